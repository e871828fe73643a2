"""Keys of a tile that several programs share: each leaves what its range gives, the last one to arrive joins all."""

from flashloom.attention.kernels.hopper.gluon import barrier, constexpr_function, gl, jit


@constexpr_function
def by_eight(WIDTH):
    """The layout of a warpgroup's product [64, WIDTH] seen as [64, WIDTH / 8, 8]: what differs between registers in the
    middle is the same for all threads, so that an address and constants say where all of a thread's numbers lie."""
    columns = [[0, 1 << i, 0] for i in range((WIDTH // 8).bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], *columns], lanes, [[16, 0, 0], [32, 0, 0]], [], [64, WIDTH // 8, 8]
    )  # fmt: skip


@jit
def joined(
    result, state, part_out, part_lse, arrivals, slot, split, splits,
    HEADS: gl.constexpr, CONSUMERS: gl.constexpr, NUMBER: gl.constexpr, STATE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Leave the rows' result [64, WIDTH] and their base-2 lse `state` [64] in the slot of this range, and answer (1,
    result and state of all ranges) to the last of them to arrive, (0, *) to the others.

    The ranges' slots are HEADS apart, each of CONSUMERS times [WIDTH / 8, 64, 8] numbers. arrivals int32 [slots,
    CONSUMERS], zero before and after: how many came is counted at the first range's.
    """
    WIDTH: gl.constexpr = result.shape[1]
    cube: gl.constexpr = by_eight(WIDTH)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, cube))
    row = gl.arange(0, 64, rows).to(gl.int64)
    middle = gl.arange(0, WIDTH // 8, gl.SliceLayout(0, gl.SliceLayout(2, cube))).to(gl.int64)
    inner = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, cube))).to(gl.int64)
    where = (row * 8)[:, None, None] + inner[None, None, :] + (middle * 512)[None, :, None]
    STEP: gl.constexpr = HEADS * CONSUMERS * 64
    at = (slot * CONSUMERS + NUMBER) * 64
    mine = at + split.to(gl.int64) * STEP
    x = gl.convert_layout(gl.reshape(result, [64, WIDTH // 8, 8]), cube, assert_trivial=True)
    level = gl.convert_layout(state, rows, assert_trivial=True)
    gl.store(part_out + mine * WIDTH + where, x)
    gl.store(part_lse + mine + row, level)
    arrivals += slot * CONSUMERS + NUMBER
    barrier()  # all threads have written before one of them says so
    last = (gl.atomic_add(arrivals, 1) == splits - 1).to(gl.int32)
    if last > 0:
        gl.store(arrivals, 0)
        x = gl.zeros([64, WIDTH // 8, 8], gl.float32, cube)
        total = gl.zeros([64], gl.float32, rows)
        top = gl.full([64], float("-inf"), gl.float32, rows)
        for _ in range(splits):
            part = gl.load(part_out + at * WIDTH + where, cache_modifier=".cg")
            level = gl.load(part_lse + at + row, cache_modifier=".cg")
            new_top = gl.maximum(top, level)
            base = gl.where(new_top == float("-inf"), 0.0, new_top)
            before = gl.exp2(top - base)
            weight = gl.exp2(level - base)
            total = total * before + weight
            top = new_top
            at += STEP
            weight = weight[:, None, None]
            x = x * before[:, None, None] + gl.where(weight == 0.0, 0.0, part) * weight
        empty = total == 0.0
        whole = gl.where(empty, 1.0, total)
        level = gl.where(empty, float("-inf"), top + gl.log2(whole))
        x = x / whole[:, None, None]
    result = gl.convert_layout(gl.reshape(x, [64, WIDTH]), LAYOUT, assert_trivial=True)
    return last, result, gl.convert_layout(level, STATE, assert_trivial=True)
