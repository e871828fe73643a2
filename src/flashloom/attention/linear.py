"""Integer expressions as sums: what an index is made of."""

from __future__ import annotations

from typing import Any

from flashloom.dataclass import dataclass
from flashloom.variant.expr import INT32, INT64, Expr

__all__ = ["RISING", "Step", "linear"]

RISING = ("min", "max", "floordiv")


@dataclass(frozen=True)
class Step:
    """min, max or floordiv of an expression and a constant, the divisor above 0, or its abs."""

    op: str
    of: Expr
    by: int = 0


def linear(e: Expr) -> tuple[dict[Any, int], int]:
    """(factors of inputs, of steps and of other expressions, a constant) that sum up to an integer expression."""
    if e.op == "const":
        return {}, int(e.attr)
    if e.op == "input":
        return {e.attr: 1}, 0
    if e.op == "cast" and e.args[0].dtype in (INT32, INT64):
        return linear(e.args[0])
    if e.op in ("add", "sub"):
        (a, x), (b, y) = map(linear, e.args)
        sign = 1 if e.op == "add" else -1
        total = dict(a)
        for term, factor in b.items():
            total[term] = total.get(term, 0) + sign * factor
        return {term: factor for term, factor in total.items() if factor}, x + sign * y
    if e.op == "neg":
        terms, constant = linear(e.args[0])
        return {term: -factor for term, factor in terms.items()}, -constant
    if e.op == "abs":
        return {Step("abs", e.args[0]): 1}, 0
    for one, by in (e.args, e.args[::-1]) if len(e.args) == 2 else ():
        if by.op == "const" and e.op == "mul":
            terms, constant = linear(one)
            return {term: factor * by.attr for term, factor in terms.items() if by.attr}, constant * by.attr
        if by.op == "const" and (e.op in ("min", "max") or (e.op == "floordiv" and by is e.args[1] and by.attr > 0)):
            return {Step(e.op, one, by.attr): 1}, 0
    return {e: 1}, 0
