"""Configs of the Hopper kernel that are worth trying beside the one that serves without tuning. Pure: numbers in and
out."""

from __future__ import annotations

from dataclasses import replace

from flashloom.attention.kernels.hopper.config import (
    LEAST_BOX,
    Config,
    box_rows,
    row_warps,
    scheduler_registers,
    tile_bytes,
    transposer_registers,
    width,
)
from flashloom.attention.shape import HeadShape

__all__ = ["OFFERED", "candidates", "valid"]

SHARED = 227 << 10  # bytes of shared memory a block may ask for
REGISTERS = 64 << 10  # of a multiprocessor
POWERS = tuple(1 << n for n in range(8))
#: Values of each field that are ever offered.
OFFERED: dict[str, tuple[int, ...]] = {
    "consumers": (2, 3),
    "block_n": (32, 64, 80, 96, 112, 128, 160, 192),
    "stages": (2, 3, 4),
    "pack": POWERS,
    "box": (1, *range(LEAST_BOX, 257, LEAST_BOX)),
    "registers": tuple(range(24, 241, 8)),
    "other_registers": tuple(range(24, 241, 8)),
}


def valid(config: Config, heads: HeadShape, page_size: int, itemsize: int = 2) -> bool:
    """Whether the kernel computes these heads, elements of `itemsize` bytes, with these pages (0: a request is one run
    of tokens), and fits."""
    keys, values, consumers = width(heads.dim), width(heads.value_dim), config.consumers
    rows = consumers * 64 * (keys + (0 if keys == values == 256 else values))
    size = 2 * (rows + config.stages * config.block_n * (keys + values)) + 2048
    if itemsize == 1:
        size = tile_bytes(config, heads.dim, heads.value_dim, 1, 1) + 2048
        if consumers != 2 or config.block_n not in (64, 128) or transposer_registers(config) < 40:
            return False
    if config.box == 1:
        warps = row_warps(config, heads.dim, heads.value_dim, itemsize)
        if consumers != 2 or scheduler_registers(config, warps) < 24:
            return False
    threads = consumers * 128 * config.registers + 4 * 32 * config.other_registers
    return (
        size <= SHARED
        and threads <= REGISTERS
        and heads.group % config.pack == 0
        and config.pack <= 64
        and config.box == box_rows(page_size, config.block_n)
    )


def candidates(default: Config, heads: HeadShape, page_size: int, itemsize: int = 2) -> list[Config]:
    """Other tiles, stages in flight, heads packed and registers, of which the valid ones are answered."""
    found = []
    for block_n in (64, 128):
        box = box_rows(page_size, block_n)
        for stages in (2, 3):
            for pack in (n for n in POWERS if heads.group % n == 0 and n <= 64):
                one = replace(default, block_n=block_n, stages=stages, pack=pack, box=box)
                found.append(one)
                if itemsize == 1:
                    found += [replace(one, registers=a, other_registers=b) for a, b in ((216, 24), (216, 40))]
                elif default.consumers == 2:
                    shares = ((216, 48), (208, 64)) if box == 1 else ((216, 72), (224, 56))
                    found += [replace(one, registers=a, other_registers=b) for a, b in shares]
    if itemsize > 1 and max(width(heads.dim), width(heads.value_dim)) == 64:
        three = {"consumers": 3, "registers": 160, "other_registers": 32}
        two = {"consumers": 2, "registers": 232, "other_registers": 40}
        found.append(replace(default, **(three if default.consumers == 2 else two)))
    return [
        config for config in dict.fromkeys(found) if config != default and valid(config, heads, page_size, itemsize)
    ]
