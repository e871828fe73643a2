"""The Triton lowering: a program becomes a module of `@triton.jit` functions that kernels take as constexpr arguments.

The same text serves Gluon kernels: only element-wise operations appear in it, so every block keeps its layout.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import struct
import tempfile
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flashloom.dataclass import dataclass
from flashloom.variant import ranges, spans
from flashloom.variant.expr import (
    BITS,
    BOOL,
    DOUBLE,
    FLOAT,
    FLOATS,
    INT32,
    INT64,
    INT_BOUNDS,
    Expr,
    Param,
    Program,
    topological,
)

TYPES = {BOOL: "tl.int1", INT32: "tl.int32", INT64: "tl.int64", FLOAT: "tl.float32", DOUBLE: "tl.float64"}
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/",
          "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
          "and": "&", "or": "|", "xor": "^", "bitand": "&", "bitor": "|", "bitxor": "^"}  # fmt: skip
CALLS = {"abs": "tl.abs", "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2",
         "sqrt": "tl.sqrt", "rsqrt": "tl.rsqrt",
         "erf": "tl.erf", "sin": "_sin", "cos": "_cos", "floor": "tl.floor", "where": "tl.where",
         "sigmoid": "_sigmoid", "tanh": "_tanh"}  # fmt: skip

PRELUDE = """\
import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # a quotient of polynomials fitted to 2e-8 up to 9.01, where tanh is 1 to float32; without a branch or a selection,
    # and with one special function: 1 / q as the square of 1 / sqrt(q), good to 2 ulp
    x = tl.maximum(tl.minimum(x, 9.01, propagate_nan=tl.PropagateNan.ALL), -9.01, propagate_nan=tl.PropagateNan.ALL)
    u = x * x
    p = x * (1.0 + u * (0.13380353 + u * (0.0034947896 + u * (2.059592e-05 + u * 1.3336356e-08))))
    root = tl.rsqrt(1.0 + u * (0.46713668 + u * (0.025873946 + u * (0.00032843283 + u * 7.7690822e-07))))
    return p * (root * root)


@triton.jit
def _sin_quadrant(x, quarters: tl.constexpr):
    # sin(x + quarters * pi/2); the reduction in float64 is exact enough to |x| = 1e9 and, unlike the library's,
    # needs no table in memory
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    r = (x.to(tl.float64) - turns.to(tl.float64) * 1.5707963267948966).to(tl.float32)
    square = r * r
    odd = r + r * square * (-0.16666654611 + square * (0.0083321608736 - square * 0.00019515295891))
    even = 1.0 + square * (-0.5 + square * (0.041666645683 + square * (-0.0013887316255 + square * 0.000024433157118)))
    quadrant = turns.to(tl.int32) + quarters
    value = tl.where((quadrant & 1) == 0, odd, even)
    return tl.where((quadrant & 2) == 0, value, -value)


@triton.jit
def _sin(x):
    return _sin_quadrant(x, 0)


@triton.jit
def _cos(x):
    return _sin_quadrant(x, 1)


@triton.jit
def _floordiv(a, b):
    # Triton truncates; a divisor of 0 gives 0, and -1 the one quotient that overflows
    divisor = tl.where((b == 0) | (b == -1), 1, b)
    quotient = tl.where(b == -1, -a, a // divisor)
    rest = a - quotient * divisor
    quotient = quotient - tl.where((rest != 0) & ((rest < 0) != (divisor < 0)), 1, 0)
    return tl.where(b == 0, 0, quotient)


@triton.jit
def _mod(a, b):
    return tl.where(b == 0, 0, a - _floordiv(a, b) * b)


@triton.jit
def _shl(a, count, bits: tl.constexpr):
    # a count outside of the type shifts everything out
    inside = (count >= 0) & (count < bits)
    return tl.where(inside, a << tl.where(inside, count, 0), 0)


@triton.jit
def _shr(a, count, bits: tl.constexpr):
    return a >> tl.where((count >= 0) & (count < bits), count, bits - 1)


@triton.jit
def _remainder(a, b):
    # of float64: a quotient that was rounded up or down is made good
    rest = tl.fma(-tl.floor(a / b), b, a)
    rest = tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
    return tl.where(tl.abs(rest) >= tl.abs(b), rest - b, rest)


@triton.jit
def _wrap(index, size):
    # a negative index counts from the end
    return _clamp(tl.where(index < 0, index + size, index), size)


@triton.jit
def _clamp(index, size):
    return tl.maximum(tl.minimum(index, size - 1), 0)


@triton.jit
def _block_range(pointer, lo, hi, size, stride):
    # bounds over a 1-D block; (1, 0) of a block of bools that is all True and all False
    lo = tl.maximum(tl.minimum(lo, size - 1), 0)
    hi = tl.maximum(tl.minimum(hi, size - 1), 0)
    columns = tl.arange(0, 128)
    first = tl.load(pointer + lo.to(tl.int64) * stride)
    least = tl.zeros([128], first.dtype) + first
    most = least
    for start in range(lo, hi + 1, 128):
        index = start + columns
        x = tl.load(pointer + index.to(tl.int64) * stride, mask=index <= hi, other=first)
        least = tl.minimum(least, x)
        most = tl.maximum(most, x)
    return tl.min(least, 0), tl.max(most, 0)
"""

_ROW = ("batch", "q_head", "kv_head", "q_pos")
_REQUEST = ("q_len", "kv_len", "q_start", "kv_start")
ARGUMENTS = {
    "logits_transform": ("logits", *_ROW, "kv_pos", *_REQUEST),
    "logits_mask": (*_ROW, "kv_pos", *_REQUEST),
    "query_transform": ("q", *_ROW, *_REQUEST, "dim"),
    "key_transform": ("k", "batch", "kv_head", "kv_pos", *_REQUEST, "dim"),
    "output_transform": ("out", "lse", *_ROW, *_REQUEST, "dim"),
    "mask_bounds": (
        "batch",
        "kv_head",
        "q_head_lo",
        "q_head_hi",
        "q_pos_lo",
        "q_pos_hi",
        "kv_pos_lo",
        "kv_pos_hi",
        *_REQUEST,
    ),
}
HOOKS = {
    "logits_transform": "logits",
    "logits_mask": "mask",
    "query_transform": "query",
    "key_transform": "key",
    "output_transform": "output",
}

#: What a module may define; the last two are Gluon's.
NAMES = (*HOOKS, "mask_bounds", "query_index", "key_index", "cap_factors", "position_slope")


def literal(value: bool | int | float, dtype: str) -> str:
    if dtype == DOUBLE:
        return _double(value)
    if dtype == FLOAT and not math.isfinite(value):
        return f'float("{value}")'
    if dtype == INT64:
        return f"tl.cast({value}, tl.int64)"
    return f"({value!r})" if dtype != BOOL and value < 0 else repr(value)


def _double(value: float) -> str:
    """A float64 as a sum: Triton reads a Python float as float32."""
    parts: list[float] = []
    rest = value
    while not parts or (rest and math.isfinite(rest)):
        part = struct.unpack("f", struct.pack("f", rest))[0] if abs(rest) < 3e38 else rest
        if not part and parts:
            break  # below what float32 holds
        parts.append(part)
        rest -= part
    text = [f"tl.cast({literal(p, FLOAT)}, tl.float64)" for p in parts]
    return text[0] if len(text) == 1 else f"({' + '.join(text)})"


class _Writer:
    def __init__(self, program: Program):
        self.words: dict[Param, int] = {}
        word = 0
        for p in program.params:
            self.words[p] = word
            word += 1 if p.kind == "scalar" else 1 + 2 * p.rank
        self.lines: list[str] = []
        self.names: dict[Expr, str] = {}
        self.elements: dict[Expr, int] = {}
        self.blocks: dict[tuple, str] = {}

    def write(self, roots: tuple[Expr, ...]) -> list[str]:
        """The names of the roots' values, after the statements that compute them."""
        for node in topological(*roots):
            if node in self.names:
                continue
            if node.op == "const":
                self.names[node] = literal(node.attr, node.dtype)
            elif node.op == "input":
                self.names[node] = str(node.attr)
            elif node.op == "element":
                row = "q" if node.attr == "query" else "k"
                self.names[node] = f"{row}[{self.elements.setdefault(node.args[0], len(self.elements))}]"
            else:
                name = f"t{len(self.lines)}"
                self.lines.append(f"    {name} = {self.call(node)}")
                self.names[node] = name
        return [self.names[r] for r in roots]

    def call(self, node: Expr) -> str:
        a = [self.names[x] for x in node.args]
        op, integer = node.op, node.args[0].dtype in INT_BOUNDS if node.args else False
        if op == "param":
            word = f"values[{self.words[node.attr]}]"
            return f"{word} != 0" if node.dtype == BOOL else f"tl.cast({word}, {TYPES[node.dtype]})"
        if op in ("load", "block_min", "block_max"):
            return self.load(node, a) if op == "load" else self.block(node, a)
        if op == "cast":
            return f"tl.cast({a[0]}, {TYPES[node.dtype]})"
        if op == "neg":
            return f"-{a[0]}"
        if op == "not":
            return f"{a[0]} == 0"
        if op == "bitnot":
            return f"~{a[0]}"
        if op == "isnan":
            return f"{a[0]} != {a[0]}"
        if op in ("min", "max"):
            nan = "" if integer else ", propagate_nan=tl.PropagateNan.ALL"
            return f"tl.{op}imum({a[0]}, {a[1]}{nan})"
        if op in ("shl", "shr"):
            return f"_{op}({a[0]}, {a[1]}, {BITS[node.dtype]})"
        if op in ("floordiv", "mod"):
            if integer:
                return f"_{op}({a[0]}, {a[1]})"
            if node.dtype == DOUBLE:
                rest = f"_remainder({a[0]}, {a[1]})"
                return rest if op == "mod" else f"tl.floor(({a[0]} - {rest}) / {a[1]} + 0.5)"
            return f"tl.floor({a[0]} / {a[1]})" if op == "floordiv" else f"{a[0]} - tl.floor({a[0]} / {a[1]}) * {a[1]}"
        if op in BINARY:
            return f"{a[0]} {BINARY[op]} {a[1]}"
        if op == "tanh" and node.dtype == DOUBLE:
            return f"1.0 - 2.0 / (tl.exp(2.0 * {a[0]}) + 1.0)"
        return f"{CALLS[op]}({', '.join(a)})"

    def load(self, node: Expr, indices: list[str]) -> str:
        p: Param = node.attr
        w = self.words[p]
        wraps = spans.wraps(node)

        def place(d: int) -> str:
            return "_wrap" if wraps[d] else "_clamp"

        if p.kind == "bits":
            bit = f"t{len(self.lines)}_bit"
            self.lines.append(f"    {bit} = {place(0)}({indices[0]}, tl.cast(values[{w + 1}], tl.int64) * 8)")
            return f"((tl.load(values[{w}] + {bit} // 8).to(tl.int32) >> ({bit} % 8).to(tl.int32)) & 1) != 0"
        offset = [
            f"{place(d)}({i}, values[{w + 1 + d}]).to(tl.int64) * values[{w + 1 + p.rank + d}]"
            for d, i in enumerate(indices)
        ]
        value = f"tl.load({' + '.join([f'values[{w}]', *offset])})"
        return f"{value} != 0" if node.dtype == BOOL else f"tl.cast({value}, {TYPES[node.dtype]})"

    def block(self, node: Expr, corners: list[str]) -> str:
        """1-D blocks are read; of others nothing is known."""
        p: Param = node.attr
        w = self.words[p]
        if p.rank != 1 or p.kind == "bits" or node.dtype in FLOATS:
            smallest = node.op == "block_min"
            if node.dtype == BOOL:
                return f"tl.cast({not smallest}, tl.int1)"
            value = literal(math.nan, FLOAT) if node.dtype in FLOATS else INT_BOUNDS[node.dtype][0 if smallest else 1]
            return f"tl.cast({value}, {TYPES[node.dtype]})"
        pair = self.blocks.get((w, *corners))
        if pair is None:
            pair = self.blocks[(w, *corners)] = f"b{len(self.blocks)}"
            call = f"_block_range(values[{w}], {corners[0]}, {corners[1]}, values[{w + 1}], values[{w + 2}])"
            self.lines.append(f"    {pair}_lo, {pair}_hi = {call}")
        value = f"{pair}_{'lo' if node.op == 'block_min' else 'hi'}"
        return f"{value} != 0" if node.dtype == BOOL else f"tl.cast({value}, {TYPES[node.dtype]})"


def _function(name: str, lines: list[str], result: str) -> list[str]:
    return [
        "",
        "",
        "@triton.jit",
        f"def {name}({', '.join([*ARGUMENTS[name], 'values'])}):",
        *lines,
        f"    return {result}",
    ]


def render(program: Program, prelude: str = PRELUDE) -> str:
    """A module's text, after a prelude. Hooks that the program lacks are None; `QUERY_LOADS` and `KEY_LOADS` say how
    many elements a vector hook reads, and `query_index(i, dim)`, `key_index(i, dim)` which. The program must be
    specialised if it has vector hooks."""
    lines = [prelude.rstrip("\n")]
    for name, hook in HOOKS.items():
        root = getattr(program, hook)
        if root is None:
            lines += ["", "", f"{name} = None"]
            if hook in ("query", "key"):
                lines += [f"{hook}_index = None", f"{hook.upper()}_LOADS = 0"]
            continue
        writer = _Writer(program)
        (result,) = writer.write((root,))
        lines += _function(name, writer.lines, result)
        if hook in ("query", "key"):
            lines += _index(program, hook, writer.elements)
    if program.mask is None:
        lines += ["", "", "mask_bounds = None"]
    else:
        writer = _Writer(program)
        every, some = writer.write(ranges.verdict(program))
        lines += _function("mask_bounds", writer.lines, f"{every}, {some}")
    return "\n".join([*lines, ""])


def _index(program: Program, hook: str, elements: dict[Expr, int]) -> list[str]:
    lines = ["", "", "@triton.jit", f"def {hook}_index(i: tl.constexpr, dim):"]
    for index, number in elements.items():
        writer = _Writer(program)
        (result,) = writer.write((index,))
        lines += [f"    {'if' if number == 0 else 'elif'} i == {number}:"]
        lines += ["    " + line for line in [*writer.lines, f"    {hook}_{number} = {result}"]]
        lines += [f"        return {hook}_{number}"]
    return [*lines, "", "", f"{hook.upper()}_LOADS = {len(elements)}"]


@dataclass(frozen=True)
class Function:
    """One function of a program's module, known by the module's text; `load` makes Triton's object of it."""

    program: Program
    text: str = field(compare=False, repr=False)
    name: str
    prelude: str = field(default=PRELUDE, repr=False)

    @property
    def identity(self) -> list[str]:
        return [self.name, _digest(self.text)]

    def load(self) -> Any:
        return getattr(load(self.program, self.prelude), self.name)


@lru_cache(maxsize=512)
def functions(program: Program, prelude: str = PRELUDE) -> SimpleNamespace:
    """The program's functions for a kernel that is asked for, each a `Function` or None, with QUERY_LOADS, KEY_LOADS
    and the module's `text`. Triton is not imported."""
    text = render(program, prelude)
    found: dict[str, Any] = {f"{hook.upper()}_LOADS": 0 for hook in ("query", "key")}
    found |= {name: int(number) for name, number in re.findall(r"^(\w+_LOADS) = (\d+)$", text, re.MULTILINE)}
    return SimpleNamespace(
        text=text, **found, **{n: Function(program, text, n, prelude) if f"\ndef {n}(" in text else None for n in NAMES}
    )


@lru_cache(maxsize=512)
def load(program: Program, prelude: str = PRELUDE) -> SimpleNamespace:
    """The program's functions as Triton's objects, which kernels are compiled with, or None. Triton reads a function's
    source from its file, so the module is written to a private temporary folder."""
    text = functions(program, prelude).text
    name = f"variant_{_digest(text)[:16]}"
    with tempfile.TemporaryDirectory(prefix="flashloom-") as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"flashloom_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return SimpleNamespace(**{n: getattr(module, n, None) for n in NAMES})


@lru_cache(maxsize=512)
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
