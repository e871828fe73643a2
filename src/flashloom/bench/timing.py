"""Timing several ways of computing the same thing, fairly: one process, interleaved rounds, medians.

On a shared machine speed drifts by tens of percent within a minute, so candidates take turns in every round and only
figures of one run are compared. A sample is the mean of enough calls to be well above the clock's resolution.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """The samples of one candidate, in seconds per call, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """First quartile, in seconds."""
        return _quantile(self.samples, 0.25)

    @property
    def high(self) -> float:
        """Third quartile, in seconds."""
        return _quantile(self.samples, 0.75)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a share of the median."""
        return (self.high - self.low) / self.median

    def to_json(self) -> dict[str, float | int]:
        return {"median_s": self.median, "q1_s": self.low, "q3_s": self.high, "rounds": len(self.samples)}


def interleave(
    calls: Mapping[Name, Call],
    *,
    rounds: int = 15,
    sample_time: float = 2e-3,
    warmup: int = 2,
    synchronize: Call | None = None,
    progress: Call | None = None,
) -> dict[Name, Timing]:
    """Time every call `rounds` times, taking turns, and return their samples.

    Args:
        calls: name (anything hashable) -> function without arguments.
        rounds: samples per call; at least 1, and 15 or more for a figure to be reported.
        sample_time: seconds; short calls are repeated within a sample until it lasts about this long.
        warmup: untimed calls of each before the first round (compilation happens here).
        synchronize: called before each clock reading, for devices that run ahead (torch.cuda.synchronize).
        progress: called after each round.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: take at least one sample per call")
    repeats = {}
    for name, call in calls.items():
        for _ in range(max(1, warmup)):
            last = _sample(call, 1, synchronize)
        repeats[name] = max(1, min(10_000, int(sample_time / max(last, 1e-9))))
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # nobody always follows the same neighbour
            samples[name].append(_sample(calls[name], repeats[name], synchronize))
        if progress is not None:
            progress()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def geomean(ratios: list[float]) -> float:
    """Geometric mean; NaN for an empty list."""
    return statistics.geometric_mean(ratios) if ratios else float("nan")


def _sample(call: Call, repeats: int, synchronize: Call | None) -> float:
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if synchronize is not None:
        synchronize()
    return (time.perf_counter() - start) / repeats


def _quantile(samples: tuple[float, ...], q: float) -> float:
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)
