"""The producer of the Hopper kernel for pages that no tensor map's box divides: warps that copy keys and values row by
row, where others let the tensor memory accelerator do it.

Every thread asks for the page of one row of a tile, one tile ahead, and turns it into an address; those that copy the
row, 128 bytes side by side at a time, get it from there. Keys come one tile before the values that belong to them, as
consumers need them. What threads copied must become visible to the tensor cores before anybody is told of it: of each
copy that is said when the following one is under way, so that nobody waits for memory.
"""

from flashloom.attention.kernels.hopper.gluon import (
    barrier,
    constexpr_function,
    copy_rows,
    copy_rows_commit,
    copy_rows_wait,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
)
from flashloom.attention.kernels.hopper.load import load_queries
from flashloom.attention.kernels.hopper.schedule import (
    BATCH,
    END,
    FULL_BEGIN,
    FULL_END,
    HEAD,
    HIGH,
    KV_LEN,
    LIVE,
    MASKED,
    PAGE,
    Q_START,
    ROW,
    TILES,
    key_tile,
    word,
)


@constexpr_function
def by_vectors(width, bits, warps):
    """How rows of so many elements are copied: 16 bytes per thread, up to 8 threads side by side."""
    vector = 128 // bits
    across = min(width // vector, 8)
    return gl.BlockedLayout([1, vector], [32 // across, across], [warps, 1], [1, 0])


@constexpr_function
def by_rows(rows, width, bits, warps):
    """So many rows, each with one of the threads that copy it: as far as there are rows, with no other."""
    across = min(width * bits // 128, 8)
    each = 32 // across  # rows that a warp copies at a time
    rest = [[each * warps << n] for n in range(8) if each * warps << n < rows]
    side = [rest[n] if n < len(rest) else [0] for n in range(across.bit_length() - 1)]
    lanes = side + [[1 << n] for n in range(each.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        rest[len(side) :], lanes, [[each << n] for n in range(warps.bit_length() - 1)], [], [rows]
    )


@jit
def load_rows(rows, strides, stage, page, within, DIM: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Begin to fill one stage [BLOCK_N, width] with the rows `within` the pages `page`; `strides` of pages and tokens
    count vectors of 16 bytes."""
    WIDTH: gl.constexpr = stage.shape[1]
    BITS: gl.constexpr = stage.dtype.primitive_bitwidth
    layout: gl.constexpr = by_vectors(WIDTH, BITS, gl.num_warps())
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    where = page.to(gl.int64) * strides[0]
    if PAGE_SIZE > 1:
        where += within.to(gl.int64) * strides[1]
    source = gl.convert_layout(rows + where * (128 // BITS), gl.SliceLayout(1, layout))[:, None] + column
    if DIM < WIDTH:
        copy_rows(stage, source, mask=column < DIM)
    else:
        copy_rows(stage, source)
    copy_rows_commit()


@jit
def announce(full, LEFT: gl.constexpr):
    """Say that a stage is full, when all copies but the LEFT last ones are done."""
    copy_rows_wait(LEFT)
    fence_async_shared()
    barrier()  # one thread arrives for all
    mbarrier.arrive(full, count=1)


@jit
def row_producer(
    q, q_jump, k_rows, v_rows, k_strides, v_strides, pages, q_smem, k_smem, v_smem, ring, ring_full, ring_empty, q_full,
    q_empty, k_full, k_empty, v_full, v_empty,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PACK: gl.constexpr, GROUP: gl.constexpr, PAGE_SIZE: gl.constexpr,
    RING: gl.constexpr, CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr, KEY_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Load what the tiles in the ring need of queries, keys and values, as stages come free. Strides count vectors of
    16 bytes. CUT: the next tile is not to be taken before this one's keys are on their way."""
    BITS: gl.constexpr = k_smem.dtype.primitive_bitwidth
    K_LAYOUT: gl.constexpr = by_rows(BLOCK_N, k_smem.shape[2], BITS, gl.num_warps())
    V_LAYOUT: gl.constexpr = by_rows(BLOCK_N, v_smem.shape[2], BITS, gl.num_warps())
    own = gl.arange(0, BLOCK_N, K_LAYOUT)
    turn = 0
    loaded = 0  # query tiles
    step = 0  # key tiles
    mbarrier.wait(ring_full.index(0), 0)
    live = word(ring, 0, LIVE, RING)
    while live > 0:
        tiles = word(ring, turn, TILES, RING)
        last = word(ring, turn, KV_LEN, RING) - 1
        row = word(ring, turn, ROW, RING)
        head = word(ring, turn, HEAD, RING) * PACK
        table = pages + word(ring, turn, PAGE, RING)
        masked = word(ring, turn, MASKED, RING)
        high = word(ring, turn, HIGH, RING)
        end = word(ring, turn, END, RING)
        full_begin = word(ring, turn, FULL_BEGIN, RING)
        full_end = word(ring, turn, FULL_END, RING)
        q_start = word(ring, turn, Q_START, RING) + word(ring, turn, BATCH, RING) * q_jump
        if not CUT:
            mbarrier.arrive(ring_empty.index(turn % RING), count=1)
        if tiles > 0:
            position = gl.minimum(key_tile(0, masked, high, end, full_begin, full_end) * BLOCK_N + own, last)
            page = gl.load(table + position // PAGE_SIZE)
            within = position % PAGE_SIZE
            load_queries(q, q_start, row, head, loaded, q_smem, q_full, q_empty, PACK, CONSUMERS, Q_STAGES)
            loaded += 1
            kv_head = head // GROUP
            first_k = k_rows + kv_head * k_strides[2] * (128 // BITS)
            first_v = v_rows + kv_head * v_strides[2] * (128 // BITS)
            # numbers of their own: Triton carries no name through a loop that begins as another name of one it carries
            v_page = gl.zeros([BLOCK_N], gl.int32, K_LAYOUT)
            v_within = gl.zeros([BLOCK_N], gl.int32, K_LAYOUT)
            for i in range(tiles + 1):  # the keys of this tile, the values of the one before
                following = key_tile(gl.minimum(i + 1, tiles - 1), masked, high, end, full_begin, full_end)
                position = gl.minimum(following * BLOCK_N + own, last)
                next_page = gl.load(table + position // PAGE_SIZE)
                at = (step + i) % STAGES
                before = (step + i - 1) % STAGES
                if i < tiles:
                    mbarrier.wait(k_empty.index(at), (((step + i) // STAGES) & 1) ^ 1)
                    load_rows(first_k, k_strides, k_smem.index(at), page, within, KEY_DIM, PAGE_SIZE)
                    if i == 0:
                        announce(k_full.index(at), 0)
                    elif i > 1:
                        announce(v_full.index((step + i - 2) % STAGES), 1)
                elif i > 1:
                    announce(v_full.index((step + i - 2) % STAGES), 0)
                if i > 0:
                    mbarrier.wait(v_empty.index(before), (((step + i - 1) // STAGES) & 1) ^ 1)
                    load_rows(
                        first_v, v_strides, v_smem.index(before), gl.convert_layout(v_page, V_LAYOUT),
                        gl.convert_layout(v_within, V_LAYOUT), VALUE_DIM, PAGE_SIZE,
                    )  # fmt: skip
                    if i < tiles:
                        announce(k_full.index(at), 1)
                    else:
                        announce(v_full.index(before), 0)
                v_page = page
                v_within = within
                page = next_page
                within = position % PAGE_SIZE
            step += tiles
        if CUT:
            mbarrier.arrive(ring_empty.index(turn % RING), count=1)
        turn += 1
        mbarrier.wait(ring_full.index(turn % RING), (turn // RING) & 1)
        live = word(ring, turn, LIVE, RING)
