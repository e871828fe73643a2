"""Forms of hooks that kernels know to compute more cheaply than what their expressions say."""

from __future__ import annotations

from flashloom.variant.expr import Expr, Program, topological


def uniform(x: Expr) -> bool:
    """Whether an expression is one number for the whole launch."""
    return all(n.op not in ("input", "load", "element") for n in topological(x))


def factors(x: Expr) -> list[tuple[Expr, Expr]]:
    """(a, b) and (b, a) of a product a * b; nothing for another expression."""
    return [(x.args[0], x.args[1]), (x.args[1], x.args[0])] if x.op == "mul" else []


def cap(program: Program) -> tuple[Expr, Expr] | None:
    """(a, b) of a logits hook a * tanh(b * logits), both numbers of the launch; else None."""
    for a, bounded in factors(program.logits) if program.logits is not None else []:
        if bounded.op == "tanh" and uniform(a):
            for b, logits in factors(bounded.args[0]):
                if uniform(b) and logits.op == "input" and logits.attr == "logits":
                    return a, b
    return None
