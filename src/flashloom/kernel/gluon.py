"""Gluon kernels, and tensor maps: how the tensor memory accelerator is told where a tensor lies.

A `GluonKernel` is a `TritonKernel` whose function is Gluon's. Arguments of a type made by `tensor_map_type` come first;
each is passed by value as the 128 bytes that the driver encodes, and the encodings are kept, because a plan meets the
same tensors again and again.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashloom.dataclass import dataclass
from flashloom.kernel import cuda
from flashloom.kernel.triton import TritonKernel

__all__ = ["GluonKernel", "MapLaunch", "TensorMaps", "launcher", "tensor_map_type"]

MAP_BYTES = 128
# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion of the driver API
_TYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float8_e4m3fn: 0}  # bytes are bytes
_SWIZZLES, _PROMOTE_128B = {64: 2, 128: 3}, 2
_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}
_KEPT, _ADDRESSES = 1024, 256  # forms of tensors, and tensors of one form


def _swizzle(box: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a swizzled row in shared memory: 128, or 64 where a box has no more."""
    return 128 if box[-1] * dtype.itemsize > 64 else 64


def tensor_map_type(box: Sequence[int], dtype: torch.dtype) -> str:
    """Gluon's name for a map whose copies are boxes of this shape, in swizzled rows."""
    layout = (
        f"NVMMASharedLayout(swizzle_byte_width={_swizzle(box, dtype)}, element_bitwidth={8 * dtype.itemsize}, "
        f"rank={len(box)})"
    )
    return f"tensordesc<{_NAMES[dtype]}[{', '.join(map(str, box))}],{layout}>"


@dataclass(frozen=True)
class GluonKernel(TritonKernel):
    """One Gluon kernel to compile; see `TritonKernel`."""

    def _source(self, function: Any, types: dict[str, Any], attributes: dict[Any, Any]) -> Any:
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(function, types, self.loaded_constants(), attributes)


class TensorMaps:
    """The encodings of one argument: boxes of `box` elements of tensors of `dtype`."""

    def __init__(self, box: Sequence[int], dtype: torch.dtype):
        swizzle = _swizzle(box, dtype)
        inner = min(box[-1], swizzle // dtype.itemsize)  # a copy is as wide as the swizzle
        rank = len(box)
        self._box = (ctypes.c_uint32 * rank)(*reversed((*box[:-1], inner)))
        self._steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        self._rank, self._type, self._size = rank, _TYPES[dtype], dtype.itemsize
        self._swizzle = _SWIZZLES[swizzle]
        self._known: dict[tuple[Any, ...], Callable[[int], bytes]] = {}

    def of(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Callable[[int], bytes]:
        """A function that answers the map of the tensor at an address, a multiple of 16 bytes: sizes outermost first,
        strides in elements of all dimensions but the last, which is contiguous; they must be multiples of 16 bytes.
        It raises NoMap where the driver makes none."""
        key = (sizes, strides)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            encode = functools.partial(self._encode, sizes, strides)
            found = self._known[key] = functools.lru_cache(_ADDRESSES)(encode)
        return found

    def _encode(self, sizes: tuple[int, ...], strides: tuple[int, ...], address: int) -> bytes:
        memory = ctypes.create_string_buffer(MAP_BYTES + 64)
        place = -(-ctypes.addressof(memory) // 64) * 64  # the driver wants it aligned
        # the stride of a dimension of size 1 says nothing, and need not be one that the driver accepts
        steps = [16 if n == 1 else s * self._size for n, s in zip(sizes, strides)]
        code = cuda._driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), ctypes.c_int(self._type), ctypes.c_uint32(self._rank), ctypes.c_void_p(address),
            (ctypes.c_uint64 * self._rank)(*reversed(sizes)), (ctypes.c_uint64 * (self._rank - 1))(*reversed(steps)),
            self._box, self._steps, 0, self._swizzle, _PROMOTE_128B, 0,
        )  # fmt: skip
        what = f"encoding a tensor map of sizes {sizes}, strides {strides} elements at {address:#x}"
        if code == _INVALID_VALUE:
            raise cuda.NoMap(f"{what} failed: these are values that the CUDA driver does not take")
        cuda._check(code, what)
        return ctypes.string_at(place, MAP_BYTES)


class MapLaunch(cuda.Launch):
    """A function with its packed arguments, tensor maps first. `ranks`: those of the maps; `types`: those of the other
    run-time arguments in order, tuples flattened."""

    __slots__ = ("_maps", "_memory", "_places")

    def __init__(self, function: cuda.Function, ranks: Sequence[int], types: Sequence[str]):
        super().__init__(function, types)
        self._memory = ctypes.create_string_buffer(MAP_BYTES * len(ranks) + 128)
        start = -(-ctypes.addressof(self._memory) // 64) * 64
        self._places = [start + MAP_BYTES * i for i in range(len(ranks))]
        zero = start + MAP_BYTES * len(ranks)  # sizes and strides follow each map; no kernel reads them
        words = [place for at, rank in zip(self._places, ranks) for place in (at, *[zero] * (2 * rank))]
        self._bind((ctypes.c_void_p * (len(words) + len(types) + 2))(*words, *self._array))
        self._maps: list[bytes] = [b""] * len(ranks)

    def put(self, maps: Sequence[bytes]) -> None:
        """Take these maps for the next launches."""
        for i, encoded in enumerate(maps):
            if encoded is not self._maps[i]:
                ctypes.memmove(self._places[i], encoded, MAP_BYTES)
                self._maps[i] = encoded


def launcher(kernel: GluonKernel, device: torch.device) -> MapLaunch:
    """The kernel ready to launch on `device`, compiled if the store lacks it."""
    ranks: list[int] = []
    types: list[str] = []
    for kind in kernel.signature.values():
        if isinstance(kind, tuple):
            types += kind
        elif kind.startswith("tensordesc"):
            ranks.append(kind[: kind.index("]")].count(",") + 1)
        else:
            types.append(kind)
    return MapLaunch(cuda.load(kernel, device), ranks, types)
