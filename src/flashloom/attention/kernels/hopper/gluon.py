"""The part of Gluon that the kernels use, under one set of names: Triton 3.9 renamed some of them."""

from triton.experimental import gluon as _gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy as _async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.language.nvidia.hopper import tma as _tma

from triton import constexpr_function

__all__ = [
    "barrier",
    "constexpr_function",
    "copy_rows",
    "copy_rows_commit",
    "copy_rows_wait",
    "fence_async_shared",
    "gl",
    "jit",
    "mbarrier",
    "reinterpret",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]

jit = _gluon.jit
tma_load = _tma.async_load if hasattr(_tma, "async_load") else _tma.async_copy_global_to_shared
tma_store = _tma.async_store if hasattr(_tma, "async_store") else _tma.async_copy_shared_to_global
tma_store_wait = _tma.store_wait
copy_rows = _async_copy.async_load if hasattr(_async_copy, "async_load") else _async_copy.async_copy_global_to_shared
copy_rows_commit = _async_copy.commit_group
copy_rows_wait = _async_copy.wait_group
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret
