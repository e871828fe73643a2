"""FlexAttention functions are called as they are; the tensors that they read become parameters where they meet a
symbol.

However a function reaches a tensor, what it does with it is torch: an index with a symbol, or arithmetic of a 0-dim
tensor. Both come here. Sizes, dtypes and views are the tensor's own. What would read or copy a tensor's numbers while
the kernel is being written is refused, since a later change in place would not be seen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.overrides import TorchFunctionMode

from flashloom.variant import expr as ir
from flashloom.variant.expr import BOOL, FLOAT, Expr, Param
from flashloom.variant.fields import as_value
from flashloom.variant.foreign import NOWHERE, TraceError, capturing, of_a_key
from flashloom.variant.names import name_of
from flashloom.variant.trace import FUNCTIONS, METHODS, TORCH_DTYPES, Symbol, field_symbol, lift

#: What may be asked of a whole tensor: the answers are no numbers of its memory.
_FACTS = {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "requires_grad", "is_leaf", "names",
    "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "size", "dim", "ndimension", "numel", "nelement",
    "stride", "storage_offset", "element_size", "is_contiguous", "is_floating_point", "is_complex", "is_signed",
    "__len__", "get_device", "is_same_size", "__hash__", "__repr__", "__str__", "__format__", "grad", "grad_fn",
    "is_inference",
}  # fmt: skip


class _RefusedError(Exception):
    """A TraceError on its way through torch, whose operators take TypeErrors for NotImplemented."""

    def __init__(self, error: TraceError):
        super().__init__(str(error))
        self.error = error


class Capture(TorchFunctionMode):
    """The tensors that functions read while it is entered, in the order in which they are met."""

    def __init__(self, *functions: Any):
        super().__init__()
        self.functions = functions
        self.values: dict[str, torch.Tensor] = {}
        self.params: dict[str, Param] = {}
        self._names: dict[tuple, str] = {}
        self._made: dict[int, torch.Tensor] = {}  # by the functions themselves, of no captured tensor: constants
        self._base: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a view, and what it is one of

    def trace(self, function: Callable, *arguments: Any) -> Expr:
        """What a function returns for these symbols."""
        function = getattr(function, "_torchdynamo_orig_callable", function)
        try:
            with capturing(self), self:
                result = function(*arguments)
                if result is None:
                    raise TraceError("it returns None: return the new value")
                return lift(self.symbol(result))
        except _RefusedError as refused:
            raise refused.error from None
        except KeyError as error:
            of_a_key(error)
            raise

    def name(self, x: torch.Tensor) -> str:
        base = self._base.get(id(x), (x, x))[1]
        return name_of(base, *self.functions) or "a captured tensor"

    def symbol(self, x: Any) -> Any:
        """An argument of an operation: a 0-dim tensor is its number."""
        if isinstance(x, Rows):
            x._whole()
        if not isinstance(x, torch.Tensor):
            return x
        with torch._C.DisableTorchFunction():
            return self._number(x)

    def _number(self, x: torch.Tensor) -> Symbol:
        if x.dim():
            raise TraceError(
                f"{self.name(x)} of shape {tuple(x.shape)} is computed with as a whole: index it to one element, "
                "as in bias[h, kv_idx]"
            )
        return self._constant(x) if id(x) in self._made else self.load(x, ())

    def load(self, x: torch.Tensor, indices: tuple[Any, ...]) -> Symbol:
        found = field_symbol(self._param(x))
        return found if isinstance(found, Symbol) else found[indices]

    def index(self, x: torch.Tensor, index: Any) -> Any:
        return select(self, x, [None] * x.dim(), index)

    def _constant(self, x: torch.Tensor) -> Symbol:
        dtype = TORCH_DTYPES.get(x.dtype, FLOAT if x.is_floating_point() else "")
        if not dtype:
            raise TraceError(f"a tensor of {x.dtype} is made in a hook: use bool, an integer type or a float type")
        return Symbol(ir.const(x.item(), dtype))

    def _param(self, x: torch.Tensor) -> Param:
        key = (_memory(x), x.storage_offset(), x.shape, x.stride(), x.dtype)
        name = self._names.get(key)
        if name is None:
            name = first = name_of(self._base.get(id(x), (x, x))[1], *self.functions) or f"captured{len(self.values)}"
            while name in self.values:
                name = f"{first}_{len(self.values)}"
            self.values[name] = as_value("from_flex", name, "tensor", x)  # type: ignore[assignment]
            self.params[name] = Param(name, "tensor", str(x.dtype).removeprefix("torch."), x.dim())
            self._names[key] = name
        return self.params[name]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        try:
            return self._called(func, args, kwargs or {})
        except TraceError as error:
            raise _RefusedError(error) from None

    def _called(self, func: Any, args: tuple, kwargs: dict) -> Any:
        given = [*args, *kwargs.values()]
        for x in [*given]:
            if isinstance(x, (tuple, list)):
                given += x
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        symbols = any(isinstance(x, (Symbol, Rows)) for x in given)
        name = _name(func)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], torch.Tensor):
            return self.index(*args)
        if symbols or name in _FACTS:
            return func(*args, **kwargs)
        captured = [x for x in tensors if id(x) not in self._made]
        if tensors and _in_place(name, kwargs):
            raise TraceError(
                f"{name} changes {self.name(tensors[0])} in place: a hook computes a value and changes none"
            )
        if name.startswith("rand") or name in ("normal", "bernoulli", "multinomial"):
            raise TraceError(f"torch.{name} draws numbers: a hook is called once, while its kernel is written")
        if not captured:
            result = func(*args, **_here(kwargs))
            self._remember(result)
            return result
        build = _operator(name) or FUNCTIONS.get(func) or METHODS.get(name)
        if build is not None and all(x.dim() == 0 for x in tensors):
            return build(*map(self.symbol, args), **{k: self.symbol(x) for k, x in kwargs.items()})
        if name == "to" and NOWHERE in given:  # where the symbols are is not known before attention runs
            args, kwargs = tuple(a for a in args if a is not NOWHERE), _here(kwargs)
            if len(args) == 1 and not kwargs:
                return args[0]
        result = func(*args, **kwargs)
        views = result if isinstance(result, (tuple, list)) else [result]
        for view in views:
            if not isinstance(view, torch.Tensor) or not _same_memory(view, captured):
                raise TraceError(
                    f"torch.{name} computes with the numbers of {self.name(captured[0])} while the kernel is being "
                    "written, so that later changes of it would not be seen: compute it before from_flex and capture "
                    "the result, or compute with one element, as in bias[h, kv_idx]"
                )
            self._base[id(view)] = view, self._base.get(id(captured[0]), (None, captured[0]))[1]
        return result

    def _remember(self, result: Any) -> None:
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self._made[id(x)] = x


class Rows:
    """A captured tensor of which some dimensions are indexed by symbols and others are not."""

    __slots__ = ("_capture", "_fixed", "_view")

    def __init__(self, capture: Capture, view: torch.Tensor, fixed: list[Any]):
        self._capture, self._view, self._fixed = capture, view, fixed

    @property
    def shape(self) -> torch.Size:
        return torch.Size(n for n, f in zip(self._view.shape, self._fixed) if f is None)

    dtype = property(lambda self: self._view.dtype)
    device = property(lambda self: self._view.device)
    ndim = property(lambda self: len(self.shape))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return select(self._capture, self._view, self._fixed, index)

    def _whole(self, *_: Any, **__: Any) -> NoReturn:
        raise TraceError(
            f"a part of {self._capture.name(self._view)} of shape {tuple(self.shape)} is computed with as a whole: "
            "index it to one element"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._whole()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> NoReturn:
        given = [*args, *(kwargs or {}).values()]
        next(x for x in given if isinstance(x, Rows))._whole()


for _name_ in (
    "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul radd rsub rmul rtruediv rfloordiv rmod rpow "
    "rand ror rxor lt le gt ge eq ne neg abs invert bool float int index setitem"
).split():
    setattr(Rows, f"__{_name_}__", Rows._whole)


def select(capture: Capture, view: torch.Tensor, fixed: list[Any], index: Any) -> Any:
    """Index the dimensions that are not fixed yet. Slices and None make views, as they do in torch; integers and
    symbols fix a dimension, and with all of them fixed it is a load."""
    with torch._C.DisableTorchFunction():
        return _select(capture, view, fixed, index)


def _select(capture: Capture, view: torch.Tensor, fixed: list[Any], index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    free = sum(f is None for f in fixed)
    taken = sum(x is not None and x is not ... for x in items)
    if taken > free:
        shape = tuple(n for n, f in zip(view.shape, fixed) if f is None)
        raise TraceError(f"{capture.name(view)} of shape {shape} is indexed with {taken} indices")
    if any(x is ... for x in items):
        at = next(i for i, x in enumerate(items) if x is ...)
        items[at : at + 1] = [slice(None)] * (free - taken)
    positions = any(isinstance(x, (Symbol, torch.Tensor)) for x in [*items, *fixed])
    static: list[Any] = []
    new: list[Any] = []
    place = 0
    for item in items:
        if item is None:
            static.append(None)
            new.append(None)
            continue
        while fixed[place] is not None:
            static.append(slice(None))
            new.append(fixed[place])
            place += 1
        if isinstance(item, slice):
            static.append(item)
            new.append(None)
        else:
            number = _integer(capture, view, place, item)
            # a count from the end is an entry of this very tensor, and a row a tensor that torch knows
            select = isinstance(number, int) and (number < 0 or (taken < free and not positions))
            static.append(number if select else slice(None))
            new += [] if select else [number]
        place += 1
    new += fixed[place:]
    if any(x != slice(None) for x in static):
        base = capture._base.get(id(view), (view, view))[1]
        view = view[tuple(static)]
        capture._base[id(view)] = view, base
    if all(f is not None for f in new):
        return capture.load(view, tuple(new))
    return Rows(capture, view, new) if any(f is not None for f in new) else view


def _integer(capture: Capture, view: torch.Tensor, dim: int, item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        if item.dim():
            raise TraceError(
                f"{capture.name(view)} is indexed with a tensor of shape {tuple(item.shape)}: give one integer for "
                "each dimension, such as an element of that tensor"
            )
        item = capture.symbol(item)
    if isinstance(item, Symbol):
        if item._expr.dtype == BOOL:
            raise TraceError(f"{capture.name(view)} is indexed with a bool: write torch.where(condition, a, b)")
        return item
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise TraceError(f"{capture.name(view)} is indexed with {type(item).__name__} {item!r}: give integers")
    number, size = operator.index(item), view.shape[dim]
    if not -size <= number < size:
        raise TraceError(f"{capture.name(view)} has {size} entries in dimension {dim} and is indexed with {number}")
    return number


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name in ("__get__", "__set__") else name


def _operator(name: str) -> Callable[..., Any] | None:
    """What `x.__sub__(y)` and `x.__rsub__(y)` compute, on symbols."""
    if not (name.startswith("__") and name.endswith("__")):
        return None
    plain = getattr(operator, name, None)
    if plain is None and name.startswith("__r"):
        other = getattr(operator, f"__{name[3:]}", None)
        return None if other is None else lambda a, b: other(b, a)
    return plain


def _in_place(name: str, kwargs: dict) -> bool:
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delitem__") or (name.startswith("__i") and name in _IN_PLACE)
    return name.endswith("_") or kwargs.get("out") is not None


_IN_PLACE = {f"__i{x}__" for x in "add sub mul truediv floordiv mod pow and or xor lshift rshift div".split()}


def _here(kwargs: dict) -> dict:
    return {k: v for k, v in kwargs.items() if v is not NOWHERE}


def _memory(x: torch.Tensor) -> int:
    """What tensors that share memory have in common."""
    try:
        return x.untyped_storage()._cdata
    except NotImplementedError:  # it has none of its own, as within torch.vmap
        return id(x)


def _same_memory(x: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return any(x is y or _memory(x) == _memory(y) for y in others)
