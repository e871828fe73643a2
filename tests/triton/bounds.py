"""A check of addresses for Triton's interpreter: every element that an active lane reads or writes must lie within the
tensor, among those given to the launch, that its pointer came from.

A pointer carries the number of its tensor in its upper bits, which arithmetic leaves alone. So a read past the end of
a view is found though another view of the same buffer follows at once. What a masked-out lane points to is never
looked at, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

SHIFT = np.uint64(48)  # host addresses have 47 bits
ADDRESS = np.uint64((1 << 48) - 1)


def extent(x: torch.Tensor) -> tuple[int, int]:
    """(first byte, byte after the last)."""
    if not x.numel():
        return x.data_ptr(), x.data_ptr()
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@contextmanager
def checked() -> Iterator[list[int]]:
    """Within it every launch in the interpreter is checked: the first access elsewhere raises Triton's
    InterpreterError from an IndexError, whose traceback names the kernel's line. Yields the launches and accesses so
    far."""
    builder, executor, convert = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter._implicit_cvt
    counts, known = [0, 0], [(0, 0)]

    def mark(argument: Any) -> Any:
        made = convert(argument)  # of a tuple by way of this function
        if isinstance(argument, torch.Tensor):
            made.handle.data = made.handle.data | (np.uint64(len(known)) << SHIFT)
            known.append(extent(argument))
        return made

    def plain(what: str, pointers: Any, mask: Any) -> Any:
        """The pointers without their marks, where all active ones are good."""
        whole, kind = np.asarray(pointers.data, dtype=np.uint64), pointers.get_element_ty()
        active = np.broadcast_to(np.asarray(True if mask is None else mask.data, dtype=bool), whole.shape)
        table = np.array(known, dtype=np.int64)
        number, place = (whole >> SHIFT).astype(np.int64), (whole & ADDRESS).astype(np.int64)
        low, high = np.moveaxis(table[np.where(number < len(table), number, 0)], -1, 0)
        bad = active & ((place < low) | (place + max(kind.primitive_bitwidth // 8, 1) > high))
        counts[1] += 1
        if bad.any():
            first = tuple(axis[0] for axis in np.nonzero(bad))
            raise IndexError(
                f"{what} of {kind} outside of its tensor: {bad.sum()} of {active.sum()} lanes, the first at byte "
                f"{place[first] - low[first]} of {high[first] - low[first]}"
            )
        return interpreter.TensorHandle(whole & ADDRESS, pointers.dtype)

    def masked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        return kept["create_masked_load"](self, plain("load", pointers, mask), mask, *more)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        return kept["create_masked_store"](self, plain("store", pointers, mask), value, mask, *more)

    def rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        return kept["create_atomic_rmw"](self, operation, plain("atomic", pointers, mask), value, mask, *more)

    def cas(self: Any, pointers: Any, *more: Any) -> Any:
        return kept["create_atomic_cas"](self, plain("atomic", pointers, None), *more)

    def launch(self: Any, *arguments: Any, **named: Any) -> Any:
        del known[1:]
        counts[0] += 1
        return call(self, *arguments, **named)

    # plain loads and stores come by way of the masked ones
    changed = {"create_masked_load": masked_load, "create_masked_store": masked_store}
    changed |= {"create_atomic_rmw": rmw, "create_atomic_cas": cas}
    kept = {name: getattr(builder, name) for name in changed}
    call = executor.__call__
    for name, function in changed.items():
        setattr(builder, name, function)
    executor.__call__, interpreter._implicit_cvt = launch, mark
    try:
        yield counts
    finally:
        executor.__call__, interpreter._implicit_cvt = call, convert
        for name, function in kept.items():
            setattr(builder, name, function)
