"""The Gluon lowering: Triton's text, but for the helpers that make blocks, which need layouts here, and tanh."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

from flashloom.lower import triton
from flashloom.lower.forms import cap, factors
from flashloom.variant.expr import Expr, Program, topological

__all__ = ["PRELUDE", "cap", "functions", "slope"]

_BLOCK_RANGE = """
@triton.jit
def _block_range(pointer, lo, hi, size, stride):
    # bounds over a 1-D block; (1, 0) of a block of bools that is all True and all False. lo and hi may be blocks
    # themselves: then each lane looks through its own
    lo = tl.maximum(tl.minimum(lo, size - 1), 0)
    hi = tl.maximum(tl.minimum(hi, size - 1), 0)
    if len((lo + hi).shape) > 0:
        lo = lo + 0 * hi
        least = tl.load(pointer + lo.to(tl.int64) * stride)
        most = least
        for start in range(1, tl.max(hi - lo, 0) + 1, 8):
            for i in tl.static_range(8):
                x = tl.load(pointer + tl.minimum(lo + (start + i), hi).to(tl.int64) * stride)
                least = tl.minimum(least, x)
                most = tl.maximum(most, x)
        return least, most
    else:
        columns = gl.arange(0, 128, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
        lows = tl.load(pointer + tl.minimum(lo + columns, hi).to(tl.int64) * stride)
        highs = lows
        for start in range(lo + 128, hi + 1, 128):
            y = tl.load(pointer + tl.minimum(start + columns, hi).to(tl.int64) * stride)
            lows = tl.minimum(lows, y)
            highs = tl.maximum(highs, y)
        return tl.min(lows, 0), tl.max(highs, 0)
"""


def _replaced(prelude: str, name: str, text: str) -> str:
    start = prelude.index(f"@triton.jit\ndef {name}(")
    end = prelude.find("\n\n\n@triton.jit", start)
    return prelude[:start] + text.strip("\n") + (prelude[end:] if end >= 0 else "\n")


PRELUDE = _replaced(triton.PRELUDE, "_block_range", _BLOCK_RANGE).replace(
    "import triton.language as tl\n",
    "import triton.language as tl\nfrom triton.experimental.gluon import language as gl\n",
    1,
)


def slope(program: Program) -> Expr | None:
    """m of a logits hook logits + m * (kv_pos - q_pos) where m depends on neither logits nor keys; else None."""
    root = program.logits
    if root is None or root.op != "add":
        return None
    for logits, bias in (root.args, root.args[::-1]):
        if logits.op == "input" and logits.attr == "logits":
            for m, distance in factors(bias):
                known = {n.attr for n in topological(m) if n.op == "input"}
                if repr(distance) == "cast(sub(kv_pos, q_pos))" and not known & {"logits", "kv_pos"}:
                    return m
    return None


@lru_cache(maxsize=512)
def _prelude(program: Program) -> str:
    lines = [PRELUDE.rstrip("\n")]
    capped, m = cap(program), slope(program)
    if capped is not None:
        writer = triton._Writer(program)
        a, b = writer.write(capped)
        lines += ["", "", "@triton.jit", "def cap_factors(values):", *writer.lines, f"    return {a}, {b}"]
    if m is not None:
        writer = triton._Writer(program)
        (result,) = writer.write((m,))
        arguments = ", ".join((*triton._ROW, *triton._REQUEST, "values"))
        lines += ["", "", "@triton.jit", f"def position_slope({arguments}):", *writer.lines, f"    return {result}"]
    return "\n".join([*lines, ""])


def functions(program: Program) -> SimpleNamespace:
    """As `triton.functions`, for Gluon kernels; also `cap_factors(values)` where the logits hook is a soft cap, and
    `position_slope(batch, ..., values)` where it adds a multiple of the distance."""
    return triton.functions(program, _prelude(program))
