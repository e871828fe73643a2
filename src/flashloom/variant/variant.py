"""A variant is torch code: a class whose annotated fields are run-time parameters and whose methods are the hooks.

Class = code, instance = numbers: two instances of one class share a kernel when their fields have the same kinds,
dtypes and ranks.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, get_origin

import torch
from typing_extensions import Self, dataclass_transform

from flashloom.dataclass import dataclass
from flashloom.variant import expr as ir
from flashloom.variant.expr import BOOL, FLOAT, Expr, Param, Program
from flashloom.variant.trace import AT_NAMES, At, Field, Symbol, TraceError, VectorSymbol, field_symbol, lift


@dataclass(frozen=True)
class Kind:
    """What a field holds one value of."""

    name: str


#: Field annotations. One value per query head, a tensor [q_heads], indexed with at.q_head.
PerHead: TypeAlias = Annotated[torch.Tensor, Kind("head")]
#: One value per key/value head, a tensor [kv_heads], indexed with at.kv_head.
PerKVHead: TypeAlias = Annotated[torch.Tensor, Kind("kv_head")]
#: One value per request, a tensor [requests], indexed with at.batch.
PerRequest: TypeAlias = Annotated[torch.Tensor, Kind("request")]
#: One value per query token of the step, a tensor [query tokens of the batch], indexed with at.q_pos.
PerQueryToken: TypeAlias = Annotated[torch.Tensor, Kind("query")]
#: One value per key token, a tensor [key tokens of the batch] in the order of the requests, indexed with a position
#: of the request: at.kv_pos, or at.q_pos for the query's own token.
PerKeyToken: TypeAlias = Annotated[torch.Tensor, Kind("key")]
#: One number (float, int or bool work as well), or a 0-dim tensor that stays on its device.
Scalar: TypeAlias = Annotated[Any, Kind("scalar")]
#: Packed bits, a uint8 tensor, little bit order; indexed with the number of the bit, it answers a bool.
Bits: TypeAlias = Annotated[torch.Tensor, Kind("bits")]

_PLAIN: dict[Any, str] = {float: "scalar", int: "scalar", bool: "scalar", torch.Tensor: "tensor"}
HOOK_METHODS = {
    "query": "query_transform", "key": "key_transform", "logits": "logits_transform", "mask": "logits_mask",
    "output": "output_transform",
}  # fmt: skip


def _kind_of(owner: type, name: str, annotation: Any) -> str:
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, Kind):
            return mark.name
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    raise TypeError(
        f"field {name!r} of {owner.__name__} is annotated {annotation!r}: use PerHead, PerKVHead, PerRequest, "
        "PerQueryToken, PerKeyToken, "
        "Scalar (or float, int, bool), Bits, or torch.Tensor for any rank"
    )


def _as_value(owner: str, name: str, kind: str, value: Any) -> torch.Tensor | int | float | bool:
    where = f"field {name!r} of {owner}"
    if kind == "scalar" and not isinstance(value, torch.Tensor):
        if not isinstance(value, (bool, int, float)):
            raise TypeError(f"{where} is {value!r}: a scalar field takes a number or a 0-dim tensor")
        if type(value) is int and not -(2**31) <= value < 2**31:
            raise ValueError(f"{where} is {value}: an int field is int32; give a 0-dim int64 tensor for larger numbers")
        return value
    if isinstance(value, (list, tuple)):
        value = torch.tensor(value)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{where} is {type(value).__name__}: give a tensor")
    rank = {"scalar": 0, "tensor": value.dim()}.get(kind, 1)
    if value.dim() != rank:
        raise ValueError(
            f"{where} has shape {tuple(value.shape)}: this kind of field takes {rank} dimension{'s' * (rank != 1)}"
        )
    if kind == "bits" and value.dtype != torch.uint8:
        raise TypeError(
            f"{where} has dtype {value.dtype}: packed bits are uint8 (numpy.packbits(..., bitorder='little') makes "
            "them)"
        )
    if value.is_complex() or value.is_quantized or str(value.dtype).startswith("torch.float8"):
        raise TypeError(f"{where} has dtype {value.dtype}: use bool, an integer type, float16, bfloat16 or float32")
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{where} requires grad, and flashloom computes no gradients: pass it with .detach() or work under "
            "torch.no_grad()"
        )
    return value


_handles = itertools.count(1)
#: Live variants by handle.
INSTANCES: weakref.WeakValueDictionary[int, Variant] = weakref.WeakValueDictionary()


@dataclass_transform(kw_only_default=True)
class Variant:
    """Base class of attention variants.

    Annotated fields become run-time parameters and keyword arguments of the constructor. Overridden hooks become the
    kernel: `query_transform(q, at)`, `key_transform(k, at)`, `logits_transform(logits, at)`, `logits_mask(at)` and
    `output_transform(out, lse, at)`; `at` has batch, q_head, kv_head, q_pos, kv_pos, q_len, kv_len and, in vector
    hooks, dim and head_dim. Positions are absolute within the request. With `softmax = False` the transformed logits
    are the weights. Variants compose with `&`, applied left to right.
    """

    if TYPE_CHECKING:
        _handle: int
    softmax: ClassVar[bool] = True
    _kinds: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        try:
            annotations = inspect.get_annotations(cls, eval_str=True)
        except NameError as error:
            raise TypeError(
                f"an annotation of {cls.__name__} cannot be read ({error}): define the name before the class"
            ) from None
        own = {
            n: _kind_of(cls, n, a) for n, a in annotations.items() if n != "softmax" and get_origin(a) is not ClassVar
        }
        cls._kinds = {**cls._kinds, **own}

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        self = super().__new__(cls)
        self.__dict__["_handle"] = next(_handles)  # how compiled code, which holds no objects, names it
        INSTANCES[self._handle] = self
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handle"}  # a copy has its own

    def __init__(self, **fields: Any) -> None:
        cls = type(self)
        unknown = [n for n in fields if n not in cls._kinds]
        if unknown:
            raise TypeError(
                f"{cls.__name__} has no field {unknown[0]!r}; its fields are {', '.join(cls._kinds) or 'none'}"
            )
        for name, kind in cls._kinds.items():
            if name not in fields and not hasattr(cls, name):
                raise TypeError(f"{cls.__name__} needs the field {name!r}")
            self.__dict__[name] = _as_value(cls.__name__, name, kind, fields.get(name, getattr(cls, name, None)))

    def __setattr__(self, name: str, value: object) -> None:
        # the constructor and cached_property write to __dict__, past this
        raise AttributeError(f"a variant does not change: make another {type(self).__name__} with {name}=...")

    def __and__(self, other: Variant) -> Variant:
        if not isinstance(other, Variant):
            return NotImplemented
        return Composed([*self._parts(), *other._parts()])

    def __repr__(self) -> str:
        fields = (f"{n}={tuple(v.shape) if isinstance(v, torch.Tensor) else v!r}" for n, v in self._fields())
        return f"{type(self).__name__}({', '.join(fields)})"

    def _parts(self) -> list[Variant]:
        return [self]

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for name in self._kinds:
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

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for i, part in enumerate(self.parts):
            for name, value in part._fields():
                yield f"{i}.{name}", value

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))


def _param(name: str, kind: str, value: Any) -> Param:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return Param(name, "tensor" if kind == "scalar" else kind, dtype, value.dim())
    # an int field is int32 in the kernel, as a Python number would be
    return Param(name, "scalar", {bool: "bool", int: "int32", float: "float32"}[type(value)], 0)


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
    for number, part in enumerate(parts):
        shadow = object.__new__(type(part))
        shadow.__dict__.update(part.__dict__)
        for name, value in part._fields():
            param = _param(f"{number}.{name}" if len(parts) > 1 else name, part._kinds[name], value)
            params.append((param, value))
            shadow.__dict__[name] = field_symbol(param)
        for hook, method in HOOK_METHODS.items():
            if getattr(type(part), method) is not getattr(Variant, method):
                state[hook] = _call(part, getattr(shadow, method), hook, method, state[hook])
    softmax = all(p.softmax for p in parts)
    changed = {h: e for h, e in state.items() if e is not start[h]}
    used = {n.attr for n in ir.topological(*changed.values()) if isinstance(n.attr, Param)}
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
        if hook == "mask":
            result = method(at)
        elif hook == "output":
            result = method(Symbol(previous), Symbol(ir.inp("lse")), at)
        else:
            result = method(Symbol(previous) if hook == "logits" else VectorSymbol(previous), at)
        if result is None:
            raise TraceError("it returns None: return the new value")
        e = lift(result)
    except TraceError as error:
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
