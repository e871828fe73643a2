"""The consumers of the Hopper kernel: warpgroups of 64 packed query rows each.

A step multiplies the queries with one tile of keys while the weights of the tile before are multiplied with its
values. The weights stay in registers as an operand. Two consumers take turns at the tensor cores (named barriers), so
that one computes its softmax while the other multiplies.
"""

# ruff: noqa: SIM102
from flashloom.attention.kernels.hopper.chunks import clear_rows, tile_of
from flashloom.attention.kernels.hopper.gluon import (
    barrier,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from flashloom.attention.kernels.hopper.narrow import run_tile
from flashloom.attention.kernels.hopper.schedule import (
    BATCH,
    END,
    FULL_BEGIN,
    FULL_END,
    HEAD,
    HIGH,
    KV_LEN,
    KV_START,
    LIVE,
    MASKED,
    Q_LEN,
    Q_START,
    ROW,
    SLOT,
    SPLITS,
    TILES,
    key_tile,
    word,
)
from flashloom.attention.kernels.hopper.split import joined
from flashloom.attention.kernels.hopper.step import (
    LN2,
    await_copy,
    done,
    enter,
    keep_turns,
    leave,
    logits_of,
    own_sums,
    packed,
    scale_of,
    shape_of_logits,
    sum_layout,
    unpacked,
    weights,
)
from flashloom.attention.kernels.hopper.transpose import column_of, in_order


@jit
def run_tiles(
    first, last, step, acc, words, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, masked, high, end,
    full_begin, full_end, q_head, q_pos, sm_scale, at, values, shape,
    LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
    MASKED_TILES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUMBER: gl.constexpr,
    CONSUMERS: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    K_CHUNKS: gl.constexpr, V_CHUNKS: gl.constexpr,
):  # fmt: skip
    """Steps first to last of a tile; `words` are the packed weights of the step before."""
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    # the values' products go on under the weights where registers suffice for both; elsewhere that was slower
    LATE: gl.constexpr = RAW and CAP is None and SLOPE is None and q.shape[1] == 128 and v_smem.shape[2] == 128
    for i in range(first, last):
        before = step % STAGES
        step += 1
        stage = step % STAGES
        await_copy(k_full, stage, (step // STAGES) & 1)
        enter(NUMBER)
        keys = tile_of(k_smem.index(stage), K_CHUNKS).permute((1, 0))
        s = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        await_copy(v_full, before, ((step - 1) // STAGES) & 1)
        v_tile = tile_of(v_smem.index(before), V_CHUNKS)
        acc = warpgroup_mma(unpacked(words, k_smem.dtype, P_LAYOUT), v_tile, acc, is_async=True)
        leave(NUMBER, CONSUMERS)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        tile = key_tile(i, masked, high, end, full_begin, full_end)
        s, new_top, base = logits_of(
            s, top, tile, q_head, q_pos, sm_scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW, MASKED_TILES,
            BLOCK_N, S_LAYOUT,
        )  # fmt: skip
        scale = scale_of(sm_scale, shape, CAP, SLOPE, RAW)
        p, rescale, total = weights(s, scale, top, base, total, 0)
        top = new_top
        if LATE:
            total = done(total)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = warpgroup_mma_init(
            acc * gl.convert_layout(rescale, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True)[:, None]
        )
        words = packed(p, k_smem.dtype)
    return step, acc, words, top, total


@jit
def transform_rows(q, first, last, head, at, values, QUERY: gl.constexpr, PACK: gl.constexpr):
    """Apply the variant's query transform to the rows in shared memory."""
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    DIM: gl.constexpr = q.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8] if DIM < 256 else [1, 32], [4, 1], [1, 0])
    row = gl.minimum(first + gl.arange(0, 64, gl.SliceLayout(1, layout)), last - 1)[:, None]
    dim = gl.arange(0, DIM, gl.SliceLayout(0, layout))[None, :]
    x = q.load(layout).to(gl.float32)
    y = QUERY(
        (x,), batch, head * PACK + row % PACK, kv_head, kv_len - q_len + row // PACK, q_len, kv_len, q_start, kv_start,
        dim, values,
    ) + gl.zeros([64, DIM], gl.float32, layout)  # fmt: skip
    barrier()
    q.store(y.to(q.dtype))
    fence_async_shared()
    barrier()


@jit
def store_rows(
    x, out, first, last, q_start, head, out_token, out_head, PACK: gl.constexpr, WIDTH: gl.constexpr,
    VEC: gl.constexpr, LAYOUT: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Store x [64, *], packed rows `first` and on, as far as there are rows (last) and columns (WIDTH). The strides
    count vectors of VEC elements. TURNED: the columns are in the order of transposed values."""
    row = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    if TURNED:
        column = column_of(column)
    where = (q_start + row // PACK).to(gl.int64) * out_token + (head * PACK + row % PACK).to(gl.int64) * out_head
    inside = (row < last)[:, None]
    if x.shape[1] > WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    gl.store(out + (where * VEC)[:, None] + column[None, :], x.to(out.dtype.element_ty), mask=inside)


@jit
def store_lse(x, lse, row, last, q_start, head, lse_token, lse_head, PACK: gl.constexpr):
    where = (q_start + row // PACK).to(gl.int64) * lse_token + (head * PACK + row % PACK).to(gl.int64) * lse_head
    gl.store(lse + where, x, mask=row < last)


@jit
def mark(x, marks, first, last):
    """Say so if one of the rows of x [64, *] below `last`, packed rows `first` and on, holds a NaN (or infinities whose
    sum is one). What a mask hides was multiplied by 0, which a NaN survives: `triton.mend` computes such rows once
    more. One flag for all: marks of rows, whose places must be worked out, make the assembler order the loops
    differently, which cost soft caps a tenth."""
    sums = own_sums(x)
    row = first + gl.arange(0, 64, gl.SliceLayout(1, sum_layout()))
    odd = (sums != sums) & (row < last)[:, None]
    one = gl.full([64, 4], 1, gl.int8, sum_layout())
    gl.store(marks + gl.full([64, 4], 0, gl.int32, sum_layout()), one, mask=odd)


@jit
def consumer(
    what, NUMBER: gl.constexpr, QUERY: gl.constexpr, LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr,
    MASK: gl.constexpr, OUTPUT: gl.constexpr, RAW: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PACK: gl.constexpr, GROUP: gl.constexpr, VALUE_DIM: gl.constexpr, OUT_MAP: gl.constexpr,
    REUSE_Q: gl.constexpr, Q_STAGES: gl.constexpr, RING: gl.constexpr, K_CHUNKS: gl.constexpr, V_CHUNKS: gl.constexpr,
    HEADS: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Rows NUMBER * 64 and on of every tile in the ring. flags: bit 0 store lse, bit 1 partial."""
    (
        out_map, out, lse, part_out, part_lse, arrivals, q_smem, k_smem, v_smem, o_smem, ring, ring_full, ring_empty,
        q_full, q_empty, k_full, k_empty, v_full, v_empty, out_jump, out_token, out_head, lse_token, lse_head, sm_scale,
        flags, scales, values, marks,
    ) = what  # fmt: skip
    VEC: gl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    FP8: gl.constexpr = k_smem.dtype.primitive_bitwidth == 8
    RAISED: gl.constexpr = 8 if FP8 else 0
    TURNS: gl.constexpr = not FP8 or k_smem.shape[2] == 64  # wide products of 8 bits are too short to wait for
    WIDTH: gl.constexpr = o_smem.shape[2]
    DEPTH: gl.constexpr = 32 if FP8 else 16  # of one product
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, DEPTH])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, DEPTH])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=DEPTH // 8)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 * 8 // WIDTH, WIDTH // 8] if WIDTH < 256 else [1, 32], [4, 1], [1, 0]
    )
    o = o_smem.index(NUMBER)
    turn = 0
    used = 0  # query tiles
    step = 0  # key tiles
    if TURNS and NUMBER + 1 == CONSUMERS:
        leave(NUMBER, CONSUMERS)
    mbarrier.wait(ring_full.index(0), 0)
    live = word(ring, 0, LIVE, RING)
    while live > 0:
        tiles = word(ring, turn, TILES, RING)
        batch = word(ring, turn, BATCH, RING)
        q_start = word(ring, turn, Q_START, RING)
        q_len = word(ring, turn, Q_LEN, RING)
        kv_len = word(ring, turn, KV_LEN, RING)
        kv_start = word(ring, turn, KV_START, RING)
        first = word(ring, turn, ROW, RING) + NUMBER * 64
        head = word(ring, turn, HEAD, RING)
        masked = word(ring, turn, MASKED, RING)
        high = word(ring, turn, HIGH, RING)
        end = word(ring, turn, END, RING)
        full_begin = word(ring, turn, FULL_BEGIN, RING)
        full_end = word(ring, turn, FULL_END, RING)
        if CUT:
            splits = word(ring, turn, SPLITS, RING)
            slot = word(ring, turn, SLOT, RING)
        mbarrier.arrive(ring_empty.index(turn % RING), count=1)
        last = q_len * PACK
        out_start = q_start + batch * out_jump
        row = first + gl.arange(0, 64, row_layout)
        working = tiles > 0
        if NUMBER > 0:
            working = working & (first < last)  # a tile of few rows leaves none to this consumer
        if working:
            kv_head = head * PACK // GROUP
            scale = sm_scale
            value_scale = 1.0
            if FP8:
                scale = sm_scale * gl.load(scales[0] + kv_head * scales[2])
                value_scale = gl.load(scales[1] + kv_head * scales[3])
            at = (batch, kv_head, q_len, kv_len, q_start, kv_start)
            inner = gl.minimum(row, last - 1)  # hooks see rows that exist
            q_pos = (kv_len - q_len + inner // PACK)[:, None]
            if PACK == 1:
                q_head = head
            else:
                q_head = (head * PACK + inner % PACK)[:, None]
            shape = shape_of_logits(q_head, q_pos, scale, at, values, CAP, SLOPE)
            buffer = (used % Q_STAGES) * CONSUMERS + NUMBER
            q = q_smem.index(buffer)
            mbarrier.wait(q_full.index(buffer), (used // Q_STAGES) & 1)
            if QUERY is not None:
                transform_rows(q, first, last, head, at, values, QUERY, PACK)
            if FP8:
                acc, top, total, stage = run_tile(
                    tiles, step, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty, q_empty.index(buffer), masked,
                    high, end, full_begin, full_end, q_head, q_pos, scale, at, values, shape, LOGITS, CAP, SLOPE, MASK,
                    RAW, BLOCK_N, STAGES, NUMBER, CONSUMERS, s_layout, o_layout, p_layout, RAISED, TURNS,
                )  # fmt: skip
                step += tiles - 1
            else:
                stage = step % STAGES
                await_copy(k_full, stage, (step // STAGES) & 1)
                enter(NUMBER)
                s = warpgroup_mma(
                    q, tile_of(k_smem.index(stage), K_CHUNKS).permute((1, 0)),
                    gl.zeros([64, BLOCK_N], gl.float32, s_layout), use_acc=False, is_async=True,
                )  # fmt: skip
                leave(NUMBER, CONSUMERS)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(stage), count=1)
                tile = key_tile(0, masked, high, end, full_begin, full_end)
                top = gl.full([64], float("-inf"), gl.float32, row_layout)
                s, new_top, base = logits_of(
                    s, top, tile, q_head, q_pos, scale, at, values, shape, LOGITS, CAP, SLOPE, MASK, RAW, True,
                    BLOCK_N, s_layout,
                )  # fmt: skip
                total = gl.zeros([64, 4], gl.float32, sum_layout())
                p, _rescale, total = weights(s, scale_of(scale, shape, CAP, SLOPE, RAW), top, base, total, 0)
                top = new_top
                words = packed(p, k_smem.dtype)
                if tile * BLOCK_N + BLOCK_N > kv_len:
                    await_copy(v_full, stage, (step // STAGES) & 1)
                    clear_rows(v_smem.index(stage), tile * BLOCK_N, kv_len, BLOCK_N, V_CHUNKS)
                acc = warpgroup_mma_init(gl.zeros([64, WIDTH], gl.float32, o_layout))
                if MASK is not None:
                    step, acc, words, top, total = run_tiles(
                        1, masked, step, acc, words, top, total, q, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                        masked, high, end, full_begin, full_end, q_head, q_pos, scale, at, values, shape, LOGITS, CAP,
                        SLOPE, MASK, RAW, True, BLOCK_N, STAGES, NUMBER, CONSUMERS, s_layout, o_layout, p_layout,
                        K_CHUNKS, V_CHUNKS,
                    )  # fmt: skip
                step, acc, words, top, total = run_tiles(
                    gl.maximum(masked, 1), tiles, step, acc, words, top, total, q, k_smem, v_smem, k_full, k_empty,
                    v_full, v_empty, masked, high, end, full_begin, full_end, q_head, q_pos, scale, at, values, shape,
                    LOGITS, CAP, SLOPE, MASK, RAW, False, BLOCK_N, STAGES, NUMBER, CONSUMERS, s_layout, o_layout,
                    p_layout, K_CHUNKS, V_CHUNKS,
                )  # fmt: skip
                if not REUSE_Q:
                    mbarrier.arrive(q_empty.index(buffer), count=1)
                stage = step % STAGES
                await_copy(v_full, stage, (step // STAGES) & 1)
                v_tile = tile_of(v_smem.index(stage), V_CHUNKS)
                acc = warpgroup_mma(unpacked(words, k_smem.dtype, p_layout), v_tile, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
            if OUT_MAP and not REUSE_Q:
                tma_store_wait(0)  # the arrival below is a barrier: nobody writes the buffer before it has been read
            mbarrier.arrive(v_empty.index(stage), count=1)
            step += 1
            used += 1

            total = gl.convert_layout(gl.sum(total, 1), row_layout, assert_trivial=True)
            empty = total == 0.0
            whole = gl.where(empty, 1.0, total)
            state = gl.where(empty, float("-inf"), top + (gl.log2(whole) - RAISED))
            factor = gl.convert_layout(value_scale / whole, gl.SliceLayout(1, o_layout), assert_trivial=True)
            result = acc * factor[:, None]
            if MASK is not None:
                mark(result, marks, first, last)
            whole_rows = 1
            if CUT:  # conversions: of layouts, Triton takes lists and tuples of the same numbers for different ones
                result = gl.convert_layout(result, o_layout, assert_trivial=True)
                state = gl.convert_layout(state, row_layout, assert_trivial=True)
                whole_rows = splits * 0 + 1
                if splits > 1:
                    at_slot = slot.to(gl.int64) * HEADS + head
                    whole_rows, result, state = joined(
                        result, state, part_out, part_lse, arrivals, at_slot, splits >> 16, splits & 0xFFFF, HEADS,
                        CONSUMERS, NUMBER, row_layout, o_layout,
                    )  # fmt: skip
                    result = gl.convert_layout(result, o_layout, assert_trivial=True)
                    state = gl.convert_layout(state, row_layout, assert_trivial=True)
            if whole_rows > 0:
                level = state * LN2
                final = result
                if OUTPUT is not None:
                    if flags & 2 == 0:
                        o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
                        o_level = gl.convert_layout(level, o_row, assert_trivial=True)[:, None]
                        o_inner = gl.minimum(first + gl.arange(0, 64, o_row), last - 1)
                        if PACK == 1:
                            o_head = head
                        else:
                            o_head = (head * PACK + o_inner % PACK)[:, None]
                        o_dim = gl.arange(0, WIDTH, gl.SliceLayout(0, o_layout))[None, :]
                        if FP8:
                            o_dim = column_of(o_dim)
                        final = OUTPUT(
                            final, o_level, batch, o_head, kv_head, (kv_len - q_len + o_inner // PACK)[:, None], q_len,
                            kv_len, q_start, kv_start, o_dim, values,
                        ) + gl.zeros([64, WIDTH], gl.float32, o_layout)  # fmt: skip
                        final = gl.where(o_level == float("-inf"), 0.0, final)
                if flags & 1:
                    store_lse(level, lse, row, last, out_start, head, lse_token, lse_head, PACK)
                if OUT_MAP:
                    if FP8:
                        final = in_order(final)
                    o.store(final.to(o.dtype))
                    fence_async_shared()
                    barrier()
                    if first + 64 <= last:
                        tma_store(out_map, [out_start + first // PACK, head * PACK, 0], o)
                    else:
                        store_rows(
                            o.load(out_layout), out, first, last, out_start, head, out_token, out_head, PACK, VALUE_DIM,
                            VEC, out_layout, False,
                        )  # fmt: skip
                else:
                    store_rows(
                        final, out, first, last, out_start, head, out_token, out_head, PACK, VALUE_DIM, VEC, o_layout,
                        FP8,
                    )  # fmt: skip
            if REUSE_Q:
                tma_store_wait(0)
                mbarrier.arrive(q_empty.index(buffer), count=1)
        elif tiles > 0:
            buffer = (used % Q_STAGES) * CONSUMERS + NUMBER
            mbarrier.wait(q_full.index(buffer), (used // Q_STAGES) & 1)
            mbarrier.arrive(q_empty.index(buffer), count=1)
            keep_turns(step, step + tiles, k_full, v_full, k_empty, v_empty, STAGES, NUMBER, CONSUMERS, TURNS)
            step += tiles
            used += 1
        else:
            if flags & 1:
                store_lse(
                    gl.full([64], float("-inf"), gl.float32, row_layout), lse, row, last, out_start, head, lse_token,
                    lse_head, PACK,
                )  # fmt: skip
            nothing = gl.zeros([64, WIDTH], gl.float32, out_layout)
            store_rows(
                nothing, out, first, last, out_start, head, out_token, out_head, PACK, VALUE_DIM, VEC, out_layout,
                False,
            )  # fmt: skip
        turn += 1
        mbarrier.wait(ring_full.index(turn % RING), (turn // RING) & 1)
        live = word(ring, turn, LIVE, RING)
    tma_store_wait(0)
    if TURNS and NUMBER == 0:
        enter(0)
