"""Writing a step's keys and values into the cache, quantised where the cache is."""

from __future__ import annotations

import torch

from flashloom.kv_cache.cache import KV, KV_DTYPES, LARGEST
from flashloom.kv_cache.integers import on_host
from flashloom.variant.plain import plain

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def append(kv: KV, k: torch.Tensor, v: torch.Tensor | None, slots: torch.Tensor) -> None:
    """Store k [tokens, kv_heads, dim] and v [tokens, kv_heads, value_dim] at `slots` int64 [tokens] (page * page_size
    + offset; -1 skips the token; `batch.slots()` gives them) of a cache's layer.

    A quantised cache stores value / scale, rounded to nearest even and saturated; values of the cache's own dtype are
    stored as they are. For a latent cache (`HeadShape.mla`) v is None, or a view of k. Two tokens must not share a
    slot. Raises TypeError or ValueError; slots on a device are not read."""
    if not isinstance(kv, KV):
        raise TypeError(f"append's first argument is {type(kv).__name__}: give one layer of a cache, cache[i]")
    latent = kv.v.data_ptr() == kv.k.data_ptr() and kv.v.stride() == kv.k.stride()
    _check_tokens("k", k, kv.k)
    if v is None and not latent:
        raise TypeError("v is None: only a latent cache (HeadShape.mla) takes keys alone; give v")
    if v is not None:
        _check_tokens("v", v, kv.v)
        if v.shape[0] != k.shape[0]:
            raise ValueError(f"k has {k.shape[0]} tokens and v {v.shape[0]}: must be the same")
        if latent and v.data_ptr() != k.data_ptr():
            raise ValueError(
                "this cache's values are the first elements of its keys: pass v=None, or v=k[..., :latent]"
            )
    _check_slots(slots, k.shape[0], kv.k)
    from flashloom import dispatch

    kernel = dispatch.append_kernel(kv.k.device)
    if kernel is not None:
        kernel(kv, k, None if latent else v, slots)
    else:
        append_reference(kv, k, None if latent else v, slots)


def append_reference(kv: KV, k: torch.Tensor, v: torch.Tensor | None, slots: torch.Tensor) -> None:
    """The definition of `append`, in torch; arguments as validated there (v is None for a latent cache). Waits for a
    GPU, to drop skipped tokens."""
    kept = slots >= 0
    if not bool(kept.all()):
        slots, k, v = slots[kept], k[kept], None if v is None else v[kept]
    page, offset = slots // kv.k.shape[1], slots % kv.k.shape[1]
    for cache, scale, x in ((kv.k, kv.k_scale, k), (kv.v, kv.v_scale, v)):
        if x is not None:
            cache[page, offset] = quantise(x.detach(), cache.dtype, None if scale is None else scale_of(scale, page))


def scale_of(scale: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
    """A cache's scale for tokens in `page`, shaped to multiply [tokens, kv_heads, dim]."""
    return scale[page].unsqueeze(-1) if scale.dim() == 2 else scale.view(1, -1, 1)


def quantise(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x / scale in `dtype`, rounded to nearest even and saturated. NaN stays NaN (int8: 0)."""
    if x.dtype == dtype and (scale is None or dtype in LARGEST):
        return x
    y = x.float()
    if scale is not None:
        y = y / scale
    if dtype in LARGEST:
        low = -128.0 if dtype == torch.int8 else -LARGEST[dtype]
        y = y.clamp(low, LARGEST[dtype])
        if dtype == torch.int8:
            y = y.round().nan_to_num(0.0)
    return y.to(dtype)


def _check_tokens(name: str, x: object, cache: torch.Tensor) -> None:
    heads, dim = cache.shape[2], cache.shape[3]
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__}: give a tensor [tokens, {heads}, {dim}]")
    if type(x) is not torch.Tensor or x.is_neg():
        plain(name, x)
    if x.dtype not in _FLOATS and x.dtype != cache.dtype:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in KV_DTYPES[:3])
        raise TypeError(f"{name} has dtype {x.dtype}: must be {allowed}, or the cache's own {cache.dtype}")
    if x.dim() != 3 or x.shape[1] != heads or x.shape[2] != dim:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: must be [tokens, kv_heads, dim] = [tokens, {heads}, {dim}]"
        )
    if x.device != cache.device:
        raise ValueError(
            f"{name} is on {x.device} and the cache on {cache.device}: must be the same; move it with "
            f".to({str(cache.device)!r})"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, and flashloom computes no gradients: work under torch.no_grad(), or pass "
            f"{name}.detach()"
        )


def _check_slots(slots: object, tokens: int, cache: torch.Tensor) -> None:
    if not isinstance(slots, torch.Tensor):
        raise TypeError(f"slots is {type(slots).__name__}: give an int64 tensor [tokens], as batch.slots() does")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots has dtype {slots.dtype}: must be int64; convert it with .long()")
    if tuple(slots.shape) != (tokens,):
        raise ValueError(f"slots has shape {tuple(slots.shape)}: must be [tokens] = [{tokens}], one per token of k")
    if slots.device != cache.device:
        raise ValueError(
            f"slots is on {slots.device} and the cache on {cache.device}: must be the same; move it with "
            f".to({str(cache.device)!r})"
        )
    if on_host(slots) and tokens:
        limit = cache.shape[0] * cache.shape[1]
        low, high = int(slots.min()), int(slots.max())
        if low < -1 or high >= limit:
            raise ValueError(
                f"slots holds {low if low < -1 else high}: must be 0 to {limit - 1} (pages * page_size), or -1 to skip "
                "the token"
            )
