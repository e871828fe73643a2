"""What is no symbol and meets one: tensors, numpy's numbers, functions that no hook can call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch

from flashloom.errors import FlashloomError

#: The device that symbols say they are on.
NOWHERE = torch.device("meta")


class TraceError(FlashloomError, TypeError):
    """A hook does something that cannot become a kernel; the message says what to write instead. `tensor` is one that
    it was about, for whoever knows its name."""

    def __init__(self, message: str, tensor: torch.Tensor | None = None):
        super().__init__(message)
        self.tensor = tensor


class _Capturing(threading.local):
    capture: Any = None


_capturing = _Capturing()


def of_one(name: str) -> Any:
    """A symbol's attribute as that of the tensor of one element that FlexAttention gives; None in other hooks."""
    return OF_ONE.get(name) if _capturing.capture is not None else None


def of_a_key(error: KeyError) -> None:
    """Raises TraceError if it was a symbol that a mapping did not find."""
    if error.args and type(error.args[0]).__name__.endswith("Symbol"):
        raise TraceError(
            "a traced value is used as a key of a dict: make the dict a tensor and index that, or use torch.where"
        ) from None


@contextlib.contextmanager
def capturing(capture: Any) -> Iterator[None]:
    """Within this, tensors that meet symbols are asked of `capture` (see `flashloom.variant.capture`)."""
    before, _capturing.capture = _capturing.capture, capture
    try:
        yield
    finally:
        _capturing.capture = before


def argument(value: Any) -> Any:
    """A value that meets a symbol."""
    return value if _capturing.capture is None else _capturing.capture.symbol(value)


def numpy_number(value: Any) -> bool | int | float:
    """A numpy number as Python's."""
    number = value.item() if value.ndim == 0 else None
    if not isinstance(number, (bool, int, float)):
        raise TraceError(
            f"a hook computes with a numpy {type(value).__name__} of shape {value.shape}: make it a tensor "
            "(torch.from_numpy shares its memory), or a number"
        )
    return number


#: What a symbol answers as the tensor of one element that FlexAttention would give.
OF_ONE: dict[str, Any] = {
    "device": NOWHERE, "shape": torch.Size(()), "ndim": 0, "dim": lambda: 0, "numel": lambda: 1,
    "size": lambda: torch.Size(()), "is_cuda": False, "requires_grad": False,
}  # fmt: skip
#: numpy's names of Python's operators.
UFUNCS = {
    "add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
    "floor_divide": "floor_divide", "remainder": "remainder", "less": "lt", "less_equal": "le", "greater": "gt",
    "greater_equal": "ge", "equal": "eq", "not_equal": "ne", "bitwise_and": "bitwise_and", "bitwise_or": "bitwise_or",
    "bitwise_xor": "bitwise_xor", "left_shift": "bitwise_left_shift", "right_shift": "bitwise_right_shift",
    "absolute": "abs", "negative": "neg", "maximum": "maximum", "minimum": "minimum", "power": "pow",
}  # fmt: skip
_PRODUCTS = ("matmul", "mm", "bmm", "mv", "dot", "einsum", "linear", "inner", "outer", "addmm", "tensordot", "bilinear")


def refuse(name: str, args: tuple, known: Iterable[str]) -> NoReturn:
    """torch.name cannot be traced; what to write in its place."""
    tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
    bare = name.strip("_").removeprefix("r")
    if bare in _PRODUCTS or name in _PRODUCTS:
        raise TraceError(
            f"{bare} is a product over many elements, and a hook sees one: apply matrices to q, k or the output "
            "outside of attention; query_transform and key_transform may combine elements of their row, as in "
            "q[at.dim ^ 1]"
        )
    if name == "__getitem__" and tensor is not None:
        shape = tuple(tensor.shape)
        raise TraceError(
            f"a tensor of shape {shape} is indexed in a hook: make it a field of the variant, as in `table: "
            "torch.Tensor`, and read self.table[...]",
            tensor,
        )
    index = "a tensor is read with an index, as in table[i, j]; " if tensor is not None else ""
    raise TraceError(
        f"torch.{name} cannot be traced in a hook; {index}available are {', '.join(sorted(known))}", tensor
    )
