"""The work partition of a batch, made on the device: which program of `attend.py` takes which rows and keys.

Every block of BLOCK_M packed query rows walks its request's keys in tiles of BLOCK_N. The total of tiles over the
programs that run at a time gives the length of a range; a longer walk is cut into ranges of it and a shorter last one.
With `fixed_tiles` the cut depends on the request alone.
Items come longest first, and within a request the last rows first (under a causal mask they take longest). With LIGHT,
those of requests with so few rows, which wait for memory, come before all others, so that a kernel can take from both
kinds in turn; with CUT the last, shorter ranges of walks that are cut have a place of their own by their length. The
kernel reads the caller's tensors and writes the plan's buffers, among them a compact copy of the page table, so it can
be captured in a graph and replayed.
"""

# ruff: noqa: SIM102
import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
SLACK = tl.constexpr(0.07)  # of a range: what a walk may have beyond its last one without another cut
WORTH = tl.constexpr(1.3)
SORTED = tl.constexpr(512)  # requests up to which items are ordered by length; the ranking is quadratic
MOST = tl.constexpr(1 << 30)  # keys of a request


@triton.jit
def table_entry(request, ok, page_indptr, entries):
    """Where the pages of requests [BLOCK], or of one, begin in a table of so many entries (at its end for the one after
    the last)."""
    return tl.maximum(tl.minimum(tl.load(page_indptr + request, mask=ok, other=0), entries), 0)


@triton.jit
def keys_held(request, ok, kv_lens, page_indptr, page_size, entries, room):
    """Keys of requests [BLOCK], or of one; zeros where not ok, -1 for a length that cannot be: a negative one, or one
    that the request's pages do not hold. room: how many keys those hold, where that is the same for all requests; -1
    where page_indptr says it.
    """
    kv_len = tl.load(kv_lens + request, mask=ok, other=0)
    if room < 0:
        begin = table_entry(request, ok, page_indptr, entries)
        end = table_entry(request + 1, ok, page_indptr, entries)
        held = tl.minimum(tl.maximum(end - begin, 0).to(tl.int64) * page_size, MOST).to(tl.int32)
    else:
        held = kv_len * 0 + room
    return tl.where((kv_len < 0) | (kv_len > held), -1, kv_len)


@triton.jit
def request_shape(
    request, ok, q_indptr, kv_lens, page_indptr, page_size, entries, room, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(query tokens, keys, row blocks, tiles of keys) of requests [BLOCK]; zeros where not ok."""
    q_len = tl.load(q_indptr + request + 1, mask=ok, other=0) - tl.load(q_indptr + request, mask=ok, other=0)
    kv_len = keys_held(request, ok, kv_lens, page_indptr, page_size, entries, room)
    return q_len, kv_len, tl.cdiv(q_len * GROUP, BLOCK_M), tl.where(ok, tl.maximum(tl.cdiv(kv_len, BLOCK_N), 1), 0)


@triton.jit
def ranges(tiles, blocks, limit, fixed_tiles, merge_ratio, CUT: tl.constexpr):
    """Into how many ranges of how many tiles a walk of `tiles` is cut: `limit` tiles each, the last one shorter, so
    that the shorter walks fill the other programs evenly; and no more ranges than merging is worth. A walk a little
    longer than the limit is not cut for that.

    With fixed cuts only requests of one block are cut. CUT: those of the Hopper kernel, whose walks are worth cutting
    only where they are longer by WORTH: few programs at work are faster each.
    """
    limit = tl.where((fixed_tiles > 0) & (blocks > 1), 1 << 30, limit)
    worth = tl.ceil(tl.sqrt(tiles.to(tl.float32) * merge_ratio)).to(tl.int32)
    wanted = tl.ceil(tiles.to(tl.float32) / limit.to(tl.float32) - SLACK).to(tl.int32)
    if CUT:
        wanted = tl.where(tiles < limit.to(tl.float32) * WORTH, 1, wanted)
    pieces = tl.maximum(tl.minimum(wanted, worth), 1)
    size = tl.maximum(tl.cdiv(tiles, pieces), 1)
    size = tl.where(pieces > 1, tl.maximum(size, limit), size)
    return tl.maximum(tl.cdiv(tiles, size), 1), size


@triton.jit
def order(size, q_len, FEW: tl.constexpr):
    """What says which ranges come first: those of requests of few tokens, if there is such a kind, and longer ones."""
    if FEW > 0:
        size += tl.where(q_len <= FEW, 1 << 30, 0)
    return size


@triton.jit
def ahead(other_rank, count, other, there, rank, request):
    """How many items of others [32] come before those of a rank [BLOCK]: of the same rank, those of requests before."""
    before = (other_rank[None, :] > rank[:, None]) | (
        (other_rank[None, :] == rank[:, None]) & (other[None, :] < request[:, None])
    )
    return tl.sum(tl.where(before & there[None, :], count[None, :], 0), 1)


@triton.jit
def plan(
    q_indptr, kv_lens, page_indptr, table, items, pages, scratch, error,
    requests, stride, max_items, max_tokens, max_pages, page_size, entries, room, programs, min_tiles, fixed_tiles,
    merge_ratio, item_programs, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGED: tl.constexpr, LIGHT: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Grid: (item_programs + (reserved requests if PAGED),). The first write 128 items each, the others copy one
    request's page numbers.

    q_indptr, page_indptr int32 [requests + 1]; kv_lens int32 [requests]; table int32; items int32 [max_items, 16];
    scratch int32 [8, stride]; error int32 [4]: code, request, number, limit (left alone when all is well). entries: of
    the table, beyond which nothing is read whatever lengths and offsets say; room: see `keys_held`.
    merge_ratio: time of a tile over that of merging one partial state. CUT: for the Hopper kernel, walks may be cut.
    """
    lane = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    if program >= item_programs:
        request = program - item_programs
        if request < requests:
            used = tl.zeros([BLOCK], tl.int64)
            for start in range(0, request, BLOCK):
                before = start + lane
                kv_len = keys_held(before, before < request, kv_lens, page_indptr, page_size, entries, room)
                used += tl.cdiv(tl.maximum(kv_len, 0), page_size)
            offset = tl.minimum(tl.sum(used, 0), max_pages).to(tl.int32)
            kv_len = keys_held(request, True, kv_lens, page_indptr, page_size, entries, room)
            count = tl.minimum(tl.cdiv(kv_len, page_size), max_pages - offset)
            source = table + table_entry(request, True, page_indptr, entries)
            for start in range(0, count, BLOCK):
                entry = start + lane
                tl.store(
                    pages + offset + entry, tl.load(source + entry, mask=entry < count, other=0), mask=entry < count
                )
        return

    lens = (q_indptr, kv_lens, page_indptr, page_size, entries, room)
    work = tl.zeros([BLOCK], tl.int64)
    wrong = requests  # the first request with a length that cannot be
    used = tl.zeros([BLOCK], tl.int64)
    longest = 0
    for start in range(0, requests, BLOCK):
        request = start + lane
        ok = request < requests
        q_len, kv_len, blocks, tiles = request_shape(request, ok, *lens, GROUP, BLOCK_M, BLOCK_N)
        wrong = tl.minimum(wrong, tl.min(tl.where(ok & ((q_len < 0) | (kv_len < 0)), request, requests), 0))
        work += blocks.to(tl.int64) * tiles
        if CUT:
            longest = tl.maximum(longest, tl.max(tl.where(blocks > 0, tiles, 0), 0))
        used += tl.cdiv(kv_len, page_size)
    limit = tl.cdiv(tl.sum(work, 0) * KV_HEADS, programs).to(tl.int32)
    if CUT:  # programs take a second walk when they are done: halves, where few have a second one to take
        limit = tl.where((limit > longest) & (limit < 1.6 * longest), tl.cdiv(limit, 2), limit)
    limit = tl.maximum(limit, min_tiles)
    limit = tl.where(fixed_tiles > 0, fixed_tiles, limit)

    item_end = 0
    slot_end = 0
    block_end = 0
    key_end = 0
    page_end = 0
    light_end = 0
    for start in range(0, requests, BLOCK):
        request = start + lane
        ok = request < requests
        q_len, kv_len, blocks, tiles = request_shape(request, ok, *lens, GROUP, BLOCK_M, BLOCK_N)
        pieces, size = ranges(tiles, blocks, limit, fixed_tiles, merge_ratio, CUT)
        count = blocks * pieces
        split = tl.where(pieces > 1, count, 0)
        need = tl.cdiv(kv_len, page_size)
        at = scratch + request
        if CUT:
            rest = tl.where((pieces > 1) & (requests <= SORTED), blocks, 0)
            tl.store(at + stride, count - rest, mask=ok)
            tl.store(at + 7 * stride, rest, mask=ok)
        else:
            tl.store(at + stride, count, mask=ok)
        tl.store(at + 2 * stride, slot_end + tl.cumsum(split, 0) - split, mask=ok)
        tl.store(at + 3 * stride, block_end + tl.cumsum(blocks, 0) - blocks, mask=ok)
        tl.store(at + 4 * stride, key_end + tl.cumsum(kv_len, 0) - kv_len, mask=ok)
        tl.store(at + 5 * stride, page_end + tl.cumsum(need, 0) - need, mask=ok)
        if requests > SORTED:
            tl.store(at, item_end + tl.cumsum(count, 0) - count, mask=ok)
        item_end += tl.sum(count, 0)
        light_end += tl.sum(tl.where(q_len * GROUP <= LIGHT, count, 0), 0)
        slot_end += tl.sum(split, 0)
        block_end += tl.sum(blocks, 0)
        key_end += tl.sum(kv_len, 0)
        page_end += tl.sum(need, 0)
    if requests <= SORTED:
        for start in range(0, requests, BLOCK):
            request = start + lane
            ok = request < requests
            q_len, kv_len, blocks, tiles = request_shape(request, ok, *lens, GROUP, BLOCK_M, BLOCK_N)
            pieces, size = ranges(tiles, blocks, limit, fixed_tiles, merge_ratio, CUT)
            offset = tl.zeros([BLOCK], tl.int32)
            rest_offset = tl.zeros([BLOCK], tl.int32)
            for other_start in range(0, requests, 32):
                other = other_start + tl.arange(0, 32)
                there = other < requests
                _q, _kv, other_blocks, other_tiles = request_shape(other, there, *lens, GROUP, BLOCK_M, BLOCK_N)
                other_pieces, other_size = ranges(other_tiles, other_blocks, limit, fixed_tiles, merge_ratio, CUT)
                if CUT:
                    other_first = other_blocks * tl.maximum(other_pieces - 1, 1)
                    other_rest = tl.where(other_pieces > 1, other_blocks, 0)
                    rank = order(size, q_len, LIGHT // GROUP)
                    rest_rank = order(tiles - (pieces - 1) * size, q_len, LIGHT // GROUP)
                    other_rank = order(other_size, _q, LIGHT // GROUP)
                    other_rest_rank = order(other_tiles - (other_pieces - 1) * other_size, _q, LIGHT // GROUP)
                    offset += ahead(other_rank, other_first, other, there, rank, request)
                    offset += ahead(other_rest_rank, other_rest, other, there, rank, request)
                    rest_offset += ahead(other_rank, other_first, other, there, rest_rank, request + 1)
                    rest_offset += ahead(other_rest_rank, other_rest, other, there, rest_rank, request)
                else:
                    rank = order(size, q_len, LIGHT // GROUP)
                    other_rank = order(other_size, _q, LIGHT // GROUP)
                    offset += ahead(other_rank, other_blocks * other_pieces, other, there, rank, request)
            if CUT:
                tl.store(scratch + 6 * stride + request, rest_offset, mask=ok)
            tl.store(scratch + request, offset, mask=ok)

    if tl.load(q_indptr) < 0:
        wrong = 0
    code = 0
    number = item_end
    bound = max_items
    if item_end > max_items:
        code = 4
    if tl.load(q_indptr + requests) > max_tokens:
        code = 2
        number = tl.load(q_indptr + requests)
        bound = max_tokens
    if PAGED:
        if tl.sum(used, 0) > max_pages:
            code = 3
            number = tl.sum(used, 0).to(tl.int32)
            bound = max_pages
    if wrong < requests:
        number = tl.load(kv_lens + wrong)
        begin = tl.load(q_indptr + wrong)
        code = tl.where((number > 0) & (begin >= 0) & (tl.load(q_indptr + wrong + 1) >= begin), 5, 1)
    if code > 0:
        item_end = 0
        if program == 0:
            tl.store(error + 1, wrong)
            tl.store(error + 2, number)
            tl.store(error + 3, bound)
            tl.store(error, code)
    tl.debug_barrier()  # the scratch is written

    item = program * BLOCK + lane
    live = item < item_end
    owner = tl.zeros([BLOCK], tl.int32)
    for start in range(0, requests, 32):
        request = start + tl.arange(0, 32)
        ok = request < requests
        offset = tl.load(scratch + request, mask=ok, other=0)
        count = tl.load(scratch + stride + request, mask=ok, other=0)
        hit = (item[:, None] >= offset[None, :]) & (item[:, None] < (offset + count)[None, :]) & ok[None, :]
        if CUT:
            rest = tl.load(scratch + 7 * stride + request, mask=ok, other=0)
            begin = tl.load(scratch + 6 * stride + request, mask=ok, other=0)
            hit |= (item[:, None] >= begin[None, :]) & (item[:, None] < (begin + rest)[None, :]) & ok[None, :]
        owner += tl.sum(tl.where(hit, request[None, :], 0), 1)
    q_len, kv_len, blocks, tiles = request_shape(owner, live, *lens, GROUP, BLOCK_M, BLOCK_N)
    pieces, size = ranges(tiles, blocks, limit, fixed_tiles, merge_ratio, CUT)
    index = item - tl.load(scratch + owner, mask=live, other=0)
    if CUT:
        first = tl.load(scratch + stride + owner, mask=live, other=0)
        begin = tl.load(scratch + 6 * stride + owner, mask=live, other=0)
        index = tl.where((index < 0) | (index >= first), first + item - begin, index)
        blocks = tl.maximum(blocks, 1)
        block = blocks - 1 - index % blocks
        split = index // blocks
    else:
        block = blocks - 1 - index // pieces
        split = index % pieces
    low = split * size * BLOCK_N
    high = tl.minimum(low + size * BLOCK_N, kv_len)
    to = items + item.to(tl.int64) * 16
    fits = item < max_items
    tl.store(to, tl.where(live, owner, -1), mask=fits)
    tl.store(to + 1, tl.load(q_indptr + owner, mask=live, other=0), mask=fits)
    tl.store(to + 2, q_len, mask=fits)
    tl.store(to + 3, kv_len, mask=fits)
    tl.store(to + 4, tl.load(scratch + 4 * stride + owner, mask=live, other=0), mask=fits)
    tl.store(to + 5, block * BLOCK_M, mask=fits)
    tl.store(to + 6, low, mask=fits)
    tl.store(to + 7, high, mask=fits)
    if PAGED:
        tl.store(to + 8, tl.load(scratch + 5 * stride + owner, mask=live, other=0), mask=fits)
    else:
        entry = table_entry(owner, live, page_indptr, entries)
        tl.store(to + 9, tl.load(table + entry, mask=live & (kv_len > 0), other=0), mask=fits)
    tl.store(to + 10, pieces, mask=fits)
    tl.store(to + 11, split, mask=fits)
    tl.store(to + 12, tl.load(scratch + 2 * stride + owner, mask=live, other=0) + block * pieces, mask=fits)
    if LIGHT > 0:
        tl.store(to + 14, item_end, mask=fits)
        tl.store(to + 15, tl.where(requests <= SORTED, light_end, 0), mask=fits)
    tl.store(to + 13, tl.load(scratch + 3 * stride + owner, mask=live, other=0) + block, mask=fits)
