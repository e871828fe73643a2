"""Tile verdicts by interval arithmetic: what a mask says of a whole tile, from its bounds alone.

`bounds` turns an expression into two expressions, a lower and an upper bound over all positions of a tile. They are
ordinary IR, so every language lowers them, and the host evaluates them. For a mask the two are "every pair is kept" and
"some pair is kept". Bounds may be loose and are never wrong: integers that could wrap, floats that could be infinite or
NaN, and operators without a rule give bounds that decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashloom.dataclass import dataclass
from flashloom.variant import spans
from flashloom.variant.expr import (
    BOOL,
    DOUBLE,
    FALSE,
    FLOAT,
    FLOATS,
    INT32,
    INT64,
    INT_BOUNDS,
    TRUE,
    Expr,
    Program,
    all_of,
    any_of,
    cast,
    const,
    inp,
    make,
    negate,
    scalar_value,
    select,
    topological,
)

SKIP, PARTIAL, FULL = 0, 1, 2

VARYING = ("q_head", "q_pos", "kv_pos")
NAN = const(math.nan)


@dataclass(frozen=True)
class Interval:
    """Bounds as expressions. Those of integers lie within the node's span (see `spans`)."""

    lo: Expr
    hi: Expr
    exact: bool = False  # one value over the whole tile, computed just as the mask computes it


def bounds(root: Expr) -> tuple[Expr, Expr]:
    """Lower and upper bound of an expression over a tile, in terms of the inputs `*_lo`, `*_hi` and those that a tile
    has one of."""
    known: dict[Expr, Interval] = {}
    for node in topological(root):
        args = tuple(known[a] for a in node.args)
        if all(a.exact for a in args) and node.op not in ("input", "element") and node.dtype not in FLOATS:
            known[node] = _exact(node, args)
        elif node.dtype == DOUBLE or (node.op == "cast" and node.args[0].dtype == DOUBLE):
            known[node] = _unknown(node)
        else:
            known[node] = RULES.get(node.op, _unknown)(node, args)
            if node.dtype in INT_BOUNDS and spans.facts(node).closer:
                known[node] = _within(known[node], node)
    return known[root].lo, known[root].hi


def verdict(program: Program) -> tuple[Expr, Expr]:
    """(every pair of the tile is kept, some pair may be kept) as bool expressions; a program without a mask keeps
    all."""
    return bounds(program.mask) if program.mask is not None else (TRUE, TRUE)


def tile_verdict(program: Program, values: tuple[Any, ...], tile: Mapping[str, int]) -> int:
    """SKIP, PARTIAL or FULL for one tile, on the host. `tile` gives batch, kv_head, q_len, kv_len, q_start, kv_start
    and the inclusive bounds q_head_lo ... kv_pos_hi."""
    by_param = dict(zip(program.params, values))

    def load(node: Expr, indices: tuple) -> Any:
        value = by_param[node.attr]
        if node.op == "param":
            return value
        if node.op == "load":
            return host_load(node, value, indices)
        return host_block(node, value, indices)

    every, some = (scalar_value(e, tile, load) for e in verdict(program))
    return FULL if every else PARTIAL if some else SKIP


def host_load(node: Expr, tensor: torch.Tensor, indices: tuple) -> Any:
    """Negative indices count from the end; then they are clamped."""
    if node.attr.kind not in ("query", "key"):
        sizes = (tensor.numel() * 8,) if node.attr.kind == "bits" else tensor.shape
        indices = tuple(i + n if i < 0 else i for i, n in zip(indices, sizes))
    if node.attr.kind == "bits":
        bit = min(max(indices[0], 0), tensor.numel() * 8 - 1)
        return bool(int(tensor[bit // 8]) >> (bit % 8) & 1)
    return tensor[tuple(min(max(i, 0), n - 1) for i, n in zip(indices, tensor.shape))].item()


def host_block(node: Expr, tensor: torch.Tensor, corners: tuple) -> Any:
    pairs = list(zip(corners[::2], corners[1::2]))
    smallest = node.op == "block_min"
    if node.attr.kind == "bits":
        last = tensor.numel() * 8 - 1
        lo, hi = (min(max(c, 0), last) for c in pairs[0])
        bits = [bool(int(tensor[b // 8]) >> (b % 8) & 1) for b in range(lo, hi + 1)]
        return all(bits) if smallest else any(bits)
    box = tuple(slice(min(max(lo, 0), n - 1), min(max(hi, 0), n - 1) + 1) for (lo, hi), n in zip(pairs, tensor.shape))
    block = tensor[box].to(torch.float64 if tensor.is_floating_point() else torch.int64)
    value = (block.amin() if smallest else block.amax()).item()
    return bool(value) if node.dtype == BOOL else value


# --- rules ------------------------------------------------------------------------------------------------------------
# -----------------


def _exact(node: Expr, args: tuple[Interval, ...]) -> Interval:
    value = make(node.op, node.dtype, tuple(a.lo for a in args), node.attr)
    return Interval(value, value, exact=True)


def _unknown(node: Expr, args: tuple[Interval, ...] = ()) -> Interval:
    if node.dtype == BOOL:
        return Interval(FALSE, TRUE)
    if node.dtype in FLOATS:
        return Interval(const(math.nan, node.dtype), const(math.nan, node.dtype))
    lo, hi = spans.span(node)
    return Interval(const(lo, node.dtype), const(hi, node.dtype))


def _within(a: Interval, node: Expr) -> Interval:
    """Bounds cut to the node's span: what is computed from them may rely on that not to wrap."""
    lo, hi = (const(x, node.dtype) for x in spans.span(node))
    return Interval(_op("max", a.lo, lo), _op("min", a.hi, hi))


def _op(name: str, *args: Expr) -> Expr:
    return make(name, args[0].dtype, args)


def _test(name: str, a: Expr, b: Expr) -> Expr:
    return make(name, BOOL, (a, b))


def _least(*args: Expr) -> Expr:
    result = args[0]
    for a in args[1:]:
        result = _op("min", result, a)
    return result


def _most(*args: Expr) -> Expr:
    result = args[0]
    for a in args[1:]:
        result = _op("max", result, a)
    return result


def _finite(*args: Expr) -> Expr:
    return all_of(*(_test("lt", _op("abs", a), const(math.inf)) for a in args))


def _loose(lo: Expr, hi: Expr) -> Interval:
    """Float bounds widened past rounding differences between languages, and undecided (NaN) unless finite."""
    slack, tiny = const(2.0**-18), const(2.0**-120)

    def margin(x: Expr) -> Expr:
        return _op("add", _op("mul", _op("abs", x), slack), tiny)

    fine = _finite(lo, hi)
    return Interval(select(fine, _op("sub", lo, margin(lo)), NAN), select(fine, _op("add", hi, margin(hi)), NAN))


def _integers(node: Expr, args: tuple[Interval, ...], rule: Callable[..., tuple[Expr, Expr]]) -> Interval:
    """Apply a rule to integer bounds, in int64 with a check where int32 could wrap."""
    full = INT_BOUNDS[node.dtype]
    wide = spans.exact(node)
    if wide is not None and full[0] <= wide[0] and wide[1] <= full[1]:
        lo, hi = rule(*((a.lo, a.hi) for a in args))
        return Interval(lo, hi)
    if wide is None:
        return _unknown(node)
    if wide[0] < INT_BOUNDS[INT64][0] or wide[1] > INT_BOUNDS[INT64][1]:
        if node.dtype == INT32:
            return _unknown(node)
        limit = const(2**31 if node.op == "mul" else 2**61, INT64)
        small = all_of(*(all_of(_test("gt", a.lo, _op("neg", limit)), _test("lt", a.hi, limit)) for a in args))
        lo, hi = rule(*((a.lo, a.hi) for a in args))
        return Interval(select(small, lo, const(full[0], INT64)), select(small, hi, const(full[1], INT64)))
    lo, hi = rule(*((cast(a.lo, INT64), cast(a.hi, INT64)) for a in args))
    fits = all_of(_test("ge", lo, const(full[0], INT64)), _test("le", hi, const(full[1], INT64)))
    return Interval(
        select(fits, cast(lo, INT32), const(full[0], INT32)), select(fits, cast(hi, INT32), const(full[1], INT32))
    )


def _numeric(rule: Callable[..., tuple[Expr, Expr]]) -> Callable[[Expr, tuple[Interval, ...]], Interval]:
    def apply(node: Expr, args: tuple[Interval, ...]) -> Interval:
        if node.dtype == FLOAT:
            return _loose(*rule(*((a.lo, a.hi) for a in args)))
        return _integers(node, args, rule)

    return apply


def _pointwise(rule: Callable[..., tuple[Expr, Expr]]) -> Callable[[Expr, tuple[Interval, ...]], Interval]:
    """Like `_numeric` for operators that return one of their arguments or its negative: nothing to widen."""

    def apply(node: Expr, args: tuple[Interval, ...]) -> Interval:
        if node.dtype == FLOAT:
            return Interval(*rule(*((a.lo, a.hi) for a in args)))
        return _integers(node, args, rule)

    return apply


def _corners(name: str) -> Callable[..., tuple[Expr, Expr]]:
    def rule(a: tuple[Expr, Expr], b: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
        values = [_op(name, x, y) for x in dict.fromkeys(a) for y in dict.fromkeys(b)]
        return _least(*values), _most(*values)

    return rule


def _abs(a: tuple[Expr, Expr]) -> tuple[Expr, Expr]:
    lo, hi = a
    zero = const(0, lo.dtype)
    return _most(zero, lo, _op("neg", hi)), _most(_op("neg", lo), hi)


def _divide(node: Expr, args: tuple[Interval, ...]) -> Interval:
    a, b = args
    zero = const(0.0)
    defined = any_of(_test("gt", b.lo, zero), _test("lt", b.hi, zero))
    lo, hi = _corners("div")((a.lo, a.hi), (b.lo, b.hi))
    return _loose(select(defined, lo, NAN), select(defined, hi, NAN))


def _floor_divide(node: Expr, args: tuple[Interval, ...]) -> Interval:
    _a, b = args
    if node.dtype == FLOAT or not b.exact:
        return _unknown(node)
    return _integers(node, args, lambda x, y: _corners("floordiv")(x, (y[0], y[0])))


def _modulo(node: Expr, args: tuple[Interval, ...]) -> Interval:
    a, b = args
    if node.dtype == FLOAT or not b.exact:
        return _unknown(node)
    n, zero, one = b.lo, const(0, node.dtype), const(1, node.dtype)
    # within one turn the rest grows with the dividend, whatever the divisor's sign (by 0 both are 0)
    one_turn = _test("eq", _op("floordiv", a.lo, n), _op("floordiv", a.hi, n))
    positive = _test("gt", n, zero)
    return Interval(
        select(one_turn, _op("mod", a.lo, n), select(positive, zero, _op("add", n, one))),
        select(one_turn, _op("mod", a.hi, n), select(positive, _op("sub", n, one), zero)),
    )


def _function(rising: bool, lowest: float | None = None) -> Callable[[Expr, tuple[Interval, ...]], Interval]:
    """A monotone function, defined from `lowest` on."""

    def apply(node: Expr, args: tuple[Interval, ...]) -> Interval:
        (a,) = args
        lo, hi = (_op(node.op, a.lo), _op(node.op, a.hi)) if rising else (_op(node.op, a.hi), _op(node.op, a.lo))
        if lowest is not None:
            defined = _test("ge", a.lo, const(lowest))
            lo, hi = select(defined, lo, NAN), select(defined, hi, NAN)
        return _loose(lo, hi)

    return apply


def _wave(node: Expr, args: tuple[Interval, ...]) -> Interval:
    fine = _finite(args[0].lo, args[0].hi)
    return Interval(select(fine, const(-1.0001), NAN), select(fine, const(1.0001), NAN))


def _floor(node: Expr, args: tuple[Interval, ...]) -> Interval:
    return Interval(_op("floor", args[0].lo), _op("floor", args[0].hi))


def _less(node: Expr, args: tuple[Interval, ...]) -> Interval:
    """lt, le, gt, ge. The upper bound is a negation so that NaN bounds say "maybe"."""
    a, b = args
    if node.op in ("gt", "ge"):
        a, b = b, a
    strict, opposite = ("lt", "ge") if node.op in ("lt", "gt") else ("le", "gt")
    return Interval(_test(strict, a.hi, b.lo), negate(_test(opposite, a.lo, b.hi)))


def _equal(node: Expr, args: tuple[Interval, ...]) -> Interval:
    a, b = args
    every = all_of(_test("eq", a.lo, a.hi), _test("eq", b.lo, b.hi), _test("eq", a.lo, b.lo))
    some = negate(any_of(_test("lt", a.hi, b.lo), _test("gt", a.lo, b.hi)))
    return Interval(every, some) if node.op == "eq" else Interval(negate(some), negate(every))


def _not(node: Expr, args: tuple[Interval, ...]) -> Interval:
    return Interval(negate(args[0].hi), negate(args[0].lo))


def _both(node: Expr, args: tuple[Interval, ...]) -> Interval:
    a, b = args
    return Interval(make(node.op, BOOL, (a.lo, b.lo)), make(node.op, BOOL, (a.hi, b.hi)))


def _xor(node: Expr, args: tuple[Interval, ...]) -> Interval:
    a, b = args
    decided = all_of(negate(make("xor", BOOL, (a.lo, a.hi))), negate(make("xor", BOOL, (b.lo, b.hi))))
    value = make("xor", BOOL, (a.lo, b.lo))
    return Interval(all_of(decided, value), any_of(negate(decided), value))


def _where(node: Expr, args: tuple[Interval, ...]) -> Interval:
    c, a, b = args
    low, high = (all_of, any_of) if node.dtype == BOOL else (_least, _most)
    lo = select(c.lo, a.lo, select(c.hi, low(a.lo, b.lo), b.lo))
    hi = select(c.lo, a.hi, select(c.hi, high(a.hi, b.hi), b.hi))
    return Interval(lo, hi)


def _cast(node: Expr, args: tuple[Interval, ...]) -> Interval:
    (a,) = args
    source = node.args[0].dtype
    if node.dtype == FLOAT or source == BOOL:
        return Interval(cast(a.lo, node.dtype), cast(a.hi, node.dtype))
    if source == FLOAT:
        lo, hi = INT_BOUNDS[node.dtype]
        fits = all_of(_test("gt", a.lo, const(float(lo))), _test("lt", a.hi, const(float(hi) * (1 - 2.0**-20))))
        return Interval(
            select(fits, cast(a.lo, node.dtype), const(lo, node.dtype)),
            select(fits, cast(a.hi, node.dtype), const(hi, node.dtype)),
        )
    low, high = INT_BOUNDS[node.dtype]
    values = spans.span(node.args[0])
    if low <= values[0] and values[1] <= high:
        return Interval(cast(a.lo, node.dtype), cast(a.hi, node.dtype))
    return _integers(node, args, lambda x: x)


def _bitand(node: Expr, args: tuple[Interval, ...]) -> Interval:
    """One operand that is not negative bounds the result, whatever the other."""
    a, b = args
    lo, hi = (const(x, node.dtype) for x in spans.span(node))
    zero = const(0, node.dtype)
    first, second = _test("ge", a.lo, zero), _test("ge", b.lo, zero)
    least = _least(select(first, a.hi, hi), select(second, b.hi, hi), hi)
    return Interval(select(any_of(first, second), zero, lo), least)


def _input(node: Expr, args: tuple[Interval, ...]) -> Interval:
    name = str(node.attr)
    if name in VARYING:
        return Interval(inp(f"{name}_lo"), inp(f"{name}_hi"))
    return Interval(node, node, exact=True) if name in spans.STATIC else _unknown(node)


def _load(node: Expr, args: tuple[Interval, ...]) -> Interval:
    """Bounds of the block that the index box covers."""
    if all(a.exact for a in args):
        return _exact(node, args)
    corners = tuple(c for a in args for c in (a.lo, a.hi))
    lo, hi = (make(op, node.dtype, corners, node.attr) for op in ("block_min", "block_max"))
    unknown = _unknown(node)
    for a, wraps in zip(args, spans.wraps(node)):  # a box that reaches below 0 is two boxes
        if wraps:
            inside = _test("ge", a.lo, const(0, a.lo.dtype))
            lo, hi = select(inside, lo, unknown.lo), select(inside, hi, unknown.hi)
    found = Interval(lo, hi)
    small = node.dtype in INT_BOUNDS and spans.span(node) != INT_BOUNDS[node.dtype]
    return _within(found, node) if small else found  # a box that is not read answers the type's bounds


RULES: dict[str, Callable[[Expr, tuple[Interval, ...]], Interval]] = {
    "const": lambda node, args: Interval(node, node, exact=True),
    "param": lambda node, args: Interval(node, node, exact=True),
    "input": _input, "load": _load, "cast": _cast, "where": _where,
    "add": _numeric(lambda a, b: (_op("add", a[0], b[0]), _op("add", a[1], b[1]))),
    "sub": _numeric(lambda a, b: (_op("sub", a[0], b[1]), _op("sub", a[1], b[0]))),
    "mul": _numeric(_corners("mul")),
    "neg": _pointwise(lambda a: (_op("neg", a[1]), _op("neg", a[0]))),
    "min": _pointwise(lambda a, b: (_op("min", a[0], b[0]), _op("min", a[1], b[1]))),
    "max": _pointwise(lambda a, b: (_op("max", a[0], b[0]), _op("max", a[1], b[1]))),
    "abs": _pointwise(_abs),
    "div": _divide, "floordiv": _floor_divide, "mod": _modulo, "floor": _floor,
    "exp": _function(True), "exp2": _function(True), "tanh": _function(True), "sigmoid": _function(True),
    "erf": _function(True),
    "log": _function(True, 0.0), "log2": _function(True, 0.0), "sqrt": _function(True, 0.0),
    "rsqrt": _function(False, 0.0),
    "sin": _wave, "cos": _wave,
    "lt": _less, "le": _less, "gt": _less, "ge": _less, "eq": _equal, "ne": _equal,
    "and": _both, "or": _both, "not": _not, "xor": _xor, "bitand": _bitand,
}  # fmt: skip
