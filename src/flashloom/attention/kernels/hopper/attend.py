"""Prefill and append attention on Hopper: a persistent kernel of two or three consumer warpgroups, two producer
warps (or, for copies row by row, a warpgroup) and a scheduler warp; of 8-bit elements also a warpgroup that transposes
the values.

After the work of Shah et al. (FlashAttention-3, 2024): copies by the tensor memory accelerator, products and softmax
overlapped within and between the consumers.
"""

from flashloom.attention.kernels.hopper.consume import consumer
from flashloom.attention.kernels.hopper.gluon import fence_async_shared, gl, jit, mbarrier
from flashloom.attention.kernels.hopper.load import producer
from flashloom.attention.kernels.hopper.rows import row_producer
from flashloom.attention.kernels.hopper.schedule import RING_WORDS, scheduler
from flashloom.attention.kernels.hopper.transpose import transposer


@jit
def attend(
    q, k, v, out_map, out, lse, k_rows, v_rows, items, pages, counter, part_out, part_lse, arrivals, q_jump, out_jump,
    out_token, out_head, lse_token, lse_head, ragged, sm_scale, flags, k_strides, v_strides, scales, marks, values,
    QUERY: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, WHOLE: gl.constexpr, LOGITS: gl.constexpr,
    MASK: gl.constexpr, BOUNDS: gl.constexpr, OUTPUT: gl.constexpr, RAW: gl.constexpr, SCAN: gl.constexpr,
    HEADS: gl.constexpr, PACK: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, KEY_DIM: gl.constexpr,
    WIDTH: gl.constexpr, VALUE_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OUT_MAP: gl.constexpr, REUSE_Q: gl.constexpr, Q_STAGES: gl.constexpr,
    RING: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, OTHER_REGISTERS: gl.constexpr,
    TRANSPOSER_REGISTERS: gl.constexpr, SCHEDULER_REGISTERS: gl.constexpr, ROW_WARPS: gl.constexpr,
    K_CHUNKS: gl.constexpr, V_CHUNKS: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Grid: any number of programs, best the number of multiprocessors; each takes tiles until none is left.

    q [tokens, heads, DIM], k and v [pages, page tokens, kv heads, *] and out_map (as q) are tensor maps; in their place
    k_rows and v_rows with strides serve BOX 1, and `out` with its strides rows that its map cannot, all in vectors of
    16 bytes. K_CHUNKS, V_CHUNKS: 1, or how many chunks of 64 columns a row has where its map is one of `chunks`; then
    k_strides and v_strides are the steps from head to head, in groups of tokens and in chunks. lse float32 [tokens,
    heads]. A request's rows begin q_jump tokens (in out and lse out_jump) further than where those of the request
    before it end, 0 where tokens follow each other through the batch. items int32 [*, 16], pages int32, counter int32
    [3]: see `schedule`. CUT: a tile's keys may be cut into ranges (`split`), with part_out float32 [slots, HEADS,
    CONSUMERS, 64 * WIDTH], part_lse [.., 64] and arrivals int32 [slots, HEADS, CONSUMERS], zero before and after.
    scales, of 8-bit elements: those of keys and of values, float32, and the steps between two heads. marks int8, under
    a mask: where it is told that a row came out as NaN. HEADS groups of PACK query heads; DIM, WIDTH: widths of keys
    and values in shared memory, KEY_DIM and VALUE_DIM in memory.
    """
    dtype: gl.constexpr = q.dtype
    BITS: gl.constexpr = dtype.primitive_bitwidth
    FP8: gl.constexpr = BITS == 8
    keys: gl.constexpr = gl.NVMMASharedLayout(128 if DIM * BITS > 512 else 64, BITS, rank=2)
    rows: gl.constexpr = gl.NVMMASharedLayout(128 if WIDTH * BITS > 512 else 64, BITS, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES * CONSUMERS, 64, DIM], keys)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], keys)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], rows)
    if REUSE_Q:
        o_smem = q_smem
    else:
        o_smem = gl.allocate_shared_memory(
            gl.bfloat16 if FP8 else dtype, [CONSUMERS, 64, WIDTH], gl.NVMMASharedLayout(128, 16, rank=2)
        )
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    ring = gl.allocate_shared_memory(gl.int32, [RING * RING_WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ring_full = gl.allocate_shared_memory(gl.int64, [RING, 1], bars)
    ring_empty = gl.allocate_shared_memory(gl.int64, [RING, 1], bars)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(RING):
        mbarrier.init(ring_full.index(i), count=1)
        mbarrier.init(ring_empty.index(i), count=CONSUMERS + 2 + FP8 - (BOX == 1))
    for i in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=1 if FP8 else CONSUMERS)
    if FP8:
        turned: gl.constexpr = gl.NVMMASharedLayout(128 if BLOCK_N > 64 else 64, BITS, rank=2)
        t_smem = gl.allocate_shared_memory(dtype, [STAGES, WIDTH, BLOCK_N], turned)
        t_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
        t_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
        for i in gl.static_range(STAGES):
            mbarrier.init(t_full.index(i), count=1)
            mbarrier.init(t_empty.index(i), count=CONSUMERS)
    else:
        t_smem, t_full, t_empty = v_smem, v_full, v_empty
    fence_async_shared()
    what = (
        out_map, out, lse, part_out, part_lse, arrivals, q_smem, k_smem, t_smem, o_smem, ring, ring_full, ring_empty,
        q_full, q_empty, k_full, k_empty, t_full, t_empty, out_jump, out_token, out_head, lse_token, lse_head, sm_scale,
        flags, scales, values, marks,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (producer, (
                q, q_jump, k, k_strides, pages, q_smem, k_smem, ring, ring_full, ring_empty, q_full, q_empty, k_full,
                k_empty, True, BLOCK_N, BOX, STAGES, PACK, GROUP, PAGE_SIZE, RING, CONSUMERS, Q_STAGES, K_CHUNKS,
                CUT,
            )) if part == "keys"
            else (producer, (
                q, q_jump, v, v_strides, pages, q_smem, v_smem, ring, ring_full, ring_empty, q_full, q_empty, v_full,
                v_empty, False, BLOCK_N, BOX, STAGES, PACK, GROUP, PAGE_SIZE, RING, CONSUMERS, Q_STAGES, V_CHUNKS,
                CUT,
            )) if part == "values"
            else (row_producer, (
                q, q_jump, k_rows, v_rows, k_strides, v_strides, pages, q_smem, k_smem, v_smem, ring, ring_full,
                ring_empty, q_full, q_empty, k_full, k_empty, v_full, v_empty, BLOCK_N, STAGES, PACK, GROUP, PAGE_SIZE,
                RING, CONSUMERS, Q_STAGES, KEY_DIM, VALUE_DIM, CUT,
            )) if part == "rows"
            else (transposer, (
                v_smem, t_smem, ring, ring_full, ring_empty, v_full, v_empty, t_full, t_empty, BLOCK_N, STAGES, WIDTH,
                RING,
            )) if part == "transposed"
            else (scheduler, (
                items, counter, ring, ring_full, ring_empty, ragged, values, BOUNDS, WHOLE, SCAN, HEADS, PACK, GROUP,
                64 * CONSUMERS, BLOCK_N, PAGE_SIZE > 0, RING, (DIM + WIDTH) * BITS // 8, CUT,
            )) if part == "tiles"
            else (consumer, (
                what, part, QUERY, LOGITS, CAP, SLOPE, MASK, OUTPUT, RAW, CONSUMERS, BLOCK_N, STAGES, PACK, GROUP,
                VALUE_DIM, OUT_MAP, REUSE_Q, Q_STAGES, RING, K_CHUNKS, V_CHUNKS, HEADS, CUT,
            ))
            for part in (
                (0, 1, "transposed", "rows", "tiles") if FP8 and BOX == 1
                else (0, 1, "rows", "tiles") if BOX == 1
                else (0, 1, "transposed", "keys", "values", "tiles") if FP8
                else (0, 1, "keys", "values", "tiles") if CONSUMERS == 2
                else (0, 1, 2, "keys", "values", "tiles")
            )
        ],
        [4, 4, ROW_WARPS, 1] if FP8 and BOX == 1
        else [4, ROW_WARPS, 1] if BOX == 1
        else [4, 1, 1, 1] if CONSUMERS == 2 and not FP8
        else [4, 4, 1, 1, 1],
        [CONSUMER_REGISTERS, TRANSPOSER_REGISTERS, OTHER_REGISTERS, SCHEDULER_REGISTERS] if FP8 and BOX == 1
        else [CONSUMER_REGISTERS, OTHER_REGISTERS, SCHEDULER_REGISTERS] if BOX == 1
        else [CONSUMER_REGISTERS, TRANSPOSER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS] if FP8
        else [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS] if CONSUMERS == 2
        else [CONSUMER_REGISTERS, CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip
