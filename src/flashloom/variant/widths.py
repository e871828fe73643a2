"""Machine types for traced expressions: torch's integers in 32 bits wherever the result is the same.

A hook means what torch computes: positions and Python's integers are int64, tensors have their own type, and each
operator wraps in its result's type. `settle` rewrites that for kernels, which have int32 and int64: an integer is int32
wherever all its values fit, and small types wrap by a few operators where theirs might not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashloom.variant import spans
from flashloom.variant.expr import (
    BOOL,
    COMPARISONS,
    FLOATS,
    INT8,
    INT16,
    INT32,
    INT64,
    INT_BOUNDS,
    UINT8,
    Expr,
    cast,
    const,
    inputs_of,
    make,
    topological,
)

_LOW_BITS = {UINT8: (0, 255), INT8: (128, 255), INT16: (32768, 65535)}
#: Operators that wrap in 32 bits as they would in more, or whose result is one of their arguments.
_WRAPS_ALIKE = ("add", "sub", "mul", "neg", "abs", "floordiv", "shl", "where", "min", "max")


def settle(roots: Mapping[str, Expr]) -> dict[str, Expr]:
    """The expressions in machine types, with comparisons decided that positions' ranges decide."""
    done: dict[Expr, Expr] = {}
    for node in topological(*roots.values()):
        done[node] = _settled(node, tuple(done[a] for a in node.args))
    return {name: done[root] for name, root in roots.items()}


def _settled(node: Expr, args: tuple[Expr, ...]) -> Expr:
    if node.dtype in INT_BOUNDS:
        return _narrow(_integer(node, args), spans.span(node))
    if node.op in COMPARISONS and args[0].dtype in INT_BOUNDS:
        known = _decided(node.op, *(spans.span(a) for a in node.args))
        if known is not None:
            return const(known)
        a, b = args
        return make(node.op, BOOL, _together((_near(a, b), _near(b, a))))
    return make(node.op, node.dtype, args, node.attr) if args or node.op == "load" else node


def _near(e: Expr, other: Expr) -> Expr:
    """A wide side of a comparison in 32 bits, cut to just outside of what the other can be: done once per row, where
    the comparison is done per key."""
    low, high = spans.span(other)
    per_key = "kv_pos" in inputs_of(other) and "kv_pos" not in inputs_of(e)
    if e.dtype != INT64 or not per_key or not _fits((low - 1, high + 1), INT32):
        return e
    cut = make("min", INT64, (make("max", INT64, (e, const(low - 1, INT64))), const(high + 1, INT64)))
    return cast(cut, INT32)


def _narrow(e: Expr, values: spans.Span) -> Expr:
    return cast(e, INT32) if _fits(values, INT32) else e


def _fits(values: spans.Span | None, dtype: str) -> bool:
    return values is not None and INT_BOUNDS[dtype][0] <= values[0] and values[1] <= INT_BOUNDS[dtype][1]


def _together(args: tuple[Expr, ...], dtype: str | None = None) -> tuple[Expr, ...]:
    """Integer arguments in one type, the widest among them unless one is given; others as they are."""
    dtype = dtype or (INT64 if any(a.dtype == INT64 for a in args) else INT32)
    return tuple(cast(a, dtype) if a.dtype in INT_BOUNDS else a for a in args)


def _integer(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """An integer node in a machine type that holds its exact value, wrapped in the type it was traced with."""
    dtype = node.dtype
    if node.op == "const":
        return const(node.attr, INT64)
    if node.op == "input":
        return node
    if node.op in ("param", "load"):
        return make(node.op, node.attr.compute_dtype, args, node.attr)
    exact = spans.exact(node)
    if node.op == "cast":
        (a,) = args
        if a.dtype == BOOL:
            return cast(a, INT32)
        if a.dtype in FLOATS:
            return _wrapped(cast(a, INT64 if dtype == INT64 else INT32), dtype)
        return a if _fits(exact, dtype) else _wrapped(a, dtype)
    if dtype == INT64:
        wide = not _fits(exact, INT32) or any(a.dtype == INT64 for a in args)
        machine = INT64 if wide else INT32
    elif node.op in _WRAPS_ALIKE or _fits(exact, INT32):
        machine = INT32
    else:
        machine = INT64
    made = make(node.op, machine, _together(args, machine))
    return made if _fits(exact, dtype) else _wrapped(made, dtype)


def _wrapped(e: Expr, dtype: str) -> Expr:
    """The value wrapped in an integer type."""
    if dtype in (INT32, INT64):
        return cast(e, dtype)
    low = cast(e, INT32)
    offset, mask = (const(x, INT32) for x in _LOW_BITS[dtype])
    kept = make("bitand", INT32, (make("add", INT32, (low, offset)), mask))
    return make("sub", INT32, (kept, offset))


def _decided(op: str, a: spans.Span, b: spans.Span) -> bool | None:
    """What a comparison of any value in one span with any in another gives, if always the same."""
    if op in ("gt", "ge"):
        return _decided("lt" if op == "gt" else "le", b, a)
    if op in ("lt", "le"):
        strict = op == "lt"
        if a[1] < b[0] or (not strict and a[1] == b[0]):
            return True
        return False if a[0] > b[1] or (strict and a[0] == b[1]) else None
    if a[1] < b[0] or b[1] < a[0]:
        return op == "ne"
    return (op == "eq") if a[0] == a[1] == b[0] == b[1] else None
