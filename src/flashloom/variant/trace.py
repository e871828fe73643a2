"""Tracing: hooks are called with symbols that answer Python operators and torch functions and write the expression
down.

Types and promotion are torch's: positions are int64, what a tensor holds has its type (16-bit floats count as float32),
Python numbers are weak, `/` of integers is a float. In which width integers are computed is decided later (`widths`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from flashloom.variant import expr as ir
from flashloom.variant.expr import (
    BOOL,
    DOUBLE,
    FLOAT,
    FLOATS,
    INT8,
    INT16,
    INT32,
    INT64,
    INT_BOUNDS,
    UINT8,
    Expr,
    Param,
    make,
)
from flashloom.variant.foreign import UFUNCS, TraceError, argument, numpy_number, of_one, refuse
from flashloom.variant.names import near

TORCH_DTYPES = {getattr(torch, t): t for t in (BOOL, UINT8, INT8, INT16, INT32, INT64, FLOAT, DOUBLE)}


def lift(value: Any) -> Expr:
    """A symbol's expression, or a Python number as a constant."""
    if isinstance(value, Symbol):
        return value._expr
    if isinstance(value, (bool, int, float)):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise TraceError(f"a hook computes with {value}, which is beyond int64: use a float")
        return ir.const(value, INT64 if type(value) is int else None)
    if isinstance(value, Field):
        raise TraceError(
            f"the field {value._param.name!r} holds one value per index: index it, as in "
            f"self.{value._param.name}[at.q_head]"
        )
    if isinstance(value, torch.Tensor):
        raise TraceError(
            "a tensor is used directly in a hook: make it a field of the variant (for one value: a 0-dim tensor "
            "field; for several: a PerHead, PerRequest ... or torch.Tensor field, indexed with at.*)",
            value,
        )
    if type(value).__module__ == "numpy":
        return lift(numpy_number(value))
    raise TraceError(
        f"a hook computes with {type(value).__name__} {value!r}: use torch functions, Python numbers and the "
        "variant's fields"
    )


def promote(args: tuple[Any, ...], at_least: str = BOOL) -> tuple[Expr, ...]:
    """Bring arguments to one type by torch's rules: a Python number decides only if it is of a higher kind, and wraps
    in the type that the others have."""
    exprs = [lift(a) for a in args]
    strong = {e.dtype for e, a in zip(exprs, args) if isinstance(a, Symbol)} | {at_least}
    dtype = max(strong, key=ir.RANK.__getitem__)
    if dtype == INT8 and UINT8 in strong:
        dtype = INT16
    weak = {e.dtype for e, a in zip(exprs, args) if not isinstance(a, Symbol)}
    if FLOAT in weak and dtype not in FLOATS:
        dtype = FLOAT
    elif INT64 in weak and dtype == BOOL:
        dtype = INT64
    return tuple(ir.cast(e, dtype) for e in exprs)


def _arithmetic(op: str, boolean: str | None) -> Callable[..., Symbol]:
    def build(a: Any, b: Any, **options: Any) -> Symbol:
        if options.pop("alpha", 1) != 1 or options:
            raise TraceError(
                f"torch.{op} with {', '.join(options) or 'alpha'} cannot be traced: write the arithmetic out"
            )
        a, b = promote((a, b))
        if a.dtype == BOOL:
            if boolean is None:
                raise TraceError(
                    f"{op} of two bools is not defined in torch: write torch.where, &, | or ~, or convert with "
                    ".to(torch.int32)"
                )
            return Symbol(make(boolean, BOOL, (a, b)))
        if op in ("floordiv", "mod") and b.op == "const" and b.dtype in INT_BOUNDS and b.attr == 0:
            raise TraceError("an integer is divided by 0: use another divisor, or floats")
        return Symbol(make(op, a.dtype, (a, b)))

    return build


def _divide(a: Any, b: Any, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode == "floor":
        return OPS["floordiv"](a, b)
    if rounding_mode is not None:
        raise TraceError(f"division with rounding_mode={rounding_mode!r} cannot be traced: use '//' (floor)")
    a, b = promote((a, b), FLOAT)
    return Symbol(make("div", a.dtype, (a, b)))


def _compare(op: str) -> Callable[..., Symbol]:
    def build(a: Any, b: Any) -> Symbol:
        a, b = promote((a, b))
        if a.dtype == BOOL and op not in ("eq", "ne"):
            a, b = ir.cast(a, UINT8), ir.cast(b, UINT8)
        if a.dtype == BOOL:
            different = make("xor", BOOL, (a, b))
            return Symbol(different if op == "ne" else ir.negate(different))
        return Symbol(make(op, BOOL, (a, b)))

    return build


def _to_bool(value: Any) -> Expr:
    e = lift(value)
    return e if e.dtype == BOOL else make("ne", BOOL, (e, ir.const(0, e.dtype)))


def _logic(op: str) -> Callable[..., Symbol]:
    return lambda *args: Symbol(make(op, BOOL, tuple(_to_bool(a) for a in args)))


def _bitwise(op: str, boolean: str | None) -> Callable[..., Symbol]:
    def build(*args: Any) -> Symbol:
        exprs = promote(args)
        if exprs[0].dtype in FLOATS:
            raise TraceError(f"{op} needs bools or integers: compare floats first, as in (x > 0) & (y > 0)")
        if exprs[0].dtype == BOOL:
            if boolean is None:
                raise TraceError(f"{op} of bools cannot be traced: convert with .to(torch.int32)")
            return Symbol(make(boolean, BOOL, exprs))
        return Symbol(make(op, exprs[0].dtype, exprs))

    return build


def _float_function(op: str) -> Callable[..., Symbol]:
    def build(a: Any, **options: Any) -> Symbol:
        if options:
            raise TraceError(f"torch.{op} takes no {', '.join(options)} in a hook")
        (e,) = promote((a,), FLOAT)
        if e.dtype == DOUBLE and op in ("sin", "cos", "erf"):
            raise TraceError(f"torch.{op} of a float64 cannot be traced: convert with .to(torch.float32)")
        return Symbol(make(op, e.dtype, (e,)))

    return build


def _unary(op: str) -> Callable[..., Symbol]:
    def build(a: Any) -> Symbol:
        e = lift(a)
        if e.dtype == BOOL:
            raise TraceError(f"{op} of a bool is not defined in torch: use ~ for the negation of a condition")
        return Symbol(e if op == "floor" and e.dtype not in FLOATS else make(op, e.dtype, (e,)))

    return build


def _where(condition: Any, a: Any = None, b: Any = None) -> Symbol:
    if a is None or b is None:
        raise TraceError("torch.where needs three arguments in a hook: torch.where(condition, a, b)")
    c = lift(condition)
    if c.dtype != BOOL:
        raise TraceError("torch.where's condition must be a bool: write a comparison")
    a, b = promote((a, b))
    return Symbol(make("where", a.dtype, (c, a, b)))


def _extreme(op: str) -> Callable[..., Symbol]:
    def build(a: Any, b: Any = None, **options: Any) -> Symbol:
        if b is None or options:
            raise TraceError(
                f"torch.{op} over a dimension cannot be traced: a hook sees one element; give two arguments for "
                f"their {op}imum"
            )
        a, b = promote((a, b))
        if a.dtype == BOOL:
            return Symbol(make("and" if op == "min" else "or", BOOL, (a, b)))
        return Symbol(make(op, a.dtype, (a, b)))

    return build


def _clamp(x: Any, min: Any = None, max: Any = None) -> Symbol:
    result = x
    if min is not None:
        result = OPS["max"](result, min)
    if max is not None:
        result = OPS["min"](result, max)
    return Symbol(lift(result))


def _power(a: Any, exponent: Any) -> Symbol:
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        if exponent in (1, 2, 3, 4):
            result = _divide(a, 1) if isinstance(exponent, float) else a  # a float
            for _ in range(int(exponent) - 1):
                result = OPS["mul"](result, a)
            return Symbol(lift(result))
        simple = {0.5: "sqrt", -0.5: "rsqrt"}.get(exponent)
        if simple:
            return OPS[simple](a)
        if exponent == -1:
            return _divide(1.0, a)
    raise TraceError(
        "a power is traced for the exponents 1 to 4, -1, 0.5 and -0.5: write torch.exp2(y * torch.log2(x)) for x ** y"
    )


def _convert(x: Any, *args: Any, **options: Any) -> Symbol:
    dtype = options.pop("dtype", args[0] if args else None)
    options.pop("copy", None)
    if isinstance(dtype, Symbol):
        name: str | None = dtype._expr.dtype
    else:
        name = TORCH_DTYPES.get(dtype)
    if name is None:
        raise TraceError(
            f"conversion to {dtype} cannot be traced: hooks compute in bool, uint8, int8, int16, int32, int64, float32 "
            "and float64"
        )
    return Symbol(_to_bool(x) if name == BOOL else ir.cast(lift(x), name))


def _filled(value: float | None) -> Callable[..., Symbol]:
    def build(x: Any, fill: Any = None, *, dtype: torch.dtype | None = None, **_: Any) -> Symbol:
        number = fill if value is None else value
        return _convert(number, dtype if dtype is not None else Symbol(lift(x)))

    return build


def _new(value: int) -> Callable[..., Symbol]:
    """new_ones and new_zeros of shape (), with which torch's mask combinators begin."""

    def build(x: Any, size: Any = (), *, dtype: torch.dtype | None = None, **_: Any) -> Symbol:
        if tuple(size) != ():
            raise TraceError(
                f"new_{'ones' if value else 'zeros'} with shape {size}: a hook sees one element, of shape ()"
            )
        return _filled(value)(x, dtype=dtype)

    return build


OPS: dict[str, Callable[..., Symbol]] = {
    "add": _arithmetic("add", "or"), "sub": _arithmetic("sub", None), "mul": _arithmetic("mul", "and"), "div": _divide,
    "floordiv": _arithmetic("floordiv", None), "mod": _arithmetic("mod", None), "pow": _power,
    **{op: _compare(op) for op in ir.COMPARISONS},
    **{op: _float_function(op) for op in ("exp", "exp2", "log", "log2", "tanh", "sigmoid")},
    **{op: _float_function(op) for op in ("sqrt", "rsqrt", "erf", "sin", "cos")},
    **{op: _unary(op) for op in ("neg", "abs", "floor")},
    "min": _extreme("min"), "max": _extreme("max"), "clamp": _clamp, "where": _where, "to": _convert,
    "logical_and": _logic("and"), "logical_or": _logic("or"), "logical_not": _logic("not"),
    "logical_xor": _logic("xor"),
    "bitand": _bitwise("bitand", "and"), "bitor": _bitwise("bitor", "or"), "bitxor": _bitwise("bitxor", "xor"),
    "bitnot": _bitwise("bitnot", "not"), "shl": _bitwise("shl", None), "shr": _bitwise("shr", None),
    "isnan": lambda x: Symbol(make("isnan", BOOL, promote((x,), FLOAT))),
    "square": lambda x: OPS["mul"](x, x), "reciprocal": lambda x: _divide(1.0, x), "relu": lambda x: OPS["max"](x, 0),
    "new_ones": _new(1), "new_zeros": _new(0), "full_like": _filled(None), "zeros_like": _filled(0),
    "ones_like": _filled(1), "clone": lambda x: Symbol(lift(x)),
    "masked_fill": lambda x, mask, value: _convert(_where(mask, value, x), Symbol(lift(x))),
}  # fmt: skip

# names under which torch knows them, as functions of torch and as methods of a tensor
ALIASES = {
    "add": "add", "sub": "sub subtract", "mul": "mul multiply", "div": "div divide true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder", "pow": "pow", "lt": "lt less", "le": "le less_equal", "gt": "gt greater",
    "ge": "ge greater_equal",
    "eq": "eq", "ne": "ne not_equal", "neg": "neg negative", "abs": "abs absolute", "min": "min minimum",
    "max": "max maximum",
    "clamp": "clamp clip", "bitand": "bitwise_and", "bitor": "bitwise_or", "bitxor": "bitwise_xor",
    "bitnot": "bitwise_not",
    "shl": "bitwise_left_shift", "shr": "bitwise_right_shift", "exp2": "exp2", "sigmoid": "sigmoid",
}  # fmt: skip
METHODS: dict[str, Callable[..., Symbol]] = {}
FUNCTIONS: dict[Any, Callable[..., Symbol]] = {}
for _op, _build in OPS.items():
    for _name in ALIASES.get(_op, _op).split():
        METHODS[_name] = _build
        for _module in (torch, torch.special, torch.nn.functional, torch.Tensor):
            _function = getattr(_module, _name, None)
            if isinstance(_function, (types.BuiltinFunctionType, types.FunctionType, types.MethodDescriptorType)):
                FUNCTIONS[_function] = _build
FUNCTIONS[torch.special.expit] = OPS["sigmoid"]
METHODS.update({k: (lambda x, t=t: _convert(x, t)) for k, t in {
    "float": torch.float32, "double": torch.float64, "bool": torch.bool, "int": torch.int32, "long": torch.int64,
    "short": torch.int16, "char": torch.int8, "byte": torch.uint8}.items()})  # fmt: skip
METHODS["type"] = METHODS["to"]


class Symbol:
    """A value inside a hook: one element, of no particular batch shape."""

    __slots__ = ("_expr",)

    def __init__(self, e: Expr):
        self._expr = e

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        build = FUNCTIONS.get(func)
        name = getattr(func, "__name__", str(func))
        if build is None:
            build = METHODS.get(name.strip("_")) if name.startswith("__") else None
        if build is None:
            refuse(name, args, METHODS)
        return build(*map(argument, args), **{k: argument(v) for k, v in (kwargs or {}).items()})

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Python's operators beside numpy's numbers; numpy's functions are not torch's."""
        name = UFUNCS.get(ufunc.__name__)
        if method != "__call__" or name is None or kwargs or not any(type(a).__module__ == "numpy" for a in args):
            known = ufunc.__name__ if ufunc.__name__ in METHODS else name
            raise TraceError(
                f"numpy.{ufunc.__name__} cannot be traced in a hook: "
                + (f"write torch.{known}" if known else "write torch functions")
            )
        return METHODS[name](*(a if isinstance(a, Symbol) else numpy_number(a) for a in args))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in METHODS:
            return lambda *args, **kwargs: METHODS[name](
                self, *map(argument, args), **{k: argument(v) for k, v in kwargs.items()}
            )
        if name == "dtype":
            return getattr(torch, self._expr.dtype)
        if of_one(name) is not None:
            return of_one(name)
        if name in ("item", "tolist", "numpy", "cpu", "cuda"):
            raise TraceError(
                f".{name}() reads a value while the kernel is being written: compute with the symbol itself and use "
                "torch.where"
            )
        if name in (
            "shape",
            "ndim",
            "size",
            "dim",
            "device",
            "view",
            "reshape",
            "unsqueeze",
            "expand",
            "sum",
            "mean",
            "any",
            "all",
        ):
            raise TraceError(
                f".{name} has no meaning in a hook, which sees one element and no tensor: use at.* and torch.where"
            )
        raise TraceError(f".{name} cannot be traced in a hook; available are {', '.join(sorted(METHODS))}")

    def __repr__(self) -> str:
        return f"Symbol({self._expr!r})"

    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise TraceError(
            "a hook branches on a traced value (if, and, or, not, min(), max() or a chained comparison): "
            "write torch.where(condition, a, b), torch.minimum, torch.maximum, and &, |, ~ between bracketed "
            "comparisons"
        )

    def _python_number(self, *_: Any) -> NoReturn:
        raise TraceError(
            "a traced value is used as a Python number (math.*, int(), float(), range(), the index of a list or numpy "
            "array): use torch functions on it, and tensors for tables (torch.from_numpy makes one of an array)"
        )

    __float__ = __int__ = __index__ = __complex__ = __round__ = __array__ = _python_number

    def _not_a_container(self, *_: Any) -> NoReturn:
        raise TraceError(
            "a traced value is one element: it cannot be indexed, iterated or measured; index the variant's fields "
            "with at.*"
        )

    __iter__ = __len__ = __contains__ = __getitem__ = __setitem__ = _not_a_container

    def __neg__(self) -> Symbol:
        return OPS["neg"](self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return OPS["abs"](self)

    def __invert__(self) -> Symbol:
        return OPS["bitnot"](self)

    def __matmul__(self, other: Any) -> NoReturn:
        refuse("matmul", (self, other), METHODS)

    __rmatmul__ = __matmul__


def _install_operators() -> None:
    binary = {"add": "add", "sub": "sub", "mul": "mul",
              "truediv": "div", "floordiv": "floordiv", "mod": "mod", "pow": "pow",
              "and": "bitand", "or": "bitor", "xor": "bitxor", "lshift": "shl", "rshift": "shr"}  # fmt: skip
    for name, op in binary.items():
        setattr(Symbol, f"__{name}__", lambda self, other, op=op: OPS[op](self, argument(other)))
        setattr(Symbol, f"__r{name}__", lambda self, other, op=op: OPS[op](argument(other), self))
    for op in ir.COMPARISONS:
        setattr(Symbol, f"__{op}__", lambda self, other, op=op: OPS[op](self, argument(other)))


_install_operators()


class VectorSymbol(Symbol):
    """The row of a vector hook: alone the element at `at.dim`; `row[i]` is another element of the same row."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Symbol:  # type: ignore[override]
        i = lift(index)
        if i.dtype not in INT_BOUNDS:
            raise TraceError(
                f"a row is indexed with {i.dtype}: use integers, such as (at.dim + at.head_dim // 2) % at.head_dim"
            )
        return Symbol(ir.substitute(self._expr, {ir.inp("dim"): ir.cast(i, INT32)}))


#: The positions that a field may be indexed with as they stand, and what it holds one value of.
_POSITIONS = {
    "head": ("head", "q_head"), "kv_head": ("key/value head", "kv_head"), "request": ("request", "batch"),
    "key": ("key token", "kv_pos", "q_pos"),
}  # fmt: skip
_PER_BATCH = {"request": "requests", "query": "query tokens", "key": "key tokens"}


def _bare(index: Expr) -> Expr:
    """An index without conversions between integer types."""
    while index.op == "cast" and index.args[0].dtype in INT_BOUNDS:
        index = index.args[0]
    return index


def _check_position(p: Param, indices: tuple[Expr, ...], shape: tuple[int, ...]) -> None:
    """A position of another kind than the field's, or a number beyond it, would be clamped and mean nothing."""
    for i, size in zip(indices, () if p.kind in {*_PER_BATCH, "bits"} else shape):
        if i.op == "const" and size and not -size <= i.attr < size:
            raise TraceError(f"the field {p.name!r} of shape {tuple(shape)} is indexed with {i.attr}: that is outside")
    if p.kind in _POSITIONS:
        what, *names = _POSITIONS[p.kind]
        index = _bare(indices[0])
        if index.op == "input" and index.attr not in names:
            raise TraceError(
                f"the field {p.name!r} has one value per {what} and is indexed with at.{index.attr}: index it with "
                + " or ".join(f"at.{name}" for name in names)
            )


class Field:
    """A field with one value per index, as a hook sees it. A negative index counts from the end, as in torch (not in
    fields per token). Every index is clamped into the tensor in every language, so that what masked-out positions read
    is harmless. Its sizes are constants of the kernel."""

    __slots__ = ("_param", "_shape")

    def __init__(self, param: Param, shape: tuple[int, ...]):
        self._param, self._shape = param, shape

    def __getitem__(self, index: Any) -> Symbol:
        p = self._param
        indices = tuple(lift(i) for i in (index if isinstance(index, tuple) else (index,)))
        if len(indices) != p.rank:
            raise TraceError(
                f"the field {p.name!r} has {p.rank} dimensions and is indexed with {len(indices)}: give one index "
                "for each"
            )
        for i in indices:
            if i.dtype not in INT_BOUNDS:
                raise TraceError(f"the field {p.name!r} is indexed with a {i.dtype}: use integers such as at.q_head")
        _check_position(p, indices, self._shape)
        return Symbol(make("load", p.traced_dtype, tuple(self._place(i) for i in indices), p))

    def _place(self, index: Expr) -> Expr:
        """Per-token fields are flat over the batch; the request's offset is added here."""
        kind, q_pos, kv_len = self._param.kind, ir.inp("q_pos"), ir.inp("kv_len")
        if kind == "query":
            if _bare(index) is not q_pos:
                raise TraceError(
                    f"the field {self._param.name!r} holds one value per query token of this step: index it with "
                    "at.q_pos alone"
                )
            row = make("sub", INT32, (q_pos, make("sub", INT32, (kv_len, ir.inp("q_len")))))
            return make("add", INT32, (ir.inp("q_start"), row))
        if kind == "key":
            if index.op == "const" and index.attr < 0:
                raise TraceError(
                    f"the field {self._param.name!r} is indexed with {index.attr}: it is indexed with a position of "
                    "the request, 0 or more; at.kv_len - 1 is the last"
                )
            index = ir.cast(index, INT64)
            if _bare(index) is not ir.inp("kv_pos"):
                last = make("sub", INT64, (ir.cast(kv_len, INT64), ir.const(1, INT64)))
                index = make("max", INT64, (make("min", INT64, (index, last)), ir.const(0, INT64)))
            return make("add", INT64, (ir.cast(ir.inp("kv_start"), INT64), index))
        return index

    @property
    def shape(self) -> torch.Size:
        if self._param.kind in ("request", "query", "key"):
            raise TraceError(
                f"the field {self._param.name!r} is as long as the batch has {_PER_BATCH[self._param.kind]}, and a "
                "kernel serves every batch: use at.q_len, at.kv_len, or a field with the number"
            )
        return torch.Size(self._shape)

    ndim = property(lambda self: self._param.rank)
    dtype = property(lambda self: getattr(torch, self._param.dtype))

    def dim(self) -> int:
        return self._param.rank

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        lift(self)

    def __setitem__(self, *_: Any) -> NoReturn:
        raise TraceError(f"the field {self._param.name!r} is changed in a hook: a hook computes a value, no more")

    def __iter__(self) -> NoReturn:
        raise TraceError(f"the field {self._param.name!r} cannot be iterated in a hook: index it with at.*")

    __torch_function__ = classmethod(
        lambda cls, func, types, args=(), kwargs=None: [lift(a) for a in args if isinstance(a, Field)]
    )
    for _name in "add radd sub rsub mul rmul truediv rtruediv lt le gt ge eq ne and or neg bool float int".split():
        locals()[f"__{_name}__"] = lambda self, *_: lift(self)
    __hash__ = object.__hash__
    del _name


def field_symbol(param: Param, shape: tuple[int, ...] = ()) -> Symbol | Field:
    if param.kind == "scalar":
        return Symbol(make("param", param.traced_dtype, (), param))
    if param.rank == 0:
        return Symbol(make("load", param.traced_dtype, (), param))
    return Field(param, shape)


class At:
    """Where a hook is being evaluated. Only what exists for that hook can be read."""

    def __init__(self, hook: str, names: tuple[str, ...]):
        object.__setattr__(self, "_hook", hook)
        for name in names:
            object.__setattr__(self, name, Symbol(ir.cast(ir.inp(name), INT64)))  # as torch's indices are

    def __getattr__(self, name: str) -> NoReturn:
        have = [k for k in self.__dict__ if not k.startswith("_")]
        if name.startswith("__"):
            raise AttributeError(name)
        meant = near(name, have)
        raise TraceError(
            f"at.{name} does not exist in {self._hook}{'; ' + meant if meant else ''}; there are {', '.join(have)}"
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TraceError(f"at.{name} cannot be assigned in a hook: bind the new value to a local name")


_ROW = ("batch", "q_head", "kv_head", "q_pos", "q_len", "kv_len")
AT_NAMES = {
    "query_transform": (*_ROW, "dim", "head_dim"),
    "key_transform": ("batch", "kv_head", "kv_pos", "q_len", "kv_len", "dim", "head_dim"),
    "logits_transform": (*_ROW, "kv_pos"),
    "logits_mask": (*_ROW, "kv_pos"),
    "output_transform": (*_ROW, "dim", "head_dim"),
}
