"""The expression IR: small, typed, hash-consed.

An `Expr` is a node of a directed acyclic graph. Equal expressions are one object, so common subexpressions are shared
from the start, and `make` folds constants and drops identities, so nothing later has to. Integers wrap in their type,
`floordiv` and `mod` floor, as in torch. While hooks are traced, types are those of torch's tensors; programs compute in
bool, int32, int64, float32 and float64 (see `widths`).
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from flashloom.dataclass import dataclass

BOOL, INT32, INT64, FLOAT, DOUBLE = "bool", "int32", "int64", "float32", "float64"
UINT8, INT8, INT16 = "uint8", "int8", "int16"
FLOATS = (FLOAT, DOUBLE)
# torch's promotion order; uint8 and int8 meet in int16
RANK = {BOOL: 0, UINT8: 1, INT8: 2, INT16: 3, INT32: 4, INT64: 5, FLOAT: 6, DOUBLE: 7}
BITS = {INT8: 8, INT16: 16, INT32: 32, INT64: 64}
INT_BOUNDS = {UINT8: (0, 255), **{t: (-(1 << (n - 1)), (1 << (n - 1)) - 1) for t, n in BITS.items()}}

#: Every input a hook can read, with its type. Positions are absolute: q_pos = kv_len - q_len + i.
INPUTS = {
    **dict.fromkeys(("batch", "q_head", "kv_head", "q_pos", "kv_pos", "q_len", "kv_len", "q_start", "kv_start"), INT32),
    **dict.fromkeys(("dim", "head_dim"), INT32),
    **dict.fromkeys(("logits", "out", "lse"), FLOAT),
    # the inclusive bounds of a tile, for verdicts (see `ranges`)
    **dict.fromkeys(("q_head_lo", "q_head_hi", "q_pos_lo", "q_pos_hi", "kv_pos_lo", "kv_pos_hi"), INT32),
}
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@dataclass(frozen=True)
class Param:
    """A run-time parameter of a variant. `dtype` is how it is stored; loads convert to the compute type."""

    name: str
    kind: str  # scalar, head, kv_head, request, query, key, tensor, bits
    dtype: str
    rank: int

    @property
    def compute_dtype(self) -> str:
        if self.kind == "bits" or self.dtype == BOOL:
            return BOOL
        if self.dtype == DOUBLE:
            return DOUBLE
        if self.dtype.startswith(("float", "bfloat")):
            return FLOAT
        return INT64 if self.dtype == INT64 else INT32

    @property
    def traced_dtype(self) -> str:
        """The type of what a hook reads: torch's, but float32 for 16-bit floats, and int64 for Python's integers."""
        if self.kind == "scalar" and self.compute_dtype == INT32:
            return INT64
        return self.dtype if self.dtype in INT_BOUNDS and self.kind != "bits" else self.compute_dtype


class Expr:
    """One node. Build it with `make`, `const` or `inp`, never directly."""

    __slots__ = ("__weakref__", "args", "attr", "dtype", "op")
    op: str
    dtype: str
    args: tuple[Expr, ...]
    attr: Any  # the value of a const, the name of an input, the Param of a load, the hook of an element

    def __repr__(self) -> str:
        if self.op == "const":
            return repr(self.attr)
        if self.op == "input":
            return str(self.attr)
        inner = [getattr(self.attr, "name", str(self.attr))] if self.attr is not None else []
        return f"{self.op}({', '.join(inner + [repr(a) for a in self.args])})"

    def __reduce__(self) -> tuple:
        return _node, (self.op, self.dtype, self.args, self.attr)


_interned: weakref.WeakValueDictionary[tuple, Expr] = weakref.WeakValueDictionary()
_interning = threading.RLock()  # setdefault of such a dictionary looks, and then writes


def _node(op: str, dtype: str, args: tuple[Expr, ...] = (), attr: Hashable = None) -> Expr:
    # repr tells 0.0 from -0.0 and 1 from True, which compare equal
    key = (op, dtype, tuple(map(id, args)), repr(attr) if op == "const" else attr)
    found = _interned.get(key)
    if found is None:
        found = Expr()
        found.op, found.dtype, found.args, found.attr = op, dtype, args, attr
        with _interning:
            found = _interned.setdefault(key, found)
    return found


def _after_fork() -> None:
    global _interning
    _interning = threading.RLock()  # a thread that held it is not in this process


os.register_at_fork(after_in_child=_after_fork)


def const(value: bool | int | float, dtype: str | None = None) -> Expr:
    """A constant, wrapped in its type; without a dtype a Python int is int32 (int64 if it must be) and a float is
    float32."""
    if dtype is None:
        dtype = BOOL if isinstance(value, bool) else FLOAT if isinstance(value, float) else INT32
        if dtype == INT32 and not INT_BOUNDS[INT32][0] <= value <= INT_BOUNDS[INT32][1]:
            dtype = INT64
    value = bool(value) if dtype == BOOL else float(value) if dtype in FLOATS else _wrap(int(value), dtype)
    return _node("const", dtype, (), value)


def inp(name: str) -> Expr:
    return _node("input", INPUTS[name], (), name)


TRUE, FALSE = const(True), const(False)


def _wrap(value: int, dtype: str) -> int:
    low, high = INT_BOUNDS[dtype]
    return (value - low) % (high - low + 1) + low


def _guard(function: Callable[..., float]) -> Callable[..., float]:
    """IEEE results where Python's math raises."""

    def call(*args: float) -> float:
        try:
            return function(*args)
        except OverflowError:
            return math.inf
        except (ValueError, ZeroDivisionError):
            return math.nan

    return call


def _divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)
    return a / b


def _floordiv(a: float, b: float) -> float:
    if b == 0:
        return 0 if isinstance(a, int) else _divide(a, b)
    return a // b


def _log(a: float, base: Callable[[float], float]) -> float:
    return -math.inf if a == 0 else base(a)


def _extreme(pick: Callable) -> Callable:
    return lambda a, b: math.nan if a != a or b != b else pick(a, b)


#: What each operator computes, on Python numbers: for folding constants and for evaluating tile verdicts on the host.
SCALAR: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs,
    "div": _divide, "floordiv": _floordiv,
    "mod": lambda a, b: (0 if isinstance(a, int) else math.nan) if b == 0 else a % b,
    "min": _extreme(min), "max": _extreme(max), "floor": lambda a: float(math.floor(a)) if math.isfinite(a) else a,
    "exp": _guard(math.exp), "exp2": _guard(lambda a: 2.0**a), "tanh": math.tanh, "erf": math.erf,
    "log": _guard(lambda a: _log(a, math.log)), "log2": _guard(lambda a: _log(a, math.log2)),
    "sigmoid": lambda a: 1 / (1 + _guard(math.exp)(-a)), "sqrt": _guard(math.sqrt),
    "rsqrt": _guard(lambda a: math.inf if a == 0 else 1 / math.sqrt(a)), "sin": _guard(math.sin),
    "cos": _guard(math.cos),
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.not_, "isnan": lambda a: a != a,
    "bitand": operator.and_, "bitor": operator.or_, "bitxor": operator.xor, "bitnot": operator.invert,
    # a count outside of the type shifts everything out; a right shift keeps the sign
    "shl": lambda a, b: a << b if 0 <= b < 64 else 0, "shr": lambda a, b: a >> (b if 0 <= b < 64 else 63),
    "where": lambda c, a, b: a if c else b,
    "cast": lambda a: a,
}  # fmt: skip


def fold(op: str, dtype: str, values: tuple) -> bool | int | float:
    """The value of an operator on Python numbers, in the result's type."""
    value = SCALAR[op](*values)
    if dtype == BOOL:
        return bool(value)
    if dtype in FLOATS:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return 0
    return _wrap(int(value), dtype)


def make(op: str, dtype: str, args: tuple[Expr, ...], attr: Hashable = None) -> Expr:
    """A node with constants folded and identities dropped. The arguments must have the operator's types already (see
    `trace`)."""
    if args and op in SCALAR:
        if op == "cast" and args[0].dtype == dtype:
            return args[0]
        if all(a.op == "const" for a in args):
            return const(fold(op, dtype, tuple(a.attr for a in args)), dtype)
        simple = _identity(op, dtype, args)
        if simple is not None:
            return simple
    return _node(op, dtype, args, attr)


def _is(e: Expr, value: float) -> bool:
    return e.op == "const" and e.attr == value


def _identity(op: str, dtype: str, args: tuple[Expr, ...]) -> Expr | None:
    a, b = args[0], args[-1]
    integer = dtype in INT_BOUNDS
    if op == "where":
        condition, yes, no = args
        if condition.op == "const":
            return yes if condition.attr else no
        if yes is no:
            return yes
        if dtype == BOOL and yes is TRUE and no is FALSE:
            return condition
    elif op == "and":
        return a if b is TRUE or a is b else b if a is TRUE else FALSE if a is FALSE or b is FALSE else None
    elif op == "or":
        return a if b is FALSE or a is b else b if a is FALSE else TRUE if a is TRUE or b is TRUE else None
    elif op == "not" and a.op == "not":
        return a.args[0]
    elif op in ("add", "sub") and integer and _is(b, 0):
        return a
    elif op == "add" and integer and _is(a, 0):
        return b
    elif (op in ("mul", "div") and _is(b, 1)) or (op == "floordiv" and integer and _is(b, 1)):
        return a
    elif op == "mul" and _is(a, 1):
        return b
    elif op in ("min", "max") and a is b:
        return a
    elif integer and op == "sub" and a is b:
        return const(0, dtype)
    elif op in COMPARISONS and a is b and a.dtype not in FLOATS:
        return const(op in ("le", "ge", "eq"))
    return None


def cast(e: Expr, dtype: str) -> Expr:
    return make("cast", dtype, (e,))


def all_of(*conditions: Expr) -> Expr:
    result = TRUE
    for c in conditions:
        result = make("and", BOOL, (result, c))
    return result


def any_of(*conditions: Expr) -> Expr:
    result = FALSE
    for c in conditions:
        result = make("or", BOOL, (result, c))
    return result


def negate(condition: Expr) -> Expr:
    return make("not", BOOL, (condition,))


def select(condition: Expr, yes: Expr, no: Expr) -> Expr:
    return make("where", yes.dtype, (condition, yes, no))


# --- walking ----------------------------------------------------------------------------------------------------------
# -----------------


def topological(*roots: Expr | None) -> Iterator[Expr]:
    """Every node below the roots once, arguments before users, in a fixed order."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots) if r is not None]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))


def substitute(root: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """The expression with some nodes replaced (and folded again)."""
    new: dict[Expr, Expr] = {}
    for node in topological(root):
        if node in mapping:
            new[node] = mapping[node]
        elif node.args:
            new[node] = make(node.op, node.dtype, tuple(new[a] for a in node.args), node.attr)
        else:
            new[node] = node
    return new[root]


def inputs_of(*roots: Expr | None) -> set[str]:
    return {str(n.attr) for n in topological(*roots) if n.op == "input"}


def scalar_value(
    root: Expr, inputs: Mapping[str, int | float], load: Callable[[Expr, tuple], int | float] | None = None
):
    """Evaluate on Python numbers; `load(node, index_values)` answers parameters. Only for host-side decisions."""
    new: dict[Expr, bool | int | float] = {}
    for node in topological(root):
        values = tuple(new[a] for a in node.args)
        if node.op == "const":
            new[node] = node.attr
        elif node.op == "input":
            new[node] = inputs[str(node.attr)]
        elif node.op in SCALAR:
            new[node] = fold(node.op, node.dtype, values)
        else:
            assert load is not None
            new[node] = load(node, values)
    return new[root]


# --- programs ---------------------------------------------------------------------------------------------------------
# -----------------

HOOKS = ("query", "key", "logits", "mask", "output")


@dataclass(frozen=True, eq=False)
class Program:
    """A traced variant: one expression per hook (None where the hook is absent) over `params`. Its digest is its
    identity."""

    params: tuple[Param, ...]
    query: Expr | None = None
    key: Expr | None = None
    logits: Expr | None = None
    mask: Expr | None = None
    output: Expr | None = None
    softmax: bool = True

    @property
    def hooks(self) -> dict[str, Expr]:
        return {name: getattr(self, name) for name in HOOKS if getattr(self, name) is not None}

    @cached_property
    def text(self) -> str:
        """The canonical form: names of fields, parts and classes do not appear in it."""
        number: dict[Expr, int] = {}
        numbers = {p: i for i, p in enumerate(self.params)}
        lines = [f"param {p.kind} {p.dtype} {p.rank}" for p in self.params]
        for node in topological(*(getattr(self, h) for h in HOOKS)):
            number[node] = len(number)
            attr = f"param{numbers[node.attr]}" if isinstance(node.attr, Param) else repr(node.attr)
            lines.append(f"%{number[node]} = {node.op} {node.dtype} {[number[a] for a in node.args]} {attr}")
        lines += [f"{h} = {number[e]}" for h, e in self.hooks.items()]
        return "\n".join([*lines, f"softmax = {self.softmax}"])

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @cached_property
    def uses_lse(self) -> bool:
        return "lse" in inputs_of(self.output)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def specialise(self, dim: int, value_dim: int) -> Program:
        """The program for one head shape: `head_dim` becomes a constant, and every element index of a vector hook is
        checked to be `at.dim`, a fixed permutation of it, or a constant. Raises ValueError otherwise."""
        new: dict[str, Any] = {}
        for hook, size in (("query", dim), ("key", dim), ("output", value_dim)):
            root = getattr(self, hook)
            if root is not None:
                root = substitute(root, {inp("head_dim"): const(size)})
                for node in topological(root):
                    if node.op == "element":
                        _check_permutation(hook, node.args[0], size)
                new[hook] = root
        return replace(self, **new)


def _check_permutation(hook: str, index: Expr, size: int) -> None:
    others = inputs_of(index) - {"dim"}
    if others or any(n.op in ("load", "element") for n in topological(index)):
        raise ValueError(
            f"{hook}_transform indexes its row with {index!r}: the index may use only at.dim, at.head_dim and "
            "constants; "
            "move what depends on positions or fields out of the index, for example into torch.where"
        )
    table = [int(scalar_value(index, {"dim": d})) for d in range(size)]
    wrong = [i for i in table if not 0 <= i < size]
    if wrong:
        raise ValueError(
            f"{hook}_transform reads element {wrong[0]} of a row of {size}: indices must lie in 0..{size - 1}; use "
            "% at.head_dim"
        )
    if len(set(table)) not in (1, size):
        raise ValueError(
            f"{hook}_transform's index {index!r} is neither a permutation of at.dim nor a constant for head dim "
            f"{size}; use one of them"
        )
