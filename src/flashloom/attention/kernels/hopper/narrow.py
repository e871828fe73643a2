"""What the consumers of the Hopper kernel do with a tile of queries of 8-bit elements.

A step turns the logits of one tile of keys into weights, multiplies the queries with the next tile of keys and the
weights with the values of this one, and looks for the largest logits of the next tile meanwhile. (The other way round,
as for 16-bit elements, weights would wait from one step to the next, and bytes that wait are taken apart.) The tensor
cores keep few bits of a sum of such products (14 of its mantissa, as far as is known), so each tile's product with the
values is added to the sum in float32. Weights are at most 1 and are multiplied by 2^RAISED: down to 2^-14 they are
rounded to four bits, and to less below.
"""

from flashloom.attention.kernels.hopper.gluon import gl, jit, mbarrier, warpgroup_mma, warpgroup_mma_wait
from flashloom.attention.kernels.hopper.schedule import key_tile
from flashloom.attention.kernels.hopper.step import await_copy, enter, leave, logits_of, scale_of, sum_layout, weights
from flashloom.attention.kernels.hopper.transpose import as_operand


@jit
def run_steps(
    first, last, step, s, before, top, base, total, acc, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, masked,
    high, end, full_begin, full_end, q_head, q_pos, sm_scale, at, values, shape,
    LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
    MASKED_TILES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
    CONSUMERS: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    RAISED: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """From the logits `s` of tile first - 1 to those of tile last - 1. `before` is the largest logit of a row in the
    tiles before, top that with this tile's, base what is subtracted (all three in units of log2)."""
    no_s = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    no_part = gl.zeros(acc.shape, gl.float32, O_LAYOUT)
    for i in range(first, last):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        scale = scale_of(sm_scale, shape, CAP, SLOPE, RAW)
        p, rescale, total = weights(s, scale, before, base, total, RAISED)
        p = as_operand(p, P_LAYOUT)
        step += 1
        following = step % STAGES
        await_copy(k_full, following, (step // STAGES) & 1)
        mbarrier.wait(v_full.index(stage), phase)
        if TURNS:
            enter(NUMBER)
        products = warpgroup_mma(q, k_smem.index(following).permute((1, 0)), no_s, use_acc=False, is_async=True)
        part = warpgroup_mma(p, v_smem.index(stage).permute((1, 0)), no_part, use_acc=False, is_async=True)
        if TURNS:
            leave(NUMBER, CONSUMERS)
        products = warpgroup_mma_wait(1, deps=[products])
        mbarrier.arrive(k_empty.index(following), count=1)
        tile = key_tile(i, masked, high, end, full_begin, full_end)
        before = top
        s, top, base = logits_of(
            products, top, tile, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW,
            MASKED_TILES, BLOCK_N, S_LAYOUT,
        )  # fmt: skip
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None] + part
    return step, s, before, top, base, total, acc


@jit
def run_tile(
    tiles, step, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, q_empty, masked, high, end, full_begin, full_end,
    q_head, q_pos, sm_scale, at, values, shape,
    LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr, CONSUMERS: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, RAISED: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """All steps of a tile of queries: (weighted sum of the values, its columns as those of transposed values, top,
    total, the last stage, whose values are yet to be released)."""
    WIDTH: gl.constexpr = v_smem.shape[1]
    stage = step % STAGES
    await_copy(k_full, stage, (step // STAGES) & 1)
    if TURNS:
        enter(NUMBER)
    s = warpgroup_mma(
        q, k_smem.index(stage).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False,
        is_async=True,
    )  # fmt: skip
    if TURNS:
        leave(NUMBER, CONSUMERS)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    row: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    acc = gl.zeros([64, WIDTH], gl.float32, O_LAYOUT)
    before = gl.full([64], float("-inf"), gl.float32, row)
    total = gl.zeros([64, 4], gl.float32, sum_layout())
    tile = key_tile(0, masked, high, end, full_begin, full_end)
    s, top, base = logits_of(
        s, before, tile, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW, True, BLOCK_N,
        S_LAYOUT,
    )  # fmt: skip
    if MASK is not None:
        step, s, before, top, base, total, acc = run_steps(
            1, masked, step, s, before, top, base, total, acc, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
            masked, high, end, full_begin, full_end, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE,
            MASK, RAW, True, BLOCK_N, STAGES, NUMBER, CONSUMERS, S_LAYOUT, O_LAYOUT, P_LAYOUT, RAISED, TURNS,
        )  # fmt: skip
    step, s, before, top, base, total, acc = run_steps(
        gl.maximum(masked, 1), tiles, step, s, before, top, base, total, acc, q, k_smem, v_smem, k_full, k_empty,
        v_full, v_empty, masked, high, end, full_begin, full_end, q_head, q_pos, sm_scale, at, values, shape, LOGITS,
        CAP, SLOPE, MASK, RAW, False, BLOCK_N, STAGES, NUMBER, CONSUMERS, S_LAYOUT, O_LAYOUT, P_LAYOUT, RAISED,
        TURNS,
    )  # fmt: skip
    mbarrier.arrive(q_empty, count=1)
    scale = scale_of(sm_scale, shape, CAP, SLOPE, RAW)
    p, rescale, total = weights(s, scale, before, base, total, RAISED)
    stage = step % STAGES
    mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
    part = warpgroup_mma(
        as_operand(p, P_LAYOUT), v_smem.index(stage).permute((1, 0)), gl.zeros([64, WIDTH], gl.float32, O_LAYOUT),
        use_acc=False, is_async=True,
    )  # fmt: skip
    part = warpgroup_mma_wait(0, deps=[part])
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None] + part
    return acc, top, total, stage
