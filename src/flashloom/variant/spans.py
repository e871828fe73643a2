"""What values an integer expression can have, whatever the tile: from the ranges of positions, fields and constants.

Two domains together: an interval, and a sum of multiples of positions plus an interval, in which a query's position is
kv_len - q_len + row. The second one knows that q_pos - (kv_len - q_len) is a row of the call.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeAlias

from flashloom.variant.expr import BOOL, INT_BOUNDS, Expr, topological

Span: TypeAlias = "tuple[int, int]"

# positions, lengths and token counts stay below 2**30 (Batch checks it), so that sums of two of them fit int32
LIMIT = 2**30 - 1
STATIC = {
    "q_pos": (-LIMIT, LIMIT), **dict.fromkeys(("kv_pos", "q_len", "kv_len", "q_start", "kv_start"), (0, LIMIT)),
    "batch": (0, 2**24), "q_head": (0, 2**16), "kv_head": (0, 2**16), "dim": (0, 2**16), "head_dim": (0, 2**16),
    "row": (0, LIMIT),
}  # fmt: skip
#: Python's integers as fields are stored in 32 bits up to here, so that their sum with a position fits int32.
NUMBER = 2**30
_OWN = {"q_pos": {"kv_len": 1, "q_len": -1, "row": 1}}


class Facts(NamedTuple):
    """Of one integer node: `exact` is the range before wrapping (None where no rule says), `span` after it; its value
    is the sum of `terms`, multiples of positions, and something in `rest`."""

    exact: Span | None
    span: Span
    terms: dict[str, int]
    rest: Span
    closer: bool = False  # than an interval computed from the arguments' own


_known: weakref.WeakKeyDictionary[Expr, Facts] = weakref.WeakKeyDictionary()


def facts(root: Expr) -> Facts:
    found = _known.get(root)
    if found is None:
        for node in topological(root):
            if node not in _known:
                found = _known[node] = _facts(node)
        found = _known[root]
    return found


def span(root: Expr) -> Span:
    """The values that an integer (or bool, as 0 and 1) expression can have."""
    return facts(root).span


def exact(root: Expr) -> Span | None:
    """The same before the result wraps in its type; None where no rule says."""
    return facts(root).exact


def wraps(load: Expr) -> tuple[bool, ...]:
    """For each index of a load, whether it may be negative and so counts from the end, as in torch. Fields per token
    are flat over the batch; their indices are placed when they are traced."""
    placed = load.attr.kind in ("query", "key")
    return tuple(not placed and span(index)[0] < 0 for index in load.args)


def _facts(node: Expr) -> Facts:
    if node.dtype == BOOL:
        return Facts((0, 1), (0, 1), {}, (0, 1))
    full = INT_BOUNDS.get(node.dtype)
    if full is None:
        return Facts(None, (0, 0), {}, (0, 0))
    wide = _interval(node)
    if wide is None:
        return Facts(None, full, {}, full)
    terms, rest = _terms(node, wide)
    low, high = rest
    for name, factor in terms.items():
        a, b = STATIC[name]
        low, high = low + min(a * factor, b * factor), high + max(a * factor, b * factor)
    closer = bool(node.args) and (low > wide[0] or high < wide[1])
    wide = max(low, wide[0]), min(high, wide[1])
    if wide[0] < full[0] or wide[1] > full[1]:
        return Facts(wide, full, {}, full)
    return Facts(wide, wide, terms, rest if terms else wide, closer)


def _terms(node: Expr, wide: Span) -> tuple[dict[str, int], Span]:
    """The node, before wrapping, as a sum of multiples of positions and an interval."""
    if node.op == "input" and node.attr in STATIC:
        return _OWN.get(str(node.attr), {str(node.attr): 1}), (0, 0)
    args = [_known[a] for a in node.args if a.dtype in INT_BOUNDS]
    if len(args) == len(node.args) and node.op in ("add", "sub", "neg", "cast", "mul"):
        if node.op == "cast":
            return args[0].terms, args[0].rest
        if node.op == "neg":
            return _scaled(args[0], -1)
        if node.op == "mul":
            for a, b in (args, args[::-1]):
                if a.span[0] == a.span[1]:
                    return _scaled(b, a.span[0])
            return {}, wide
        terms, (low, high) = _scaled(args[1], 1 if node.op == "add" else -1)
        joined = dict(args[0].terms)
        for name, factor in terms.items():
            joined[name] = joined.get(name, 0) + factor
        return {n: f for n, f in joined.items() if f}, (args[0].rest[0] + low, args[0].rest[1] + high)
    return {}, wide


def _scaled(x: Facts, factor: int) -> tuple[dict[str, int], Span]:
    ends = (x.rest[0] * factor, x.rest[1] * factor)
    return {n: f * factor for n, f in x.terms.items() if factor}, (min(ends), max(ends))


def _bits(*spans: Span) -> int:
    """The least k with all values in -2**k ... 2**k - 1."""
    return max(max(hi, ~lo).bit_length() for lo, hi in spans)


def _interval(node: Expr) -> Span | None:
    """The range of an integer node before wrapping, from those of its arguments."""
    op = node.op
    if op == "const":
        return node.attr, node.attr
    if op == "input":
        return STATIC.get(str(node.attr))
    if op == "param":
        return (-NUMBER, NUMBER) if node.attr.dtype == "int32" and not node.attr.rank else None
    if op in ("load", "block_min", "block_max"):
        return (0, 1) if node.attr.compute_dtype == BOOL else INT_BOUNDS.get(node.attr.dtype)
    if op == "where":
        (a, b), (c, d) = span(node.args[1]), span(node.args[2])
        return min(a, c), max(b, d)
    if not all(a.dtype == BOOL or a.dtype in INT_BOUNDS for a in node.args):
        return None
    s = [_known[a].span for a in node.args]
    (a, b), (c, d) = s[0], s[-1]
    if op == "cast":
        return a, b
    if op == "add":
        return a + c, b + d
    if op == "sub":
        return a - d, b - c
    if op == "neg":
        return -b, -a
    if op == "abs":
        return max(0, a, -b), max(abs(a), abs(b))
    if op == "mul":
        corners = [x * y for x in s[0] for y in s[1]]
        return min(corners), max(corners)
    if op == "min":
        return min(a, c), min(b, d)
    if op == "max":
        return max(a, c), max(b, d)
    if op == "floordiv":
        if c == d and c:
            corners = [a // c, b // c]
            return min(corners), max(corners)
        largest = max(abs(a), abs(b))
        return (0 if a >= 0 and c >= 0 else -largest), largest
    if op == "mod":
        return min(0, c + 1), max(0, d - 1)
    if op == "bitand":
        if a >= 0 or c >= 0:
            return 0, min(hi for lo, hi in s if lo >= 0)
        return -(1 << _bits(*s)), (1 << _bits(*s)) - 1
    if op in ("bitor", "bitxor"):
        return (0 if a >= 0 and c >= 0 else -(1 << _bits(*s))), (1 << _bits(*s)) - 1
    if op == "bitnot":
        return ~b, ~a
    if op == "shr":
        if c == d and 0 <= c < 64:
            return a >> c, b >> c
        return min(a, 0), max(b, 0)
    if op == "shl" and c >= 0 and d < 31:
        corners = [x << y for x in s[0] for y in s[1]]
        return min(corners), max(corners)
    return None
