"""Where FlashInfer keeps what it builds; flashloom keeps its kernels in a store of its own (`flashloom store ls`)."""

from __future__ import annotations

import os
from pathlib import Path

from flashloom.compat.flashinfer.version import __version__

FLASHINFER_BASE_DIR = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
FLASHINFER_CACHE_DIR = FLASHINFER_BASE_DIR / ".cache" / "flashinfer"
_arch = os.environ.get("FLASHINFER_CUDA_ARCH_LIST", "").replace(" ", "_").replace(".", "") or "flashloom"
FLASHINFER_WORKSPACE_DIR = FLASHINFER_CACHE_DIR / __version__ / _arch
FLASHINFER_JIT_DIR = FLASHINFER_WORKSPACE_DIR / "cached_ops"
FLASHINFER_GEN_SRC_DIR = FLASHINFER_WORKSPACE_DIR / "generated"
FLASHINFER_CUBIN_DIR = FLASHINFER_CACHE_DIR / "cubins"
FLASHINFER_AOT_DIR = FLASHINFER_CACHE_DIR / "aot"


def has_flashinfer_jit_cache() -> bool:
    """True: see `flashinfer.utils`."""
    return True


def has_flashinfer_cubin() -> bool:
    """False: FlashInfer's binaries have no use here."""
    return False
