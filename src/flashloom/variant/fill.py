"""Rows that a number fills: a score of torch.finfo(torch.float32).min is low, but it is not -inf.

Kernels compute the softmax in units of log2, in which such a score would be -inf and its key left out. So where a hook
can return one, it is raised to `LOWEST`, whose multiple is finite and exact. A row of nothing else then is the mean of
its values, as in torch, and beside any other score its weight is 0 as before. Other large constants become powers of
two: the rounding of their multiples, of which a fused multiplication knows nothing, would be large as well.
"""

from __future__ import annotations

import math

from flashloom.variant.expr import BOOL, DOUBLE, FLOAT, Expr, const, make, select

LOWEST = -(2.0**127)
_COARSE = 2.0**31  # here float32's steps are 256 and more
_LARGE = 2.0**100  # multiples and sums of smaller constants do not come near
_PASSED_ON = ("add", "sub", "neg", "where", "min", "max", "cast")


def raised(e: Expr) -> Expr:
    """The logits with every finite value at least `LOWEST`."""
    if e.op == "where":
        return select(e.args[0], raised(e.args[1]), raised(e.args[2]))
    if e.op == "const":
        if math.isfinite(e.attr) and abs(e.attr) >= _COARSE:
            return const(math.copysign(2.0 ** (math.frexp(e.attr)[1] - 1), e.attr), e.dtype)
        return e
    if not _reaches(e, {}):
        return e
    least = make("max", FLOAT, (e, const(LOWEST)))
    nothing = const(-math.inf)
    return select(make("eq", BOOL, (e, nothing)), nothing, least)


def _reaches(e: Expr, known: dict[Expr, bool]) -> bool:
    """Whether a value below `LOWEST` is plausible: from a large constant, or added from a tensor or a number of the
    variant (not as a factor of theirs, which are slopes and scales)."""
    if e not in known:
        if e.op == "const":
            known[e] = e.dtype in (FLOAT, DOUBLE) and math.isfinite(e.attr) and abs(e.attr) >= _LARGE
        elif e.op in ("load", "param"):
            known[e] = e.dtype in (FLOAT, DOUBLE) and e.attr.dtype != "float16"
        elif e.op in _PASSED_ON:
            known[e] = any(_reaches(a, known) for a in (e.args[1:] if e.op == "where" else e.args))
        else:
            known[e] = e.op in ("mul", "div") and any(a.op == "const" and _reaches(a, known) for a in e.args)
    return known[e]
