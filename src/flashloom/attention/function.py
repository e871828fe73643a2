"""`fl.attention`: one call on dense tensors, with the plans of recent classes of shapes kept.

A call like a former one, on other tensors of the same form, is recognised by one lookup and one comparison in torch,
and launches with new addresses alone."""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch

from flashloom.attention import check
from flashloom.attention.attention import Attention, Plan
from flashloom.attention.batch import Batch
from flashloom.attention.executor import guard
from flashloom.attention.shape import HeadShape
from flashloom.kernel import cuda
from flashloom.kv_cache.pages import DenseKV, RaggedKV
from flashloom.variant import causal as causal_variant
from flashloom.variant import full
from flashloom.variant.expr import Expr, all_of, topological
from flashloom.variant.plain import plain, transformed, transforming
from flashloom.variant.ranges import SKIP, tile_verdict
from flashloom.variant.variant import Variant, advice

_PLANS_KEPT, _CALLS_KEPT = 64, 256  # per thread
_SHARING = 4  # plans of one size class; a further shape takes over the one looked up least recently
_modes = torch._C._len_torch_dispatch_stack  # fake tensors, make_fx and the like see operators, not launches
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
    *more: NoReturn,
    variant: Variant = full,
    causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    layout: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """Attention over dense tensors: q [tokens, q_heads, dim], k [kv_tokens, kv_heads, dim], v [kv_tokens, kv_heads,
    value_dim], or with a batch q [batch, q_heads, tokens, dim], k [batch, kv_heads, kv_tokens, dim], v [batch,
    kv_heads, kv_tokens, value_dim] as torch's SDPA has it. Any strides but the last axis' 1 are read in place.

    layout: "BTHD" for flash-attn's [batch, tokens, heads, dim], of the result too; "BHTD" says that the order above is
    meant where it looks like a mistake: a causal batch with more queries than keys is a ValueError without it. causal:
    variant & fl.causal. out: where the result goes, in q's form with value_dim, any strides but the last axis' 1; apart
    from q, k and v.

    Returns out in q's form, dtype and memory order of heads and tokens, or (out, lse) with return_lse: float32, natural
    logarithm, [tokens, q_heads] or [batch, q_heads, tokens] ([batch, tokens, q_heads] with "BTHD"). Queries are the
    last tokens of their request (query i sits at kv_tokens - tokens + i). Without requests or tokens the result is
    empty, without keys 0 and -inf. Autocast changes nothing: dtypes are those of the tensors. Plans are kept for recent
    classes of shapes. A CUDA graph captures calls on tensors of shapes that were called with before. Raises TypeError,
    ValueError or RuntimeError for what does not fit."""
    if causal and not torch.compiler.is_compiling():  # no variant is made in a trace
        variant, causal = _causal(variant, causal), False
    if more or unknown or layout is not None or out is not None:
        return _named(q, k, v, more, variant, causal, sm_scale, return_lse, out, layout, unknown)
    if torch.compiler.is_compiling() or _modes():
        return _operator(q, k, v, variant, sm_scale, return_lse, False, causal)
    key = None
    if type(q) is type(k) is torch.Tensor and not return_lse and (sm_scale is None or type(sm_scale) is float):
        device = q.get_device()
        stream = cuda.raw_stream(device) if device >= 0 else 0
        try:
            key = (id(variant), sm_scale, device, stream, q.shape, k.shape)
        except RuntimeError:  # a nested tensor has no shape
            _check(q, k, v, variant, False)
            raise
        call = _recent.calls.get(key)
        if (
            call is not None
            and call.same(q, k, v)
            and not (stream and torch.cuda.is_current_stream_capturing())  # see _plan
        ):
            if call.plan.launch is call.launch and call.again is not None and Plan.run is _RUN:
                out = torch.empty_like(q) if call.like else q.new_empty_strided(*call.form, dtype=call.dtype)
                to = out.data_ptr()  # 0 where out has no memory, as within torch.func.functionalize
                if to and call.again(q.data_ptr(), k.data_ptr(), v.data_ptr(), to):
                    return out
            if call.plan.batch is call.batch and transforming() is None:  # another call of this plan came between
                result = _run(call.plan, q, k, v, variant, sm_scale, False, None)
                call.follow()
                return result
    if transforming() is not None or any(map(transformed, (q, k, v))):
        return _operator(q, k, v, variant, sm_scale, return_lse, False)
    _check(q, k, v, variant, False)
    plan, result = dense(q, k, v, variant, sm_scale, return_lse)
    if key is not None:
        _remember(key, plan, q, k, v, variant, result)
    return result


def _causal(variant: Any, causal: object) -> Any:
    """The variant under the causal mask; the same object each time, so that calls can repeat each other."""
    if causal is not True and not isinstance(causal, np.bool_):
        raise TypeError(f"causal={causal!r} is {type(causal).__name__}: give True or False")
    if variant is full:
        return causal_variant
    if not isinstance(variant, Variant) or causal_variant in variant._parts():
        return variant
    known = variant.__dict__.get("_causal")
    if known is None:
        known = variant.__dict__["_causal"] = variant & causal_variant
    return known


def _named(
    q: Any, k: Any, v: Any, more: tuple, variant: Any, causal: bool, sm_scale: Any, return_lse: bool, out: Any,
    layout: Any, unknown: dict[str, Any],
) -> Any:  # fmt: skip
    """`attention` with arguments by which calls are not repeated at once."""
    if more or unknown:
        _refuse(more, unknown)
    if layout not in (None, "BHTD", "BTHD"):
        raise ValueError(
            f'layout={layout!r}: give "BHTD" ([batch, heads, tokens, dim], torch\'s) or "BTHD" ([batch, tokens, heads, '
            'dim], flash-attn\'s), or leave it out for "BHTD"'
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: give a tensor")
        if layout is not None and x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: layout={layout!r} is for 4-D tensors; leave it out")
    if out is not None:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"out is {type(out).__name__}: give a tensor, or None")
        if out.shape != (*q.shape[:-1], v.shape[-1]):
            raise ValueError(f"out has shape {tuple(out.shape)}: must be {(*q.shape[:-1], v.shape[-1])}, q's form")
    if layout == "BTHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = None if out is None else out.transpose(1, 2)
        result = _named(q, k, v, (), variant, causal, sm_scale, return_lse, out, "BHTD", {})
        return tuple(x.transpose(1, 2) for x in result) if return_lse else result.transpose(1, 2)
    if torch.compiler.is_compiling() or _modes() or transforming() is not None or any(map(transformed, (q, k, v))):
        result = _operator(q, k, v, variant, sm_scale, return_lse, layout is not None, causal)
        if out is None:
            return result
        out.copy_(result[0] if return_lse else result)
        return (out, result[1]) if return_lse else out
    if out is None and q.shape[2] <= k.shape[2]:  # what the name would permit does not arise
        return attention(q, k, v, variant=variant, sm_scale=sm_scale, return_lse=return_lse)
    _check(q, k, v, variant, layout is not None)
    result = dense(q, k, v, variant, sm_scale, return_lse, out)[1]
    if out is None:
        return result
    return (out, result[1]) if return_lse else out


_INSTEAD = {
    "is_causal": "causal=True (query i of n sits at kv_tokens - n + i, which is torch's order where there are as many "
    "queries as keys)",
    **dict.fromkeys(("scale", "softmax_scale"), "sm_scale="),
    **dict.fromkeys(("attn_mask", "mask", "attn_bias"), "variant=fl.custom_mask(mask) for a bool mask (True keeps), or "
    "a variant of your own whose logits_transform adds a bias"),
    **dict.fromkeys(("dropout_p", "dropout"), "nothing: flashloom is for inference and drops nothing"),
    "enable_gqa": "nothing: groups of query heads share a kv head whenever there are fewer of them",
    **dict.fromkeys(("window_size", "window_left", "window"), "variant=fl.sliding_window(...)"),
    **dict.fromkeys(("softcap", "logits_soft_cap"), "variant=fl.softcap(...)"),
    "alibi_slopes": "variant=fl.alibi(slopes)",
    **dict.fromkeys(("score_mod", "mask_mod", "block_mask"), "variant=fl.from_flex(score_mod=, mask_mod=)"),
    **dict.fromkeys(("return_softmax_lse", "return_attn_probs"), "return_lse=True"),
    "lse": "return_lse=True",
}  # fmt: skip
_TAKEN = ("variant", "causal", "sm_scale", "return_lse", "out", "layout")


def _refuse(more: tuple, unknown: dict[str, Any]) -> NoReturn:
    if more:
        what = type(more[0]).__name__
        raise TypeError(
            f"fl.attention takes q, k and v by place, and a {what} was given as a fourth: name it, as in variant=..., "
            "causal=True, sm_scale=... (torch's attn_mask is variant=fl.custom_mask(mask))"
        )
    name = next(iter(unknown))
    near = difflib.get_close_matches(name, _TAKEN, 1)
    hint = _INSTEAD.get(name) or (f"{near[0]}=, if that was meant" if near else f"one of {', '.join(_TAKEN)}")
    raise TypeError(f"fl.attention has no argument {name!r}: give {hint}")


def _operator(
    q: Any, k: Any, v: Any, variant: Any, sm_scale: Any, return_lse: bool, named: bool, causal: bool = False
) -> Any:
    """The call as an operator of torch.library."""
    from flashloom.attention import library

    return library.dense(q, k, v, variant, sm_scale, return_lse, named, causal)


def _check(q: Any, k: Any, v: Any, variant: Any, named: bool) -> None:
    """What a plan does not say in the words of this call. named: the caller has said which axis is which."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: give a tensor")
        if x.is_nested:
            raise TypeError(
                f"{name} is a nested tensor: pass its values to a plan, Batch(q_indptr=q.offsets(), "
                "kv=RaggedKV(indptr=k.offsets())), with [tokens, heads, dim]"
            )
        if x.dim() not in (3, 4) or x.dim() != q.dim():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: q, k and v are [tokens, heads, dim], or all three [batch, heads, "
                "tokens, dim]"
            )
        check.grad(name, x)
        plain(name, x)
    if not isinstance(variant, Variant):
        raise TypeError(f"variant is {advice(variant)}")
    if not named and q.dim() == 4:
        check_order(q, k, variant)


def _conditions(mask: Expr) -> list[Expr]:
    """What is ANDed."""
    return [mask] if mask.op != "and" else [e for part in mask.args for e in _conditions(part)]


def check_order(q: torch.Tensor, k: torch.Tensor, variant: Variant) -> None:
    """A causal batch with more queries than keys has rows that see nothing; most often its axes are in flash-attn's
    order. What tensors of the variant say is another matter."""
    queries, keys, program = q.shape[2], k.shape[2], variant.program
    if not 0 < keys < queries or not q.shape[0] or program.mask is None:
        return
    fixed = [e for e in _conditions(program.mask) if all(node.op != "load" for node in topological(e))]
    program = replace(program, mask=all_of(*fixed))
    place = {"batch": 0, "kv_head": 0, "q_len": queries, "kv_len": keys, "q_start": 0, "kv_start": 0}
    pairs = {"q_head_lo": 0, "q_head_hi": q.shape[1] - 1, "kv_pos_lo": 0, "kv_pos_hi": keys - 1}
    first = {"q_pos_lo": keys - queries, "q_pos_hi": -1}
    if tile_verdict(program, variant.values, {**place, **pairs, **first}) == SKIP:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}, which as [batch, heads, tokens, dim] are {queries} "
            f"queries over {keys} keys: under this mask the first {queries - keys} rows see no key. For flash-attn's "
            '[batch, tokens, heads, dim] pass layout="BTHD"; layout="BHTD" says that just this is meant'
        )


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, sm_scale: float | None, return_lse: bool,
    out: torch.Tensor | None = None,
) -> tuple[Plan, Any]:  # fmt: skip
    """`attention` after the first checks: the plan and the result."""
    plan = _plan(q, k, v, variant)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        _recent.captured.add(plan)
    return plan, _run(plan, q, k, v, variant, sm_scale, return_lse, out)


def _run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant,
    sm_scale: float | None,
    return_lse: bool,
    out: torch.Tensor | None,
) -> Any:
    if q.dim() == 3:
        return plan.run(q, (k, v), out=out, return_lse=return_lse, variant=variant, sm_scale=sm_scale)
    rows, to = q.transpose(1, 2), None if out is None else out.transpose(1, 2)
    result = plan.run(rows, (k, v), out=to, return_lse=return_lse, variant=variant, sm_scale=sm_scale)
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
    return Batch(q_lens=[q.shape[2]] * k.shape[0], kv=DenseKV(k.shape[0], k.shape[2]))


def _check_lengths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape[1] != v.shape[1] or k.shape[-2 if k.dim() == 4 else 0] != v.shape[-2 if v.dim() == 4 else 0]:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: must have the same heads and tokens")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: the last axis, dim, must be the same")
    if q.dim() == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v have {q.shape[0]}, {k.shape[0]} and {v.shape[0]} batches: must be the same")
