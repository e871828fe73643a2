"""The kinds of a variant's fields, and what each takes as its value.

A kind is a class at run time, so that help() shows its paragraph; type checkers read the tensor that it stands for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_origin

import torch

if TYPE_CHECKING:
    PerHead: TypeAlias = torch.Tensor
    PerKVHead: TypeAlias = torch.Tensor
    PerRequest: TypeAlias = torch.Tensor
    PerQueryToken: TypeAlias = torch.Tensor
    PerKeyToken: TypeAlias = torch.Tensor
    Bits: TypeAlias = torch.Tensor
    Scalar: TypeAlias = Any
else:

    class _Kind(type):
        def __call__(cls, *_: Any, **__: Any) -> Any:
            raise TypeError(
                f"{cls.__name__} is an annotation of a variant's field: write `name: fl.{cls.__name__}` in the class, "
                "and give the tensor to the instance"
            )

    class PerHead(metaclass=_Kind):
        """Field of a variant with one value per query head: a tensor [q_heads], read as self.name[at.q_head]."""

        __slots__ = ()
        _kind = "head"

    class PerKVHead(metaclass=_Kind):
        """Field of a variant with one value per key/value head: a tensor [kv_heads], read as self.name[at.kv_head]."""

        __slots__ = ()
        _kind = "kv_head"

    class PerRequest(metaclass=_Kind):
        """Field of a variant with one value per request: a tensor [requests], read as self.name[at.batch]."""

        __slots__ = ()
        _kind = "request"

    class PerQueryToken(metaclass=_Kind):
        """Field of a variant with one value per query token of the step: a tensor [query tokens of the batch], in the
        order of the requests, read as self.name[at.q_pos]."""

        __slots__ = ()
        _kind = "query"

    class PerKeyToken(metaclass=_Kind):
        """Field of a variant with one value per key token: a tensor [key tokens of the batch], in the order of the
        requests, read at a position of the request: self.name[at.kv_pos], or self.name[at.q_pos] for the query's own
        token."""

        __slots__ = ()
        _kind = "key"

    class Bits(metaclass=_Kind):
        """Field of a variant with packed bits: a uint8 tensor in little bit order, read with the number of the bit; it
        answers a bool."""

        __slots__ = ()
        _kind = "bits"

    class Scalar(metaclass=_Kind):
        """Field of a variant with one number: a float, int or bool, or a 0-dim tensor, which stays on its device. Read
        as self.name. Annotations float, int and bool mean the same."""

        __slots__ = ()
        _kind = "scalar"


#: What a tensor may hold: the types that torch computes with.
DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
)  # fmt: skip
_PLAIN: dict[Any, str] = {float: "scalar", int: "scalar", bool: "scalar", torch.Tensor: "tensor"}


def kind_of(owner: type, name: str, annotation: Any) -> str:
    """The kind that an annotation names. Raises TypeError for anything else."""
    bare = annotation
    while get_origin(bare) is Annotated:
        bare = bare.__origin__
    found = getattr(bare, "_kind", None) if isinstance(bare, type) else None
    found = found or (_PLAIN.get(bare) if isinstance(bare, type) else None)
    if found is None:
        raise TypeError(
            f"field {name!r} of {owner.__name__} is annotated {annotation!r}: use PerHead, PerKVHead, PerRequest, "
            "PerQueryToken, PerKeyToken, Scalar (or float, int, bool), Bits, or torch.Tensor for any rank; a constant "
            "of the class is a ClassVar"
        )
    return found


def is_kind(value: object) -> bool:
    return isinstance(value, type) and isinstance(getattr(value, "_kind", None), str)


def as_value(owner: str, name: str, kind: str, value: Any) -> torch.Tensor | int | float | bool:
    """A field's value in the form that kernels take: a tensor, or a Python number. Raises TypeError, ValueError or
    RuntimeError for what the kind does not take."""
    where = f"field {name!r} of {owner}"
    if type(value).__module__ == "numpy":
        value = _from_numpy(where, value)
    if kind == "scalar" and not isinstance(value, torch.Tensor):
        if not isinstance(value, (bool, int, float)):
            raise TypeError(f"{where} is {value!r}: a scalar field takes a number or a 0-dim tensor")
        if isinstance(value, bool):
            return value
        if isinstance(value, float):
            return float(value)
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{where} is {value}: an int field holds at most 64 bits")
        return int(value)
    if isinstance(value, (list, tuple)):
        try:
            value = torch.tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where} is a {type(value).__name__} that makes no tensor ({error})") from None
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
    if value.dtype not in DTYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in DTYPES)
        raise TypeError(f"{where} has dtype {value.dtype}: use one of {names}")
    if value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{where} requires grad, and flashloom computes no gradients: pass it with .detach() or work under "
            "torch.no_grad()"
        )
    return value


def _from_numpy(where: str, value: Any) -> Any:
    """A numpy number as Python's, an array as a tensor of the same memory."""
    if type(value).__name__ != "ndarray" or value.ndim == 0:
        return value.item()
    try:
        return torch.from_numpy(value) if value.flags.writeable else torch.tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where} is a numpy array that torch does not take ({error})") from None
