"""What a plan of the Triton backend owns: the work items, the copy of the page table, partial states, and how host
values reach the device."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from flashloom.attention import pool
from flashloom.attention.batch import Batch
from flashloom.attention.kernels.triton.config import Config
from flashloom.dataclass import dataclass
from flashloom.kernel import cuda

ITEM_WORDS, SCRATCH_ROWS, PLAN_BLOCK = 16, 8, 128


@dataclass(frozen=True)
class Sizes:
    """How much a plan can hold. What the planner kernel writes stays within it, or it writes nothing and reports an
    error.

    requests, tokens, pages: of a batch; blocks: blocks of packed query rows; items: programs per kv head; slots:
    partial states per kv head; stride: entries per row of the scratch."""

    requests: int
    tokens: int
    pages: int
    blocks: int
    items: int
    slots: int
    stride: int

    @classmethod
    def of(
        cls,
        group: int,
        kv_heads: int,
        config: Config,
        programs: int,
        requests: int,
        tokens: int,
        pages: int,
        tiles: int,
    ) -> Sizes:
        """tiles: with batch invariance the most ranges that fixed cuts can make of the pages; else 0.

        Every request's rows fill at most one block in part. Cutting the walks at the mean length per program makes at
        most one range per program more than there are blocks, and fewer than two ranges per program of those that are
        cut at all."""
        blocks = tokens * group // config.block_m + min(requests, tokens)
        extra = -(-programs // kv_heads)
        items = blocks + (tiles or extra)
        slots = items if tiles else min(items, 2 * extra + 1)
        return cls(requests, tokens, pages, blocks, items, slots, -(-requests // PLAN_BLOCK) * PLAN_BLOCK or PLAN_BLOCK)

    def halved(self) -> Sizes:
        """For a planner that may cut at half the mean length per program, where no walk is longer than that mean: each
        then has two ranges at most, and fewer than two per program are cut at all."""
        cut = min(self.blocks, 2 * (self.items - self.blocks))
        return replace(self, items=max(self.items, self.blocks + cut), slots=max(self.slots, 2 * cut))


class Buffers:
    """The device memory of a plan, one allocation; views are int32 or float32."""

    def __init__(self, sizes: Sizes, kv_heads: int, block_m: int, value_dim: int, device: torch.device):
        parts = {
            "items": sizes.items * ITEM_WORDS,
            "pages": sizes.pages + 1,  # one more, which a read ahead may touch
            "scratch": SCRATCH_ROWS * sizes.stride,
            "arrivals": max(sizes.blocks, sizes.slots) * kv_heads * max(block_m // 32, 1),
            "part_lse": sizes.slots * kv_heads * block_m,
            "part_out": sizes.slots * kv_heads * block_m * value_dim,
        }
        padded = {name: -(-max(n, 1) // 64) * 64 for name, n in parts.items()}
        self.bytes = sum(padded.values()) * 4
        pool.claim(self, device, self.bytes)
        self.memory = torch.zeros(self.bytes // 4, dtype=torch.int32, device=device)
        self.views: dict[str, torch.Tensor] = {}
        start = 0
        for name, n in padded.items():
            view = self.memory[start : start + max(parts[name], 1)]
            self.views[name] = view.view(torch.float32) if name.startswith("part") else view
            start += n
        self.error = torch.zeros(
            4, dtype=torch.int32, pin_memory=device.type == "cuda"
        )  # the device writes it, the host looks without waiting
        self.error_words = (ctypes.c_int32 * 4).from_address(self.error.data_ptr())

    def raise_error(self, sizes: Sizes) -> None:
        """Raise what the planner kernel reported for an earlier batch."""
        code, request, number, limit = self.error_words
        if not code:
            return
        self.error.zero_()
        if code == 1:
            raise ValueError(f"the last batch had a negative length (request {request}): its results were not computed")
        if code == 5:
            raise ValueError(
                f"in the last batch request {request} has {number} keys, more than its pages or its row of dense keys "
                "hold: its results were not computed"
            )
        name = {2: "tokens", 3: "pages"}.get(code)
        if name is None:
            raise ValueError(
                f"the last batch needed {number} work items and the plan holds {limit}: its results were not computed; "
                "plan with a larger Reserve"
            )
        raise ValueError(
            f"the last batch had {number} {name} but the plan reserves {limit}: its results were not computed; plan "
            f"with Reserve({name}={number}) or more"
        )


#: Pinned buffers of plans that are gone, each until a kernel that may still read it is done. Plans may go in any thread
#: and at any point, also within `_sweep`.
_leaving: deque[tuple[torch.cuda.Event | None, list[torch.Tensor]]] = deque()


def _sweep() -> None:
    if _leaving and not torch.cuda.is_current_stream_capturing():  # nothing may be asked then
        with suppress(IndexError):  # another thread took the last one
            for _ in range(len(_leaving)):
                pair = _leaving.popleft()
                if pair[0] is None or not pair[0].query():
                    _leaving.append(pair)


class Staging:
    """Host values on their way to the device: pinned buffers in turn, which the planner kernel reads where they are, or
    a copy of them where they are many. An event is recorded after every few turns, and waited for before the first of
    them comes again. `errors`: the plan's error words, pinned as well, which an update that still runs may write."""

    TURNS, MARKED = 16, 8
    # entries in all, and pages per request, up to which the kernel reads host memory: that takes less time than a copy
    DIRECT, SHORT = 4096, 256

    def __init__(self, device: torch.device):
        self.device = device
        self.turn = -1
        self.capacity, self.stream = 0, 0
        self.host: list[torch.Tensor] = []
        self.errors: list[torch.Tensor] = []
        _sweep()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # modules may be gone by then
        if finalizing() or not (self.host or self.errors):
            return
        event = None
        if not torch.cuda.is_current_stream_capturing():  # nothing may be recorded then: the buffers stay
            event = torch.cuda.Event()
            event.record(cuda.stream_of(self.stream, self.device))
        _leaving.append((event, [*self.host, *self.errors]))

    def _reserve(self, entries: int) -> None:
        _sweep()
        self.capacity = max(entries, 256)
        self.host = [torch.empty(self.capacity, dtype=torch.int32, pin_memory=True) for _ in range(self.TURNS)]
        self.starts = [h.data_ptr() for h in self.host]
        self.views: list[Any] = [h.numpy().data for h in self.host]
        self.events = [torch.cuda.Event() for _ in range(self.TURNS // self.MARKED)]
        self.buffer = torch.empty(self.capacity, dtype=torch.int32, device=self.device)

    def copy(self, batch: Batch, capacity: int) -> tuple[int, int, int, int]:
        """Make q_indptr, kv_lens, page_indptr and pages readable for the next launch on the current stream; answers
        their addresses."""
        n, numbers = batch.requests, batch.numbers
        pages = numbers[3].size
        entries = 3 * n + 2 + pages
        if entries > self.capacity:
            if self.capacity:
                torch.cuda.current_stream(self.device).synchronize()  # the old buffers may still be read
            self._reserve(max(entries, capacity))
        self.stream = cuda.raw_stream(self.device.index)
        self.turn = turn = (self.turn + 1) % self.TURNS
        if turn % self.MARKED == 0:
            group = turn // self.MARKED
            self.events[group - 1].record(torch.cuda.current_stream(self.device))
            self.events[group].synchronize()
        start, view, at = self.starts[turn], self.views[turn], 0
        for part in numbers:
            view[at : at + part.size] = part  # in a quarter of memmove's time, or of a numpy slice's
            at += part.size
        if entries > self.DIRECT or pages > self.SHORT * n:
            cuda.copy_to_device(self.buffer.data_ptr(), start, 4 * entries, self.device)
            start = self.buffer.data_ptr()
        return start, start + 4 * (n + 1), start + 4 * (2 * n + 1), start + 4 * (3 * n + 2)
