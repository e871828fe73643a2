"""From FlashInfer's plan() and run() to flashloom's: batches from its index arrays, and a wrapper's plans."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import flashloom as fl
from flashloom.attention import Attention, Batch, HeadShape, Plan, Reserve
from flashloom.compat.flashinfer import utils
from flashloom.compat.flashinfer._variants import LOG2E
from flashloom.kv_cache import PageTable, RaggedKV
from flashloom.kv_cache.integers import INT32_MAX, offsets, to_int32

ATTENTIONS_KEPT = 256
PLANS_KEPT = 8  # per wrapper
SCALES_KEPT = 1024
NO_LENGTH = 1 << 30  # more than the pages of any request hold
NARROW = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32)

_lock = threading.Lock()
_attentions: OrderedDict[tuple, Attention] = OrderedDict()
_scales: OrderedDict[tuple, torch.Tensor] = OrderedDict()


@dataclass(frozen=True)
class Form:
    """What of a call picks a kernel, beside its variant."""

    q_heads: int
    kv_heads: int
    dim: int
    value_dim: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    batch_invariant: bool = False

    @property
    def heads(self) -> HeadShape:
        return HeadShape(self.q_heads, self.kv_heads, self.dim, self.value_dim)


def attention(form: Form, variant: fl.Variant, device: torch.device) -> Attention:
    """The Attention of a form and a variant's expression; its numbers come with each run. One that holds a batch's own
    tensors, such as masks, is not kept."""
    if any(param.kind in ("request", "query", "key") for param in variant.program.params):
        return _attention(form, variant, device)
    key = (form, variant.program.digest, device)
    with _lock:
        found = _attentions.get(key)
        if found is not None:
            _attentions.move_to_end(key)
            return found
    made = _attention(form, variant, device)
    with _lock:
        _attentions[key] = made
        if len(_attentions) > ATTENTIONS_KEPT:
            _attentions.popitem(last=False)
    return made


def _attention(form: Form, variant: fl.Variant, device: torch.device) -> Attention:
    return Attention(
        form.heads,
        variant=variant,
        dtype=form.q_dtype,
        kv_dtype=form.kv_dtype,
        batch_invariant=form.batch_invariant,
        device=device,
    )


def scale_tensor(value: Any, device: torch.device) -> torch.Tensor | None:
    """A scale of keys or values as float32 [1] or [kv_heads] on the device; None for 1. A number is filled in once."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float32).reshape(-1)
    if float(value) == 1.0:
        return None
    if utils.capturing(device):  # what is made there is filled at a replay, and lies in the graph's memory
        return torch.full((1,), float(value), dtype=torch.float32, device=device)
    key = (float(value), device)
    found = _scales.get(key)
    if found is None:
        # made on the host, so that it is there whichever stream uses it first
        found = _scales[key] = torch.tensor([float(value)], dtype=torch.float32).to(device)
        if len(_scales) > SCALES_KEPT:
            _scales.popitem(last=False)
    return found


def base_two(lse: torch.Tensor) -> torch.Tensor:
    """A natural logarithm in place as one to base 2, as FlashInfer has it."""
    return lse.mul_(LOG2E)


class Plans:
    """The plans of one wrapper for the batch it was planned for last.

    A plan is made for a form, a variant's expression and a size class of batches, and follows later batches of that
    class. `fixed` (CUDA graphs): every plan follows at once, at the same addresses, up to `reserve`."""

    def __init__(self, device: torch.device, fixed: bool = False):
        self.device, self._fixed = device, fixed
        self._plans: OrderedDict[tuple, list] = OrderedDict()  # key -> [plan, step it is at]
        self.step = 0
        self._reserve: Reserve | None = None
        self.batch: Batch | None = None
        self._class: tuple = ()
        self.last: Plan | None = None

    def follow(self, batch: Batch, reserve: Reserve | None = None) -> None:
        """From now on this batch; plans of the former one follow when they are used next, fixed ones at once."""
        if self._fixed:
            self._reserve = self._reserve or reserve
            for entry in self._plans.values():
                entry[0].update(batch)
                entry[1] = self.step + 1
        self.step, self.batch = self.step + 1, batch
        self._class = (batch.page_size, batch.ragged, batch.host, *(() if self._fixed else _size_class(batch)))

    def get(self, form: Form, variant: fl.Variant) -> Plan:
        """The plan for the batch, made or updated if it is not there yet."""
        key = (form, variant.program.digest, self._class)
        entry = self._plans.get(key)
        if entry is not None and not self._fixed and self.batch is not None and not entry[0].fits(self.batch):
            entry = None
        if entry is None:
            assert self.batch is not None
            if utils.capturing(self.device):
                raise RuntimeError(
                    "this wrapper has no plan yet for these heads, dtypes and rules, and cannot make one while a CUDA "
                    "graph is captured: run it once before"
                )
            plan = attention(form, variant, self.device).plan(self.batch, reserve=self._reserve)
            entry = self._plans[key] = [plan, self.step]
            if len(self._plans) > PLANS_KEPT and not self._fixed:
                self._plans.popitem(last=False)
        elif entry[1] != self.step:
            entry[0].update(self.batch, variant=variant)
            entry[1] = self.step
            self._plans.move_to_end(key)
        self.last = entry[0]
        return entry[0]


def _size_class(batch: Batch) -> tuple[int, ...]:
    """Batches of one class share a plan: sizes that can pick a kernel, to the next power of two."""
    tokens = batch.max_q_len * batch.requests if batch.tokens is None else batch.tokens
    mean = -(-tokens // max(batch.requests, 1))
    keys = max(batch.kv_lens.tolist(), default=0) if batch.host else 0
    return tuple(int(x).bit_length() for x in (batch.max_q_len - 1, mean - 1, batch.requests, keys))


def on_host(x: torch.Tensor) -> torch.Tensor:
    """The contents of offsets or lengths; waits for the device if they are there."""
    return x if x.device.type == "cpu" else x.cpu()


def host_offsets(name: str, x: torch.Tensor) -> torch.Tensor:
    """Offsets of queries on the host, int32; waits for the device if they are there. Raises ValueError unless they
    ascend from 0."""
    host = on_host(x)
    return offsets(name, int32(host, host.device, name=name))


def kv_lengths(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each request, int32 where indptr is; a request without pages has none, whatever its last page says.
    Raises ValueError for other numbers of requests, and for negative last pages that are on the host."""
    if tuple(last_page_len.shape) != (len(indptr) - 1,):
        raise ValueError(
            f"last_page_len has shape {tuple(last_page_len.shape)} but indptr has {len(indptr)} entries: give one"
            f" length per request, [{len(indptr) - 1}]"
        )
    if indptr.device.type == "cpu":
        starts, own = indptr.numpy().astype(np.int64), last_page_len.cpu().numpy()
        count = starts[1:] - starts[:-1]
        if own.size and own.min() < 0 and (wrong := (count > 0) & (own < 0)).any():
            at = int(wrong.argmax())
            raise ValueError(f"last_page_len[{at}] = {own[at]}: must be 1 to page_size = {page_size}")
        return to_int32("lengths", torch.from_numpy(np.where(count > 0, (count - 1) * page_size + own, 0)))
    pages = indptr[1:] - indptr[:-1]
    lens = (pages - 1) * page_size + last_page_len.to(indptr.device, indptr.dtype)
    return int32(lens.masked_fill(pages <= 0, 0), indptr.device, name="lengths")


def int32(x: torch.Tensor, device: torch.device, non_blocking: bool = True, *, name: str = "indices") -> torch.Tensor:
    """Offsets, lengths or page numbers as int32 on the device. Host values beyond 32 bits are a ValueError; those on a
    device become the largest number, which is no page. Raises TypeError for what are no integers."""
    if x.dtype is not torch.int32:
        if x.dtype in NARROW:
            x = x.to(torch.int64)
        x = to_int32(name, x, x.dim())
    return x.to(device, non_blocking=non_blocking)


def table(
    indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, name: str = "last_page_len"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A page table in CSR form as int32, each part where it is; what is on the host is checked. Page numbers that need
    64 bits on a device make lengths that no pages hold, which the kernel that plans refuses and a later call reports.
    The last part, called `name`, may be whole lengths."""
    indptr = int32(indptr, indptr.device, name="indptr")
    check_offsets("indptr", indptr, indices)
    last = int32(last_page_len, last_page_len.device, name=name)
    if indices.dtype is torch.int64 and indices.device.type != "cpu":
        used = torch.arange(len(indices), device=indices.device) < indptr[-1].to(indices.device)
        last = last.to(indices.device).masked_fill(wide_pages(indices, used), NO_LENGTH)
    return indptr, int32(indices, indices.device, name="page numbers"), last


def wide_pages(pages: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Whether a page number in use does not fit 32 bits: a bool without dimensions, where the numbers are."""
    return (((pages > INT32_MAX) | (pages < -INT32_MAX)) & used).any()


def check_offsets(name: str, indptr: torch.Tensor, indices: torch.Tensor | None = None) -> None:
    """Raise ValueError unless offsets are 1-D, ascend from 0 or more, and end within the indices; on a device, look at
    the shape alone."""
    if indptr.dim() != 1 or not len(indptr):
        raise ValueError(f"{name} has shape {tuple(indptr.shape)}: offsets are [batch + 1]")
    if indptr.device.type != "cpu":
        return
    array = indptr.numpy()
    if int(array[0]) < 0 or (array[1:] < array[:-1]).any():
        raise ValueError(
            f"{name} = {array[:8].tolist()}{'...' * (len(array) > 8)}: offsets must not decrease, from 0 on"
        )
    if indices is not None and int(array[-1]) > indices.numel():
        raise ValueError(f"{name} ends at {array[-1]} but there are {indices.numel()} page indices: give one per page")


def paged(
    q_indptr: torch.Tensor,
    max_q_len: int,
    tokens: int,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    kv_lens: torch.Tensor,
    page_size: int,
) -> Batch:
    """A batch over pages; all tensors int32 on one device. `indices` may be longer than indptr says."""
    if indptr.device.type == "cpu":
        check_offsets("indptr", indptr, indices)
        return Batch(q_indptr=q_indptr, kv=PageTable(kv_lens, indptr, indices.clone(), page_size))
    return Batch(
        q_indptr=q_indptr, kv=PageTable(kv_lens, indptr, indices, page_size), max_q_len=max_q_len, tokens=tokens
    )


def ragged(q_indptr: torch.Tensor, max_q_len: int, tokens: int, kv_indptr: torch.Tensor) -> Batch:
    """A batch over rows of keys and values; int32 offsets on one device."""
    if kv_indptr.device.type == "cpu":
        return Batch(q_indptr=q_indptr, kv=RaggedKV(indptr=kv_indptr))
    return Batch(q_indptr=q_indptr, kv=RaggedKV(indptr=kv_indptr), max_q_len=max_q_len, tokens=tokens)
