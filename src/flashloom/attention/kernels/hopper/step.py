"""What a step of the Hopper kernel's consumers consists of: turns at the tensor cores, and the online softmax."""

from flashloom.attention.kernels.hopper.cap import LIMIT, capped
from flashloom.attention.kernels.hopper.gluon import fence_async_shared, gl, jit, mbarrier

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
    first, last, k_empty, v_empty, STAGES: gl.constexpr, NUMBER: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """What a consumer without rows in a tile owes the others: its turns, and its word that stages are free. It gets a
    turn when they have done the step before."""
    for step in range(first, last):
        enter(NUMBER)
        leave(NUMBER, CONSUMERS)
        mbarrier.arrive(k_empty.index(step % STAGES), count=1)
        mbarrier.arrive(v_empty.index(step % STAGES), count=1)


@jit
def await_copy(full, stage, phase, FENCE: gl.constexpr):
    """Wait until a stage is full. Copies that threads made themselves must become visible to the tensor cores."""
    mbarrier.wait(full.index(stage), phase)
    if FENCE:
        fence_async_shared()


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


@jit
def weights(
    s, top, total, tile, q_head, q_pos, sm_scale, at, values, shape,
    LOGITS: gl.constexpr, CAP: gl.constexpr, SLOPE: gl.constexpr, MASK: gl.constexpr, RAW: gl.constexpr,
    MASKED_TILE: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, RAISED: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax: (weights, factor for what was summed before, top, total) from the products s
    [64, BLOCK_N]. `top` is kept in units of log2; weights and total are 2^RAISED too large. `shape`: see
    `shape_of_logits`."""
    batch, kv_head, q_len, kv_len, q_start, kv_start = at
    scale = sm_scale * LOG2E
    if LOGITS is not None or MASKED_TILE:
        kv_pos = (tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)))[None, :]
    if CAP is not None:
        s = capped(s * shape[0])
        scale = shape[1]
    elif SLOPE is not None:
        column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)).to(gl.float32)[None, :]
        base = shape * (tile * BLOCK_N - q_pos).to(gl.float32)
        s = s * scale + (shape * column + base)
        scale = 1.0
    elif RAW:
        scale = gl.maximum(scale, 1e-37)  # 0 must not meet -inf
    else:
        s = s * sm_scale
        if LOGITS is not None:
            s = LOGITS(s, batch, q_head, kv_head, q_pos, kv_pos, q_len, kv_len, q_start, kv_start, values) + gl.zeros(
                s.shape, gl.float32, LAYOUT
            )
        scale = LOG2E
    if MASKED_TILE:
        keep = kv_pos < kv_len
        if MASK is not None:
            keep = keep & MASK(batch, q_head, kv_head, q_pos, kv_pos, q_len, kv_len, q_start, kv_start, values)
        s = gl.where(keep, s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    base = new_top
    if MASKED_TILE or LOGITS is not None or SLOPE is not None:
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
    lowered = base
    if RAISED > 0:
        lowered = base - RAISED
    p = gl.exp2(s * scale - lowered[:, None])
    rescale = gl.exp2(top - base)
    return p, rescale, new_top, total * rescale + gl.sum(p, 1)
