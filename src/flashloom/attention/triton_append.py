"""`fl.append` on a GPU: one launch that writes a step's keys and values to their slots, quantised where the cache
is."""

from __future__ import annotations

import os
import threading

import torch

from flashloom.attention.about import short
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.triton.asked import KERNELS
from flashloom.kernel import launch
from flashloom.kernel.source import Source
from flashloom.kernel.triton import TritonKernel, pointer
from flashloom.kv_cache.cache import KV, LARGEST
from flashloom.target import Target

__all__ = ["append", "append_kernel", "append_kernels"]

ROWS = 8
STRIDES = (
    "k_token", "k_head", "v_token", "v_head", "kc_page", "kc_token", "kc_head", "vc_page", "vc_token", "vc_head",
    "ks_page", "ks_head", "vs_page", "vs_head",
)  # fmt: skip
_launchers: dict[tuple, launch.Launcher] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that held it is not in this process


os.register_at_fork(after_in_child=_after_fork)


def append_kernels(spec: AttentionSpec, target: Target) -> list[TritonKernel]:
    """Those that write tokens of the queries' dtype or of the cache's own into caches of such layers, with scales and
    without."""
    heads = spec.heads
    sizes = (heads.kv_heads, heads.dim, heads.value_dim)
    return [
        append_kernel(tokens, spec.kv_dtype, *sizes, scaled, not heads.latent_value, target)
        for tokens in dict.fromkeys((spec.out_dtype, spec.kv_dtype))
        for scaled in (False, True)
    ]


def append_kernel(
    k: torch.dtype,
    cache: torch.dtype,
    kv_heads: int,
    dim: int,
    value_dim: int,
    scaled: bool,
    values: bool,
    target: Target,
) -> TritonKernel:
    """The append kernel for tokens of dtype `k` into a cache of dtype `cache`; values: there are values to store."""
    same = k == cache and cache.itemsize == 1  # bytes that stay as they are
    old = not same and int(target.name.removeprefix("sm")) < 89
    mantissa = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}.get(cache, 0) if old else 0
    source, to = ("*i8", "*i8") if same else (pointer(k), "*u8" if mantissa else pointer(cache))
    signature = {"k": source, "v": source, "k_cache": to, "v_cache": to, "k_scale": "*fp32", "v_scale": "*fp32"}
    signature |= {"slots": "*i64", "tokens": "i32", **dict.fromkeys(STRIDES, "i64"), "page_size": "i32"}
    constants = {
        "KV_HEADS": kv_heads, "DIM": dim, "VALUE_DIM": value_dim, "BLOCK_D": 1 << (max(dim, value_dim) -
        1).bit_length(), "ROWS": ROWS, "SCALED": scaled and not same, "HIGHEST": 0.0 if same else LARGEST.get(cache,
        0.0), "MANTISSA": mantissa, "VALUES": values,
    }  # fmt: skip
    dtypes = short(k) if k == cache else f"{short(k)}, {short(cache)} KV"
    told = {"kernel": "append to the cache", "heads": f"{kv_heads}x{dim}", "dtypes": dtypes}
    return TritonKernel(Source(f"{KERNELS}.append", "append"), signature, constants, (), target, 4, 1, told)


def append(kv: KV, k: torch.Tensor, v: torch.Tensor | None, slots: torch.Tensor) -> None:
    """Store k and v (None for a latent cache) at `slots`; arguments as validated by `fl.append`. Waits for nothing."""
    tokens, kv_heads, dim = k.shape
    scaled = kv.k_scale is not None or kv.v_scale is not None
    key = (k.dtype, kv.k.dtype, kv_heads, dim, kv.v.shape[-1], scaled, v is not None, k.device)
    kernel = _launchers.get(key)
    if kernel is None:
        with _lock:
            if key not in _launchers:
                target = Target.of(k.device) if k.is_cuda else Target("sm90")  # of no meaning in the interpreter
                _launchers[key] = launch.launcher(append_kernel(*key[:-1], target), k.device)
            kernel = _launchers[key]
    values = k if v is None else v.to(k.dtype)
    k_scale, v_scale = (
        s if s is not None else (kv.v_scale if kv.k_scale is None else kv.k_scale) for s in (kv.k_scale, kv.v_scale)
    )
    if (kv.k_scale is None) != (kv.v_scale is None):
        one = torch.ones(1, dtype=torch.float32, device=k.device)
        k_scale, v_scale = kv.k_scale if kv.k_scale is not None else one, kv.v_scale if kv.v_scale is not None else one
    tensors = (k, values, kv.k, kv.v, k_scale, v_scale, slots)
    places = (
        tuple(0 if t is None else t.data_ptr() for t in tensors)
        if k.is_cuda
        else tuple(k if t is None else t for t in tensors)
    )
    strides = (
        *k.stride()[:2],
        *values.stride()[:2],
        *kv.k.stride()[:3],
        *kv.v.stride()[:3],
        *_scale(k_scale),
        *_scale(v_scale),
    )
    with _lock:  # threads share the memory in which a launcher packs its arguments
        kernel(-(-tokens * kv_heads // ROWS), (*places, tokens, *strides, kv.k.shape[1]))


def _scale(scale: torch.Tensor | None) -> tuple[int, int]:
    if scale is None or scale.numel() == 1:
        return 0, 0
    return (scale.stride(0), scale.stride(1)) if scale.dim() == 2 else (0, scale.stride(0))
