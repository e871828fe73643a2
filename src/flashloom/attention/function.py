"""`fl.attention`: one call on dense tensors, with the plans of recent classes of shapes kept.

A call like a former one, on other tensors of the same form, is recognised by one lookup and one comparison in torch,
and launches with new addresses alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from flashloom.attention import check
from flashloom.attention.attention import Attention, Plan
from flashloom.attention.batch import Batch
from flashloom.attention.executor import guard
from flashloom.attention.shape import HeadShape
from flashloom.kernel import cuda
from flashloom.kv_cache.pages import DenseKV, RaggedKV
from flashloom.variant import full
from flashloom.variant.variant import Variant

_PLANS_KEPT, _CALLS_KEPT = 64, 256  # per thread
_SHARING = 4  # plans of one size class; a further shape takes over the one looked up least recently
_RUN = Plan.run  # while a monitor watches, Plan.run is another function, and every call goes through it


class _Call:
    """A call that can be repeated: while the plan's last launch is that of this call, tensors of the same form need
    no more than their addresses written."""

    __slots__ = ("again", "batch", "dtype", "form", "launch", "like", "plan", "same", "variant")

    def __init__(self, plan: Plan, variant: Variant, same: Callable[..., bool], q: torch.Tensor, out: torch.Tensor):
        self.plan, self.variant, self.same = plan, variant, same
        self.form, self.dtype = (out.shape, out.stride()), out.dtype
        like = torch.empty_like(q)  # the quicker way to make one
        self.like = ((like.shape, like.stride()), like.dtype) == (self.form, self.dtype)
        self.follow()

    def follow(self) -> None:
        """The plan's last run was this call."""
        self.batch, self.launch, self.again = self.plan.batch, self.plan.launch, self.plan.launch[1]


class _Recent(threading.local):
    def __init__(self) -> None:
        self.plans: OrderedDict[tuple, Plan] = OrderedDict()  # by exact shapes
        self.classes: dict[tuple, list[tuple]] = {}  # names of the plans that may follow other shapes, by class
        self.calls: dict[tuple, _Call] = {}
        self.captured: set[Plan] = set()  # CUDA graphs hold their addresses

    def clear(self) -> None:
        self.plans.clear()
        self.classes.clear()
        self.calls.clear()

    def take(self, name: tuple) -> Plan:
        """Take a plan out."""
        for key, names in self.classes.items():
            if name in names:
                names.remove(name)
                if not names:
                    del self.classes[key]
                break
        return self.plans.pop(name)

    def forget(self, plan: Plan) -> None:
        """No call repeats one of this plan."""
        self.calls = {key: call for key, call in self.calls.items() if call.plan is not plan}


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
    kv_heads, kv_tokens, value_dim]. Any strides but the last axis' 1 are read in place.

    Returns out in q's form, dtype and memory order of heads and tokens, or (out, lse) with return_lse: float32, natural
    logarithm, [tokens, q_heads] or [batch, q_heads, tokens]. Queries are the last tokens of their request (query i sits
    at kv_tokens - tokens + i). Plans are kept for recent classes of shapes. A CUDA graph captures calls on tensors of
    shapes that were called with before. Raises TypeError, ValueError or RuntimeError for what does not fit."""
    if torch.compiler.is_compiling():
        from flashloom.attention import library

        return library.dense(q, k, v, variant, sm_scale, return_lse)
    key = None
    if type(q) is type(k) is torch.Tensor and not return_lse and (sm_scale is None or type(sm_scale) is float):
        device = q.get_device()
        stream = cuda.raw_stream(device) if device >= 0 else 0
        key = (id(variant), sm_scale, device, stream, q.shape, k.shape)
        call = _recent.calls.get(key)
        if (
            call is not None
            and call.same(q, k, v)
            and not (stream and torch.cuda.is_current_stream_capturing())  # see _plan
        ):
            if call.plan.launch is call.launch and call.again is not None and Plan.run is _RUN:
                out = torch.empty_like(q) if call.like else q.new_empty_strided(*call.form, dtype=call.dtype)
                if call.again(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()):
                    return out
            if call.plan.batch is call.batch:  # another call of this plan came between
                result = _run(call.plan, q, k, v, variant, sm_scale, False)
                call.follow()
                return result
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
    plan, result = dense(q, k, v, variant, sm_scale, return_lse)
    if key is not None:
        _remember(key, plan, q, k, v, variant, result)
    return result


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, sm_scale: float | None, return_lse: bool
) -> tuple[Plan, Any]:
    """`attention` after the first checks: the plan and the result."""
    plan = _plan(q, k, v, variant)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _recent.captured.add(plan)
    return plan, _run(plan, q, k, v, variant, sm_scale, return_lse)


def _run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant,
    sm_scale: float | None,
    return_lse: bool,
) -> Any:
    if q.dim() == 3:
        return plan.run(q, (k, v), return_lse=return_lse, variant=variant, sm_scale=sm_scale)
    result = plan.run(q.transpose(1, 2), (k, v), return_lse=return_lse, variant=variant, sm_scale=sm_scale)
    if return_lse:
        return result[0].transpose(1, 2), result[1].transpose(1, 2)
    return result.transpose(1, 2)


def _remember(
    key: tuple, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, out: torch.Tensor
) -> None:
    """Keep what a call like this one needs, if it can be repeated."""
    calls = _recent.calls
    call = calls.get(key)
    if call is not None and call.plan is plan and call.same(q, k, v):  # the plan followed other lengths between
        call.follow()
        return
    same = guard(q, k, v) if plan.launch[0] is not None else None
    if same is None:
        calls.pop(key, None)
        return
    if len(calls) >= _CALLS_KEPT:
        calls.clear()
    calls[key] = _Call(plan, variant, same, q, out)


def _plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant) -> Plan:
    stream = cuda.raw_stream(q.device.index) if q.is_cuda else None
    # the head axis is 1 in both forms; fields per request or token follow from the variant passed to run
    rest = (q.dtype, k.dtype, q.device, stream, variant.program.digest)
    name, plans = (q.shape, k.shape, v.shape, *rest), _recent.plans
    if stream and torch.cuda.is_current_stream_capturing():
        return _for_graph(name)
    plan = plans.get(name)
    if plan is not None:
        plans.move_to_end(name)
        return plan
    _check_lengths(q, k, v)
    key = (*_class(q, k, v), *rest)
    names, batch = _recent.classes.get(key, ()), _batch(q, k)
    oldest = next(x for x in plans if x in names) if len(names) >= _SHARING else None
    if oldest is not None and plans[oldest].fits(batch):
        plans[oldest].update(batch, variant=variant)
        plan = _recent.take(oldest)
    else:
        if oldest is not None:
            _recent.forget(_recent.take(oldest))
        heads = HeadShape(q.shape[1], k.shape[1], q.shape[-1], v.shape[-1])
        layer = Attention(heads, variant=variant, dtype=q.dtype, kv_dtype=k.dtype, layout="HND", device=q.device)
        try:
            plan = layer.plan(batch)
        except MemoryError:  # the pool is full: the plans kept here are what nobody else can drop
            _recent.clear()
            plan = layer.plan(batch)
    plans[name] = plan
    _recent.classes.setdefault(key, []).append(name)
    if len(plans) > _PLANS_KEPT:
        _recent.forget(_recent.take(next(iter(plans))))
    return plan


def _for_graph(name: tuple) -> Plan:
    """The plan of these shapes, or that of another stream, for a graph that is being captured: it would see later
    lengths, so from now on it is the graph's, and follows no others."""
    form, plans = (*name[:-2], name[-1]), _recent.plans
    known = name
    if name not in plans:
        others = (x for x in reversed(plans) if (*x[:-2], x[-1]) == form and plans[x] not in _recent.captured)
        known = next(others, name)
    if known in plans:
        plan = plans[name] = _recent.take(known)
        if known != name:
            _recent.forget(plan)
        return plan
    raise RuntimeError(
        f"fl.attention has no plan yet for q {tuple(name[0])} and k {tuple(name[1])} of this dtype and variant, and "
        "none can be made while a CUDA graph is captured: call it once with such tensors before"
    )


def _class(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple:
    """Batches of one class share plans, which follow their lengths: those can pick a kernel by powers of two."""
    if q.dim() == 3:
        (tokens, q_heads, dim), (keys, kv_heads, _), requests = q.shape, k.shape, None
    else:
        (requests, q_heads, tokens, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    size = (tokens - 1).bit_length(), (keys - 1).bit_length()
    return (requests, q_heads, kv_heads, dim, k.shape[-1], v.shape[-1], *size)


def _batch(q: torch.Tensor, k: torch.Tensor) -> Batch:
    if q.dim() == 3:
        return Batch(q_lens=[q.shape[0]], kv=RaggedKV([k.shape[0]]))
    requests, tokens = k.shape[0], k.shape[2]
    return Batch(q_lens=[q.shape[2]] * requests, kv=DenseKV(requests, max(tokens, 1), [tokens] * requests))


def _check_lengths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape[1] != v.shape[1] or k.shape[-2 if k.dim() == 4 else 0] != v.shape[-2 if v.dim() == 4 else 0]:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: must have the same heads and tokens")
    if q.dim() == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v have {q.shape[0]}, {k.shape[0]} and {v.shape[0]} batches: must be the same")
