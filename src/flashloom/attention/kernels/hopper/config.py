"""How the Hopper kernel is cut to size. Pure: numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLOCK_M", "Config", "box_rows", "choose", "pack", "width"]

BLOCK_M = 128  # packed query rows of a tile: two consumers of 64
RING = 1  # tiles the scheduler prepares ahead
LEAST_BOX = 8  # rows of a copy: the swizzle repeats after so many


@dataclass(frozen=True)
class Config:
    """block_n keys per tile, stages of them in flight; pack query heads of a group share a tile; box rows per copy of
    keys; registers per thread of a consumer, and of the producer and the scheduler."""

    block_n: int
    stages: int
    pack: int
    box: int
    registers: int
    other_registers: int

    def __str__(self) -> str:
        heads = f", {self.pack} heads packed" if self.pack > 1 else ""
        return f"{BLOCK_M}x{self.block_n}, {self.stages} stages, copies of {self.box} keys{heads}"


def width(dim: int) -> int:
    """Columns in shared memory: a power of two, and full rows of the swizzle."""
    return max(64, 1 << (dim - 1).bit_length())


def box_rows(page_size: int, block_n: int) -> int:
    """Keys per copy, all within one page; page_size 0: a request is one run of tokens."""
    return block_n if page_size == 0 else min(page_size & -page_size, block_n)


def pack(group: int, mean_q_len: int) -> int:
    """How many heads of a group share a tile. Long queries fill tiles by themselves, and then a head's number is the
    same for all rows, which makes the hooks cheaper."""
    if mean_q_len >= 2 * BLOCK_M:
        return 1
    return min(group & -group, 64)


def choose(
    dim: int, value_dim: int, group: int, mean_q_len: int, page_size: int, invariant: bool, heavy: bool = False
) -> Config:
    """The config for head widths and a batch's mean query; invariant: it may not depend on the batch; heavy: the logits
    go through special functions, whose temporaries want the registers of a smaller tile."""
    wide = max(width(dim), width(value_dim)) > 128
    block_n = 64 if heavy or wide else 128
    box = box_rows(page_size, block_n)
    heads = 1 if invariant else pack(group, mean_q_len)
    # many copies per tile want registers for the page numbers; wide accumulators have none to give
    registers, others = (216, 72) if block_n >= 8 * box and not wide else (232, 40)
    return Config(block_n, 2, heads, box, registers, others)
