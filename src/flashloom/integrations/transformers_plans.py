"""Variants and plans kept from one forward pass to the next.

A model asks for the same few variants at every step (the padding of a batch does not change while it generates), over
batches that differ in their lengths alone. So variants are traced once, and the plan of a mask that is gone is taken
over by the next one, which only updates it.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

import flashloom as fl
from flashloom.attention.executor import guard

VARIANTS_KEPT, COMPOSED_KEPT, LAYOUTS_KEPT = 64, 256, 32
PLANS_KEPT, SPARE_KEPT = 128, 4  # kinds of plans that are spare, and plans of each kind


class Recent(threading.local):
    """The values asked for last, by key, of each thread."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made now if it is not there."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        if len(self._values) > self._kept:
            self._values.popitem(last=False)
        return value


class Posed:
    """A mask as a variant, and what it becomes with the soft cap and the sinks of a layer."""

    def __init__(self, variant: fl.Variant):
        self.variant = variant
        self._composed = Recent(COMPOSED_KEPT)

    def with_logits(self, softcap: float | None, sinks: Tensor | None) -> fl.Variant:
        """The variant with a soft cap before the mask and with sinks [q_heads]; the same object for the same sinks."""
        if softcap is None and sinks is None:
            return self.variant
        # what is kept holds the sinks' memory, so that no other tensor can come to lie there
        at = None if sinks is None else (sinks.data_ptr(), sinks.dtype, sinks.shape, sinks.stride())
        return self._composed.get((softcap, at), lambda: self._compose(softcap, sinks))

    def _compose(self, softcap: float | None, sinks: Tensor | None) -> fl.Variant:
        variant = self.variant if softcap is None else fl.softcap(softcap) & self.variant
        return variant if sinks is None else variant & fl.sink(sinks.detach())


_RUN = fl.Plan.run  # while a monitor watches, Plan.run is another function, and every call goes through it


class Call:
    """A layer's call as the other layers of the same forward pass repeat it: while the plan's last launch is that of
    this call, tensors of the same form need no more than their addresses written. `asked`: whatever else decides."""

    __slots__ = ("_again", "_asked", "_launch", "_out", "_plan", "_same", "_stream")

    def __init__(self, plan: fl.Plan, same: Callable[..., bool], out: torch.Size, device: torch.device, asked: tuple):
        self._plan, self._same, self._out, self._asked = plan, same, out, asked
        self._launch, self._again = plan.launch, plan.launch[1]
        self._stream = _stream(device.index)

    def repeat(self, query: Tensor, key: Tensor, value: Tensor, asked: tuple) -> Tensor | None:
        """The result, or None where something differs."""
        if not self._same(query, key, value) or asked != self._asked or self._plan.launch is not self._launch:
            return None
        if self._stream is not None:
            stream = _stream(query.get_device())
            if stream != self._stream or (stream and torch.cuda.is_current_stream_capturing()):
                return None
        if fl.Plan.run is not _RUN:
            return None
        out = query.new_empty(self._out)
        return out if self._again(query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()) else None


def _stream(index: int | None) -> int | None:
    """torch's current stream of a GPU; None for the CPU."""
    return None if index is None else torch._C._cuda_getCurrentRawStream(index)


class Layout:
    """How one attention call is posed to flashloom, and the plans made for it, which other layers of the same forward
    pass share. It belongs to one thread."""

    def __init__(self, batch: fl.Batch, posed: Posed):
        self.batch, self.posed = batch, posed
        self._call: Call | None = None
        self._plans: dict[tuple, fl.Plan] = {}
        self._planned: dict[tuple, fl.Variant] = {}
        longest, requests = batch.max_q_len, batch.requests
        page_size = 0 if batch.kind == "dense" else batch.page_size
        self._size = (batch.kind, page_size, min(longest.bit_length(), 8), requests.bit_length())
        weakref.finalize(self, _give, self._plans)

    def plan(
        self, heads: tuple[int, int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype, scale: float | None,
        device: torch.device, variant: fl.Variant,
    ) -> tuple[fl.Plan, fl.Variant | None]:  # fmt: skip
        """The plan of this batch for layers of these heads (q_heads, kv_heads, dim, value_dim) and a variant of this
        expression, and the variant that `run` must be told of: None where the plan has it."""
        key = (heads, dtype, kv_dtype, scale, device, variant.program.digest, *self._size)
        plan = self._plans.get(key)
        if plan is None:
            plan = _take(key)
            if plan is not None and plan.fits(self.batch):
                plan.update(self.batch, variant=variant)
            else:
                attention = fl.Attention(
                    fl.HeadShape(*heads), variant=variant, dtype=dtype, kv_dtype=kv_dtype,
                    sm_scale=scale, device=device,
                )  # fmt: skip
                plan = attention.plan(self.batch)
            self._plans[key], self._planned[key] = plan, variant
        return plan, None if self._planned[key] is variant else variant

    def repeat(self, query: Tensor, key: Tensor, value: Tensor, *asked: object) -> Tensor | None:
        """The result of tensors in transformers' form, as in the last call that was kept; None where anything but
        their addresses differs."""
        return None if self._call is None else self._call.repeat(query, key, value, asked)

    def keep(self, plan: fl.Plan, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *asked: object) -> None:
        """Keep the call that the plan ran last, if it can be repeated: queries, keys and values were read where they
        lie, and the plan knew the variant."""
        same = guard(query, key, value) if plan.launch[1] is not None else None
        self._call = None if same is None else Call(plan, same, out.shape, query.device, asked)


VARIANTS, UNMASKED = Recent(VARIANTS_KEPT), Recent(LAYOUTS_KEPT)
_spare: OrderedDict[tuple, list[fl.Plan]] = OrderedDict()
_lock = threading.RLock()  # garbage collection may call `_give` at any point, also while this thread holds it


def _take(key: tuple) -> fl.Plan | None:
    with _lock:
        plans = _spare.get(key)
        return plans.pop() if plans else None


def _give(plans: dict[tuple, fl.Plan]) -> None:
    with _lock:
        for key, plan in plans.items():
            kept = _spare.setdefault(key, [])
            _spare.move_to_end(key)
            if len(kept) < SPARE_KEPT:
                kept.append(plan)
        while len(_spare) > PLANS_KEPT:
            _spare.popitem(last=False)
