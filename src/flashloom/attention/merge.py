"""Joining partial attention states: two results over different keys become the result over all of them. Nothing is
copied from the host, so that CUDA graphs can capture it."""

from __future__ import annotations

import torch

from flashloom.variant.expr import inputs_of
from flashloom.variant.variant import Variant

_MERGEABLE = {"out", "lse", "q_head", "dim", "head_dim"}


def merge(
    out_a: torch.Tensor,
    lse_a: torch.Tensor | None,
    out_b: torch.Tensor,
    lse_b: torch.Tensor | None,
    variant: Variant | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge two partial results (`run(..., partial=True, return_lse=True)`) of the same queries over disjoint keys.

    out: [tokens, q_heads, value_dim] (or [batch, q_heads, tokens, value_dim]), lse: float32, natural logarithm, out's
    shape without its last dimension. Returns (out, lse) of both together, out in out_a's dtype. `variant` applies its
    output_transform, once; leave it out while more parts follow. Parts of a variant with softmax = False add: give that
    variant, and None for both lse. A part whose lse is -inf, or +inf as flash-attention marks it, saw no key: it has no
    weight, and where both saw none the result is 0 and -inf. Method: log-sum-exp weights (Milakov and Gimelshein
    2018)."""
    program = None if variant is None else variant.program
    softmax = True if program is None else program.softmax
    if program is not None and program.output is not None and not inputs_of(program.output) <= _MERGEABLE:
        others = ", ".join(sorted(inputs_of(program.output) - _MERGEABLE))
        raise ValueError(
            f"the variant's output_transform reads {others}, which merge does not know: apply it to the merged result "
            "yourself"
        )
    if (lse_a is None or lse_b is None) and softmax:
        raise ValueError(
            "merge needs both lse to weigh the parts: pass those that run(..., partial=True, return_lse=True) returned "
            "(parts of a variant with softmax = False add: pass variant= with None for both)"
        )
    if lse_a is not None and lse_b is not None and not softmax:
        raise ValueError("the variant has no softmax, so its parts have no lse: pass None for both")
    _check(out_a, lse_a, out_b, lse_b)
    dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    a, b = out_a.to(dtype), out_b.to(dtype)
    if not softmax:
        out, lse = a + b, None
    else:
        assert lse_a is not None
        assert lse_b is not None
        lse_a, lse_b = _known(lse_a.to(dtype)), _known(lse_b.to(dtype))
        top = torch.maximum(lse_a, lse_b)
        safe = top.masked_fill(top == -torch.inf, 0)
        weight_a, weight_b = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
        total = weight_a + weight_b
        # a part without keys has weight 0: its rows must not count, whatever they hold
        out = (a * (weight_a / total).unsqueeze(-1)).masked_fill(weight_a.unsqueeze(-1) == 0, 0)
        out = out + (b * (weight_b / total).unsqueeze(-1)).masked_fill(weight_b.unsqueeze(-1) == 0, 0)
        lse = safe + torch.log(total)
    if program is not None and program.output is not None:
        assert variant is not None
        out = _transform(variant, out, lse)
    if lse is not None:
        out = out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
        lse = lse.to(torch.float32)
    return out.to(out_a.dtype), lse


def _known(lse: torch.Tensor) -> torch.Tensor:
    """lse with -inf for every part without keys, which flash-attention marks with +inf."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def _transform(variant: Variant, out: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
    heads = torch.arange(out.shape[1], dtype=torch.int32, device=out.device).view(-1, *[1] * (out.dim() - 2))
    inputs = {
        "out": out,
        "q_head": heads,
        "dim": torch.arange(out.shape[-1], dtype=torch.int32, device=out.device),
        "head_dim": torch.full((), out.shape[-1], dtype=torch.int32, device=out.device),
    }
    if lse is not None:
        inputs["lse"] = lse.unsqueeze(-1)
    from flashloom.lower.torch import evaluate

    return evaluate(variant.program, "output", inputs, variant.values, out.dtype).expand_as(out)


def _check(out_a: torch.Tensor, lse_a: torch.Tensor | None, out_b: torch.Tensor, lse_b: torch.Tensor | None) -> None:
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if x is None and name.startswith("lse"):
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: give a tensor")
        if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
            raise TypeError(f"{name} has dtype {x.dtype}: must be float32, float16 or bfloat16")
        if x.device != out_a.device:
            raise ValueError(
                f"{name} is on {x.device} and out_a on {out_a.device}: must be the same; move it with "
                f".to({str(out_a.device)!r})"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires grad, and flashloom computes no gradients: work under torch.no_grad(), or pass "
                f"{name}.detach()"
            )
        shape = tuple(out_a.shape[:-1] if name.startswith("lse") else out_a.shape)
        if out_a.dim() not in (3, 4) or tuple(x.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and out_a {tuple(out_a.shape)}: out is [tokens, q_heads, "
                "value_dim] or [batch, q_heads, tokens, "
                "value_dim], the same for both parts, and lse the same without the last dimension"
            )


def merge_many(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number of partial results of the same queries over disjoint keys.

    outs: [tokens, parts, q_heads, value_dim]; lses: float32 [tokens, parts, q_heads], natural logarithm. Returns out
    [tokens, q_heads, value_dim] in outs' dtype and lse [tokens, q_heads]; 0 and -inf where every part is -inf or +inf
    (saw no key)."""
    _check_parts(outs, lses, 4, "[tokens, parts, q_heads, value_dim]")
    lses = _known(lses.to(torch.float32))
    lse = torch.logsumexp(lses, 1) if lses.shape[1] else lses.new_full(_without(lses, 1), -torch.inf)
    weight = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(1))
    kept = outs.to(torch.float32).masked_fill(weight.unsqueeze(-1) == 0, 0)
    return torch.einsum("tph,tphd->thd", weight, kept).to(outs.dtype), lse


def merge_ragged(outs: torch.Tensor, lses: torch.Tensor, indptr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge another number of partial results for each query: those of query i are rows indptr[i]:indptr[i + 1].

    outs: [rows, q_heads, value_dim]; lses: float32 [rows, q_heads], natural logarithm; indptr: int32 or int64 [tokens +
    1], ascending from 0 to rows. Returns out [tokens, q_heads, value_dim] and lse [tokens, q_heads]."""
    _check_parts(outs, lses, 3, "[rows, q_heads, value_dim]")
    if indptr.dim() != 1 or indptr.numel() < 1 or indptr.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indptr is {indptr.dtype} {tuple(indptr.shape)}: give int32 or int64 [tokens + 1]")
    tokens, (rows, heads, width) = indptr.numel() - 1, outs.shape
    token = torch.searchsorted(indptr, torch.arange(rows, dtype=indptr.dtype, device=outs.device), right=True) - 1
    lses = _known(lses.to(torch.float32))
    top = lses.new_full((tokens, heads), -torch.inf)
    top = top.scatter_reduce(0, token.unsqueeze(1).expand(rows, heads), lses, "amax")
    safe = top.masked_fill(top == -torch.inf, 0)
    weight = torch.exp(lses - safe[token])
    total = lses.new_zeros((tokens, heads)).index_add_(0, token, weight)
    share = weight / total.masked_fill(total == 0, 1)[token]
    part = outs.to(torch.float32).masked_fill(share.unsqueeze(-1) == 0, 0).mul_(share.unsqueeze(-1))
    out = part.new_zeros((tokens, heads, width)).index_add_(0, token, part)
    return out.to(outs.dtype), safe + torch.log(total)


def _without(x: torch.Tensor, axis: int) -> list[int]:
    return [size for i, size in enumerate(x.shape) if i != axis]


def _check_parts(outs: torch.Tensor, lses: torch.Tensor, rank: int, form: str) -> None:
    if outs.dim() != rank or tuple(lses.shape) != tuple(outs.shape[:-1]):
        raise ValueError(
            f"outs has shape {tuple(outs.shape)} and lses {tuple(lses.shape)}: must be {form}, and the same without "
            "the last dimension"
        )
