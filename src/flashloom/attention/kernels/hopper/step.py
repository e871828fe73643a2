"""What a step of the Hopper kernel's consumers consists of: turns at the tensor cores, and the online softmax."""

from flashloom.attention.kernels.hopper.cap import LIMIT, capped
from flashloom.attention.kernels.hopper.gluon import constexpr_function, gl, jit, mbarrier

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@jit
def once_per_thread(TEXT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x = gl.full([128], 0, gl.int32, layout)  # one element in each thread
    gl.inline_asm_elementwise(TEXT, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@jit
def enter(NUMBER: gl.constexpr):
    """Wait for this consumer's turn at the tensor cores. Triton's own code uses named barriers below 9."""
    if NUMBER == 0:
        once_per_thread("bar.sync 9, 256; mov.b32 $0, $1;")
    elif NUMBER == 1:
        once_per_thread("bar.sync 10, 256; mov.b32 $0, $1;")
    else:
        once_per_thread("bar.sync 11, 256; mov.b32 $0, $1;")


@jit
def leave(NUMBER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Give the turn to the next consumer."""
    if NUMBER + 1 == CONSUMERS:
        once_per_thread("bar.arrive 9, 256; mov.b32 $0, $1;")
    elif NUMBER == 0:
        once_per_thread("bar.arrive 10, 256; mov.b32 $0, $1;")
    else:
        once_per_thread("bar.arrive 11, 256; mov.b32 $0, $1;")


@jit
def keep_turns(
    first, last, k_full, v_full, k_empty, v_empty, STAGES: gl.constexpr, NUMBER: gl.constexpr, CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """What a consumer without rows in a tile owes the others: its turns, and its word that stages are free. It gets a
    turn when they have done the step before; where nobody takes turns, it waits for the copies."""
    for step in range(first, last):
        stage = step % STAGES
        if TURNS:
            enter(NUMBER)
            leave(NUMBER, CONSUMERS)
        else:
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(k_empty.index(stage), count=1)  # before values are waited for, which may come after later keys
        if not TURNS:
            mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(v_empty.index(stage), count=1)


@jit
def await_copy(full, stage, phase):
    """Wait until a stage is full."""
    mbarrier.wait(full.index(stage), phase)


@jit
def shape_of_logits(
    q_head, q_pos, sm_scale, at, values, CAP: gl.constexpr, SLOPE: gl.constexpr,
):  # fmt: skip
    """What a tile of queries needs of a soft cap, the factors before and after its tanh, or of a bias by
    distance, its slope in units of log2."""
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    if CAP is not None:
        outer, inner = CAP(values)
        inner = gl.where(outer < 0, -inner, inner)  # the factor of the softmax is positive
        return (2.0 / LIMIT * sm_scale) * inner, gl.maximum(gl.abs(outer) * LOG2E, 1e-37)
    elif SLOPE is not None:
        return SLOPE(batch, q_head, kv_head, q_pos, q_len, kv_len, q_start, kv_start, values) * LOG2E
    else:
        return 0.0


@constexpr_function
def sum_layout():
    """The layout of [64, 4]: the sums of what each thread of a warpgroup's product holds of a row."""
    return gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )  # fmt: skip


@jit
def largest(x, LAYOUT: gl.constexpr):
    """The largest of each row of x [64, N] in `LAYOUT`, by a tree: in a chain of a thread's elements the warp waits
    for each comparison."""
    N: gl.constexpr = x.shape[1]
    x = gl.max(gl.max(gl.reshape(x, [64, 4, N // 32, 8]), 2), 1)
    return gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, LAYOUT), assert_trivial=True)


@jit
def own_sums(x):
    """The sums of each row of x [64, N], of what each thread holds: [64, 4]. Threads meet at a tile's end alone."""
    N: gl.constexpr = x.shape[1]
    x = gl.sum(gl.sum(gl.reshape(x, [64, N // 8, 4, 2]), 3), 1)
    return gl.convert_layout(x, sum_layout(), assert_trivial=True)


@jit
def scale_of(sm_scale, shape, CAP: gl.constexpr, SLOPE: gl.constexpr, RAW: gl.constexpr):
    """What the logits of `logits_of` are to be multiplied with for units of log2."""
    if CAP is not None:
        return shape[1]
    elif SLOPE is not None:
        return 1.0
    elif RAW:
        return gl.maximum(sm_scale * LOG2E, 1e-37)  # 0 must not meet -inf
    else:
        return LOG2E


@jit
def logits_of(
    s, top, tile, q_head, q_pos, sm_scale, at, values, shape,
    LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
    MASKED_TILE: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """From products s [64, BLOCK_N] to logits, the first half of a step of the online softmax: (logits, the largest of
    a row so far, what to subtract). The latter two are in units of log2, the logits times `scale_of`; `shape`: see
    `shape_of_logits`."""
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    scale = scale_of(sm_scale, shape, CAP, SLOPE, RAW)
    if LOGITS is not None or MASKED_TILE:
        kv_pos = (tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)))[None, :]
    if CAP is not None:
        s = capped(s * shape[0])
    elif SLOPE is not None:
        column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)).to(gl.float32)[None, :]
        bias = shape * (tile * BLOCK_N - q_pos).to(gl.float32)
        s = s * (sm_scale * LOG2E) + (shape * column + bias)
    elif not RAW:
        s = s * sm_scale
        if LOGITS is not None:
            s = LOGITS(s, batch, q_head, kv_head, q_pos, kv_pos, q_len, kv_len, q_start, kv_start, values) + gl.zeros(
                s.shape, gl.float32, LAYOUT
            )
    if MASKED_TILE:
        keep = kv_pos < kv_len
        if MASK is not None:
            keep = keep & MASK(batch, q_head, kv_head, q_pos, kv_pos, q_len, kv_len, q_start, kv_start, values)
        s = gl.where(keep, s, float("-inf"))
    new_top = gl.maximum(top, largest(s, LAYOUT) * scale)
    base = new_top
    if MASKED_TILE or LOGITS is not None or SLOPE is not None:
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
    return s, new_top, base


@jit
def weights(s, scale, top, base, total, RAISED: gl.constexpr):
    """The second half: (weights, factor for what was summed before, sums of weights, of each thread for itself); `top`
    is that of the steps before. Weights and sums are 2^RAISED too large."""
    lowered = base
    if RAISED > 0:
        lowered = base - RAISED
    p = gl.exp2(s * scale - lowered[:, None])
    rescale = gl.exp2(top - base)
    sums: gl.constexpr = gl.SliceLayout(1, sum_layout())
    return p, rescale, total * gl.convert_layout(rescale, sums, assert_trivial=True)[:, None] + own_sums(p)


@jit
def done(x):
    """x, which the assembler must compute before it waits for what comes next: it would move the wait forward. No
    arithmetic answers the number that is compared with."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; mov.b32 $0, $1; setp.eq.b32 p, $1, 0x7FC0DEAD; @p nanosleep.u32 0; }",
        "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def packed(p, DTYPE: gl.constexpr):
    """Weights p [64, N] rounded to 16 bits, two to a word: [64, N / 2]. What waits from one step to the next as 16-bit
    numbers would be taken apart and put together again."""
    low, high = gl.split(gl.reshape(p.to(DTYPE), [64, p.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@jit
def unpacked(words, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The operand [64, N] that `packed` has packed."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )  # fmt: skip
    p = gl.reshape(gl.join(low, high), [64, 2 * words.shape[1]]).to(DTYPE, bitcast=True)
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)
