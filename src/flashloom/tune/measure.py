"""Timing candidates against the default: in turns, as they will be used, until the difference is known from the noise.

A round takes one sample of everybody. A candidate's figure is the median over rounds of its time over the default's in
the same round, so drift of the machine cancels. The default also runs under a second name: what it differs by from
itself is the noise that a winner must beat. Where memory happens to lie, and what else the machine does for a second,
shows in every round of a session alike; so those that won are timed in further sessions, with inputs and plans of their
own, and must win in each.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch

__all__ = ["BUSY", "SESSIONS", "Figure", "Policy", "Session", "Timer", "agree", "decide", "race", "rerun", "winners"]

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
LEAST_GAIN = 0.02  # what is below is not worth another config
FIRST, SECOND, LAST = 3, 5, 15  # rounds of everybody, of the better ones, of the finalists
FINALISTS = 3
SESSIONS = 3  # that must agree
BUSY = 0.1  # the default differs by more than this from itself: the machine is too busy to tell


@dataclass(frozen=True)
class Policy:
    """How calls are made while they are timed: replayed from a CUDA graph or not, with the caches as the call before
    left them (warm) or full of something else (cold)."""

    graph: bool
    cold: bool
    sample_time: float = 1e-3

    def __str__(self) -> str:
        return f"{'CUDA graph' if self.graph else 'eager'}, {'cold' if self.cold else 'warm'} cache"

    @classmethod
    def of(cls, device: torch.device) -> Policy:
        """As engines deploy: on a GPU graphs, and between two calls of a layer all others have passed the cache."""
        return cls(graph=device.type == "cuda", cold=device.type == "cuda")


@dataclass(frozen=True)
class Figure:
    """Of one candidate: seconds of its median sample, distance of the quartiles as a share of it, its time over the
    default's (the less flattering of the median over rounds and of the medians' ratio), the standard error of that, and
    the ratio in the worse half of the rounds."""

    median: float
    spread: float
    ratio: float
    error: float
    worst: float


class Timer:
    """Takes samples on a device: seconds per call."""

    def __init__(self, device: torch.device, policy: Policy) -> None:
        self.device, self.policy = device, policy
        self._flush: torch.Tensor | None = None
        if policy.cold:
            size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64 << 20
            self._flush = torch.empty(2 * size, dtype=torch.uint8, device=device)

    def ready(self, call: Call) -> Call:
        """The call as it will be timed. What it allocates must stay."""
        call()
        if not self.policy.graph:
            return call
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def repeats(self, call: Call) -> int:
        """Calls of one sample."""
        taken = min(self.sample(call, 1) for _ in range(2))
        return max(1, min(1000 if self._flush is None else 10, int(self.policy.sample_time / max(taken, 1e-9))))

    def sample(self, call: Call, repeats: int) -> float:
        """Mean (cold: median) of some calls, in seconds."""
        if self.device.type == "cuda":
            return self._sample_cuda(call, repeats)
        if self._flush is None:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        taken = []
        for _ in range(repeats):
            self._flush.zero_()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _sample_cuda(self, call: Call, repeats: int) -> float:
        pairs = []
        for _ in range(repeats):
            if self._flush is not None:
                self._flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize(self.device)
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e-3


#: What was measured together: figures by name, and the noise.
Session: TypeAlias = tuple[dict[Name, Figure], float]


def race(
    timer: Timer,
    calls: Mapping[Name, Sequence[Call]],
    default: Name,
    progress: Callable[[], None] = lambda: None,
    deadline: float = math.inf,
) -> Session[Name]:
    """Time candidates, each with its calls (one per case, the same cases for all), and answer their figures and the
    noise: the share by which the default differed from itself. Fewer take part from stage to stage; finalists are
    judged by rounds of their own, so that luck in the choice does not count. Past the deadline stages are cut short."""
    repeats = [timer.repeats(call) for call in calls[default]]
    figures: dict[Name, Figure] = {}
    field: list[Name] = list(calls)
    noise = 0.0
    for rounds, kept in ((FIRST, 3 * FINALISTS), (SECOND, FINALISTS), (LAST, 0)):
        found, noise = _session(timer, calls, field, default, repeats, rounds, progress, deadline)
        figures |= found
        ranked = sorted((name for name in field if name != default), key=lambda name: figures[name].ratio)
        field = [default, *ranked[:kept]]
        if not ranked:
            break
    return figures, noise


def rerun(
    timer: Timer, calls: Mapping[Name, Sequence[Call]], default: Name, deadline: float = math.inf
) -> Session[Name]:
    """A further session of those that won the last one, with calls made anew."""
    repeats = [timer.repeats(call) for call in calls[default]]
    return _session(timer, calls, list(calls), default, repeats, LAST, lambda: None, deadline)


def _session(
    timer: Timer, calls: Mapping[Name, Sequence[Call]], field: Sequence[Name], default: Name,
    repeats: Sequence[int], rounds: int, progress: Callable[[], None], deadline: float,
) -> Session[Name]:  # fmt: skip
    taken, again = _rounds(timer, calls, field, default, repeats, rounds, progress, deadline)
    control = _figure(again, taken[default])
    noise = max(abs(control.ratio - 1), abs(control.worst - 1), 2 * control.error)
    return {name: _figure(taken[name], taken[default]) for name in field}, noise


def _rounds(
    timer: Timer, calls: Mapping[Name, Sequence[Call]], field: Sequence[Name], default: Name,
    repeats: Sequence[int], rounds: int, progress: Callable[[], None], deadline: float,
) -> tuple[dict[Name, list[tuple[float, ...]]], list[tuple[float, ...]]]:  # fmt: skip
    taken: dict[Name, list[tuple[float, ...]]] = {name: [] for name in field}
    again: list[tuple[float, ...]] = []
    for i in range(rounds):
        order: list[Name | None] = [*field, None]  # None: the default once more
        for name in order[i % len(order) :] + order[: i % len(order)]:
            made = calls[default if name is None else name]
            sample = tuple(timer.sample(call, n) for call, n in zip(made, repeats))
            (again if name is None else taken[name]).append(sample)
        progress()
        if i >= 2 and time.monotonic() > deadline:
            break
    return taken, again


def _figure(taken: Sequence[tuple[float, ...]], default: Sequence[tuple[float, ...]]) -> Figure:
    ratios = [
        math.exp(statistics.fmean(math.log(a / b) for a, b in zip(mine, other))) for mine, other in zip(taken, default)
    ]
    times = [math.exp(statistics.fmean(map(math.log, sample))) for sample in taken]
    median = statistics.median(times)
    base = statistics.median(math.exp(statistics.fmean(map(math.log, sample))) for sample in default)
    ratio = max(statistics.median(ratios), median / base)
    half = (len(ratios) + 1) // 2
    worst = max(statistics.median(ratios[:half]), statistics.median(ratios[-half:]))
    # the standard error of a median is about 1.25 of that of a mean; 1.35 sigma lie between the quartiles of a normal
    error = 1.25 * _quartiles(ratios) / 1.35 / math.sqrt(len(ratios))
    return Figure(median, _quartiles(times) / median, ratio, error, worst)


def _quartiles(values: Sequence[float]) -> float:
    if len(values) < 3:
        return max(values) - min(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def winners(session: Session[Name], default: Name) -> dict[Name, Figure]:
    """Those that beat the default by more than the noise (their own, and the default's against itself), by 2 %, and in
    both halves of the rounds."""
    figures, noise = session
    return {
        name: figure
        for name, figure in figures.items()
        if name != default
        and figure.ratio < 1 - max(LEAST_GAIN, noise, 3 * figure.error)
        and figure.worst < 1 - LEAST_GAIN
    }


def agree(sessions: Sequence[Session[Name]], default: Name) -> dict[Name, Figure]:
    """Those that won in every session, each with its least flattering figure."""
    won = [winners(session, default) for session in sessions]
    return {
        name: max((one[name] for one in won), key=lambda figure: figure.ratio)
        for name in won[0]
        if all(name in one for one in won)
    }


def decide(sessions: Sequence[Session[Name]], default: Name) -> Name:
    """The fastest of those that won in every session; the default where there is none. Of those that cannot be told
    apart, the first in order."""
    won = agree(sessions, default)
    if not won:
        return default
    best = min(won.values(), key=lambda figure: figure.ratio)
    limit = best.ratio + max(best.error, LEAST_GAIN)
    return next(name for name, figure in won.items() if figure.ratio <= limit)
