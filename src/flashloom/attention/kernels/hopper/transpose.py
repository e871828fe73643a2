"""The transposer of the Hopper kernel for 8-bit elements: a warpgroup between the copies of values and the products.

The tensor cores take 8-bit operands only with the reduced dimension contiguous, for values that of the tokens, while
values arrive as rows of one token. Two elements of a row are one 16-bit number, and such numbers the matrix loads and
stores of the hardware transpose: two byte permutations per eight elements put the tokens together.

Two orders are chosen so that nothing else has to move. Tokens: of 16 in a row, place 4 t + 2 c + b of the transposed
tile holds token 8 c + 2 t + b (t < 4), which is where a thread's weights lie as the result of one product when they
become the operand of the next (`as_operand`). Columns: of 16, row 8 b + p holds column 2 p + b (p < 8), so that both
the stores here and those of the result (`in_order`) reach all banks.
"""

from flashloom.attention.kernels.hopper.gluon import (
    barrier,
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reinterpret,
)
from flashloom.attention.kernels.hopper.schedule import (
    END,
    FULL_BEGIN,
    FULL_END,
    HIGH,
    KV_LEN,
    LIVE,
    MASKED,
    TILES,
    key_tile,
    word,
)


@jit
def four_bytes(x):
    """float32 as float8e4nv, four at a time. Triton's own conversion joins them byte by byte."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }",
        "=r,r,r,r,r", [x], dtype=gl.float8e4nv, is_pure=True, pack=4,
    )  # fmt: skip


@jit
def as_operand(p, LAYOUT: gl.constexpr):
    """Weights [64, tokens] as the operand that belongs to transposed values: no thread gives any away."""
    N: gl.constexpr = p.shape[1]
    p = gl.reshape(p, [64, N // 16, 2, 4, 2])  # 16 tokens, c, t, b
    p = gl.reshape(gl.permute(p, [0, 1, 3, 2, 4]), [64, N])
    return four_bytes(gl.convert_layout(p, LAYOUT, assert_trivial=True))


@jit
def column_of(n):
    """The column of the values in row n of transposed ones."""
    return n - n % 16 + n % 8 * 2 + n // 8 % 2


@jit
def in_order(x):
    """A result [64, columns] of transposed values with its columns in order: four in a row lie in one thread."""
    N: gl.constexpr = x.shape[1]
    x = gl.reshape(x, [64, N // 16, 2, 8])
    return gl.reshape(gl.permute(x, [0, 1, 3, 2]), [64, N])


@constexpr_function
def pieces(tokens, pairs):
    """The layout of a transposing matrix load of [tokens, pairs] by four warps: 16 tokens x 8 pairs at a time."""
    across = [[0, n] for n in (8, 16, 32) if n < pairs]
    along = [[n, 0] for n in (16, 32, 64) if n < tokens]
    lanes = [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout(
        [[1, 0], [8, 0], *across, *along[:-2]], lanes, along[-2:], [], [tokens, pairs]
    )  # fmt: skip


@jit
def regroup(x):
    """Of the pairs of tokens 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t, which a thread holds one after the other: the first
    element of all of them, then the second one of all."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;", "=r,=r,r,r", [x], dtype=gl.int16, is_pure=True,
        pack=4,
    )  # fmt: skip


@jit
def as_pairs(x):
    """A tile in shared memory of 8-bit elements, as one of 16-bit numbers."""
    WIDTH: gl.constexpr = x.shape[1]
    return reinterpret(x, gl.int16, [x.shape[0], WIDTH // 2], gl.NVMMASharedLayout(WIDTH, 16, rank=2))


@jit
def clear_pairs(values, end):
    """Zero the rows of a tile of 8-bit values from `end` on: as `clear_rows`, with a loop that takes few registers."""
    PAIRS: gl.constexpr = values.shape[1] // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // PAIRS, PAIRS // 8], [4, 1], [1, 0])
    parts = reinterpret(
        values, gl.int16, [values.shape[0] // 16, 16, PAIRS], gl.NVMMASharedLayout(2 * PAIRS, 16, rank=2)
    )  # fmt: skip
    for i in range(end // 16, values.shape[0] // 16):
        part = parts.index(i)
        position = i * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
        part.store(gl.where((position < end)[:, None], part.load(layout), gl.zeros([16, PAIRS], gl.int16, layout)))
    fence_async_shared()
    barrier()


@jit
def transpose_tile(values, to, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """values [BLOCK_N, WIDTH] to `to` [WIDTH, BLOCK_N], in the orders that the module's beginning describes."""
    PAIRS: gl.constexpr = WIDTH // 2
    x = regroup(as_pairs(values).load(pieces(BLOCK_N, PAIRS)))
    x = gl.reshape(x, [BLOCK_N // 16, 2, 4, 2, PAIRS // 8, 8])  # 16 tokens, element, t, c, 8 pairs, pair
    x = gl.permute(x, [4, 1, 5, 0, 2, 3])
    as_pairs(to).store(gl.reshape(x, [WIDTH, BLOCK_N // 2]))


@jit
def transposer(
    v_smem, t_smem, ring, ring_full, ring_empty, v_full, v_empty, t_full, t_empty,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Turn every stage of values that the tiles in the ring need."""
    turn = 0
    step = 0  # key tiles
    mbarrier.wait(ring_full.index(0), 0)
    live = word(ring, 0, LIVE, RING)
    while live > 0:
        tiles = word(ring, turn, TILES, RING)
        kv_len = word(ring, turn, KV_LEN, RING)
        masked = word(ring, turn, MASKED, RING)
        high = word(ring, turn, HIGH, RING)
        end = word(ring, turn, END, RING)
        full_begin = word(ring, turn, FULL_BEGIN, RING)
        full_end = word(ring, turn, FULL_END, RING)
        mbarrier.arrive(ring_empty.index(turn % RING), count=1)
        for i in range(tiles):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(v_full.index(stage), phase)
            if i == 0:
                first = key_tile(0, masked, high, end, full_begin, full_end) * BLOCK_N
                if first + BLOCK_N > kv_len:
                    clear_pairs(v_smem.index(stage), kv_len - first)
            mbarrier.wait(t_empty.index(stage), phase ^ 1)
            transpose_tile(v_smem.index(stage), t_smem.index(stage), BLOCK_N, WIDTH)
            fence_async_shared()
            mbarrier.arrive(v_empty.index(stage), count=1)
            mbarrier.arrive(t_full.index(stage), count=1)
            step += 1
        turn += 1
        mbarrier.wait(ring_full.index(turn % RING), (turn // RING) & 1)
        live = word(ring, turn, LIVE, RING)
