"""A variant is torch code: a class whose annotated fields are run-time parameters and whose methods are the hooks.

Class = code, instance = numbers: two instances of one class share a kernel when their fields have the same kinds,
dtypes and ranks.
"""

from __future__ import annotations

import collections
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, get_origin

import torch
from typing_extensions import Self, dataclass_transform

from flashloom.variant import expr as ir
from flashloom.variant import fill, names, spans, widths
from flashloom.variant.expr import BOOL, FLOAT, Expr, Param, Program
from flashloom.variant.fields import (
    Bits,
    PerHead,
    PerKeyToken,
    PerKVHead,
    PerQueryToken,
    PerRequest,
    Scalar,
    as_value,
    kind_of,
)
from flashloom.variant.foreign import of_a_key
from flashloom.variant.trace import AT_NAMES, At, Field, Symbol, TraceError, VectorSymbol, field_symbol, lift

HOOK_METHODS = {
    "query": "query_transform", "key": "key_transform", "logits": "logits_transform", "mask": "logits_mask",
    "output": "output_transform",
}  # fmt: skip
_handles = itertools.count(1)
#: Live variants by handle.
INSTANCES: weakref.WeakValueDictionary[int, Variant] = weakref.WeakValueDictionary()


@dataclass_transform(kw_only_default=True)
class Variant:
    """Base class of attention variants.

    Annotated fields become run-time parameters and keyword arguments of the constructor; help(fl.PerHead) and the other
    kinds say how each is indexed. Overridden hooks become the kernel: `query_transform(q, at)`, `key_transform(k, at)`,
    `logits_transform(logits, at)`, `logits_mask(at)` and `output_transform(out, lse, at)`; `at` has batch, q_head,
    kv_head, q_pos, kv_pos, q_len, kv_len and, in vector hooks, dim and head_dim. Positions are absolute within the
    request. With `softmax = False` the transformed logits are the weights. Variants compose with `&`, applied left to
    right.

    What no hook reads or calls is a TypeError when the class is first used, as is a class without a hook; a name that
    is a hook's but for its spelling is one at once. Names of another purpose begin with an underscore. Variants are
    equal when their classes and numbers are and their tensors are the same objects, and can be keys of a dict.
    """

    if TYPE_CHECKING:
        _handle: int
    softmax: ClassVar[bool] = True
    _kinds: ClassVar[dict[str, str]] = {}
    _all_pairs: ClassVar[bool] = False  # its indices must be right for every pair of a query and a key, masked or not
    _sized: ClassVar[tuple[str, ...]] = ()  # fields whose sizes `_check_batch` knows better than their indices do

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        try:
            annotations = inspect.get_annotations(cls, eval_str=True)
        except NameError as error:
            raise TypeError(
                f"an annotation of {cls.__name__} cannot be read ({error}): define the name before the class"
            ) from None
        own = {
            n: kind_of(cls, n, a)
            for n, a in annotations.items()
            if n != "softmax" and a is not ClassVar and get_origin(a) is not ClassVar
        }
        cls._kinds = {**cls._kinds, **own}
        names.check_class(cls, Variant, own)

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        self = super().__new__(cls)
        self.__dict__["_handle"] = next(_handles)  # how compiled code, which holds no objects, names it
        INSTANCES[self._handle] = self
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy has its own handle, tensors and, with these, identity
        return {n: value for n, value in self.__dict__.items() if n not in ("_handle", "_identity", "_traced")}

    def __init__(self, *values: Any, **fields: Any) -> None:
        cls = type(self)
        call = f"{cls.__name__}({', '.join(f'{n}=...' for n in cls._kinds)})"
        if values:
            raise TypeError(f"{cls.__name__} takes its fields by name: write {call}")
        for name in fields:
            if name not in cls._kinds:
                meant = names.near(name, cls._kinds)
                raise TypeError(
                    f"{cls.__name__} has no field {name!r}; its fields are {', '.join(cls._kinds) or 'none'}"
                    + (f"; {meant}" if meant else f" (a field is an annotation in the class, as {name}: float)")
                )
        for name, kind in cls._kinds.items():
            if name not in fields and not hasattr(cls, name):
                raise TypeError(f"{cls.__name__} needs the field {name!r}: {call}")
            self.__dict__[name] = as_value(cls.__name__, name, kind, fields.get(name, getattr(cls, name, None)))

    def __setattr__(self, name: str, value: object) -> None:
        # the constructor and cached_property write to __dict__, past this
        title = type(self).__name__
        if name in self._kinds and name in self.__dict__:
            raise AttributeError(f"a variant does not change: make another {title} with {name}=...")
        if "__dataclass_fields__" in vars(type(self)):
            raise AttributeError(f"{title} is a dataclass: leave out @dataclass, its fields are arguments already")
        init = (
            "" if type(self).__init__ is Variant.__init__ else f", drop __init__, and make it with {title}({name}=...)"
        )
        raise AttributeError(
            f"a variant does not change, and self.{name} = ... makes no field: fields are annotations, write "
            f"`{name}: {_like(value)}` in the class{init}"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a variant does not change: {type(self).__name__}.{name} cannot be deleted")

    def __getattr__(self, name: str) -> NoReturn:
        cls = type(self)
        meant = "" if name.startswith("_") else names.near(name, [n for n in dir(cls) if n[0] != "_"] + [*cls._kinds])
        raise AttributeError(f"{cls.__name__} has no attribute {name!r}" + (f": {meant}" if meant else ""))

    def __and__(self, other: Variant) -> Variant:
        if not isinstance(other, Variant):
            raise TypeError(f"{self} & {advice(other)}")
        parts = [*self._parts(), *other._parts()]
        return Composed(parts) if len(parts) > 1 else other if other._parts() else self

    def __rand__(self, other: object) -> NoReturn:
        raise TypeError(f"... & {self}: {advice(other)}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self} is an instance of a variant already: leave out the ()")

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"{self} is neither true nor false: variants are joined with & (not `and`), and one is told from None by "
            "`is None`"
        )

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        """What makes two variants of a class equal: numbers by value, tensors by being the same object, since their
        contents may change and lie on a device."""
        return tuple((n, id(v)) if isinstance(v, torch.Tensor) else (n, type(v), repr(v)) for n, v in self._fields())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Variant):
            return NotImplemented
        return self is other or (type(self) is type(other) and self._identity == other._identity)

    def __hash__(self) -> int:
        return hash((type(self), self._identity))

    def __repr__(self) -> str:
        fields = (f"{n}={tuple(v.shape) if isinstance(v, torch.Tensor) else v!r}" for n, v in self._fields())
        return f"{type(self).__name__}({', '.join(fields)})"

    def _parts(self) -> list[Variant]:
        return [self]

    def _check_batch(self, batch: Any, heads: Any) -> None:
        """Raise ValueError where the fields in `_sized` do not fit a batch, as far as the host knows its sizes."""

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for name in self._kinds:
            if name not in self.__dict__:
                raise TypeError(f"{type(self).__name__}.__init__ sets no {name!r}: call super().__init__({name}=...)")
            yield name, self.__dict__[name]

    @cached_property
    def _traced(self) -> tuple[Program, tuple[Any, ...]]:
        return trace_parts(self._parts())

    @property
    def program(self) -> Program:
        """The traced expressions: what a kernel is made from."""
        return self._traced[0]

    @property
    def values(self) -> tuple[Any, ...]:
        """The run-time values (tensors and numbers) for `program.params`, in order."""
        return self._traced[1]

    def explain(self, language: str = "cpp", dim: int = 128, value_dim: int | None = None) -> str:
        """The source generated for this variant: language "torch", "cpp", "triton" or "gluon"; `dim` matters to vector
        hooks only."""
        from flashloom import lower

        return lower.explain(self.program, language, dim, dim if value_dim is None else value_dim)


class Composed(Variant):
    """Several variants applied left to right: transforms chain, masks are ANDed."""

    if TYPE_CHECKING:
        parts: tuple[Variant, ...]

    def __init__(self, parts: list[Variant]):
        self.__dict__["parts"] = tuple(parts)

    def _parts(self) -> list[Variant]:
        return list(self.parts)

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        return self.parts

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for i, part in enumerate(self.parts):
            for name, value in part._fields():
                yield f"{i}.{name}", value

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))


def _like(value: object) -> str:
    return "torch.Tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def advice(other: object) -> str:
    """What something is that was given for a variant, and what to write instead."""
    if isinstance(other, type) and issubclass(other, Variant):
        fields = ", ".join(f"{n}=..." for n in other._kinds)
        return f"{other.__name__}: that is a class, make an instance: {other.__name__}({fields})"
    if callable(other) and not isinstance(other, type):
        name = getattr(other, "__name__", type(other).__name__)
        if (getattr(other, "__module__", None) or "").startswith("flashloom."):
            return f"{name}: that is a function that makes a variant, call it: {name}(...)"
        return (
            f"{name}: a function is no variant; fl.from_flex(mask_mod=...) or fl.from_flex(score_mod=...) makes one "
            "of a FlexAttention function, and a class with hooks (fl.Variant) is one of your own"
        )
    return f"{type(other).__name__}: give a Variant, such as fl.causal or YourVariant(...); several are joined with &"


def _no_operator(sign: str) -> Callable[..., NoReturn]:
    words = {
        "|": "for keys that either lets in, write one logits_mask that joins both conditions with |",
        "~": "for the other keys, write a logits_mask that returns ~condition",
    }.get(sign, "transforms and masks are joined with &")

    def refuse(self: Variant, *_: object) -> NoReturn:
        raise TypeError(f"variants have no {sign}: {words}")

    return refuse


for _name, _sign in {"or": "|", "xor": "^", "add": "+", "sub": "-", "mul": "*", "matmul": "@"}.items():
    setattr(Variant, f"__{_name}__", _no_operator(_sign))
    setattr(Variant, f"__r{_name}__", _no_operator(_sign))
setattr(Variant, "__invert__", _no_operator("~"))  # noqa: B010


def _param(name: str, kind: str, value: Any) -> Param:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return Param(name, "tensor" if kind == "scalar" else kind, dtype, value.dim())
    # so that its sum with a position fits 32 bits: only larger numbers need kernels with 64
    integer = "int32" if abs(value) <= spans.NUMBER else "int64"
    return Param(name, "scalar", {bool: "bool", int: integer, float: "float32"}[type(value)], 0)


def _params(hooks: dict[str, Expr]) -> set[Param]:
    return {n.attr for n in ir.topological(*hooks.values()) if isinstance(n.attr, Param)}


def _in_doubles(
    hooks: dict[str, Expr], params: list[tuple[Param, Any]]
) -> tuple[dict[str, Expr], list[tuple[Param, Any]]]:
    """Float fields that meet float64 tensors become float64 tensors of one element: kernels take numbers as float32."""
    values, new = dict(params), {}
    for node in ir.topological(*hooks.values()):
        if node.op == "cast" and node.dtype == ir.DOUBLE and node.args[0].op == "param" and node.args[0].dtype == FLOAT:
            new[node] = Param(node.args[0].attr.name, "tensor", ir.DOUBLE, 0)
    device = next((v.device for v in values.values() if isinstance(v, torch.Tensor)), None)
    more = [
        (p, torch.tensor(float(values[n.args[0].attr]), dtype=torch.float64, device=device)) for n, p in new.items()
    ]
    loads = {n: ir.make("load", ir.DOUBLE, (), p) for n, p in new.items()}
    return ({h: ir.substitute(e, loads) for h, e in hooks.items()} if new else hooks), [*params, *more]


def trace_parts(parts: list[Variant]) -> tuple[Program, tuple[Any, ...]]:
    """Call every part's hooks with symbols and chain the results."""
    params: list[tuple[Param, Any]] = []
    state = {
        "query": _element("query"),
        "key": _element("key"),
        "logits": ir.inp("logits"),
        "output": ir.inp("out"),
        "mask": ir.TRUE,
    }
    start = dict(state)
    many = collections.Counter(type(part).__name__ for part in parts)
    for number, part in enumerate(parts):
        title = type(part).__name__
        scope = "" if len(parts) == 1 else f"{title}." if many[title] == 1 else f"{number}.{title}."
        shadow, named = object.__new__(type(part)), dict[str, Param]()
        shadow.__dict__.update(part.__dict__, _named=named)
        for name, value in part._fields():
            param = _param(scope + name, part._kinds[name], value)
            params.append((param, value))
            shadow.__dict__[name] = field_symbol(param, getattr(value, "shape", ()))
            named[name] = param
        for hook, method in HOOK_METHODS.items():
            if getattr(type(part), method) is not getattr(Variant, method):
                state[hook] = _call(part, getattr(shadow, method), hook, method, state[hook])
    softmax = all(p.softmax for p in parts)
    traced = {h: e for h, e in state.items() if e is not start[h]}
    for part in parts:
        if "_checked" not in vars(type(part)):
            names.check_read(type(part), Variant, [p.name.rpartition(".")[2] for p in _params(traced)])
            type.__setattr__(type(part), "_checked", True)
    changed = widths.settle(traced)
    if changed.get("mask") is ir.TRUE:
        del changed["mask"]
    if softmax and "logits" in changed:
        changed["logits"] = fill.raised(changed["logits"])
    changed, params = _in_doubles(changed, params)
    used = _params(changed)
    kept = [(p, v) for p, v in params if p in used]
    program = Program(tuple(p for p, _ in kept), softmax=softmax, **changed)
    if not softmax and program.uses_lse:
        raise ValueError(
            "a part with softmax = False is composed with a part that uses lse (such as a sink): without softmax "
            "there is no lse"
        )
    return program, tuple(v for _, v in kept)


def _element(hook: str) -> Expr:
    return ir.make("element", FLOAT, (ir.inp("dim"),), hook)


def _call(part: Variant, method: Callable, hook: str, name: str, previous: Expr) -> Expr:
    at = At(name, AT_NAMES[name])
    label = f"{type(part).__name__}.{name}"
    try:
        try:
            if hook == "mask":
                result = method(at)
            elif hook == "output":
                result = method(Symbol(previous), Symbol(ir.inp("lse")), at)
            else:
                result = method(Symbol(previous) if hook == "logits" else VectorSymbol(previous), at)
        except KeyError as error:
            of_a_key(error)
            raise
        if result is None:
            raise TraceError("it returns None: return the new value")
        e = lift(result)
    except TraceError as error:
        tensor = names.name_of(error.tensor, method, holder=part) if error.tensor is not None else None
        if tensor:
            tensor = tensor.rpartition(".")[2]
            advice = (
                f"`{tensor}` is no field: write `{tensor}: torch.Tensor` in the class, and self.{tensor} in the hook"
            )
            raise TraceError(f"{label}: {advice} ({error})") from error
        raise TraceError(f"{label}: {error}") from error
    except AttributeError as error:  # it would be taken for one of `program`
        raise TraceError(f"{label}: {error}") from error
    if hook == "mask":
        if e.dtype != BOOL:
            raise TraceError(f"{label} returns {e.dtype}: a mask is a bool (True keeps the key); write a comparison")
        return ir.all_of(previous, e)
    if e.dtype == BOOL:
        raise TraceError(f"{label} returns a bool: return a number, or use logits_mask for conditions")
    return ir.cast(e, FLOAT)


def _hook(name: str) -> Callable:
    def absent(self: Variant, *args: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define {name}")

    absent.__name__ = name
    return absent


for _name in HOOK_METHODS.values():
    setattr(Variant, _name, _hook(_name))

__all__ = [
    "Bits",
    "Field",
    "PerHead",
    "PerKVHead",
    "PerKeyToken",
    "PerQueryToken",
    "PerRequest",
    "Scalar",
    "TraceError",
    "Variant",
]
