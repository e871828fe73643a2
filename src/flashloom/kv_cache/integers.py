"""Lengths, offsets and page numbers: lists or integer tensors in, contiguous int32 tensors out.

Host values are copied, so that what was validated is what is used; device tensors are kept as they are and never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

INT32_MAX = 2**31 - 1
Integers = Sequence[int] | torch.Tensor | np.ndarray


def on_host(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def to_int32(name: str, value: Integers, rank: int = 1) -> torch.Tensor:
    """`value` as a contiguous int32 tensor of `rank` dimensions. Host values must fit int32; raises TypeError or
    ValueError."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype {value.dtype}: must be int32 or int64; convert it with .to(torch.int32)")
        if value.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: must have {rank} dimension{'s' * (rank > 1)}")
        if not on_host(value):
            if value.dtype != torch.int32:  # what does not fit must not become another page
                value = value.clamp(-INT32_MAX, INT32_MAX)
            return value.to(torch.int32).contiguous()
        array = value.detach().numpy()
    else:
        array = _array(name, value)
        if array.ndim != rank:
            raise ValueError(f"{name} has shape {array.shape}: must have {rank} dimension{'s' * (rank > 1)}")
    if array.dtype != np.int32 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < -INT32_MAX or high > INT32_MAX:
            raise ValueError(
                f"{name} holds {low if low < -INT32_MAX else high}: lengths, offsets and page numbers must fit 32 bits"
            )
    return torch.from_numpy(np.array(array, dtype=np.int32, order="C"))


def _array(name: str, value: object) -> np.ndarray:
    if isinstance(value, np.ndarray):
        array = value
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            raise TypeError(f"{name} is not rectangular: give a list of ints, or an int32 or int64 tensor") from None
        if array.size == 0:
            array = array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} holds {array.dtype} values ({str(value)[:60]}): give a list of ints, or an int32 or int64 tensor"
        )
    return array


def lengths(name: str, value: Integers) -> torch.Tensor:
    """Non-negative lengths whose sum fits int32, as int32 [requests]; host contents are checked."""
    result = to_int32(name, value)
    if on_host(result) and result.numel():
        array = result.numpy()
        if array.min() < 0:
            at = int(array.argmin())
            raise ValueError(f"{name}[{at}] = {array[at]}: a length must not be negative")
        if array.sum(dtype=np.int64) > INT32_MAX:
            raise ValueError(
                f"{name} sums to {array.sum(dtype=np.int64)}: the tokens of one batch must number less than 2**31"
            )
    return result


def offsets(name: str, value: Integers) -> torch.Tensor:
    """Ascending offsets that start at 0, as int32 [requests + 1]; host contents are checked."""
    result = to_int32(name, value)
    if result.numel() == 0:
        raise ValueError(f"{name} is empty: offsets have one entry more than there are requests and start with 0")
    if on_host(result):
        array = result.numpy()
        if array[0] != 0:
            raise ValueError(f"{name}[0] = {array[0]}: offsets must start at 0")
        if (step := array[1:] - array[:-1]).size and step.min() < 0:
            at = int(step.argmin())
            raise ValueError(
                f"{name}[{at}] = {array[at]}, {name}[{at + 1}] = {array[at + 1]}: offsets must not decrease (a length "
                "would be negative)"
            )
    return result


def cumulative(lens: torch.Tensor) -> torch.Tensor:
    """Offsets [n + 1] of lengths [n], int32, where the lengths are."""
    if on_host(lens):
        result = np.zeros(lens.numel() + 1, dtype=np.int32)
        np.cumsum(lens.numpy(), out=result[1:])
        return torch.from_numpy(result)
    result_d = torch.zeros(lens.numel() + 1, dtype=torch.int32, device=lens.device)
    torch.cumsum(lens, 0, out=result_d[1:])
    return result_d


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """A Python int of at least `least` (and at most `most`), from that or from one of numpy's."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r} is not an int: give a Python int")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}={value}: must be at least {least}" + ("" if most is None else f" and at most {most}"))
    return int(value)


def positive(name: str, value: object) -> int:
    """An int of at least 1 (a page size, a block size)."""
    return integer(name, value, 1)
