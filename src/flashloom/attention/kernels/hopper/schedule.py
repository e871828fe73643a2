"""The scheduler of the Hopper kernel: one warp that takes tiles of work and says what the other warps need to know.

A tile is an item of the plan (`kernels/triton/plan.py` writes them: a block of packed query rows of one request) for
one group of heads. Tiles come from counters in memory, so a program that is done early takes the next. There are two
kinds: items of few rows wait for memory, the others keep the tensor cores busy. In a batch of both, half of the
programs begin with one kind and half with the other, so that they overlap. Each kind comes in the plan's order, longest
first, some heads at a time where the keys of all of them would not stay in the L2 cache. The scheduler also asks the
variant which key tiles matter. Its answer goes through a small ring in shared memory, ahead of the warps that read it.
"""

from flashloom.attention.kernels.hopper.gluon import gl, jit, mbarrier

WORDS = gl.constexpr(16)  # of an item
RING_WORDS = gl.constexpr(18)  # of a tile in the ring
LIVE = gl.constexpr(0)  # 1, or 0 after the last tile
BATCH = gl.constexpr(1)
Q_START = gl.constexpr(2)
Q_LEN = gl.constexpr(3)
KV_LEN = gl.constexpr(4)
KV_START = gl.constexpr(5)
ROW = gl.constexpr(6)  # first packed row
HEAD = gl.constexpr(7)  # group of packed heads
PAGE = gl.constexpr(8)  # first entry in the page table; without one, the page
TOKEN = gl.constexpr(9)  # first token within that page
TILES = gl.constexpr(10)  # key tiles to visit
MASKED = gl.constexpr(11)  # so many of them, the first ones, need the mask
HIGH = gl.constexpr(12)  # so many of the masked ones lie above the others
END = gl.constexpr(13)  # one past the last key tile
FULL_BEGIN = gl.constexpr(14)  # the key tiles that need no mask
FULL_END = gl.constexpr(15)
SPLITS = gl.constexpr(16)  # ranges into which the rows' keys are cut, plus which of them this is times 2^16
SLOT = gl.constexpr(17)  # of the first one's partial state
LEAST = gl.constexpr(4)  # key tiles of a range, where the mask leaves few
CACHED = gl.constexpr(16 << 20)  # bytes of keys and values that are meant to stay in the L2 cache


@jit
def word(ring, turn, which: gl.constexpr, RING: gl.constexpr):
    """A word of the tile in a slot of the ring, a scalar."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(ring.index((turn % RING) * RING_WORDS + which).load(one), 0)


@jit
def put(ring, turn, which: gl.constexpr, value, RING: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    ring.index((turn % RING) * RING_WORDS + which).store(gl.full([1], value, gl.int32, one))


@jit
def key_tile(i, masked, high, end, full_begin, full_end):
    """The i-th key tile to visit: masked ones above the full run, masked ones below it, then the full run, each from
    the last key back. The tile with the end of the keys is the first, if it is visited at all."""
    below = full_begin - 1 - (i - high)
    full = full_end - 1 - (i - masked)
    return gl.where(i < high, end - 1 - i, gl.where(i < masked, below, full))


@jit
def kept_range(
    last, q_pos_lo, q_pos_hi, head_lo, head_hi, kv_head, batch, q_len, kv_len, q_start, kv_start, values,
    BOUNDS: gl.constexpr, WHOLE: gl.constexpr, BLOCK_N: gl.constexpr, SCAN: gl.constexpr,
):  # fmt: skip
    """Of the key tiles 0 to last: (begin, end) of those with any key kept, and (full_begin, full_end), a run of tiles
    that need no mask. SCAN tiles are judged at a time; WHOLE: all together before, where that is cheap."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    begin = 0
    end = last
    full_begin = 0
    full_end = kv_len // BLOCK_N
    if BOUNDS is not None:
        all_kept = False
        if WHOLE:
            all_kept, _ = BOUNDS(
                batch, kv_head, head_lo, head_hi, q_pos_lo, q_pos_hi, 0, kv_len - 1, q_len, kv_len, q_start, kv_start,
                values,
            )  # fmt: skip
        if not all_kept:
            begin = last
            end = 0
            full_begin = last
            full_end = last
            for first in range(0, last, SCAN):
                tile = first + gl.arange(0, SCAN, layout)
                low = tile * BLOCK_N
                full, some = BOUNDS(
                    batch, kv_head, head_lo, head_hi, q_pos_lo, q_pos_hi, low, gl.minimum(low + BLOCK_N, kv_len) - 1,
                    q_len, kv_len, q_start, kv_start, values,
                )  # fmt: skip
                some = some & (tile < last)
                full = full & (low + BLOCK_N <= kv_len)
                begin = gl.minimum(begin, gl.min(gl.where(some, tile, last), 0))
                end = gl.maximum(end, gl.max(gl.where(some, tile + 1, 0), 0))
                full_begin = gl.minimum(full_begin, gl.min(gl.where(full, tile, last), 0))
                full_end = gl.minimum(full_end, gl.min(gl.where((tile > full_begin) & (full == 0), tile, last), 0))
            end = gl.maximum(begin, end)
            full_begin = gl.minimum(full_begin, end)
            full_end = gl.maximum(gl.minimum(full_end, end), full_begin)
    return begin, end, full_begin, full_end


@jit
def own_range(item, splits, split, begin, end, last, BLOCK_N: gl.constexpr):
    """Of the key tiles begin to end that the mask leaves, out of `last`: (into how many ranges they are cut, begin and
    end of this item's). The plan, which knows no mask, cut all of them into `splits`: where the mask leaves most,
    ranges are as long as the plan's, and those beyond the end are left out; elsewhere they are alike."""
    low = gl.load(item + 6)
    size = gl.where(split + 1 < splits, gl.load(item + 7) - low, low // gl.maximum(split, 1)) // BLOCK_N
    visited = end - begin
    if visited * 2 < last:
        size = gl.maximum((visited + splits - 1) // splits, LEAST)
    begin += gl.minimum(split * size, visited)
    return gl.maximum((visited + size - 1) // size, 1), begin, gl.minimum(begin + size, end)


@jit
def take(counter, kind, both, programs, light, heavy, HEADS: gl.constexpr):
    """(the next tile of a kind, how many there are); the first ones went to the programs that began with it."""
    begun = gl.where(both, (programs + 1 - kind) // 2, programs)
    return gl.atomic_add(counter + kind, 1) + begun, gl.where(kind > 0, light, heavy) * HEADS


@jit
def place(tile, count, together, HEADS: gl.constexpr, LAST: gl.constexpr):
    """(item, group of heads) of a tile. `together` groups of heads walk through the items before the next ones do; but
    the last one in LAST of the items, short ones where tiles differ, come at the end, for all heads: they fill up."""
    first = count // HEADS
    if LAST > 0:
        first -= first // LAST
    rounds = gl.maximum(first * together, 1)
    begin = tile // rounds * together
    wide = gl.maximum(gl.minimum(together, HEADS - begin), 1)
    within = tile % rounds
    rest = tile - first * HEADS
    item = gl.where(rest < 0, within // wide, first + rest // HEADS)
    return item, gl.where(rest < 0, begin + within % wide, rest % HEADS)


@jit
def scheduler(
    items, counter, ring, ring_full, ring_empty, ragged, values,
    BOUNDS: gl.constexpr, WHOLE: gl.constexpr, SCAN: gl.constexpr, HEADS: gl.constexpr, PACK: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PAGED: gl.constexpr, RING: gl.constexpr,
    KEY_BYTES: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Take tiles until there are none, those of many rows in the order of `place`, of few rows all groups of heads of
    an item, then the next item. counter int32 [3], zero before and after: tiles taken of many and of few rows, programs
    done. KEY_BYTES: of a key and a value. CUT: items may be one of several ranges of keys."""
    light = gl.load(items + 15)
    heavy = gl.load(items + 14) - light
    LAST: gl.constexpr = 0 if BOUNDS is None else 2
    FIT: gl.constexpr = CACHED // KEY_BYTES
    longest = gl.maximum(gl.load(items + light.to(gl.int64) * WORDS + 3, mask=heavy > 0, other=0), 1)
    together = gl.minimum(gl.maximum(FIT // longest, 1) * (GROUP // PACK), HEADS)
    if CUT:  # then all programs are at work on few walks, and the longest ranges are to begin first
        cut = gl.load(items + light.to(gl.int64) * WORDS + 10, mask=heavy > 0, other=1) > 1
        together = gl.where(cut, HEADS, together)
    programs = gl.num_programs(0)
    both = (light > 0) & (heavy > 0)
    few = gl.where(both, gl.program_id(0) % 2, (light > 0).to(gl.int32))  # 1: begin with items of few rows
    kind = few
    tile = gl.where(both, gl.program_id(0) // 2, gl.program_id(0))
    turn = 0
    count = gl.where(kind > 0, light, heavy) * HEADS
    if tile >= count:
        kind = 1 - few
        tile, count = take(counter, kind, both, programs, light, heavy, HEADS)
    while tile < count:
        if kind > 0:  # nobody shares their keys
            index, head = place(tile, count, HEADS, HEADS, 0)
        else:
            index, head = place(tile, count, together, HEADS, LAST)
            index += light
        item = items + index.to(gl.int64) * WORDS
        batch = gl.load(item)
        q_start = gl.load(item + 1)
        q_len = gl.load(item + 2)
        kv_len = gl.load(item + 3)
        kv_start = gl.load(item + 4)
        row = gl.load(item + 5)
        page = gl.load(item + 8)
        token = 0
        if not PAGED:
            first = gl.load(item + 9)
            page = gl.where(ragged > 0, 0, first)
            token = gl.where(ragged > 0, first, 0)
        rows = gl.minimum(q_len * PACK - row, BLOCK_M)
        q_pos = kv_len - q_len + row // PACK
        begin, end, full_begin, full_end = kept_range(
            (kv_len + BLOCK_N - 1) // BLOCK_N, q_pos, kv_len - q_len + (row + rows - 1) // PACK, head * PACK,
            head * PACK + PACK - 1, head * PACK // GROUP, batch, q_len, kv_len, q_start, kv_start, values, BOUNDS,
            WHOLE, BLOCK_N, SCAN,
        )  # fmt: skip
        splits = 1
        split = 0
        if CUT:
            splits = gl.load(item + 10)
            split = gl.load(item + 11)
            if splits > 1:
                last = (kv_len + BLOCK_N - 1) // BLOCK_N
                splits, begin, end = own_range(item, splits, split, begin, end, last, BLOCK_N)
                full_begin = gl.minimum(gl.maximum(full_begin, begin), end)
                full_end = gl.maximum(gl.minimum(full_end, end), full_begin)
        if split < splits:
            mbarrier.wait(ring_empty.index(turn % RING), ((turn // RING) & 1) ^ 1)
            put(ring, turn, LIVE, 1, RING)
            put(ring, turn, BATCH, batch, RING)
            put(ring, turn, Q_START, q_start, RING)
            put(ring, turn, Q_LEN, q_len, RING)
            put(ring, turn, KV_LEN, kv_len, RING)
            put(ring, turn, KV_START, kv_start, RING)
            put(ring, turn, ROW, row, RING)
            put(ring, turn, HEAD, head, RING)
            put(ring, turn, PAGE, page, RING)
            put(ring, turn, TOKEN, token, RING)
            put(ring, turn, TILES, end - begin, RING)
            put(ring, turn, MASKED, end - begin - (full_end - full_begin), RING)
            put(ring, turn, HIGH, end - full_end, RING)
            put(ring, turn, END, end, RING)
            put(ring, turn, FULL_BEGIN, full_begin, RING)
            put(ring, turn, FULL_END, full_end, RING)
            if CUT:
                put(ring, turn, SPLITS, splits | (split << 16), RING)
                put(ring, turn, SLOT, gl.load(item + 12), RING)
            mbarrier.arrive(ring_full.index(turn % RING), count=1)
            turn += 1
        if CUT:  # not before the producer of keys is done with this tile: another program may be done earlier
            mbarrier.wait(ring_empty.index(turn % RING), ((turn // RING) & 1) ^ 1)
        tile, count = take(counter, kind, both, programs, light, heavy, HEADS)
        if (tile >= count) & (kind == few):
            kind = 1 - few
            tile, count = take(counter, kind, both, programs, light, heavy, HEADS)
    mbarrier.wait(ring_empty.index(turn % RING), ((turn // RING) & 1) ^ 1)
    put(ring, turn, LIVE, 0, RING)
    mbarrier.arrive(ring_full.index(turn % RING), count=1)
    if gl.atomic_add(counter + 2, 1) == programs - 1:  # the last program leaves the counters at zero
        gl.store(counter, 0)
        gl.store(counter + 1, 0)
        gl.store(counter + 2, 0)
