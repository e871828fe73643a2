"""Attention of one request, or of 4-D tensors: translations onto fl.attention, which keeps its plans."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.compiler import is_compiling

import flashloom as fl
from flashloom.attention.function import attention
from flashloom.compat.flashinfer import _ops, utils
from flashloom.compat.flashinfer._plans import base_two
from flashloom.compat.flashinfer._variants import Heads, Rules, both, packed, variant, with_mask


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    *,
    allow_fp16_qk_reduction: bool = False,
) -> Any:
    """Attention of one request: q [qo_len, q_heads, head_dim], k and v [kv_len, kv_heads, head_dim] ("HND": heads
    first); or of a batch, all three [batch, heads, tokens, head_dim] whatever the layout.

    Returns out in q's form, or (out, lse) with return_lse: float32 [qo_len, q_heads], base 2 (4-D: [batch, q_heads,
    tokens]). custom_mask: bool [qo_len, kv_len]; packed_custom_mask: its bits, little bit order, in place of it. The
    two reduction flags permit sums in float16; flashloom's are in float32. Raises KeyError for an unknown layout or
    encoding."""
    utils.check_backend(backend)
    if is_compiling():
        return _traced(
            "single_prefill_with_kv_cache", q, k, v, kv_layout, pos_encoding_mode, return_lse, o_dtype,
            scale_q=scale_q, scale_k=scale_k, scale_v=scale_v, custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask, causal=causal, sm_scale=sm_scale, window_left=window_left,
            logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
    if q.dtype.itemsize == 1 and window_left >= 0 and scale_q is not None:
        raise AssertionError("window_left must be -1 with scales of 8-bit queries")
    rules = Rules.of(causal, window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
    heads, dim = q.shape[1], q.shape[-1]
    if custom_mask is not None or packed_custom_mask is not None:
        if q.dim() != 3:
            raise ValueError("a custom mask belongs to one request: give 3-D q, k and v, or use a batch wrapper")
        keys = k.shape[1 if kv_layout == "HND" else 0]
        if custom_mask is not None and custom_mask.dim() > 1 and tuple(custom_mask.shape[-2:]) != (q.shape[0], keys):
            raise ValueError(
                f"custom_mask has shape {list(custom_mask.shape)}: must be [qo_len, kv_len] = [{q.shape[0]}, {keys}]"
            )
        mask = fl.packed_mask(*packed(custom_mask, packed_custom_mask, [q.shape[0] * keys]))
        chosen = with_mask(rules, heads, dim, mask)
    else:
        chosen = variant(rules, heads, dim, q.device)
    kv_heads = k.shape[0 if kv_layout == "HND" and k.dim() == 3 else 1]
    scales = [
        None if x is None else utils.per_head(name, x, heads, kv_heads)
        for name, x in (("scale_q", scale_q), ("scale_k", scale_k), ("scale_v", scale_v))
    ]
    for per_head in scales[:2]:
        if per_head is not None:
            chosen = both(Heads(scale=per_head), chosen)
    scale = utils.scale_of(dim, sm_scale)
    factor: Any = v_scale
    if scales[2] is not None:
        rows = scales[2].view(-1, *[1] * (q.dim() - 2))
        factor = rows if v_scale is None else rows * v_scale
    scale = scale if k_scale is None else scale * k_scale
    return _dense(q, k, v, chosen, kv_layout, scale, return_lse, factor, o_dtype)


def _traced(
    call: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, encoding: str, return_lse: bool,
    o_dtype: torch.dtype | None, **options: Any,
) -> Any:  # fmt: skip
    """A call while torch.compile traces it: one operator, and the tensors that it fills."""
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype if o_dtype is None else o_dtype)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else None
    given = {name: value for name, value in options.items() if value is not None}
    torch.ops.flashloom_compat.single(
        call, q, k, v, *_ops.split(tuple(given.values())), " ".join(given), layout, encoding, out, lse
    )
    return (out, lse) if return_lse else out


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of one query token: q [q_heads, head_dim], k and v [kv_len, kv_heads, head_dim] ("HND": heads first);
    or of a batch, q [batch, q_heads, 1, head_dim], k and v [batch, kv_heads, kv_len, head_dim].

    Returns out in q's form, or (out, lse) with return_lse: float32 [q_heads], base 2 (4-D: [batch, q_heads, 1])."""
    if is_compiling():
        return _traced(
            "single_decode_with_kv_cache", q, k, v, kv_layout, pos_encoding_mode, return_lse, None, q_scale=q_scale,
            k_scale=k_scale, v_scale=v_scale, window_left=window_left, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
    rules = Rules.of(False, window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
    if q.dim() == 4 and q.shape[2] != 1:
        raise ValueError(f"q has shape {tuple(q.shape)}: decode takes one query token, [batch, q_heads, 1, head_dim]")
    if q.dim() not in (2, 4):
        raise ValueError(f"q has shape {tuple(q.shape)}: must be [q_heads, head_dim] or [batch, q_heads, 1, head_dim]")
    chosen = variant(rules, q.shape[-2 if q.dim() == 2 else 1], q.shape[-1], q.device)
    scale = utils.scale_of(q.shape[-1], sm_scale)
    for factor in (q_scale, k_scale):
        scale = scale if factor is None else scale * factor
    rows = q.unsqueeze(0) if q.dim() == 2 else q
    result = _dense(rows, k, v, chosen, kv_layout, scale, return_lse, v_scale)
    if q.dim() == 4:
        return result
    return (result[0].squeeze(0), result[1].squeeze(0)) if return_lse else result.squeeze(0)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: fl.Variant,
    kv_layout: str,
    sm_scale: float,
    return_lse: bool,
    v_scale: Any,
    o_dtype: torch.dtype | None = None,
) -> Any:
    utils._check_kv_layout(kv_layout)
    if k.dtype == torch.uint8:
        raise NotImplementedError("NVFP4 KV caches (uint8 with kv_cache_sf) are not supported by flashloom yet")
    if kv_layout == "HND" and q.dim() == 3:
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    if q.stride(-1) != 1:
        q = q.contiguous()
    result = attention(q, k, v, variant=chosen, sm_scale=sm_scale, return_lse=return_lse)
    out, lse = result if return_lse else (result, None)
    if v_scale is not None and not (isinstance(v_scale, float) and v_scale == 1.0):
        out = out.mul_(v_scale)
    o_dtype = q.dtype if o_dtype is None else o_dtype
    if out.dtype != o_dtype:
        out = utils.narrow(out, o_dtype)
    return out if lse is None else (out, base_two(lse))
