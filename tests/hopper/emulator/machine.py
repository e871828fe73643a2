"""Warps that take turns at random, what they wait for, and memory that knows its bounds."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Broken(AssertionError):
    """The kernel does what the hardware punishes: a deadlock, a stray access, a missing fence."""


@dataclass
class Warps:
    """One partition of one program: the warps that run a function together."""

    program: int
    name: str
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] = lambda: True
    waits_for: str = ""
    done: bool = False
    products: list[Callable[[], None]] = field(default_factory=list)  # asynchronous ones to be done, in order
    outstanding: int = 0  # of those that were not waited for
    stores: list[Callable[[], None]] = field(default_factory=list)  # copies to memory that still read shared memory
    copies: list[Callable[[], None]] = field(default_factory=list)  # copies by threads that are of no group yet
    groups: list[list[Callable[[], None]]] = field(default_factory=list)  # those that were not waited for


class Barrier:
    """An mbarrier: arrivals and bytes that are missing in its present phase."""

    def __init__(self) -> None:
        self.count, self.missing, self.bytes, self.phase = 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def add(self, arrivals: int = 0, copied: int = 0) -> None:
        self.missing -= arrivals
        self.bytes -= copied
        if self.missing < 0:
            raise Broken("more arrivals at a barrier than it counts in one phase")
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity


class NamedBarrier:
    """bar.sync and bar.arrive of a number."""

    def __init__(self) -> None:
        self.arrived, self.turn = 0, 0

    def arrive(self, threads: int, of: int) -> None:
        self.arrived += threads
        if self.arrived > of:
            raise Broken("more threads at a named barrier than it takes")
        if self.arrived == of:
            self.arrived, self.turn = 0, self.turn + 1


@dataclass
class Dirty:
    """Shared memory that threads wrote, which the tensor cores and copies do not see before a fence."""

    low: int
    high: int
    owner: Warps
    fenced: set[int] = field(default_factory=set)  # ids of the warps that fenced after it


class Memory:
    """Ranges of addresses that a kernel may touch."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._kept: list[torch.Tensor] = []

    def allow(self, *tensors: torch.Tensor | None) -> None:
        for x in tensors:
            if x is not None:
                storage = x.untyped_storage()
                self._ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
                self._kept.append(x)

    def view(self, low: int, high: int, dtype: torch.dtype, what: str) -> torch.Tensor:
        """The elements from address low to high (exclusive)."""
        if not any(a <= low and high <= b for a, b in self._ranges):
            raise Broken(f"{what} touches {low:#x} to {high:#x}, which is no memory of the call")
        return torch.frombuffer((ctypes.c_byte * (high - low)).from_address(low), dtype=dtype)


class Machine:
    """Runs one launch. Only one partition runs at a time, and gives its turn to another wherever it could wait."""

    def __init__(self, memory: Memory, programs: int, seed: int) -> None:
        self.memory, self.programs = memory, programs
        self.random = random.Random(seed)
        self.warps: list[Warps] = []
        self.jobs: list[Callable[[], None]] = []  # copies under way
        self.named: dict[tuple[int, int], NamedBarrier] = {}
        self.dirty: list[Dirty] = []
        self.failure: BaseException | None = None
        self.current = Warps(0, "the beginning of a program")
        self._finished = threading.Semaphore(0)

    def start(self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Add the partitions of the program that begins."""
        for i, (function, arguments) in enumerate(parts):
            own = Warps(self.current.program, f"{function.__name__} {i} of program {self.current.program}")
            self.warps.append(own)
            threading.Thread(target=self._work, args=(own, function, arguments), daemon=True).start()

    def run(self, kernel: Callable[[], None]) -> None:
        """All programs to their end."""
        for program in range(self.programs):
            self.current = Warps(program, f"the beginning of program {program}")
            kernel()
        self._pass_on(None)
        self._finished.acquire()
        if self.failure is not None:
            raise self.failure

    def _work(self, own: Warps, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        own.turn.acquire()
        try:
            if self.failure is None:
                function(*arguments)
                if own.outstanding:
                    raise Broken(f"{own.name} ends before its products do")
                if own.stores:
                    raise Broken(f"{own.name} ends before its copies have read shared memory")
        except BaseException as error:
            self.failure = self.failure or error
        own.done = True
        self._pass_on(own)

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let others run, at least until `ready`."""
        own = self.current
        own.ready, own.waits_for = ready, waits_for
        self._pass_on(own)
        if self.failure is not None:
            raise Broken("another partition failed")

    def _pass_on(self, own: Warps | None) -> None:
        following = self._choose()
        if following is None:
            self._finished.release()
            return
        self.current = following
        if following is own:
            return
        following.turn.release()
        if own is not None and not own.done:
            own.turn.acquire()

    def _choose(self) -> Warps | None:
        while True:
            left = [w for w in self.warps if not w.done]
            if self.failure is not None:
                return left[0] if left else None
            can = [w for w in left if w.ready()]
            if self.jobs and (not can or self.random.random() < 0.3):
                self.jobs.pop(self.random.randrange(len(self.jobs)))()
                continue
            if can:
                return self.random.choice(can)
            if not left:
                return None
            self.failure = Broken("deadlock: " + "; ".join(f"{w.name} waits for {w.waits_for}" for w in left))

    def wrote(self, low: int, high: int) -> None:
        """Threads of the current partition wrote shared memory."""
        self.dirty.append(Dirty(low, high, self.current))

    def fence(self) -> None:
        """What the current partition wrote or can see is visible to tensor cores and copies."""
        own = self.current
        self.dirty = [d for d in self.dirty if d.owner is not own]
        for d in self.dirty:
            d.fenced.add(id(own))

    def replaced(self, low: int, high: int) -> None:
        """A copy by the hardware overwrote shared memory."""
        self.dirty = [d for d in self.dirty if not (low <= d.low and d.high <= high)]

    def reads(self, low: int, high: int, what: str) -> None:
        """Tensor cores or a copy are told to read shared memory."""
        own = id(self.current)
        for d in self.dirty:
            if d.low < high and low < d.high and own not in d.fenced:
                raise Broken(f"{what} reads shared memory that {d.owner.name} wrote, without a fence")
