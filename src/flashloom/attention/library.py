"""The operators that torch.compile and torch.export see. Eager calls do not come through here.

Plans and variants are Python objects, so a graph holds handles of them: a compiled function runs the very plan it was
traced with, as that plan then is, and is traced again for another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashloom.attention import check
from flashloom.attention.rows import like
from flashloom.kv_cache.cache import KV
from flashloom.variant.variant import INSTANCES, Variant

if TYPE_CHECKING:
    from flashloom.attention.attention import Plan

_library = torch.library.Library("flashloom", "DEF")
_library.define(
    "attention_run(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor(a!) out, Tensor(b!)? lse, "
    "int plan, int variant, "
    "bool views, bool partial, float? sm_scale=None, bool given=True, bool lse_given=True) -> ()"
)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, int variant, float? sm_scale, bool return_lse, bool named=False, "
    "bool causal=False) -> (Tensor, Tensor)"
)


def _variant(handle: int) -> Variant:
    found = INSTANCES.get(handle)
    if found is None:
        raise RuntimeError(
            f"variant {handle} no longer exists: a compiled or exported function needs the variants it was traced "
            "with; keep them alive"
        )
    return found


def run(
    plan: Plan,
    q: Tensor,
    kv: KV | tuple,
    out: Tensor | None,
    lse: Tensor | None,
    return_lse: bool,
    partial: bool,
    variant: Variant | None,
    sm_scale: float | None = None,
) -> Any:
    """`Plan.run` while it is being traced."""
    heads = plan.attention.heads
    check.grad("q", q)
    given = out is not None, lse is not None
    if out is None:
        out = like(q, heads.value_dim, plan.attention.spec.out_dtype)
    if lse is None and return_lse:
        lse = like(out, None, torch.float32)
    if isinstance(kv, KV):
        views, parts = True, (kv.k, kv.v, kv.k_scale, kv.v_scale)
    else:
        views, parts = False, check.raw_kv(kv, plan.batch, heads)
    handle = 0 if variant is None else variant._handle
    torch.ops.flashloom.attention_run(q, *parts, out, lse, plan.handle, handle, views, partial, sm_scale, *given)
    return (out, lse) if return_lse else out


def dense(
    q: Tensor, k: Tensor, v: Tensor, variant: Variant, sm_scale: float | None, return_lse: bool, named: bool = False,
    causal: bool = False,
) -> Any:  # fmt: skip
    """`fl.attention` while it is being traced."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.grad(name, x)
    out, lse = torch.ops.flashloom.attention(q, k, v, variant._handle, sm_scale, return_lse, named, causal)
    return (out, lse) if return_lse else out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    plan: int,
    variant: int,
    views: bool,
    partial: bool,
    sm_scale: float | None = None,
    given: bool = True,
    lse_given: bool = True,
) -> None:
    from flashloom.attention.attention import PLANS

    found = PLANS.get(plan)
    if found is None:
        raise RuntimeError(
            f"plan {plan} no longer exists: a compiled or exported function needs the plan it was traced with; keep it "
            "alive"
        )
    kv: Any = KV(k, v, k_scale, v_scale) if views else (k, v, k_scale, v_scale)
    other = _variant(variant) if variant else None
    if q.dim() == 3:  # this function's caller made no result of its own, so it has just the batch's rows
        if not given:
            check.further_rows("out", q, found.batch)
        if lse is not None and not lse_given:
            check.further_rows("lse", q, found.batch)
    found.run(q, kv, out=out, lse=lse, partial=partial, variant=other, sm_scale=sm_scale)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, variant: int, sm_scale: float | None, return_lse: bool, named: bool = False,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from flashloom.attention.function import attention

    layout, chosen = "BHTD" if named else None, _variant(variant)
    result = attention(
        q, k, v, variant=chosen, causal=causal, sm_scale=sm_scale, return_lse=return_lse, layout=layout
    )  # fmt: skip
    return result if return_lse else (result, q.new_empty(0, dtype=torch.float32))


def _dense_fake(
    q: Tensor, k: Tensor, v: Tensor, variant: int, sm_scale: float | None, return_lse: bool, named: bool = False,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    rows = q.transpose(1, 2) if q.dim() == 4 else q
    out, lse = like(rows, v.shape[-1], dtype), like(rows, None, torch.float32)
    if q.dim() == 4:
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


_library.impl("attention_run", _run, "CompositeExplicitAutograd")
_library.impl("attention", _dense, "CompositeExplicitAutograd")
torch.library.register_fake("flashloom::attention_run", lambda *args: None, lib=_library)
torch.library.register_fake("flashloom::attention", _dense_fake, lib=_library)
