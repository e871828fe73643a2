"""FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)` and `mask_mod(b, h, q_idx, kv_idx)`, traced unchanged.

Tensors that the functions reach, in whatever way, are run-time parameters (see `capture`), so that the same code with
other tensors shares a kernel. Captured Python numbers and sizes are constants of the kernel.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from flashloom.variant import expr as ir
from flashloom.variant.capture import Capture
from flashloom.variant.expr import BOOL, Expr, Param
from flashloom.variant.library import full
from flashloom.variant.names import call_of, near
from flashloom.variant.trace import AT_NAMES, At, Symbol, TraceError, lift
from flashloom.variant.variant import Variant

_GIVEN = {"score_mod": ("score", "b", "h", "q_idx", "kv_idx"), "mask_mod": ("b", "h", "q_idx", "kv_idx")}


class Flex(Variant):
    """A FlexAttention variant; made by `from_flex`. Its functions are called once, when it is made."""

    _all_pairs = True

    if TYPE_CHECKING:
        score_mod: Callable | None
        mask_mod: Callable | None
        q_index: str
        _roots: dict[str, Expr]
        _captured: dict[str, torch.Tensor]
        _recorded: dict[str, Param]
        _named: dict[str, Param]

    def __init__(self, score_mod: Callable | None, mask_mod: Callable | None, q_index: str):
        capture = Capture(score_mod, mask_mod)
        at = At("from_flex", AT_NAMES["logits_transform"])
        query: Any = at.q_pos - (at.kv_len - at.q_len) if q_index == "local" else at.q_pos
        where = at.batch, at.q_head, query, at.kv_pos
        roots = {}
        if score_mod is not None:
            roots["logits"] = _call(capture, "score_mod", score_mod, Symbol(ir.inp("logits")), *where)
        if mask_mod is not None:
            roots["mask"] = _call(capture, "mask_mod", mask_mod, *where)
        self.__dict__.update(
            score_mod=score_mod, mask_mod=mask_mod, q_index=q_index, _roots=roots, _captured=capture.values,
            _recorded=capture.params, _kinds=dict.fromkeys(capture.values, "tensor"),
        )  # fmt: skip

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        functions = (self.score_mod, self.mask_mod)
        return (self.q_index, *map(_same, functions), *((n, id(x)) for n, x in self._captured.items()))

    def __repr__(self) -> str:
        names = (
            f"{k}={getattr(f, '__name__', f)}"
            for k, f in (("score_mod", self.score_mod), ("mask_mod", self.mask_mod))
            if f is not None
        )
        return f"from_flex({', '.join(names)}, q_index={self.q_index!r})"

    def _fields(self) -> Iterator[tuple[str, Any]]:
        yield from self._captured.items()

    def _joined(self, hook: str, previous: Any = None) -> Symbol:
        """The recorded expression of a hook, over the parameters and logits of the variant that it is a part of."""
        params = {param: self._named[name] for name, param in self._recorded.items()}
        new: dict[Expr, Expr] = {}
        for node in ir.topological(self._roots[hook]):
            if previous is not None and node is ir.inp("logits"):
                new[node] = lift(previous)
            elif node.args or isinstance(node.attr, Param):
                attr = params[node.attr] if isinstance(node.attr, Param) else node.attr
                new[node] = ir.make(node.op, node.dtype, tuple(new[a] for a in node.args), attr)
            else:
                new[node] = node
        return Symbol(new[self._roots[hook]])


def _call(capture: Capture, kind: str, function: Callable, *arguments: Any) -> Expr:
    try:
        e = capture.trace(function, *arguments)
    except TraceError as error:
        raise TraceError(f"{kind} {call_of(function)}: {error}") from error
    if (e.dtype == BOOL) != (kind == "mask_mod"):
        wanted = "a bool, True where the key is kept" if kind == "mask_mod" else "the new score, a number"
        other = "; a mask is given as mask_mod=" if e.dtype == BOOL else ""
        raise TraceError(f"{kind} {call_of(function)} returns {e.dtype}: it must return {wanted}{other}")
    return e


def _same(function: Any) -> Any:
    """A bound method is another object whenever it is asked for."""
    if isinstance(function, types.MethodType):
        return id(function.__func__), id(function.__self__)
    return id(function)


class _FlexScore(Flex):
    def logits_transform(self, logits: Any, at: Any) -> Any:
        return self._joined("logits", logits)


class _FlexMask(Flex):
    def logits_mask(self, at: Any) -> Any:
        return self._joined("mask")


class _FlexBoth(_FlexScore, _FlexMask):
    pass


def from_flex(
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *more: NoReturn,
    q_index: str = "local",
    **unknown: NoReturn,
) -> Variant:
    """A variant from FlexAttention functions (PyTorch's `torch.nn.attention.flex_attention`).

    `score_mod(score, b, h, q_idx, kv_idx)` returns the new score, `mask_mod(b, h, q_idx, kv_idx)` True where the key is
    kept. `q_index` says what q_idx is: "local" counts the query tokens of the call from 0, as FlexAttention does
    (top-left); "absolute" gives the position in the request (bottom-right), which is what decode and append want.

    The functions are called once, here. Tensors that they read become run-time parameters, however they are reached
    (closures, globals, objects, partials, containers): changing one in place changes the next result, another tensor
    needs another variant. Python numbers and sizes are constants of the kernel.

    Raises ValueError for an unknown q_index, TypeError for what is no function of these parameters, TraceError for what
    cannot be traced.
    """
    if more or unknown:
        name = next(iter(unknown), "")
        meant = "give mask_mod=block_mask.mask_mod" if name == "block_mask" else near(name, (*_GIVEN, "q_index"))
        what = f"no argument {name!r}" if unknown else "two arguments by place"
        raise TypeError(f"from_flex takes {what}: {meant or 'they are score_mod, mask_mod and q_index='}")
    if q_index not in ("local", "absolute"):
        raise ValueError(f"q_index is {q_index!r}: use 'local' (FlexAttention's own) or 'absolute'")
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if function is not None:
            _check_function(name, function)
    if score_mod is None and mask_mod is None:
        return full
    kind: Any = _FlexScore if mask_mod is None else _FlexMask if score_mod is None else _FlexBoth
    return kind(score_mod, mask_mod, q_index)


def _check_function(name: str, function: Any) -> None:
    if isinstance(function, Variant):
        raise TypeError(f"{name} is a variant already: use it as it is, and join variants with &")
    if not callable(function) and hasattr(function, "mask_mod"):
        raise TypeError(f"{name} is a {type(function).__name__}: give its function, mask_mod=block_mask.mask_mod")
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} is {type(function).__name__}: give a function, or None")
    if not _takes(function, len(_GIVEN[name])):
        other = "mask_mod" if name == "score_mod" else "score_mod"
        meant = f"; did you mean {other}=?" if _takes(function, len(_GIVEN[other])) else ""
        raise TypeError(
            f"{name} is {call_of(function)}: it is called with {len(_GIVEN[name])} arguments, "
            f"({', '.join(_GIVEN[name])}){meant}"
        )


def _takes(function: Callable, count: int) -> bool:
    if isinstance(function, types.FunctionType):
        code = function.__code__
        if code.co_argcount == count and not code.co_kwonlyargcount and not hasattr(function, "__wrapped__"):
            return True
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:  # a function of C says nothing of its parameters
        return True
    except TypeError:
        return False
    return True
