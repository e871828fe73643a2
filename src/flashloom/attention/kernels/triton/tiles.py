"""Reading keys and values: where a tile of tokens lies, and how its storage becomes numbers.

Token t of a request lies in page `pages[page_begin + t // PAGE_SIZE]`. PAGE_SIZE 0 means that the request is one run of
tokens at page
`first_page` (dense and ragged KV), so that no table is read in the loop. All offsets are 64-bit. Strides count vectors
of VEC elements, so
that the compiler knows how far rows are aligned.
"""

# ruff: noqa: RUF005
import triton
import triton.language as tl


@triton.jit
def token_pages(tile, kv_hi, pages, page_begin, first_page, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page numbers of a tile's tokens, int32 [BLOCK_N], or one number where they share a page; tokens from kv_hi on:
    0."""
    token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:
        page = first_page
    elif PAGE_SIZE % BLOCK_N == 0:  # the tile lies in one page
        start = tl.minimum(tile * BLOCK_N, kv_hi - 1)
        page = tl.load(pages + page_begin + start // PAGE_SIZE)
    elif BLOCK_N % PAGE_SIZE == 0:
        entry = pages + (page_begin + tile * (BLOCK_N // PAGE_SIZE))
        page = tl.load(entry + tl.arange(0, BLOCK_N) // PAGE_SIZE, mask=token < kv_hi, other=0)
    else:
        page = tl.load(pages + page_begin + token // PAGE_SIZE, mask=token < kv_hi, other=0)
    return page


@triton.jit
def token_offsets(tile, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, within): a tile's tokens lie at first + within in their pages, int32 [BLOCK_N]. `within` is the same for
    every tile where it can be, so that a loop need not compute it."""
    start = tile * BLOCK_N
    token = tl.arange(0, BLOCK_N)
    first = 0
    if PAGE_SIZE == 0:
        first = start
        within = token
    elif PAGE_SIZE % BLOCK_N == 0:
        first = start % PAGE_SIZE
        within = token
    elif BLOCK_N % PAGE_SIZE == 0:
        # said so that what repeats from page to page is one number for the compiler
        within = tl.reshape(
            tl.broadcast_to(tl.arange(0, PAGE_SIZE)[None, :], [BLOCK_N // PAGE_SIZE, PAGE_SIZE]), [BLOCK_N]
        )
    else:
        within = (start + token) % PAGE_SIZE
    return first, within


@triton.jit
def tile_places(
    base, page, page_step, first, within, step, VEC: tl.constexpr, PASS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(pointer, element offsets int64 [BLOCK_N]) of the rows of a tile of keys or values, strides in vectors of VEC.

    What changes from tile to tile is one number where a tile lies in one page. Rows are said in two parts, those of one
    PASS of all threads over the tile, and passes: those of a thread then differ by what all threads share, and it
    keeps one offset instead of one for each pass."""
    rows = ((within % PASS).to(tl.int64) * step + (within // PASS).to(tl.int64) * (PASS * step)) * VEC
    where = base
    if PAGE_SIZE % BLOCK_N == 0:
        where += (page * page_step + first.to(tl.int64) * step) * VEC
    else:
        rows += page * page_step * VEC
    return where, rows


@triton.jit
def stored(x, TYPE: tl.constexpr, E4M3_BITS: tl.constexpr):
    """Numbers of TYPE from what lies in the cache; E4M3_BITS marks uint8 that holds float8 e4m3 (targets without that
    type)."""
    if E4M3_BITS:
        bits = x.to(tl.uint16)
        size = bits & 0x7F
        nan = ((size + 1) & 0x80) << 7  # the bit that makes a NaN of 0x7F alone
        half = (((bits & 0x80) << 8) | (size << 7) | nan).to(tl.float16, bitcast=True)
        number = (half * 256.0).to(TYPE)  # exact, subnormals too
    else:
        number = x.to(TYPE)
    return number


@triton.jit
def apart(pairs, STORED: tl.constexpr, TYPE: tl.constexpr, E4M3_BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Numbers of TYPE from int16 that hold two 8-bit ones of type STORED each: (the lower ones, the upper ones)."""
    if ASSEMBLY:  # eight bytes with two instructions, which the compiler does not find
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;",
            "=&r,=r,r,r",
            [pairs],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = pairs.to(tl.int8), (pairs >> 8).to(tl.int8)
    low, high = low.to(STORED, bitcast=True), high.to(STORED, bitcast=True)
    return stored(low, TYPE, E4M3_BITS), stored(high, TYPE, E4M3_BITS)


@triton.jit
def load_tile(
    base, row, column, row_mask, DIM: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr, MASKED: tl.constexpr
):
    """Columns FIRST to FIRST + BLOCK (or those in `column`) of the rows at element offsets `row`; beyond the mask and
    DIM: 0."""
    where = base + row[:, None] + column[None, :]  # [rows, BLOCK]
    if FIRST + BLOCK > DIM:
        inside = (FIRST + tl.arange(0, BLOCK) < DIM)[None, :]
        if MASKED:
            inside = inside & row_mask[:, None]
        tile = tl.load(where, mask=inside, other=0.0)
    elif MASKED:
        tile = tl.load(where, mask=row_mask[:, None], other=0.0)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def load_queries(
    base, row, row_mask, head, q_pos, at, values,
    QUERY: tl.constexpr, QUERY_INDEX: tl.constexpr, QUERY_LOADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + BLOCK of the query rows at element offsets `row`, transformed where the variant does."""
    column = FIRST + tl.arange(0, BLOCK)
    if QUERY is None:
        query = load_tile(base, row, column, row_mask, DIM, BLOCK, FIRST, True)
    else:
        loads = ()
        for i in tl.static_range(QUERY_LOADS):
            loads = loads + (  # type: ignore[assignment]
                load_tile(base, row, QUERY_INDEX(i, column), row_mask, DIM, BLOCK, FIRST, True).to(tl.float32),
            )
        batch, kv_head, q_len, kv_len, q_start, kv_start = at
        query = QUERY(
            loads,
            batch,
            head[:, None],
            kv_head,
            q_pos[:, None],
            q_len,
            kv_len,
            q_start,
            kv_start,
            column[None, :],
            values,
        )
        query = query + tl.zeros([row.shape[0], BLOCK], tl.float32)
        if FIRST + BLOCK > DIM:
            query = tl.where((column < DIM)[None, :], query, 0.0)
    return query


@triton.jit
def load_keys(
    base, row, kv_pos, at, scale, values, row_mask,
    KEY: tl.constexpr, KEY_INDEX: tl.constexpr, KEY_LOADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, TYPE: tl.constexpr, E4M3_BITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys [BLOCK_N, BLOCK] as TYPE, transformed where the variant does (then already multiplied by
    `scale`)."""
    column = FIRST + tl.arange(0, BLOCK)
    if KEY is None:
        key = stored(load_tile(base, row, column, row_mask, DIM, BLOCK, FIRST, MASKED), TYPE, E4M3_BITS)
    else:
        loads = ()
        for i in tl.static_range(KEY_LOADS):
            part = load_tile(base, row, KEY_INDEX(i, column), row_mask, DIM, BLOCK, FIRST, MASKED)
            loads = loads + (stored(part, tl.float32, E4M3_BITS) * scale,)  # type: ignore[assignment]
        batch, kv_head, q_len, kv_len, q_start, kv_start = at
        made = KEY(loads, batch, kv_head, kv_pos[:, None], q_len, kv_len, q_start, kv_start, column[None, :], values)
        made = made + tl.zeros([row.shape[0], BLOCK], tl.float32)
        if FIRST + BLOCK > DIM:  # what the transform makes of columns that do not exist
            made = tl.where((column < DIM)[None, :], made, 0.0)
        key = made.to(TYPE)
    return key
