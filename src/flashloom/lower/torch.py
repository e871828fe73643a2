"""The torch lowering: an interpreter of the IR. It is the definition that every other language is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flashloom.variant.expr import BOOL, DOUBLE, FLOAT, INT32, INT64, Expr, Program, topological


def _divide_or_zero(function: Callable) -> Callable:
    """Integer division by zero gives 0 instead of an exception, as in the kernels."""

    def apply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.is_floating_point():
            return function(a, b)
        return function(a, b.masked_fill(b == 0, 1)).masked_fill(b == 0, 0).to(a.dtype)

    return apply


OPS: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "abs": torch.abs,
    "floordiv": _divide_or_zero(torch.floor_divide), "mod": _divide_or_zero(torch.remainder),
    "min": torch.minimum, "max": torch.maximum, "floor": torch.floor, "exp": torch.exp, "exp2": torch.exp2,
    "log": torch.log, "log2": torch.log2,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "erf": torch.erf,
    "sin": torch.sin, "cos": torch.cos,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    "isnan": torch.isnan,
    "and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor, "not": torch.logical_not,
    "where": torch.where,
    "bitand": torch.bitwise_and, "bitor": torch.bitwise_or, "bitxor": torch.bitwise_xor, "bitnot": torch.bitwise_not,
    "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift,
}  # fmt: skip


def evaluate(
    program: Program,
    hook: str,
    inputs: Mapping[str, torch.Tensor],
    values: Sequence[Any],
    float_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Evaluate one hook ("query", "key", "logits", "mask", "output") on tensors that broadcast against each other.

    `inputs` maps the hook's inputs to tensors: integers int32, floats `float_dtype` (float64 gives the reference in
    double precision). Vector hooks need "row" [..., D], the rows to transform, "dim" = arange(D), and every other input
    with a trailing dimension of 1. `values` belong to `program.params`. Returns the broadcast result.
    """
    root: Expr = getattr(program, hook)
    dtypes = {
        BOOL: torch.bool, INT32: torch.int32, INT64: torch.int64, FLOAT: float_dtype, DOUBLE: torch.float64,
    }  # fmt: skip
    by_param = dict(zip(program.params, values))
    device = next(iter(inputs.values())).device
    done: dict[Expr, torch.Tensor] = {}
    for node in topological(root):
        args = [done[a] for a in node.args]
        dtype = dtypes[node.dtype]
        if node.op == "const":
            result = torch.full((), node.attr, dtype=dtype, device=device)  # unlike tensor(): no copy from the host
        elif node.op == "input":
            result = inputs[str(node.attr)]
        elif node.op == "param":
            result = torch.full((), by_param[node.attr], dtype=dtype, device=device)
        elif node.op == "load":
            result = _load(node, by_param[node.attr].to(device), args)
        elif node.op == "element":
            result = inputs["row"][..., args[0].long().reshape(-1)]  # a constant index keeps the dimension
        elif node.op == "cast":
            result = args[0]
        else:
            result = OPS[node.op](*args)
        done[node] = result.to(dtype)
    return done[root]


def _load(node: Expr, tensor: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
    """Negative indices count from the end, except in fields per token; then indices are clamped into the tensor."""
    if node.attr.kind not in ("query", "key"):
        sizes = (tensor.numel() * 8,) if node.attr.kind == "bits" else tensor.shape
        indices = [torch.where(i < 0, i.long() + n, i) for i, n in zip(indices, sizes)]
    if node.attr.kind == "bits":
        bit = indices[0].long().clamp(0, tensor.numel() * 8 - 1)
        return (tensor[bit // 8].int() >> (bit % 8).int()) & 1 != 0
    if not indices:
        return tensor
    if any(n == 0 for n in tensor.shape):
        shape = torch.broadcast_shapes(*(i.shape for i in indices))
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return tensor[tuple(i.long().clamp(0, n - 1) for i, n in zip(indices, tensor.shape))]
