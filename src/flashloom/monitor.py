"""What flashloom did while you watched: compile times, execution times, memory and the store, in one object.

    with fl.monitor() as seen:
        serve()
    print(seen)                     # or seen.report(), plain numbers for a metrics endpoint

Off, it costs nothing: watching replaces `Plan.run` and its sisters, and the last monitor puts the originals back.
Watching waits for nothing either: times on a GPU are pairs of CUDA events, read when you read them.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from flashloom import store
from flashloom.attention import pool
from flashloom.attention.attention import Plan
from flashloom.store import evict
from flashloom.store.store import listeners

__all__ = ["Call", "Compile", "Monitor", "monitor"]


@dataclass(frozen=True)
class Compile:
    """One kernel that this process compiled: its label and the seconds it took."""

    label: str
    seconds: float


class Call:
    """One `plan`, `update` or `run`.

    kind: which of them. executor: "cpu", "hopper", ...; requests, tokens: of the batch (tokens None where only the
    device knows). thread: name of the calling thread. host_seconds: the call's own duration. captured: it was recorded
    into a CUDA graph and computed nothing; what replays of the graph take is not seen."""

    __slots__ = ("_events", "captured", "executor", "host_seconds", "kind", "requests", "thread", "tokens")

    def __init__(self, kind: str, plan: Plan, host_seconds: float, events: tuple[Any, Any] | None, captured: bool):
        self.kind, self.executor, self.host_seconds = kind, _executor(plan), host_seconds
        self.requests, self.tokens = plan.batch.requests, plan.batch.tokens
        self.thread, self._events, self.captured = threading.current_thread().name, events, captured

    @property
    def seconds(self) -> float:
        """The time of the work: on a CPU `host_seconds`, on a GPU between two events in its stream, the launch included
        where the GPU waited for it. Waits until the work is done; nan for a captured call."""
        if self.captured:
            return float("nan")
        if self._events is not None:
            start, end = self._events
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        return self.host_seconds

    def __repr__(self) -> str:
        return f"Call({self.kind} {self.executor}, {self.requests} requests, {self.tokens} tokens)"


class Monitor:
    """What happened since its `with` was entered, until now or until it was left; made by `fl.monitor`."""

    def __init__(self, *, nvtx: bool | None = None, capture: bool = False, keep: int = 100_000):
        gpu = torch.cuda.is_available()
        for name, asked in (("nvtx", nvtx), ("capture", capture)):
            if asked and not gpu:
                raise RuntimeError(
                    f"{name}=True marks what Nsight tools show of a GPU, and torch sees none: leave it out"
                )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}: give the number of calls to keep, an int of at least 1")
        self.nvtx, self.capture = gpu if nvtx is None else nvtx, capture
        self._calls: dict[str, deque[Call]] = {kind: deque(maxlen=keep) for kind in ("plan", "update", "run")}
        self._counts = dict.fromkeys(self._calls, 0)
        self._compiles: list[Compile] = []
        self._lock = threading.Lock()
        self._before = self._after = store.Counters()
        self._started = self._ended = 0.0
        self._peaks: dict[str, int] = {}

    # --- the context ---

    def __enter__(self) -> Monitor:
        if self._started:
            raise RuntimeError("this monitor was entered before: make another one with fl.monitor()")
        self._before, self._started = store.counters(), time.perf_counter()
        self._note_memory()
        _watch(self)
        if self.capture:
            _profiler("cudaProfilerStart")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.capture:
            _profiler("cudaProfilerStop")
        _unwatch(self)
        self._after, self._ended = store.counters(), time.perf_counter()

    def _add(self, call: Call) -> None:
        with self._lock:
            self._calls[call.kind].append(call)
            self._counts[call.kind] += 1
        if call.kind != "run":
            self._note_memory()

    def _compiled(self, entry: store.Entry) -> None:
        with self._lock:
            self._compiles.append(Compile(entry.label, entry.seconds))

    def _note_memory(self) -> None:
        with self._lock:
            for place, size in pool.totals().items():
                self._peaks[place] = max(size, self._peaks.get(place, 0))

    # --- reading ---

    def _of(self, kind: str) -> list[Call]:
        with self._lock:
            return list(self._calls[kind])

    @property
    def compiles(self) -> list[Compile]:
        """Kernels that this process compiled, in the order in which they were ready."""
        with self._lock:
            return list(self._compiles)

    @property
    def plans(self) -> list[Call]:
        """Plans that were made, the latest `keep` of them; their duration includes compiling."""
        return self._of("plan")

    @property
    def updates(self) -> list[Call]:
        """Calls of `plan.update`, the latest `keep` of them."""
        return self._of("update")

    @property
    def runs(self) -> list[Call]:
        """Calls of `plan.run`, and what `fl.attention` ran, the latest `keep` of them."""
        return self._of("run")

    @property
    def workspace_bytes(self) -> dict[str, int]:
        """Bytes that the workspaces of all live plans hold now, by device."""
        return pool.totals()

    @property
    def workspace_peak_bytes(self) -> dict[str, int]:
        """The most of them after any plan or update that was seen, by device."""
        with self._lock:
            return dict(self._peaks)

    @property
    def store_bytes(self) -> int:
        """Bytes of the kernel store on disk now; reads the folder. 0 where there is none."""
        try:
            return sum(entry.bytes for entry in evict.usage(store.default_folder()))
        except (OSError, RuntimeError):
            return 0

    @property
    def counters(self) -> store.Counters:
        """What the store did meanwhile: hits, misses, builds, seconds; see `store.Counters`."""
        now = self._after if self._ended else store.counters()
        pairs = zip(dataclasses.astuple(now), dataclasses.astuple(self._before))
        return store.Counters(*(a - b for a, b in pairs))

    def report(self) -> dict[str, Any]:
        """All of it as plain numbers: seconds and bytes, with totals, medians and largest values of each kind of call.
        Waits for the GPU work that was seen."""
        found: dict[str, Any] = {"seconds": (self._ended or time.perf_counter()) - self._started}
        for kind in self._calls:
            calls = self._of(kind)
            found[kind] = {"calls": self._counts[kind], **_spread([c.seconds for c in calls if not c.captured])}
            found[kind]["host"] = _spread([c.host_seconds for c in calls])
            found[kind]["captured"] = sum(c.captured for c in calls)
        compiles = self.compiles
        found["compile"] = {"calls": len(compiles), **_spread([c.seconds for c in compiles])}
        found["workspace_bytes"], found["workspace_peak_bytes"] = self.workspace_bytes, self.workspace_peak_bytes
        found["store_bytes"], found["store"] = self.store_bytes, dataclasses.asdict(self.counters)
        return found

    def __repr__(self) -> str:
        state = "not entered" if not self._started else "left" if self._ended else "watching"
        counts = ", ".join(f"{n} {kind}s" for kind, n in self._counts.items())
        return f"Monitor({state}, {counts}, {len(self.compiles)} compiles)"

    def __str__(self) -> str:
        report = self.report()
        lines = [f"{'':10}{'calls':>8}{'total s':>12}{'median us':>12}{'largest us':>12}"]
        for kind in ("compile", "plan", "update", "run"):
            row = report[kind]
            times = f"{row['total_s']:12.4f}{row['median_s'] * 1e6:12.1f}{row['largest_s'] * 1e6:12.1f}"
            lines.append(f"{kind:10}{row['calls']:8}{times}")
        peaks = ", ".join(f"{size} on {place}" for place, size in report["workspace_peak_bytes"].items()) or "0"
        counters = ", ".join(f"{n} {name}" for name, n in report["store"].items() if n and not name.endswith("seconds"))
        stored = "; ".join(filter(None, [f"store: {report['store_bytes']} bytes", counters]))
        return "\n".join([*lines, f"workspace bytes at most: {peaks}", stored])


def monitor(*, nvtx: bool | None = None, capture: bool = False, keep: int = 100_000) -> Monitor:
    """Watch what flashloom does, in every thread, from entering to leaving: ``with fl.monitor() as seen``.

    nvtx: mark plans, updates and runs as NVTX ranges ("flashloom run hopper 8 requests, 4096 tokens"); where there is a
    GPU unless given. capture: start CUDA's profiler on entering and stop it on leaving, so that ``nsys profile
    --capture-range=cudaProfilerApi`` records just that. keep: calls of each kind to keep; counts include all. Monitors
    may nest and overlap, each sees what happens while it is entered. Raises RuntimeError for nvtx or capture without a
    GPU. A method taken before (``run = plan.run``) is not seen."""
    return Monitor(nvtx=nvtx, capture=capture, keep=keep)


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    return {"total_s": sum(ordered), "median_s": ordered[len(ordered) // 2], "largest_s": ordered[-1]}


# --- watching ---

_lock = threading.RLock()
_watching: tuple[Monitor, ...] = ()
_ORIGINALS = {name: getattr(Plan, name) for name in ("__init__", "update", "run")}


def _watch(one: Monitor) -> None:
    global _watching
    with _lock:
        if not _watching:
            for name, kind in (("__init__", "plan"), ("update", "update"), ("run", "run")):
                setattr(Plan, name, _watched(kind, _ORIGINALS[name]))
            listeners.append(_on_build)
        _watching = (*_watching, one)


def _unwatch(one: Monitor) -> None:
    global _watching
    with _lock:
        _watching = tuple(other for other in _watching if other is not one)
        if not _watching:
            for name, original in _ORIGINALS.items():
                setattr(Plan, name, original)
            listeners.remove(_on_build)


def _on_build(entry: store.Entry) -> None:
    for one in _watching:
        one._compiled(entry)


def _watched(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A method of Plan that tells the monitors of each call that succeeds."""

    def method(plan: Plan, *arguments: Any, **options: Any) -> Any:
        monitors = _watching
        if torch.compiler.is_compiling() or not monitors:
            return original(plan, *arguments, **options)
        with _range(kind, plan, any(one.nvtx for one in monitors)):
            device = arguments[0].device if kind == "plan" else plan.attention.device
            gpu = device.type == "cuda"
            captured = gpu and torch.cuda.is_current_stream_capturing()
            events = _events(device) if gpu and not captured else None
            start = time.perf_counter()
            result = original(plan, *arguments, **options)
            seconds = time.perf_counter() - start
            if events is not None:
                events[1].record(torch.cuda.current_stream(device))
        call = Call(kind, plan, seconds, events, captured)
        for one in monitors:
            one._add(call)
        return result

    return method


def _executor(plan: Plan) -> str:
    """Its name, without having one chosen that the first run would otherwise choose."""
    return "not chosen" if getattr(plan, "_executor", plan) is None else plan.executor


def _events(device: torch.device) -> tuple[Any, Any]:
    """Two events for timing, the first of them recorded."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream(device))
    return start, end


@contextmanager
def _range(kind: str, plan: Plan, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    what = "" if kind == "plan" else f" {_executor(plan)} {plan.batch.requests} requests, {plan.batch.tokens} tokens"
    torch.cuda.nvtx.range_push(f"flashloom {kind}{what}")
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def _profiler(call: str) -> None:
    code = getattr(torch.cuda.cudart(), call)()
    if int(code):
        raise RuntimeError(f"{call} failed with CUDA error {int(code)}")
