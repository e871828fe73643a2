"""What a tuned config is the answer to: everything that changes the candidates or their speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import Any

from flashloom.dataclass import dataclass
from flashloom.store.entry import Key, digest

__all__ = ["Question", "bucket_of", "ceil_power"]


def ceil_power(n: int) -> int:
    """The smallest power of two that is at least n; 0 for 0. Raises ValueError below 0."""
    if n < 0:
        raise ValueError(f"a size of {n}: must not be negative")
    return 1 << (n - 1).bit_length() if n else 0


def bucket_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """The bucket that shapes of these sizes share, when they are tuned and when they are looked up: each size rounded
    up to a power of two, without an upper end."""
    return tuple(map(ceil_power, sizes))


@dataclass(frozen=True, eq=False)
class Question:
    """One operator with all that is fixed before shapes are known; ask it for a bucket of `sizes`.

    fields: JSON values that identify it: every option that changes the candidates, dtypes, machine, digests of kernel
    sources. Never a path, a time or a name of a process. toolchain: who compiles the kernels, None on a host that
    compiles nothing (then any toolchain's record serves). sizes: what the numbers of a bucket are. read: turns a stored
    config into the operator's own and raises ValueError, TypeError or KeyError for one that it would not offer now.
    label: for people.

    Questions are compared by identity, so that a look-up costs no hashing of contents: keep and reuse them.
    """

    operator: str
    fields: Mapping[str, Any]
    toolchain: Mapping[str, Any] | None
    sizes: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Any] = field(repr=False)
    label: str = ""

    @cached_property
    def digest(self) -> str:
        """Of operator, fields and the meaning of the sizes."""
        return digest({"operator": self.operator, "fields": self.fields, "sizes": sorted(self.sizes)})

    def key(self, bucket: tuple[int, ...]) -> Key:
        """Where the record of this bucket is kept. Raises ValueError for a bucket of another length."""
        if len(bucket) != len(self.sizes):
            raise ValueError(f"bucket {bucket}: give one number each for {', '.join(self.sizes)}")
        return Key.of({"question": self.digest, "bucket": dict(zip(self.sizes, bucket))}, self.toolchain or {})
