"""Attention over paged, ragged or dense KV: decode, prefill, append and any mix of them, one launch.

A program takes one work item (`plan.py` writes them): a block of packed query rows of one request (query token * GROUP
+ head, so that the
heads of a group share every key they read) against a range of its keys, for one kv head. Where a block's keys are
split over several items, each leaves a partial state, and the last of them to arrive combines them in order and
stores the result. So a run is one launch, and its
result does not depend on who was last.

Scores are kept so that one multiply-add gives the exponent of 2: exp2(s * c - m * c), with c = scale * log2(e).
Quantised keys are multiplied
in float16, in which every value of theirs is exact; the query rows are brought into its range by a factor per row.
"""

# ruff: noqa: SIM102
import triton
import triton.language as tl
from flashloom.attention.kernels.triton.exact import any_odd, exact_row, odd_rows
from flashloom.attention.kernels.triton.finish import combine, finish
from flashloom.attention.kernels.triton.tiles import (
    apart,
    load_keys,
    load_queries,
    load_tile,
    stored,
    tile_places,
    token_offsets,
    token_pages,
)

ITEM_WORDS = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def unknown_zeros(flags, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros, each computed, so that a compiler cannot tell. Zeros that it knows it writes where a loop is left out.
    There the assembler takes them for writes to accumulators of products under way, and Hopper's kernel then waits for
    every single product (its message C7515)."""
    numbers = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return (numbers & (flags >> 8)).to(tl.float32, bitcast=True)


@triton.jit
def kept_range(
    first, last, kv_hi, q_pos_lo, q_pos_hi, at, values,
    BOUNDS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Of the tiles first to last: (begin, end) of those with any key kept, and (full_begin, full_end), a run that needs
    no mask."""
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    head_lo, head_hi = kv_head * GROUP, kv_head * GROUP + GROUP - 1
    begin, end = first, last
    full_begin, full_end = first, kv_hi // BLOCK_N
    all_kept, _ = BOUNDS(
        batch, kv_head, head_lo, head_hi, q_pos_lo, q_pos_hi, first * BLOCK_N, kv_hi - 1, q_len, kv_len, q_start,
        kv_start, values
    )  # fmt: skip
    if not all_kept:
        begin, end = last, first
        full_begin, full_end = last, last
        if SCAN == 0:  # the verdict reads tensors: tile by tile
            for tile in range(first, last):
                low = tile * BLOCK_N
                high = tl.minimum(low + BLOCK_N, kv_hi)
                full, some = BOUNDS(
                    batch, kv_head, head_lo, head_hi, q_pos_lo, q_pos_hi, low, high - 1, q_len, kv_len, q_start,
                    kv_start, values
                )  # fmt: skip
                begin = tl.where(some, tl.minimum(begin, tile), begin)
                end = tl.where(some, tile + 1, end)
                whole = full & (high - low == BLOCK_N)
                full_begin = tl.where(whole, tl.minimum(full_begin, tile), full_begin)
                full_end = tl.where((tile > full_begin) & (whole == 0), tl.minimum(full_end, tile), full_end)
        else:
            for group in range(first, last, SCAN):
                tile = group + tl.arange(0, SCAN)
                low = tile * BLOCK_N
                full, some = BOUNDS(
                    batch, kv_head, head_lo, head_hi, q_pos_lo, q_pos_hi, low, tl.minimum(low + BLOCK_N, kv_hi) - 1,
                    q_len, kv_len, q_start, kv_start, values,
                )  # fmt: skip
                some = some & (tile < last)
                full = full & (low + BLOCK_N <= kv_hi)
                begin = tl.minimum(begin, tl.min(tl.where(some, tile, last), 0))
                end = tl.maximum(end, tl.max(tl.where(some, tile + 1, first), 0))
                full_begin = tl.minimum(full_begin, tl.min(tl.where(full, tile, last), 0))
                full_end = tl.minimum(full_end, tl.min(tl.where((tile > full_begin) & (full == 0), tile, last), 0))
        end = tl.maximum(begin, end)
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.maximum(tl.minimum(full_end, end), full_begin)
    return begin, end, full_begin, full_end


@triton.jit
def attend_tiles(
    first, last, skip_at, skip, known_tile, known_page, acc0, acc1, top, total, q0, q1, c, scale, q_head, q_pos,
    kv_hi, k, v, k_scale, v_scale, pages, page_begin, first_page, k_page, k_token, v_page, v_token, k_scale_page,
    v_scale_page, at, values, visited,
    KEY: tl.constexpr, KEY_INDEX: tl.constexpr, KEY_LOADS: tl.constexpr, LOGITS: tl.constexpr, MASK: tl.constexpr,
    SOFTMAX: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, VEC_K: tl.constexpr,
    VEC_V: tl.constexpr, QK_TYPE: tl.constexpr, PV_TYPE: tl.constexpr, PRECISION: tl.constexpr, K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr, E4M3_BITS: tl.constexpr, LATENT: tl.constexpr, RAW: tl.constexpr, MASKED: tl.constexpr,
    STORED: tl.constexpr,
    LISTED: tl.constexpr, SPREAD: tl.constexpr, PASS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Go over tiles first to last of keys (from skip_at on, `skip` further; or, LISTED, those that `visited` has at
    these places) and update the state of the online softmax. known_page: `token_pages` of known_tile; SPREAD: `total`
    is a number per key of a tile."""
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    tile = first
    if LISTED:
        tile = tl.load(visited + first)
    elif MASKED:
        tile = first + tl.where(first >= skip_at, skip, 0)
    upcoming = tile
    next_page = known_page
    if tile != known_tile:
        next_page = token_pages(tile, kv_hi, pages, page_begin, first_page, PAGE_SIZE, BLOCK_N)
    for index in range(first, last):
        tile = index
        following = index + 1
        if LISTED:
            tile = upcoming
            following = tl.load(visited + index + 1)  # there is one place more than tiles
            upcoming = following
        elif MASKED:
            tile = index + tl.where(index >= skip_at, skip, 0)
            following = index + 1 + tl.where(index + 1 >= skip_at, skip, 0)
        kv_pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live = kv_pos < kv_hi
        page = next_page.to(tl.int64)
        next_page = token_pages(
            following, kv_hi, pages, page_begin, first_page, PAGE_SIZE, BLOCK_N
        )  # a step ahead, so that no load waits for it
        first_token, within = token_offsets(tile, PAGE_SIZE, BLOCK_N)
        k_tile, k_row = tile_places(k, page, k_page, first_token, within, k_token, VEC_K, PASS, PAGE_SIZE, BLOCK_N)
        key_scale = scale
        if K_SCALE == 2:
            k_factor = tl.load(k_scale + (page + tl.zeros([BLOCK_N], tl.int64)) * k_scale_page)
            key_scale = k_factor[:, None]
        key0 = load_keys(
            k_tile, k_row, kv_pos, at, key_scale, values, live, KEY, KEY_INDEX, KEY_LOADS, DIM, D0, 0, QK_TYPE,
            E4M3_BITS, MASKED
        )  # fmt: skip  # [BLOCK_N, D0]
        s = tl.dot(q0, tl.trans(key0), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if D1 > 0:
            key1 = load_keys(
                k_tile, k_row, kv_pos, at, key_scale, values, live, KEY, KEY_INDEX, KEY_LOADS, DIM, D1, D0, QK_TYPE,
                E4M3_BITS, MASKED
            )  # fmt: skip
            s = tl.dot(q1, tl.trans(key1), s, input_precision=PRECISION)
        if not RAW:
            s = s * c[:, None]
            if K_SCALE == 2 and KEY is None:
                s = s * k_factor[None, :]
        if LOGITS is not None:
            s = LOGITS(
                s, batch, q_head[:, None], kv_head, q_pos[:, None], kv_pos[None, :], q_len, kv_len, q_start, kv_start,
                values
            ) + tl.zeros_like(s)  # fmt: skip
        if MASKED:
            keep = live[None, :]
            if MASK is not None:
                keep = keep & MASK(
                    batch,
                    q_head[:, None],
                    kv_head,
                    q_pos[:, None],
                    kv_pos[None, :],
                    q_len,
                    kv_len,
                    q_start,
                    kv_start,
                    values,
                )
            s = tl.where(keep, s, float("-inf") if SOFTMAX else 0.0)
        if SOFTMAX:
            new_top = tl.maximum(top, tl.max(s, 1))
            base = new_top
            if MASKED or LOGITS is not None:
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
            if RAW:
                base = base * c
                p = tl.exp2(s * c[:, None] - base[:, None])
                rescale = tl.exp2(top * c - base)
            else:
                p = tl.exp2((s - base[:, None]) * LOG2E)
                rescale = tl.exp2((top - base) * LOG2E)
            top = new_top
            if SPREAD:  # summed at the end, since a sum over a row takes all warps and three barriers
                total = total * rescale[:, None] + p
            else:
                total = total * rescale + tl.sum(p, 1)
            acc0 = acc0 * rescale[:, None]
            if V1 > 0 or PAIRS:
                acc1 = acc1 * rescale[:, None]
        else:
            p = s
        if LATENT:
            value0 = key0
        elif PAIRS:
            v_tile, v_row = tile_places(
                v, page, v_page, first_token, within, v_token, VEC_V // 2, PASS, PAGE_SIZE, BLOCK_N
            )
            both = load_tile(v_tile, v_row, tl.arange(0, V0 // 2), live, VALUE_DIM // 2, V0 // 2, 0, MASKED)
            value0, value1 = apart(both, STORED, PV_TYPE, E4M3_BITS, PAIRS == 2)
        else:
            v_tile, v_row = tile_places(v, page, v_page, first_token, within, v_token, VEC_V, PASS, PAGE_SIZE, BLOCK_N)
            value0 = stored(
                load_tile(v_tile, v_row, tl.arange(0, V0), live, VALUE_DIM, V0, 0, MASKED), PV_TYPE, E4M3_BITS
            )
        if V_SCALE == 2:
            v_place = v_scale + (page + tl.zeros([BLOCK_N], tl.int64)) * v_scale_page
            v_factor = tl.load(v_place, mask=live, other=0.0) if MASKED else tl.load(v_place)
            p = p * v_factor[None, :]
        p = p.to(PV_TYPE)
        acc0 = tl.dot(p, value0, acc0, input_precision=PRECISION)  # [BLOCK_M, V0]
        if PAIRS:
            acc1 = tl.dot(p, value1, acc1, input_precision=PRECISION)
        elif V1 > 0:
            value1 = stored(
                load_tile(v_tile, v_row, V0 + tl.arange(0, V1), live, VALUE_DIM, V1, V0, MASKED), PV_TYPE, E4M3_BITS
            )
            acc1 = tl.dot(p, value1, acc1, input_precision=PRECISION)
    return acc0, acc1, top, total


@triton.jit
def attend(
    q, k, v, out, lse, k_scale, v_scale, items, pages, part_out, part_lse, arrivals,
    q_request, q_token, q_head_step, k_page, k_token, k_head, v_page, v_token, v_head, out_request, out_token, out_head,
    lse_request, lse_token, lse_head, k_scale_page, k_scale_head, v_scale_page, v_scale_head, sm_scale, flags, values,
    QUERY: tl.constexpr, QUERY_INDEX: tl.constexpr, QUERY_LOADS: tl.constexpr, KEY: tl.constexpr, KEY_INDEX:
    tl.constexpr, KEY_LOADS: tl.constexpr, LOGITS: tl.constexpr, MASK: tl.constexpr, BOUNDS: tl.constexpr, OUTPUT:
    tl.constexpr, SOFTMAX: tl.constexpr, SCAN: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM:
    tl.constexpr, VALUE_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_SPLITS:
    tl.constexpr, VEC_Q: tl.constexpr, VEC_K: tl.constexpr, VEC_V: tl.constexpr, VEC_OUT: tl.constexpr,
    QK_TYPE: tl.constexpr, PV_TYPE: tl.constexpr, PRECISION: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    E4M3_BITS: tl.constexpr, Q_FACTOR: tl.constexpr, LATENT: tl.constexpr, NEGATIVE: tl.constexpr,
    ONE_LOOP: tl.constexpr, PARTS: tl.constexpr, LISTS: tl.constexpr, SPREAD: tl.constexpr, PASS: tl.constexpr,
    PAIRS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One work item for one kv head, or one of its PARTS blocks of rows. Grid: (items * PARTS * KV_HEADS,).

    q, out [tokens, KV_HEADS * GROUP, DIM | VALUE_DIM]; k, v [pages, PAGE_SIZE, KV_HEADS, ...]; lse float32 [tokens,
    heads]; inner strides 1,
    the others in vectors of VEC_*. `*_request`: how much further the rows of each request begin than where those of the
    one before it end, 0 where tokens follow each other through the batch. K_SCALE, V_SCALE: 0 none, 1 per kv head
    (strides 0 for one number), 2 per page and kv head.
    items int32 [*, 16]; part_out float32 [slots, KV_HEADS, PARTS * BLOCK_M, VALUE_DIM]; part_lse without the last;
    arrivals int32 [tiles, PARTS, KV_HEADS], zero before and after. flags: bit 0 store lse, bit 1 partial. NEGATIVE:
    sm_scale is. SPREAD: row sums are kept by key of a tile. PASS: rows of a tile that all threads copy at a time.
    PAIRS: 8-bit values are read as int16, two columns each, and taken apart in registers (2: by assembly); until the
    end acc0 has the even columns and acc1 the odd ones.
    EXACT: rows that come out as NaN are computed once more, from the keys that they see alone.
    LISTS: where in `values` the two lists of visited tiles begin (`triton_blocks.LISTS`), or None.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(0) // KV_HEADS % PARTS
    item = items + (tl.program_id(0) // (KV_HEADS * PARTS)).to(tl.int64) * ITEM_WORDS
    batch = tl.load(item)
    q_start = tl.load(item + 1)
    q_len = tl.load(item + 2)
    kv_len = tl.load(item + 3)
    kv_start = tl.load(item + 4)
    row_start = tl.load(item + 5) + part * BLOCK_M
    kv_lo = tl.load(item + 6)
    kv_hi = tl.load(item + 7)
    page_begin = tl.load(item + 8)
    first_page = tl.load(item + 9)
    splits = tl.load(item + 10)
    split = tl.load(item + 11)
    slot = tl.load(item + 12).to(tl.int64) * KV_HEADS + kv_head
    arrival = (tl.load(item + 13).to(tl.int64) * PARTS + part) * KV_HEADS + kv_head
    if batch | page_begin < 0:  # page_begin never is, but so both halves of the item are on their way
        return
    if PARTS > 1:
        if row_start >= q_len * GROUP:
            return

    known_tile = kv_lo // BLOCK_N  # its pages are asked for at once, beside the queries
    known_page = token_pages(known_tile, kv_hi, pages, page_begin, first_page, PAGE_SIZE, BLOCK_N)
    RAW: tl.constexpr = SOFTMAX and LOGITS is None and not NEGATIVE and (K_SCALE != 2 or KEY is not None)
    at = (batch, kv_head, q_len, kv_len, q_start, kv_start)
    rows = tl.minimum(q_len * GROUP - row_start, BLOCK_M)
    local = tl.arange(0, BLOCK_M)
    row = row_start + tl.minimum(
        local, rows - 1
    )  # rows beyond the last repeat it, so that hooks see positions that exist
    token = row // GROUP
    q_head = kv_head * GROUP + row % GROUP
    q_pos = kv_len - q_len + token
    row_mask = local < rows

    wide_head = kv_head.to(tl.int64)  # strides may have 32 bits, offsets may not
    out_request = out_request.to(tl.int64) * VEC_OUT
    out_token = out_token.to(tl.int64) * VEC_OUT
    out_head = out_head.to(tl.int64) * VEC_OUT
    scale = 1.0
    if K_SCALE == 1:
        scale = tl.load(k_scale + wide_head * k_scale_head)
    if V_SCALE == 1:
        v_factor = tl.load(v_scale + wide_head * v_scale_head)  # used at the end: no wait there
    k_scale += wide_head * k_scale_head
    v_scale += wide_head * v_scale_head
    k += (wide_head * k_head) * VEC_K
    v += (wide_head * v_head) * VEC_V
    q_row = (
        batch.to(tl.int64) * q_request + (q_start + token).to(tl.int64) * q_token + q_head.to(tl.int64) * q_head_step
    ) * VEC_Q
    q0 = load_queries(
        q, q_row, row_mask, q_head, q_pos, at, values, QUERY, QUERY_INDEX, QUERY_LOADS, DIM, D0, 0
    )  # [BLOCK_M, D0]
    q1 = q0
    if D1 > 0:
        q1 = load_queries(q, q_row, row_mask, q_head, q_pos, at, values, QUERY, QUERY_INDEX, QUERY_LOADS, DIM, D1, D0)
    factor = sm_scale
    if K_SCALE == 1 and KEY is None:
        factor = sm_scale * scale
    c = tl.zeros([BLOCK_M], tl.float32) + factor
    if Q_FACTOR:  # keep float16 in range: the largest element of a row becomes 1
        size = tl.max(tl.abs(q0.to(tl.float32)), 1)
        if D1 > 0:
            size = tl.maximum(size, tl.max(tl.abs(q1.to(tl.float32)), 1))
        size = tl.where(size > 0.0, size, 1.0)
        q0 = q0.to(tl.float32) / size[:, None]
        if D1 > 0:
            q1 = q1.to(tl.float32) / size[:, None]
        c = c * size
    if RAW:
        c = tl.maximum(c * LOG2E, 1e-37)  # 0 must not meet -inf
    q0 = q0.to(QK_TYPE)
    if D1 > 0:
        q1 = q1.to(QK_TYPE)

    STORED: tl.constexpr = v.dtype.element_ty
    own_values = v
    if PAIRS:
        v = v.to(tl.pointer_type(tl.int16), bitcast=True)
    first, last = kv_lo // BLOCK_N, tl.cdiv(kv_hi, BLOCK_N)
    full_begin, full_end = first, kv_hi // BLOCK_N
    if BOUNDS is not None:
        if kv_hi > kv_lo:
            q_pos_lo = kv_len - q_len + row_start // GROUP
            q_pos_hi = kv_len - q_len + (row_start + rows - 1) // GROUP
            first, last, full_begin, full_end = kept_range(
                first, last, kv_hi, q_pos_lo, q_pos_hi, at, values, BOUNDS, GROUP, BLOCK_N, SCAN
            )  # fmt: skip

    acc0 = tl.zeros([BLOCK_M, V0 // 2 if PAIRS else V0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, V0 // 2 if PAIRS else 32 if V1 == 0 else V1], tl.float32)
    if BOUNDS is not None and BLOCK_M >= 64:
        acc0 = unknown_zeros(flags, BLOCK_M, V0)
        if V1 > 0:
            acc1 = unknown_zeros(flags, BLOCK_M, V1)
    top = tl.zeros([BLOCK_M], tl.float32) + float("-inf")
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if SPREAD else tl.zeros([BLOCK_M], tl.float32)
    visited = pages  # not read
    if LISTS is not None:  # from here on numbers of visited tiles, not of tiles
        block = tl.load(item + 13).to(tl.int64)
        before = values[LISTS] + block * values[LISTS + 3]
        visited = values[LISTS + 5] + block * values[LISTS + 8]
        first = tl.load(before + first)
        last = tl.load(before + last)
    if ONE_LOOP:  # few rows: masks cost little, and half the code is half the instructions to fetch
        full_begin = last
        full_end = last
    else:
        acc0, acc1, top, total = attend_tiles(
            full_begin, full_end, 0, 0, known_tile, known_page, acc0, acc1, top, total, q0, q1, c, scale, q_head,
            q_pos, kv_hi, k, v, k_scale, v_scale, pages, page_begin, first_page, k_page, k_token, v_page, v_token,
            k_scale_page, v_scale_page, at, values, visited, KEY, KEY_INDEX, KEY_LOADS, LOGITS, MASK, SOFTMAX, DIM,
            VALUE_DIM, D0, D1, V0, V1,
            PAGE_SIZE, BLOCK_N, VEC_K, VEC_V, QK_TYPE, PV_TYPE, PRECISION, K_SCALE, V_SCALE, E4M3_BITS, LATENT, RAW,
            False, STORED, False, SPREAD, PASS, PAIRS,
        )  # fmt: skip
    acc0, acc1, top, total = attend_tiles(  # before and after the full tiles
        first, last - (full_end - full_begin), full_begin, full_end - full_begin, known_tile, known_page, acc0,
        acc1, top, total, q0, q1, c, scale, q_head, q_pos, kv_hi, k, v, k_scale, v_scale, pages, page_begin,
        first_page, k_page, k_token, v_page, v_token, k_scale_page, v_scale_page, at, values, visited, KEY, KEY_INDEX,
        KEY_LOADS, LOGITS, MASK, SOFTMAX, DIM,
        VALUE_DIM, D0, D1, V0, V1, PAGE_SIZE, BLOCK_N, VEC_K, VEC_V, QK_TYPE, PV_TYPE, PRECISION, K_SCALE, V_SCALE,
        E4M3_BITS, LATENT, RAW, True, STORED, LISTS is not None, SPREAD, PASS, PAIRS,
    )  # fmt: skip

    if PAIRS:
        acc0 = tl.reshape(tl.join(acc0, acc1), [BLOCK_M, V0])
    state = top
    if SOFTMAX:
        if SPREAD:
            total = tl.sum(total, 1)
        whole = tl.where(total == 0.0, 1.0, total)
        acc0 = acc0 / whole[:, None]
        if V1 > 0:
            acc1 = acc1 / whole[:, None]
        state = tl.where(total == 0.0, float("-inf"), (top * c if RAW else top * LOG2E) + tl.log2(whole))
    if V_SCALE == 1:
        acc0 = acc0 * v_factor
        if V1 > 0:
            acc1 = acc1 * v_factor

    wrong = tl.zeros([BLOCK_M], tl.int32)  # rows that came out as NaN, and whether there is one
    some_wrong = 0
    if splits == 1:
        finish(
            acc0, state * LN2, row, row_mask, out, lse, at, out_request, out_token, out_head, lse_request, lse_token,
            lse_head, flags, values, OUTPUT, SOFTMAX, GROUP, VALUE_DIM, V0, 0,
        )  # fmt: skip
        if V1 > 0:
            finish(
                acc1, state * LN2, row, row_mask, out, lse, at, out_request, out_token, out_head, lse_request,
                lse_token, lse_head, flags, values, OUTPUT, SOFTMAX, GROUP, VALUE_DIM, V1, V0,
            )  # fmt: skip
        if EXACT:
            some_wrong = any_odd(acc0, acc1, V1 > 0)
            if some_wrong > 0:
                wrong = odd_rows(acc0, acc1, V1 > 0)
    else:
        mine = (slot + split * KV_HEADS) * (BLOCK_M * PARTS) + part * BLOCK_M + local  # int64 [BLOCK_M]
        column = tl.arange(0, V0)
        tl.store(
            part_out + mine[:, None] * VALUE_DIM + column[None, :],
            acc0,
            mask=row_mask[:, None] & (column < VALUE_DIM)[None, :],
        )
        if V1 > 0:
            column1 = V0 + tl.arange(0, V1)
            tl.store(
                part_out + mine[:, None] * VALUE_DIM + column1[None, :],
                acc1,
                mask=row_mask[:, None] & (column1 < VALUE_DIM)[None, :],
            )
        if SOFTMAX:
            tl.store(part_lse + mine, state, mask=row_mask)
        tl.debug_barrier()  # every thread's partial state is written before one of them says so
        arrived = tl.atomic_add(arrivals + arrival, 1, sem="acq_rel", scope="gpu")
        merging = 0
        if arrived == splits - 1:
            tl.store(arrivals + arrival, 0)
            merging = rows
        for start in range(0, merging, MERGE_ROWS):
            some = start + tl.arange(0, MERGE_ROWS)
            ok = some < rows
            whole_row = row_start + tl.minimum(some, rows - 1)
            merged, level = combine(
                part_out, part_lse, slot, splits, part * BLOCK_M + some, ok, SOFTMAX, BLOCK_M * PARTS, VALUE_DIM, V0,
                0, KV_HEADS, MERGE_ROWS, MERGE_SPLITS,
            )  # fmt: skip
            finish(
                merged, level * LN2, whole_row, ok, out, lse, at, out_request, out_token, out_head, lse_request,
                lse_token, lse_head, flags, values, OUTPUT, SOFTMAX, GROUP, VALUE_DIM, V0, 0,
            )  # fmt: skip
            merged1 = merged
            if V1 > 0:
                merged1, level1 = combine(
                    part_out, part_lse, slot, splits, part * BLOCK_M + some, ok, SOFTMAX, BLOCK_M * PARTS, VALUE_DIM,
                    V1, V0, KV_HEADS, MERGE_ROWS, MERGE_SPLITS,
                )  # fmt: skip
                finish(
                    merged1, level1 * LN2, whole_row, ok, out, lse, at, out_request, out_token, out_head, lse_request,
                    lse_token, lse_head, flags, values, OUTPUT, SOFTMAX, GROUP, VALUE_DIM, V1, V0,
                )  # fmt: skip
            if EXACT:
                if any_odd(merged, merged1, V1 > 0) > 0:
                    some_wrong = 1
                    odd = odd_rows(merged, merged1, V1 > 0)
                    mark = tl.where(local[:, None] == some[None, :], odd[None, :], 0)
                    wrong = tl.maximum(wrong, tl.max(mark, 1))

    if EXACT:
        if some_wrong > 0:
            tl.debug_barrier()  # the rows have been written
            v_factor_now = 1.0
            if V_SCALE == 1:
                v_factor_now = v_factor
            for n in range(rows):
                if tl.max(tl.where(local == n, wrong, 0), 0) > 0:
                    exact_row(
                        row_start + n, q, k, own_values, out, lse, k_scale, v_scale, pages, page_begin, first_page,
                        q_request, q_token, q_head_step, k_page, k_token, v_page, v_token, out_request, out_token,
                        out_head, lse_request, lse_token, lse_head, k_scale_page, v_scale_page, factor, scale,
                        v_factor_now, flags, at, values, QUERY, QUERY_INDEX, QUERY_LOADS, KEY, KEY_INDEX, KEY_LOADS,
                        LOGITS, MASK, OUTPUT, SOFTMAX, GROUP, DIM, VALUE_DIM, D0, D1, V0, V1, PAGE_SIZE,
                        16, VEC_Q, VEC_K, VEC_V, K_SCALE, V_SCALE, E4M3_BITS,
                    )  # fmt: skip
