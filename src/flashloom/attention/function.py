"""`fl.attention`: one call on dense tensors, with the plans of recent classes of shapes kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch

from flashloom.attention import check
from flashloom.attention.attention import Attention, Plan
from flashloom.attention.batch import Batch
from flashloom.attention.shape import HeadShape
from flashloom.kv_cache.pages import DenseKV, RaggedKV
from flashloom.variant import full
from flashloom.variant.variant import Variant

_PLANS_KEPT = 64  # per thread


class _Recent(threading.local):
    def __init__(self) -> None:
        self.plans: OrderedDict[tuple, Plan] = OrderedDict()
        self.captured: set[Plan] = set()  # CUDA graphs hold their addresses


_recent = _Recent()


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    variant: Variant = full,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over dense tensors: q [tokens, q_heads, dim], k [kv_tokens, kv_heads, dim], v [kv_tokens, kv_heads,
    value_dim], or with a batch q [batch, q_heads, tokens, dim], k [batch, kv_heads, kv_tokens, dim], v [batch,
    kv_heads, kv_tokens, value_dim].

    Returns out in q's form and dtype, or (out, lse) with return_lse: float32, natural logarithm, [tokens, q_heads] or
    [batch, q_heads, tokens]. Queries are the last tokens of their request (query i sits at kv_tokens - tokens + i).
    Plans are kept for recent classes of shapes. Raises TypeError, ValueError or RuntimeError for what does not fit."""
    if torch.compiler.is_compiling():
        from flashloom.attention import library

        return library.dense(q, k, v, variant, sm_scale, return_lse)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: give a tensor")
        if x.dim() not in (3, 4) or x.dim() != q.dim():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: q, k and v are [tokens, heads, dim], or all three [batch, heads, "
                "tokens, dim]"
            )
        check.grad(name, x)
    if not isinstance(variant, Variant):
        raise TypeError(f"variant is {type(variant).__name__}: give a Variant, such as fl.causal or YourVariant(...)")
    return dense(q, k, v, variant, sm_scale, return_lse)


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, sm_scale: float | None, return_lse: bool
) -> Any:
    """`attention` after the first checks."""
    plan = _plan(q, k, v, variant)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _recent.captured.add(plan)
    if q.dim() == 3:
        return plan.run(q, (k, v), return_lse=return_lse, variant=variant, sm_scale=sm_scale)
    requests, heads, tokens, dim = q.shape
    rows = q.transpose(1, 2).reshape(requests * tokens, heads, dim)  # copies unless there is one request or one token
    result = plan.run(rows, (k, v), return_lse=return_lse, variant=variant, sm_scale=sm_scale)
    out = (result[0] if return_lse else result).view(requests, tokens, heads, v.shape[3]).transpose(1, 2)
    return (out, result[1].view(requests, tokens, heads).transpose(1, 2)) if return_lse else out


def _plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> Plan:
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
    # the head axis is 1 in both forms; fields per request or token follow from the variant passed to run
    rest = (q.dtype, k.dtype, q.device, stream, variant.program.digest)
    exact, plans = (q.shape, k.shape, v.shape, *rest), _recent.plans
    plan = plans.get(exact)
    if plan is not None:
        plans.move_to_end(exact)
        return plan
    key = exact if q.dim() == 4 else (*_class(q, k, v), *rest)
    plan = plans.get(key)
    if plan is not None:
        plans.move_to_end(key)
        if (plan.batch.tokens, plan.batch.kv_tokens) != (q.shape[0], k.shape[0]):
            _check_lengths(k, v)
            plan.update(_one_request(q, k), variant=variant)
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            plans[exact] = plans.pop(key)  # the graph's alone from now on: it would see later lengths
        return plan
    _check_lengths(k, v)
    if q.dim() == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v have {q.shape[0]}, {k.shape[0]} and {v.shape[0]} batches: must be the same")
    heads = HeadShape(q.shape[1], k.shape[1], q.shape[-1], v.shape[-1])
    layer = Attention(heads, variant=variant, dtype=q.dtype, kv_dtype=k.dtype, layout="HND", device=q.device)
    if q.dim() == 3:
        batch = _one_request(q, k)
    else:
        batch = Batch(
            q_lens=[q.shape[2]] * q.shape[0], kv=DenseKV(q.shape[0], max(k.shape[2], 1), [k.shape[2]] * q.shape[0])
        )
    try:
        plan = layer.plan(batch)
    except MemoryError:  # the pool is full: the plans kept here are what nobody else can drop
        plans.clear()
        plan = layer.plan(batch)
    plans[key] = plan
    if len(plans) > _PLANS_KEPT:
        plans.popitem(last=False)
    return plan


def _class(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    """Requests of one class share a plan, which follows their lengths: those can pick a kernel by powers of two."""
    return (q.shape[1:], k.shape[1:], v.shape[1:], (q.shape[0] - 1).bit_length(), (k.shape[0] - 1).bit_length())


def _one_request(q: torch.Tensor, k: torch.Tensor) -> Batch:
    return Batch(q_lens=[q.shape[0]], kv=RaggedKV([k.shape[0]]))


def _check_lengths(k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape[1] != v.shape[1] or k.shape[-2 if k.dim() == 4 else 0] != v.shape[-2 if v.dim() == 4 else 0]:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: must have the same heads and tokens")
