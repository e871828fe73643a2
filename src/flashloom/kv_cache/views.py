"""The one form in which kernels take keys and values, as views of what callers have."""

from __future__ import annotations

import torch

from flashloom.kv_cache.cache import KV


def as_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    *,
    ragged: bool,
    layout: str,
) -> KV:
    """KV of ragged tensors [tokens, kv_heads, dim], or of pages in the declared layout: "NHD" [pages, page_size,
    kv_heads, dim], "HND" [pages, kv_heads, page_size, dim]. Ranks must be right; nothing else is checked."""
    if ragged:
        return KV(_rows(k), _rows(v), k_scale, v_scale, layout)
    if layout == "HND":
        return KV(k.transpose(1, 2), v.transpose(1, 2), k_scale, v_scale, layout)
    return KV(k, v, k_scale, v_scale, layout)


def _rows(x: torch.Tensor) -> torch.Tensor:
    # one token per page, with the token stride in both places: a kernel may take either
    s, h, d = x.stride()
    return x.as_strided((x.shape[0], 1, x.shape[1], x.shape[2]), (s, s, h, d))
