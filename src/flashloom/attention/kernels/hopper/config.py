"""How the Hopper kernel is cut to size. Pure: numbers in, numbers out."""

from __future__ import annotations

from typing import Any

from flashloom.dataclass import dataclass

__all__ = ["ROWS", "Config", "box_rows", "choose", "cuts", "pack", "width"]

ROWS = 64  # packed query rows of a consumer
SHARED = 225 << 10  # bytes of shared memory for tiles
RING = 1  # tiles the scheduler prepares ahead
LEAST = 4  # key tiles of a range, where a tile's keys are cut
LEAST_BOX = 8  # rows of a copy by a tensor map: the swizzle repeats after so many


@dataclass(frozen=True)
class Config:
    """consumers of 64 packed query rows each share a tile of block_n keys, stages of which are in flight; pack query
    heads of a group share a tile; box rows per copy of keys; registers per thread of a consumer, and of the other
    warps. Of 8-bit elements four more warps have what those leave (`transposer_registers`)."""

    consumers: int
    block_n: int
    stages: int
    pack: int
    box: int
    registers: int
    other_registers: int

    @property
    def block_m(self) -> int:
        """Packed query rows of a tile."""
        return self.consumers * ROWS

    def __str__(self) -> str:
        heads = f", {self.pack} heads packed" if self.pack > 1 else ""
        copies = f"copies of {self.box} keys" if self.box > 1 else "keys copied one by one"
        return f"{self.block_m}x{self.block_n}, {self.stages} stages, {copies}{heads}"


def width(dim: int) -> int:
    """Columns in shared memory: a power of two, and full rows of the swizzle."""
    return max(64, 1 << (dim - 1).bit_length())


def box_rows(page_size: int, block_n: int) -> int:
    """Keys per copy, all within one page; page_size 0: a request is one run of tokens. 1: tensor maps cannot do it."""
    box = block_n if page_size == 0 else min(page_size & -page_size, block_n)
    return box if box >= LEAST_BOX else 1


def pack(group: int, mean_q_len: int) -> int:
    """How many heads of a group share a tile. Long queries fill tiles by themselves, and then a head's number is the
    same for all rows, which makes the hooks cheaper."""
    if mean_q_len >= 256:
        return 1
    return min(group & -group, 64)


def cuts(q_lens: Any, kv_lens: Any, config: Config, groups: int, programs: int) -> bool:
    """Whether some request's keys are worth cutting into ranges, for a batch of these lengths (arrays of numpy) and
    `groups` of heads: the planner's rule (`kernels/triton/plan.py`)."""
    blocks = -(-q_lens * config.pack // config.block_m)
    tiles = -(-kv_lens // config.block_n)
    longest = int(tiles.max(initial=1, where=blocks > 0))
    limit = -(-int(blocks.astype("int64") @ tiles) * groups // programs)
    if longest < limit < 1.6 * longest:
        limit = -(-limit // 2)
    return longest >= 1.3 * max(limit, LEAST)


def tile_bytes(config: Config, dim: int, value_dim: int, q_tiles: int, itemsize: int = 2) -> int:
    """Shared memory for tiles of queries, keys, values and results. 8-bit values lie there twice, and their results
    have 16 bits."""
    keys, values = width(dim), width(value_dim)
    kv = config.stages * config.block_n * (keys + (2 if itemsize == 1 else 1) * values)
    return config.block_m * (q_tiles * keys * itemsize + 2 * values) + kv * itemsize


def q_stages(config: Config, dim: int, value_dim: int, itemsize: int = 2) -> int:
    """Tiles of queries in shared memory: two where they fit, so that the next ones are there in time."""
    return 2 if tile_bytes(config, dim, value_dim, 2, itemsize) <= SHARED else 1


def row_warps(config: Config, dim: int, value_dim: int, itemsize: int) -> int:
    """Warps that copy keys and values row by row: a warpgroup, unless there is a transposer beside it or the products
    are so wide that no more than three fit."""
    return 4 if itemsize > 1 and max(width(dim), width(value_dim)) <= 128 else 2


def scheduler_registers(config: Config, warps: int) -> int:
    """Registers per thread of the scheduler where keys are copied row by row by so many warps: what the others leave,
    where it is in a warpgroup of its own."""
    return 512 - config.consumers * config.registers - config.other_registers if warps == 4 else config.other_registers


def transposer_registers(config: Config) -> int:
    """Registers per thread of the transposing warpgroup: what the others leave of a multiprocessor's."""
    return min(512 - config.consumers * config.registers - config.other_registers, 64)


def choose(
    dim: int,
    value_dim: int,
    group: int,
    mean_q_len: int,
    page_size: int,
    invariant: bool,
    heavy: bool = False,
    spare: bool = False,
    itemsize: int = 2,
) -> Config:
    """The config for head widths and a batch's mean query; invariant: it may not depend on the batch; heavy: the logits
    go through special functions, whose temporaries want the registers of a smaller tile; spare: the hooks leave the
    registers of narrow heads to a third consumer; itemsize: bytes of an element."""
    widest = max(width(dim), width(value_dim))
    block_n = 64 if heavy or widest > 128 else 128
    box = box_rows(page_size, block_n)
    heads = 1 if invariant else pack(group, mean_q_len)
    if itemsize == 1:  # what these leave is for the warps that transpose the values
        registers, others = (224, 24) if box > 1 else (216, 40)
        return Config(2, block_n, 2, heads, box, registers, others)
    if box == 1 and widest <= 128:  # what these leave is for the scheduler
        return Config(2, block_n, 2, heads, box, 224, 40)
    if widest == 64 and spare and not heavy:  # a third consumer fills the time that the softmax of two leaves
        return Config(3, block_n, 2, heads, box, 160, 32)
    return Config(2, block_n, 2, heads, box, 232, 40)
