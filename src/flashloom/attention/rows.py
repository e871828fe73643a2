"""Where the rows of q, out and lse lie: one after another through the batch, [tokens, heads, ...], or, where all
requests have as many, [requests, tokens, heads, ...] in any strides. Kernels take both as three steps."""

from __future__ import annotations

import torch

__all__ = ["like", "steps"]


def steps(x: torch.Tensor, width: bool = True) -> tuple[int, int, int]:
    """(request, token, head) for [tokens, heads, ...] or [requests, tokens, heads, ...], without the last axis where
    width is False: a row lies `request` times its request's number, `token` times its token's number in the batch and
    `head` times its head's number further, in elements."""
    strides = x.stride()[:-1] if width else x.stride()
    if len(strides) == 2:
        return (0, *strides)
    request, token, head = strides
    if x.shape[1] == 1:
        return 0, request, head
    return 0 if x.shape[0] == 1 else request - x.shape[1] * token, token, head


def like(q: torch.Tensor, width: int | None, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor with a row of `width` elements (None: one element without an axis) for each row of q. It
    lies in memory as q does, with heads within or around the tokens of a request."""
    tail = () if width is None else (width,)
    size = width or 1
    if q.dim() == 3:
        return q.new_empty((*q.shape[:2], *tail), dtype=dtype)
    requests, tokens, heads, _ = q.shape
    if q.stride(1) >= q.stride(2):
        return q.new_empty((requests, tokens, heads, *tail), dtype=dtype)
    strides = (heads * tokens * size, size, tokens * size, *(1 for _ in tail))
    return q.new_empty_strided((requests, tokens, heads, *tail), strides, dtype=dtype)
