"""How tiles of keys and values that come page by page lie in shared memory.

Copies of the tensor memory accelerator are no wider than 128 bytes, the swizzle's row; so a page of wide heads takes
several, and each takes its time however small it is. Here one copy brings a whole page: a tensor map of five
dimensions, [pages, groups of 8 tokens, chunks of 64 columns, 8 tokens, 64 columns], fills shared memory in that order.
The tensor cores can read it, because the step from one group of 8 tokens to the next is the same throughout a tile.
"""

from flashloom.attention.kernels.hopper.gluon import (
    barrier,
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    reinterpret,
)


@constexpr_function
def by_groups(rows, chunks):
    """[rows, chunks * 64] of 16 bits: groups of 8 rows, of each its chunks, swizzled by 128 bytes."""
    columns = [[0, 1 << n] for n in range(6)]
    swizzled = [[1 << n, 8 << n] for n in range(3)]
    beside = [[0, 64 << n] for n in range(chunks.bit_length() - 1)]
    groups = [[8 << n, 0] for n in range((rows // 8).bit_length() - 1)]
    return gl.SharedLinearLayout(columns + swizzled + beside + groups, [], 1024)


@jit
def tile_of(stage, CHUNKS: gl.constexpr):
    """A stage [rows, columns] as an operand."""
    if CHUNKS == 1:
        return stage
    else:
        return reinterpret(stage, stage.dtype, [stage.shape[0], stage.shape[1]], by_groups(stage.shape[0], CHUNKS))


@jit
def lines_of(stage, CHUNKS: gl.constexpr):
    """A stage [rows, columns] in the order of its memory: [rows * CHUNKS, columns / CHUNKS]."""
    if CHUNKS == 1:
        return stage
    else:
        return reinterpret(stage, stage.dtype, [stage.shape[0] * CHUNKS, 64], gl.NVMMASharedLayout(128, 16, rank=2))


@jit
def clear_rows(stage, first, end, BLOCK_N: gl.constexpr, CHUNKS: gl.constexpr):
    """Zero the rows of a stage from position `end` on, so that a weight of 0 meets no NaN there."""
    lines = lines_of(stage, CHUNKS)
    WIDTH: gl.constexpr = lines.shape[1]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 * 8 // WIDTH, WIDTH // 8] if WIDTH < 256 else [1, 32], [4, 1], [1, 0]
    )
    for i in gl.static_range(BLOCK_N // 16):
        if first + i * 16 + 16 > end:
            part = lines.slice(i * 16 * CHUNKS, 16 * CHUNKS, dim=0)
            line = gl.arange(0, 16 * CHUNKS, gl.SliceLayout(1, layout))
            position = first + i * 16 + line // (8 * CHUNKS) * 8 + line % 8
            x = part.load(layout)
            part.store(gl.where((position < end)[:, None], x, gl.zeros([16 * CHUNKS, WIDTH], x.dtype, layout)))
    fence_async_shared()
    barrier()


@jit
def boxes_of(stage, BOX: gl.constexpr, CHUNKS: gl.constexpr):
    """The parts of a stage that copies of BOX rows fill."""
    return reinterpret(
        stage, stage.dtype, [stage.shape[0] // BOX, 1, BOX // 8, CHUNKS, 8, 64], gl.NVMMASharedLayout(128, 16, rank=5)
    )
