"""Descriptions of modules. A flashloom kernel depends on more than FlashInfer's modules are named by (head counts, the
batch), so building one of these ahead has nothing to do: plan() does it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("flashloom.compat.flashinfer")


@dataclass(frozen=True)
class JitSpec:
    """A module by name. Its kernels are built by the plans that need them."""

    name: str
    is_compiled: bool = True
    is_aot: bool = True

    def build(self, verbose: bool = False, **others: Any) -> None:
        """Nothing to do: plans build."""

    def build_and_load(self, **others: Any) -> JitSpec:
        """Nothing to load: plans load."""
        return self


class MissingJITCacheError(RuntimeError):
    """A module is not there and may not be built; see flashloom.SealedError for that in flashloom."""

    def __init__(self, message: str = "", spec: JitSpec | None = None):
        super().__init__(message)
        self.spec = spec


def generator(kind: str) -> Callable[..., JitSpec]:
    """A function that names a module by its arguments."""

    def gen(*args: Any, **options: Any) -> JitSpec:
        parts = [*args, *(value for _, value in sorted(options.items()))]
        return JitSpec("_".join([kind, *(str(part).removeprefix("torch.") for part in parts)]))

    gen.__name__ = gen.__qualname__ = f"gen_{kind}_module"
    gen.__doc__ = f"Name the {kind} module of these arguments."
    return gen


def build_jit_specs(specs: Iterable[JitSpec], verbose: bool = False, skip_prebuilt: bool = True) -> None:
    """Nothing to do: plans build."""


def clear_cache_dir() -> None:
    """Empty flashloom's store of kernels."""
    from flashloom.store import default_folder, evict

    folder = default_folder()
    folder.remove_old(seconds=0)
    evict.prune(folder, 0)


def check_cuda_arch() -> None:
    """Any GPU that Triton serves will do; plans say what they cannot."""
