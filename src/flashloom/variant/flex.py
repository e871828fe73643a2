"""FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)` and `mask_mod(b, h, q_idx, kv_idx)`, traced unchanged.

Tensors that the functions capture (closures, globals, defaults, partials, attributes of callable objects) are lifted to
run-time parameters, so that the same code with other tensors shares a kernel. Captured Python numbers are constants of
the kernel.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flashloom.variant.fields import as_value
from flashloom.variant.library import full
from flashloom.variant.variant import Variant


class _Lifter:
    """Finds captured tensors in a fixed order and rebuilds functions with stand-ins for them."""

    def __init__(self, replace: Callable[[int, torch.Tensor], Any]):
        self.replace = replace
        self.tensors: list[torch.Tensor] = []
        self.done: dict[int, Any] = {}
        self.keep: list[Any] = []  # ids stay valid while their objects live

    def lift(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.done:
                self.done[id(value)] = self.replace(len(self.tensors), value)
                self.tensors.append(value)
            return self.done[id(value)]
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(self.lift(v) for v in value)
        if type(value) is dict:
            return {k: self.lift(v) for k, v in value.items()}
        if isinstance(value, functools.partial):
            return functools.partial(self.lift(value.func), *self.lift(value.args), **self.lift(value.keywords))
        if isinstance(value, types.MethodType):
            return types.MethodType(self.lift(value.__func__), self.lift_object(value.__self__))
        if isinstance(value, types.FunctionType):
            return self.lift_function(value)
        if (
            callable(value)
            and not isinstance(value, (type, types.BuiltinFunctionType))
            and hasattr(value, "__dict__")
            and not _library(type(value))
        ):
            return self.lift_object(value)
        return value

    def lift_object(self, value: Any) -> Any:
        if id(value) not in self.done:
            copy = object.__new__(type(value))
            self.done[id(value)] = copy
            self.keep.append(value)
            copy.__dict__.update({k: self.lift(v) for k, v in vars(value).items()})
        return self.done[id(value)]

    def lift_function(self, function: types.FunctionType) -> types.FunctionType:
        if _library(function):
            return function
        if id(function) not in self.done:
            self.keep.append(function)
            names = _global_names(function.__code__)
            scope = dict(function.__globals__)
            cells = tuple(types.CellType() for _ in function.__closure__ or ())
            copy = types.FunctionType(function.__code__, scope, function.__name__, None, cells)
            self.done[id(function)] = copy
            copy.__defaults__ = self.lift(function.__defaults__)
            copy.__kwdefaults__ = self.lift(function.__kwdefaults__)
            for new, old in zip(cells, function.__closure__ or ()):
                try:
                    new.cell_contents = self.lift(old.cell_contents)
                except ValueError:  # an empty cell: a name that the function never reaches
                    continue
            for name in names:
                if name in scope:
                    scope[name] = self.lift(scope[name])
        return self.done[id(function)]


def _library(thing: Any) -> bool:
    """Functions and classes of torch capture no tensors of the user's; its FlexAttention helpers (and_masks, or_masks
    ...) do."""
    module = getattr(thing, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "builtins") and module != "torch.nn.attention.flex_attention"


def _global_names(code: types.CodeType) -> list[str]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _global_names(constant)
    return names


class Flex(Variant):
    """A FlexAttention variant; made by `from_flex`."""

    if TYPE_CHECKING:
        score_mod: Callable
        mask_mod: Callable
        q_index: str

    def __init__(self, score_mod: Callable | None, mask_mod: Callable | None, q_index: str):
        finder = _Lifter(lambda i, tensor: tensor)
        for function in (score_mod, mask_mod):
            finder.lift(function)
        self.__dict__.update(score_mod=score_mod, mask_mod=mask_mod, q_index=q_index)
        fields = {
            f"captured{i}": as_value("from_flex", f"captured{i}", "tensor", t) for i, t in enumerate(finder.tensors)
        }
        self.__dict__.update(fields, _kinds=dict.fromkeys(fields, "tensor"))

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        functions = (self.score_mod, self.mask_mod)
        return (self.q_index, *map(_same, functions), *map(id, self.values))

    def __repr__(self) -> str:
        names = (
            f"{k}={getattr(f, '__name__', f)}"
            for k, f in (("score_mod", self.score_mod), ("mask_mod", self.mask_mod))
            if f is not None
        )
        return f"from_flex({', '.join(names)}, q_index={self.q_index!r})"

    def _q_index(self, at: Any) -> Any:
        return at.q_pos - (at.kv_len - at.q_len) if self.q_index == "local" else at.q_pos

    def _lifted(self, function: Callable) -> Callable:
        lifter = _Lifter(lambda i, tensor: self.__dict__[f"captured{i}"])
        both = [lifter.lift(f) for f in (self.score_mod, self.mask_mod)]
        return both[0] if function is self.score_mod else both[1]


def _same(function: Any) -> Any:
    """A bound method is another object whenever it is asked for."""
    if isinstance(function, types.MethodType):
        return id(function.__func__), id(function.__self__)
    return id(function)


class _FlexScore(Flex):
    def logits_transform(self, logits: Any, at: Any) -> Any:
        return self._lifted(self.score_mod)(logits, at.batch, at.q_head, self._q_index(at), at.kv_pos)


class _FlexMask(Flex):
    def logits_mask(self, at: Any) -> Any:
        return self._lifted(self.mask_mod)(at.batch, at.q_head, self._q_index(at), at.kv_pos)


class _FlexBoth(_FlexScore, _FlexMask):
    pass


def from_flex(
    score_mod: Callable | None = None, mask_mod: Callable | None = None, *, q_index: str = "local"
) -> Variant:
    """A variant from FlexAttention functions (PyTorch's `torch.nn.attention.flex_attention`).

    `score_mod(score, b, h, q_idx, kv_idx)` returns the new score, `mask_mod(b, h, q_idx, kv_idx)` True where the key is
    kept. `q_index` says what q_idx is: "local" counts the query tokens of the call from 0, as FlexAttention does
    (top-left); "absolute" gives the position in the request (bottom-right), which is what decode and append want.
    Captured tensors become run-time parameters.

    Raises ValueError for an unknown q_index, TypeError if a function is not callable, TraceError for what cannot be
    traced.
    """
    if q_index not in ("local", "absolute"):
        raise ValueError(f"q_index is {q_index!r}: use 'local' (FlexAttention's own) or 'absolute'")
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {type(function).__name__}: give a function, or None")
    if score_mod is None and mask_mod is None:
        return full
    kind: Any = _FlexScore if mask_mod is None else _FlexMask if score_mod is None else _FlexBoth
    return kind(score_mod, mask_mod, q_index)
