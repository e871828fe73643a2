"""The producers of the Hopper kernel: one warp that keeps the copies of queries and keys going, one for the values.

Queries are boxes of [64 / PACK tokens, PACK heads, DIM] of [tokens, heads, dim]; keys and values boxes of [1, BOX, 1,
DIM] of [pages, page tokens, kv heads, dim], or of pages as `chunks` has them. What lies beyond a tensor arrives as
zeros, also the columns beyond its width. BOX is BLOCK_N where a tile of keys lies in one run of memory; else several
boxes, each within a page, make one. Pages that no such box divides are the business of `rows`.
"""

from flashloom.attention.kernels.hopper.chunks import boxes_of
from flashloom.attention.kernels.hopper.gluon import gl, jit, mbarrier, tma_load
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
    TOKEN,
    key_tile,
    word,
)


@jit
def load_boxes(
    tensor, stage, full, places, token, head, strides, BOX: gl.constexpr, BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Fill one stage [BLOCK_N, width] from the pages `places`, one per box, beginning at position `token`. CHUNKS: of a
    row, where a copy brings all of them; `strides`: then those of heads in groups of tokens and in chunks."""
    mbarrier.expect(full, BLOCK_N // BOX * tensor.block_type.nbytes)
    if CHUNKS > 1:
        boxes = boxes_of(stage, BOX, CHUNKS)
    for i in gl.static_range(BLOCK_N // BOX):
        within = token + i * BOX
        if PAGE_SIZE == BOX:
            within = 0
        elif PAGE_SIZE > 0:
            within = within % PAGE_SIZE
        if CHUNKS > 1:
            group = head * strides[0] + within // 8
            tma_load(tensor, [places[i], group, head * strides[1], 0, 0], full, boxes.index(i))
        elif BOX == BLOCK_N:
            tma_load(tensor, [places[i], within, head, 0], full, stage)
        else:
            tma_load(tensor, [places[i], within, head, 0], full, stage.slice(i * BOX, BOX, dim=0))


@jit
def load_queries(
    q, q_start, row, head, loaded, q_smem, q_full, q_empty, PACK: gl.constexpr, CONSUMERS: gl.constexpr,
    Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Load the queries of a tile, for each consumer when it has room."""
    for c in gl.static_range(CONSUMERS):
        to = (loaded % Q_STAGES) * CONSUMERS + c
        mbarrier.wait(q_empty.index(to), ((loaded // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(to), q.block_type.nbytes)
        tma_load(q, [q_start + row // PACK + c * (64 // PACK), head, 0], q_full.index(to), q_smem.index(to))


@jit
def producer(
    q, q_jump, kv, strides, pages, q_smem, kv_smem, ring, ring_full, ring_empty, q_full, q_empty, kv_full, kv_empty,
    QUERIES: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, PACK: gl.constexpr,
    GROUP: gl.constexpr, PAGE_SIZE: gl.constexpr, RING: gl.constexpr, CONSUMERS: gl.constexpr, Q_STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Load what the tiles in the ring need of one tensor, as stages come free, and the queries if QUERIES. PAGE_SIZE 0:
    a request is one run of tokens. CUT: the next tile is not to be taken before this one's keys are on their way."""
    turn = 0
    loaded = 0  # query tiles
    step = 0  # key tiles
    mbarrier.wait(ring_full.index(0), 0)
    live = word(ring, 0, LIVE, RING)
    while live > 0:
        tiles = word(ring, turn, TILES, RING)
        kv_len = word(ring, turn, KV_LEN, RING)
        row = word(ring, turn, ROW, RING)
        head = word(ring, turn, HEAD, RING) * PACK
        page = word(ring, turn, PAGE, RING)
        first_token = word(ring, turn, TOKEN, RING)
        masked = word(ring, turn, MASKED, RING)
        high = word(ring, turn, HIGH, RING)
        end = word(ring, turn, END, RING)
        full_begin = word(ring, turn, FULL_BEGIN, RING)
        full_end = word(ring, turn, FULL_END, RING)
        if QUERIES:
            q_start = word(ring, turn, Q_START, RING) + word(ring, turn, BATCH, RING) * q_jump
        if not (QUERIES and CUT):
            mbarrier.arrive(ring_empty.index(turn % RING), count=1)
        if tiles > 0:
            if QUERIES:
                load_queries(q, q_start, row, head, loaded, q_smem, q_full, q_empty, PACK, CONSUMERS, Q_STAGES)
                loaded += 1
            kv_head = head // GROUP
            for i in range(tiles):
                token = key_tile(i, masked, high, end, full_begin, full_end) * BLOCK_N
                stage = step % STAGES
                places = ()
                for box in gl.static_range(BLOCK_N // BOX):
                    if PAGE_SIZE > 0:
                        at = gl.minimum(token + box * BOX, kv_len - 1) // PAGE_SIZE
                        places = places + (gl.load(pages + page + at),)  # type: ignore[assignment]  # noqa: RUF005
                    else:
                        places = places + (page,)  # type: ignore[assignment]  # noqa: RUF005
                mbarrier.wait(kv_empty.index(stage), ((step // STAGES) & 1) ^ 1)
                load_boxes(
                    kv, kv_smem.index(stage), kv_full.index(stage), places, token + first_token, kv_head, strides, BOX,
                    BLOCK_N, PAGE_SIZE, CHUNKS,
                )  # fmt: skip
                step += 1
        if QUERIES and CUT:
            mbarrier.arrive(ring_empty.index(turn % RING), count=1)
        turn += 1
        mbarrier.wait(ring_full.index(turn % RING), (turn // RING) & 1)
        live = word(ring, turn, LIVE, RING)
