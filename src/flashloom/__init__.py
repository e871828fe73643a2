"""flashloom: attention variants written as torch code, compiled into fast kernels for the machine at hand.

The public names are imported when they are first used, so that `flashloom --help` is quick and `flashloom doctor`
works where torch cannot be imported.
"""

import os
import sys
import threading
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashloom._public import (
        Attention,
        Batch,
        Bits,
        BlockSparseKV,
        DenseKV,
        FlashloomError,
        HeadShape,
        Monitor,
        Pack,
        PagedKVCache,
        PageTable,
        PerHead,
        PerKeyToken,
        PerKVHead,
        PerQueryToken,
        PerRequest,
        Plan,
        RaggedKV,
        Reserve,
        Scalar,
        SealedError,
        Target,
        TraceError,
        Variant,
        Workload,
        alibi,
        alibi_slopes,
        append,
        attention,
        autotune,
        bench,
        causal,
        configure,
        custom_mask,
        document_mask,
        from_flex,
        full,
        length_temperature,
        merge,
        monitor,
        packed_mask,
        prefix_lm,
        prepare,
        rope,
        rope_frequencies,
        seal,
        sigmoid,
        sink,
        sliding_window,
        softcap,
        tune,
        tune_cache_path,
        use,
        workloads,
    )  # fmt: skip

# module -> the public names that live there
_PUBLIC = {
    "attention": ("Attention", "Batch", "BlockSparseKV", "HeadShape", "Plan", "Reserve", "attention", "merge"),
    "bench": ("Workload", "bench", "workloads"),
    "errors": ("FlashloomError",),
    "kv_cache": ("DenseKV", "PageTable", "PagedKVCache", "RaggedKV", "append"),
    "monitor": ("Monitor", "monitor"),
    "pack": ("Pack", "prepare"),
    "settings": ("configure",),
    "store": ("SealedError", "seal", "use"),
    "target": ("Target",),
    "tune": ("autotune", "tune", "tune_cache_path"),
    "variant": (
        "Bits", "PerHead", "PerKVHead", "PerKeyToken", "PerQueryToken", "PerRequest", "Scalar", "TraceError", "Variant",
        "alibi", "alibi_slopes", "causal", "custom_mask", "document_mask", "from_flex", "full", "length_temperature",
        "packed_mask", "prefix_lm", "rope", "rope_frequencies", "sigmoid", "sink", "sliding_window", "softcap",
    ),
}  # fmt: skip
_HOME = {name: f"flashloom.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "Attention", "Batch", "Bits", "BlockSparseKV", "DenseKV", "FlashloomError", "HeadShape", "Monitor", "Pack",
    "PageTable", "PagedKVCache", "PerHead", "PerKVHead", "PerKeyToken", "PerQueryToken", "PerRequest", "Plan",
    "RaggedKV", "Reserve", "Scalar", "SealedError", "Target", "TraceError", "Variant", "Workload", "alibi",
    "alibi_slopes", "append", "attention", "autotune", "bench", "causal", "configure", "custom_mask",
    "document_mask", "from_flex", "full", "length_temperature", "merge", "monitor", "packed_mask", "prefix_lm",
    "prepare", "rope", "rope_frequencies", "seal", "sigmoid", "sink", "sliding_window", "softcap", "tune",
    "tune_cache_path", "use", "workloads",
]  # fmt: skip


class _Package(ModuleType):
    # Threads that import packages and their parts at the same time for the first time can meet parts of modules. The
    # modules below use no public name while they are imported, so nobody who waits for the lock holds up its holder.
    _importing = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            self.__dict__[name] = found = _version()
            return found
        if name not in _HOME:
            raise AttributeError(f"module 'flashloom' has no attribute {name!r}{_meant(name)}")
        with _Package._importing:
            self.__dict__[name] = getattr(import_module(_HOME[name]), name)
        return self.__dict__[name]

    def __setattr__(self, name: str, value: object) -> None:
        # importing the package flashloom.attention must not hide the function fl.attention; likewise bench
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*(name for name in self.__dict__ if name.startswith("__")), "__version__", *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("flashloom")
    except PackageNotFoundError:
        return "0+unknown"  # sources on the path, not installed


def _meant(name: str) -> str:
    import difflib

    near = () if name.startswith("_") else difflib.get_close_matches(name, __all__, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _after_fork() -> None:
    _Package._importing = threading.RLock()  # a thread that held it is not in this process


os.register_at_fork(after_in_child=_after_fork)
sys.modules[__name__].__class__ = _Package
