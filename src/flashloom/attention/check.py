"""Diagnosing arguments: every function returns silently or raises a sentence with the value, the rule and the fix.

These run at plan time, and in run() only when its quick comparison with the last accepted arguments fails.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from flashloom.attention.batch import Batch
from flashloom.attention.overlap import overlap
from flashloom.attention.shape import HeadShape
from flashloom.kv_cache.cache import KV, check_scale, check_scale_values
from flashloom.kv_cache.integers import on_host
from flashloom.variant.expr import Program
from flashloom.variant.plain import plain

Q_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def dtype(name: str, value: object, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}={value!r} is not a torch.dtype: give one of {_names(allowed)}")
    if value not in allowed:
        raise TypeError(f"{name}={value}: must be one of {_names(allowed)}")


def scale(value: object, default: float) -> float:
    """The softmax scale as a finite float."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"sm_scale={value!r} is not a number: give a Python float, or None for 1 / sqrt(dim)")
    if not math.isfinite(value):
        raise ValueError(f"sm_scale={value}: must be finite; leave it out for 1 / sqrt(dim)")
    return float(value)


def tensor(name: str, x: object, form: str, want: torch.dtype, device: torch.device) -> None:
    """Type, dtype, device, gradient and inner stride, which every tensor argument shares."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__}: give a tensor {form}")
    if x.dtype != want:
        raise TypeError(
            f"{name} has dtype {x.dtype} but the plan is for {want}: convert it with .to({want}) or plan with its dtype"
        )
    if x.device != device:
        raise ValueError(
            f"{name} is on {x.device} but the plan is for {device}: move it with .to({str(device)!r}) or plan for its "
            "device"
        )
    grad(name, x)
    plain(name, x)
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has inner stride {x.stride(-1)}: elements of a row must lie side by side (stride 1); use "
            ".contiguous()"
        )


def grad(name: str, x: torch.Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, and flashloom computes no gradients: work under torch.no_grad(), or pass "
            f"{name}.detach()"
        )


def query(q: object, heads: HeadShape, want: torch.dtype, device: torch.device, batch: Batch) -> None:
    form = f"[tokens, q_heads, dim] = [tokens, {heads.q_heads}, {heads.dim}]"
    tensor("q", q, form, want, device)
    assert isinstance(q, torch.Tensor)
    if q.dim() not in (3, 4) or tuple(q.shape[-2:]) != (heads.q_heads, heads.dim):
        raise ValueError(f"q has shape {tuple(q.shape)}: must be {form}")
    if q.dim() == 4:
        if batch.requests != q.shape[0] or (batch.each != q.shape[1] and batch.requests):
            lengths = (
                "lengths on a device, which are not read"
                if not batch.host
                else f"{batch.requests} requests of {'several lengths' if batch.each is None else batch.each}"
            )
            raise ValueError(
                f"q has shape {tuple(q.shape)} but the batch has {lengths}: [requests, tokens, q_heads, dim] is for "
                f"requests of one length that the host knows; pass {form}"
            )
        return
    if batch.tokens is not None and q.shape[0] < batch.tokens:
        raise ValueError(
            f"q has {q.shape[0]} tokens but the batch has {batch.tokens}: pass every query token of the batch, or "
            "update the plan"
        )


def output(out: object, q: torch.Tensor, heads: HeadShape, device: torch.device) -> None:
    want = (*q.shape[:-1], heads.value_dim)
    form = f"[{'requests, ' if q.dim() == 4 else ''}tokens, q_heads, value_dim] = {list(want)}"
    if isinstance(out, torch.Tensor):
        dtype("out.dtype", out.dtype, OUT_DTYPES)
    tensor("out", out, form, getattr(out, "dtype", torch.float32), device)
    assert isinstance(out, torch.Tensor)
    if tuple(out.shape) != want:
        raise ValueError(f"out has shape {tuple(out.shape)}: must be {form}, one row per row of q")


def logsumexp(lse: object, q: torch.Tensor, heads: HeadShape, device: torch.device) -> None:
    want = tuple(q.shape[:-1])
    form = f"[{'requests, ' if q.dim() == 4 else ''}tokens, q_heads] = {list(want)}"
    if not isinstance(lse, torch.Tensor):
        raise TypeError(f"lse is {type(lse).__name__}: give a float32 tensor {form}")
    plain("lse", lse)
    if lse.dtype != torch.float32:
        raise TypeError(f"lse has dtype {lse.dtype}: must be float32")
    if lse.device != device:
        raise ValueError(f"lse is on {lse.device} but the plan is for {device}: make it there")
    if tuple(lse.shape) != want:
        raise ValueError(f"lse has shape {tuple(lse.shape)}: must be {form}, one row per row of q")


def apart(out: torch.Tensor | None, lse: torch.Tensor | None, q: torch.Tensor, kv: KV) -> None:
    """A caller's out and lse against each other and what the call reads."""
    read = (("q", q), ("k", kv.k), ("v", kv.v))
    for name, x, others in (("out", out, read), ("lse", lse, read if out is None else (*read, ("out", out)))):
        if x is not None:
            if 0 in x.stride() and any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride())):
                raise ValueError(
                    f"{name} has strides {x.stride()}: an axis of stride 0, as expand() makes, holds several rows in "
                    f"one place; give {name} memory for each, or leave it out"
                )
            memory = x.untyped_storage().data_ptr()
            for other, y in others:
                if y.untyped_storage().data_ptr() == memory and overlap(x, y):
                    raise ValueError(
                        f"{name} shares memory with {other}, which would be read after it was overwritten: give "
                        f"{name} memory of its own, or leave it out"
                    )


def keys_values(
    kv: KV, heads: HeadShape, want: torch.dtype, device: torch.device, batch: Batch, contents: bool
) -> None:
    """Keys and values as 4-D views against the plan's heads, dtype, device and batch."""
    size = {"ragged": "tokens", "dense": "requests, tokens"}.get(batch.kind, "pages, page_size")
    for name, x, width in (("k", kv.k, heads.dim), ("v", kv.v, heads.value_dim)):
        form = f"[{size}, kv_heads, {'dim' if name == 'k' else 'value_dim'}]"
        tensor(name, x, form, want, device)
        shape = (x.shape[0], *x.shape[2:]) if batch.ragged else tuple(x.shape)
        wanted = (x.shape[0], heads.kv_heads, width) if batch.ragged else (x.shape[0], batch.row, heads.kv_heads, width)
        if shape != wanted:
            number = size.split(",")[0]
            listed = ", ".join([number, *map(str, wanted[1:])])
            look = {"ragged": "the heads", "dense": "the heads, the batch's DenseKV(requests, tokens) and layout="}
            hint = look.get(batch.kind, "the heads, the page size and layout=")
            raise ValueError(f"{name} is {list(shape)} as {form}: must be [{listed}]; check {hint} of Attention")
    if kv.k.shape[0] != kv.v.shape[0]:
        raise ValueError(f"k has {kv.k.shape[0]} {size.split(',')[0]} and v {kv.v.shape[0]}: must be the same")
    if batch.host:
        batch.kv.check_pages(kv.k.shape[0])
    for name, s in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        if s is not None:
            if batch.ragged and isinstance(s, torch.Tensor) and s.dim() != 1:
                raise ValueError(f"{name} has shape {tuple(s.shape)}: ragged KV has no pages; give [1] or [kv_heads]")
            check_scale(name, s, kv.k.shape[0], heads.kv_heads)
            if s.device != device:
                raise ValueError(
                    f"{name} is on {s.device} but the plan is for {device}: move it with .to({str(device)!r})"
                )
            if s.is_contiguous() is False:
                raise ValueError(f"{name} has strides {s.stride()}: must be contiguous; use .contiguous()")
            if on_host(s) or contents:
                check_scale_values(name, s)


def raw_kv(kv: object, batch: Batch, heads: HeadShape) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    """k, v, k_scale, v_scale of what a caller passed as kv; ranks are right afterwards."""
    if isinstance(kv, torch.Tensor) and heads.latent_value:
        kv = (kv, kv[..., : heads.value_dim])
    if not isinstance(kv, (tuple, list)):
        raise TypeError(f"kv is {type(kv).__name__}: give cache[i], (k, v) or (k, v, k_scale, v_scale)")
    if len(kv) not in (2, 4):
        raise ValueError(f"kv has {len(kv)} parts: give (k, v) or (k, v, k_scale, v_scale)")
    k, v, k_scale, v_scale = kv if len(kv) == 4 else (*kv, None, None)
    rank, form = (
        (3, "[tokens, kv_heads, dim]")
        if batch.ragged
        else (4, "[pages, page_size, kv_heads, dim] in the declared layout")
    )
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: give a tensor {form}")
        if x.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {form}")
    for name, s in (("k_scale", k_scale), ("v_scale", v_scale)):
        if s is not None and not isinstance(s, torch.Tensor):
            raise TypeError(
                f"{name} is {type(s).__name__}: give a float32 tensor [1], [kv_heads] or [pages, kv_heads], or None"
            )
    return k, v, k_scale, v_scale


def fields(program: Program, values: tuple[Any, ...], heads: HeadShape, device: torch.device | None) -> None:
    """A variant's tensors against the heads and the device (None: not known yet): what does not depend on a batch."""
    sizes = {"head": ("q_heads", heads.q_heads), "kv_head": ("kv_heads", heads.kv_heads)}
    for param, value in zip(program.params, values, strict=True):
        if isinstance(value, torch.Tensor):
            own = f"the variant's {param.name}"
            if device is not None and value.device != device:
                raise ValueError(
                    f"{own} is on {value.device} but the plan is for {device}: move it with .to({str(device)!r})"
                )
            plain(own, value)
            grad(own, value)
            if param.kind in sizes and value.shape[0] != sizes[param.kind][1]:
                name, size = sizes[param.kind]
                raise ValueError(f"{own} has {value.shape[0]} entries: must have one per head, {name} = {size}")


def batch_fields(program: Program, values: tuple[Any, ...], batch: Batch) -> None:
    """A variant's per-request and per-token tensors against the batch, and any without elements against one that
    attends to something."""
    sizes = {
        "request": ("requests", batch.requests),
        "query": ("query tokens", batch.tokens),
        "key": ("key tokens", None),
    }
    attends = bool(batch.tokens and batch.kv_tokens)  # as far as the host knows
    for param, value in zip(program.params, values, strict=True):
        if attends and isinstance(value, torch.Tensor) and value.numel() == 0:
            raise ValueError(
                f"the variant's {param.name} has shape {tuple(value.shape)}, without an element, "
                f"but the batch has {batch.tokens} query tokens that read it: give one with elements, or a variant "
                "that does not read it"
            )
        if param.kind in sizes and isinstance(value, torch.Tensor):
            name, size = sizes[param.kind]
            size = batch.kv_tokens if param.kind == "key" else size
            if size is not None and value.shape[0] < size:
                raise ValueError(
                    f"the variant's {param.name} has {value.shape[0]} entries but the batch has "
                    f"{size} {name}: give one for each"
                )


def further_rows(name: str, q: torch.Tensor, batch: Batch) -> None:
    """A caller who lets run() make a result has just the batch's rows."""
    if batch.tokens is not None and q.shape[0] > batch.tokens:
        raise ValueError(
            f"q has {q.shape[0]} tokens but the batch has {batch.tokens}: update the plan for this batch, or pass "
            f"{name}=, whose further rows stay untouched"
        )


def batch(value: object, device: torch.device | None) -> None:
    if not isinstance(value, Batch):
        raise TypeError(
            f"a plan takes a Batch, not {type(value).__name__}: fl.Batch(q_lens=..., kv=...) or fl.Batch.decode(kv)"
        )
    if device is not None and not value.host and value.device != device:
        raise ValueError(
            f"the batch is on {value.device} but the attention on {device}: make its tensors there or on the host"
        )
