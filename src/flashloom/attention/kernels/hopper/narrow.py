"""What the consumers of the Hopper kernel do with a tile of queries of 8-bit elements.

A step turns the logits of one tile of keys into weights, multiplies them with its values and the queries with the next
tile of keys. (The other way round, as for 16-bit elements, weights would wait from one step to the next, and bytes that
wait are taken apart.) The tensor cores keep few bits of a sum of such products (14 of its mantissa, as far as is
known), so each tile's product with the values is added to the sum in float32. Weights are at most 1 and are multiplied
by 2^RAISED: down to 2^-14 they are rounded to four bits, and to less below.
"""

from flashloom.attention.kernels.hopper.gluon import gl, jit, mbarrier, warpgroup_mma, warpgroup_mma_wait
from flashloom.attention.kernels.hopper.schedule import key_tile
from flashloom.attention.kernels.hopper.step import await_copy, enter, leave, weights
from flashloom.attention.kernels.hopper.transpose import as_operand


@jit
def run_steps(
    first, last, step, s, acc, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, masked, high, end,
    full_begin, full_end, q_head, q_pos, sm_scale, at, values, shape,
    LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
    MASKED_TILES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
    CONSUMERS: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    FENCE: gl.constexpr, RAISED: gl.constexpr,
):  # fmt: skip
    """Steps first to last of a tile; `s` are the products of the first one's keys, and then of those after the last."""
    no_s = gl.zeros(s.shape, gl.float32, S_LAYOUT)
    no_part = gl.zeros(acc.shape, gl.float32, O_LAYOUT)
    for i in range(first, last):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        tile = key_tile(i, masked, high, end, full_begin, full_end)
        p, rescale, top, total = weights(
            s, top, total, tile, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW,
            MASKED_TILES, BLOCK_N, S_LAYOUT, RAISED,
        )  # fmt: skip
        p = as_operand(p, P_LAYOUT)
        step += 1
        following = step % STAGES
        await_copy(k_full, following, (step // STAGES) & 1, FENCE)
        mbarrier.wait(v_full.index(stage), phase)
        enter(NUMBER)
        part = warpgroup_mma(p, v_smem.index(stage).permute((1, 0)), no_part, use_acc=False, is_async=True)
        s = warpgroup_mma(q, k_smem.index(following).permute((1, 0)), no_s, use_acc=False, is_async=True)
        leave(NUMBER, CONSUMERS)
        part = warpgroup_mma_wait(1, deps=[part])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None] + part
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(following), count=1)
    return step, s, acc, top, total


@jit
def run_tile(
    tiles, step, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, q_empty, masked, high, end, full_begin, full_end,
    q_head, q_pos, sm_scale, at, values, shape,
    LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr, CONSUMERS: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, FENCE: gl.constexpr, RAISED: gl.constexpr,
):  # fmt: skip
    """All steps of a tile of queries: (weighted sum of the values, its columns as those of transposed values, top,
    total, the last stage, whose values are yet to be released)."""
    WIDTH: gl.constexpr = v_smem.shape[1]
    stage = step % STAGES
    await_copy(k_full, stage, (step // STAGES) & 1, FENCE)
    enter(NUMBER)
    s = warpgroup_mma(
        q, k_smem.index(stage).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False,
        is_async=True,
    )  # fmt: skip
    leave(NUMBER, CONSUMERS)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    row: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    top = gl.full([64], float("-inf"), gl.float32, row)
    total = gl.zeros([64], gl.float32, row)
    acc = gl.zeros([64, WIDTH], gl.float32, O_LAYOUT)
    first = gl.minimum(gl.maximum(masked, 1), tiles - 1)  # the tile with the end of the keys needs its mask
    step, s, acc, top, total = run_steps(
        0, first, step, s, acc, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, masked, high, end,
        full_begin, full_end, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW, True, BLOCK_N,
        STAGES, NUMBER, CONSUMERS, S_LAYOUT, O_LAYOUT, P_LAYOUT, FENCE, RAISED,
    )  # fmt: skip
    step, s, acc, top, total = run_steps(
        first, tiles - 1, step, s, acc, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, masked, high,
        end, full_begin, full_end, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW, False,
        BLOCK_N, STAGES, NUMBER, CONSUMERS, S_LAYOUT, O_LAYOUT, P_LAYOUT, FENCE, RAISED,
    )  # fmt: skip
    mbarrier.arrive(q_empty, count=1)
    tile = key_tile(tiles - 1, masked, high, end, full_begin, full_end)
    p, rescale, top, total = weights(
        s, top, total, tile, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW, True, BLOCK_N,
        S_LAYOUT, RAISED,
    )  # fmt: skip
    stage = step % STAGES
    mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
    part = warpgroup_mma(
        as_operand(p, P_LAYOUT), v_smem.index(stage).permute((1, 0)), gl.zeros([64, WIDTH], gl.float32, O_LAYOUT),
        use_acc=False, is_async=True,
    )  # fmt: skip
    part = warpgroup_mma_wait(0, deps=[part])
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None] + part
    return acc, top, total, stage
