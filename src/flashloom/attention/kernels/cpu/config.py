"""How the CPU kernels cut their work: what can be chosen, and which choices a batch is worth trying.

Pure: numbers in, numbers out. Zeros, the default, leave a choice to the kernels (schedule.h, decode.h)."""

from __future__ import annotations

from dataclasses import replace

from flashloom.dataclass import dataclass

__all__ = ["DEFAULT", "OFFERED", "Config", "candidates"]

DECODE_ROWS = 12  # requests with up to so many rows are decoded (attention.h; fewer where vectors are narrow)
#: Values of each field that are ever offered.
OFFERED: dict[str, tuple[int, ...]] = {
    "pieces": (0, 1, 2, 8, 16),
    "shortest": (0, 64, 128, 512, 1024, 4096),
    "state_kib": (0, 64, 128, 1024, 4096),
    "decode_rows": (0, 1),
    "block_rows": (0, 32, 64, 128, 256, 512),
    "decode_keys": (0, 32, 64),
    "vector_decode": (0, 1),
}


@dataclass(frozen=True)
class Config:
    """pieces of work per thread; shortest: keys of a piece of decode, at least; state_kib: of decode rows per piece
    that should stay in the cache; decode_rows: requests with up to so many rows are decoded, others take the kernel for
    many rows; block_rows: rows of a piece of the latter, at most. The last two make other kernels: decode_keys of a
    block, and vector_decode without AMX tiles."""

    pieces: int = 0
    shortest: int = 0
    state_kib: int = 0
    decode_rows: int = 0
    block_rows: int = 0
    decode_keys: int = 0
    vector_decode: int = 0

    def __str__(self) -> str:
        said = [f"{name} {value}" for name, value in vars(self).items() if value]
        return ", ".join(said) or "as the kernel chooses"

    @property
    def defines(self) -> dict[str, int]:
        """What the compiler is told."""
        told = {"FL_DECODE_KEYS": self.decode_keys, "FL_VECTOR_DECODE": self.vector_decode}
        return {name: value for name, value in told.items() if value}


DEFAULT = Config()


def candidates(max_rows: int, mean_kv: int, kv_heads: int, tiles: bool) -> list[Config]:
    """Configs worth trying, the likeliest first, for packed rows of the longest request, keys of the mean one and
    heads; tiles: decode can use AMX tiles. The default is the first."""
    base = DEFAULT
    found = [base]
    if max_rows <= DECODE_ROWS:
        found += [replace(base, shortest=n) for n in OFFERED["shortest"][1:] if n <= max(2 * mean_kv, 64)]
        found += [replace(base, pieces=n) for n in OFFERED["pieces"][1:]]
        if kv_heads > 1:
            found += [replace(base, state_kib=n) for n in OFFERED["state_kib"][1:]]
        found += [Config(pieces=2, shortest=1024), Config(pieces=8, shortest=128), Config(pieces=1, state_kib=4096)]
        if max_rows > 1:
            found.append(replace(base, decode_rows=1))
        keys = [n for n in OFFERED["decode_keys"][1:] if n != (64 if tiles else 32)]
        found += [replace(base, decode_keys=n) for n in keys]
        if tiles:
            found += [replace(base, vector_decode=1), replace(base, vector_decode=1, decode_keys=64)]
    else:
        found += [replace(base, block_rows=n) for n in reversed(OFFERED["block_rows"]) if 0 < n < 2 * max_rows]
        found += [replace(base, pieces=n) for n in OFFERED["pieces"][1:]]
        found += [Config(pieces=8, block_rows=n) for n in (64, 128, 256) if n < 2 * max_rows]
    return list(dict.fromkeys(found))
