"""How the attention kernel is cut to size: candidate configs, when they are valid, and the one to start with.

Pure: numbers in, numbers out. A tuner may search `candidates`; `choose` is what serves without one.
"""

from __future__ import annotations

from dataclasses import replace

from flashloom.dataclass import dataclass

__all__ = ["OFFERED", "PAIRS", "Config", "Need", "candidates", "choose", "pieces", "shared_limit", "split", "valid"]

# dynamic shared memory a block may ask for, bytes (CUDA C++ Programming Guide, compute capabilities)
SHARED = {
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}


# requests times kv heads from which latent attention takes blocks of 64 rows, decode takes long tiles, and programs
# that share a multiprocessor
PAIRS = (5, 32, 512)


@dataclass(frozen=True)
class Need:
    """What is asked: query heads per kv head, kv heads, widths, bytes per element of queries and keys, packed rows
    (query tokens * group) of
    the longest and of the mean request, page size (0: a request is one run of tokens), compute capability;
    pairs: requests times kv heads."""

    group: int
    kv_heads: int
    dim: int
    value_dim: int
    q_bytes: int
    kv_bytes: int
    max_rows: int
    mean_rows: int
    page_size: int
    capability: int
    invariant: bool = False
    latent: bool = False
    key_transform: bool = False
    pairs: int = 1


@dataclass(frozen=True)
class Config:
    """block_m packed query rows against tiles of block_n keys, num_stages of them in flight; resident: programs per
    multiprocessor that the
    planner counts on."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    resident: int

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages, {self.resident} per SM"
        )


#: Values of each field that are ever offered.
OFFERED: dict[str, tuple[int, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "resident": (1, 2, 3, 4),
}


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least` (16: the least width of a matrix instruction)."""
    return max(least, 1 << (n - 1).bit_length())


def split(dim: int, least: int = 32) -> tuple[int, int]:
    """A width as one or two powers of two that cover it with the least waste: 128 -> (128, 0), 576 -> (512, 64),
    80 -> (64, 32). None is below `least`."""
    whole = power_of_two(dim, least)
    first = whole // 2
    if first < least or dim <= first:
        return whole, 0
    rest = power_of_two(dim - first, least)
    return (first, rest) if first + rest < whole else (whole, 0)


def pieces(
    dim: int, value_dim: int, made: tuple[bool, bool], block_m: int, capability: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """How keys and values are split. made: which of them (keys, values) pass through registers, converted or
    transformed, before they are multiplied.

    Such tiles lie in shared memory one after another at the same address, and Hopper's products find them by
    descriptors, which depend on the swizzle, which depends on the width: 32, or 64 and more. ptxas 12.8 loses the
    address where descriptors of two swizzles begin there. So all of these tiles have one."""
    parts = (split(dim), split(value_dim))
    widths = {width for part, own in zip(parts, made) if own for width in part if width}
    if capability == 90 and block_m >= 64 and 32 in widths and len(widths) > 1:
        parts = (split(dim, 64 if made[0] else 32), split(value_dim, 64 if made[1] else 32))
    return parts


def shared_limit(capability: int) -> int:
    return SHARED.get(capability, 99 << 10)


def widths(config: Config, need: Need) -> tuple[int, int]:
    """Columns of a tile of keys and of one of values."""
    converted = need.kv_bytes != need.q_bytes
    made = (converted or need.key_transform, converted)
    keys, values = pieces(need.dim, need.value_dim, made, config.block_m, need.capability)
    return sum(keys), sum(values)


def shared_bytes(config: Config, need: Need) -> int:
    """An upper estimate of the shared memory a config takes."""
    width, values = widths(config, need)
    values = 0 if need.latent else values
    tiles = config.block_n * (width + values) * need.kv_bytes * (config.num_stages - 1)
    if config.num_stages == 1:  # one operand at a time
        tiles = config.block_n * max(width, values) * need.kv_bytes
    if (
        need.kv_bytes != need.q_bytes or need.key_transform or config.block_m >= 64
    ):  # operands that pass through shared memory once more
        tiles += (
            config.block_n
            * max(width, values)
            * (need.q_bytes if need.kv_bytes != need.q_bytes or need.key_transform else need.kv_bytes)
        )
    return tiles + config.block_m * (width + config.block_n) * max(need.q_bytes, 2) + 1024


def registers(config: Config, need: Need) -> int:
    """Registers per thread for accumulators and scores."""
    return config.block_m * (widths(config, need)[1] + config.block_n) // (32 * config.num_warps)


def valid(config: Config, need: Need) -> bool:
    """Whether the config compiles for the need without spilling, as far as sizes tell."""
    if need.q_bytes == 4 and config.block_m * config.block_n > 64 * 32:
        return False
    return shared_bytes(config, need) <= shared_limit(need.capability) and registers(config, need) <= 192


def candidates(need: Need) -> list[Config]:
    """All configs worth trying."""
    rows = sorted({min(power_of_two(need.max_rows), 128), 64} if need.max_rows > 16 else {16})
    found = [
        Config(m, n, warps, stages, resident)
        for m in rows
        for n in (32, 64, 128)
        for warps in ((4, 8) if m >= 64 else (1, 2, 4))
        for stages in (2, 3, 4)
        for resident in (1, 2, 3, 4)
        if resident * warps * 32 <= 1024
    ]
    return [
        c
        for c in found
        if valid(c, need) and shared_bytes(c, need) * c.resident <= shared_limit(need.capability) + 1024
    ]


def choose(need: Need) -> Config:
    """The config that serves when nothing was tuned."""
    wide = max(need.dim, need.value_dim)
    rows = 64 if need.invariant else min(power_of_two(need.max_rows), 128)
    if need.mean_rows <= 64:  # a few long requests among many short ones do not pay for large blocks
        rows = min(rows, 64)
    if need.q_bytes == 4:
        config = Config(
            16 if rows == 16 else 32, 32 if wide <= 256 else 16, 4 if rows == 16 and wide <= 128 else 8, 2, 1
        )
    elif wide > 256 and rows >= 64 and need.capability < 100 and (need.pairs >= PAIRS[0] or need.invariant):
        config = Config(64, 64, 8, 2, 1)
    elif wide > 256:
        config = Config(16, 64 if need.latent else 32, 4, 2, 1)
    elif need.key_transform:
        config = Config(min(rows, 64), 32, 4 if rows == 16 else 8, 2, 1)
    elif rows >= 64 and need.kv_bytes == 1 and need.capability < 89:  # float8 is taken apart bit by bit
        config = Config(64, 32, 8, 2, 1)
    elif rows == 128 and wide <= 128:
        config = Config(128, 64, 8, 3, 1)
    elif rows >= 64:
        config = Config(64, 64, 4, 3, 2) if wide <= 128 else Config(64, 64, 8, 2, 1)
    elif wide > 128 or rows > 16:
        config = Config(rows, 64 if wide <= 128 else 32, 4, 3, 2)
    elif need.kv_bytes == 1:
        config = Config(rows, 128, 4, 3, 2)
    elif need.pairs >= PAIRS[2]:
        config = Config(rows, 128, 4, 2, 3)
    else:
        config = Config(rows, 128 if need.pairs >= PAIRS[1] else 64, 4, 3, 1)
    while not valid(config, need):
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = replace(config, block_m=config.block_m // 2)
        elif config.num_warps < 8:
            config = replace(config, num_warps=config.num_warps * 2)
        elif config.num_stages > 1:
            config = replace(config, num_stages=1)
        else:
            raise ValueError(
                f"no config for head widths {need.dim} and {need.value_dim} fits compute capability {need.capability}"
            )
    return config
