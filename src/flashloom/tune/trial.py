"""Trying a candidate once: is its result right? Where it could end the process, a child process tries it first.

A candidate that this process tries itself leaves a marker beside the records until it has come back. A marker whose
process is gone says which candidate it died of; that one is tried in a child process from then on.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch

import flashloom
from flashloom import store
from flashloom.errors import FlashloomError
from flashloom.records import FORMAT, Folder
from flashloom.tune.operator import Config, Operator

__all__ = ["Children", "Lost", "Markers", "try_here"]

Task: TypeAlias = tuple[int, Config]
Tried: TypeAlias = tuple[str, str]
MOST_CHILDREN = 6
CHILD_S = 300.0  # a candidate that takes longer than this is given up
log = logging.getLogger("flashloom")


class Lost(FlashloomError, RuntimeError):
    """The device can no longer be used by this process."""


def try_here(
    operator: Operator, config: Config, cases: Sequence[tuple[Any, Any]]
) -> tuple[str, str, list[Callable[[], object]]]:
    """Compute all cases, given with their inputs, and compare: (status, note, calls), "slower" for a right result, the
    calls being ready to be timed. Raises Lost, store.SealedError, and what ends a process."""
    calls = []
    try:
        for case, inputs in cases:
            call = operator.run(config, case, inputs)
            spoil(inputs)
            call()
            wrong = operator.check(case, inputs)
            if wrong:
                return "wrong", wrong, []
            calls.append(call)
    except (MemoryError, torch.OutOfMemoryError) as error:
        _recover(operator)
        return "memory", _line(error), []
    except store.SealedError:
        raise
    except Exception as error:
        _recover(operator)
        return "failed", _line(error), []
    return "slower", "", calls


def spoil(inputs: Any) -> None:
    """Make results that are not written not a number."""
    out = getattr(inputs, "out", None)
    if isinstance(out, torch.Tensor) and out.is_floating_point():
        out.fill_(torch.nan)


def _recover(operator: Operator) -> None:
    if operator.device.type == "cuda":
        try:
            torch.cuda.synchronize(operator.device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise Lost(f"{operator.device} cannot be used any more: {_line(error)}") from error


def _line(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text[:200]}"


class Markers:
    """What this process is trying, for those who come after it."""

    def __init__(self, folder: Folder | None, request: str, operator: str) -> None:
        self._place = None if folder is None else folder.root / f"v{FORMAT}" / operator
        self._request = request[:16]

    @contextmanager
    def trying(self, config: Config) -> Iterator[None]:
        """Leave a marker while a candidate is tried here. Where that cannot be written there is none."""
        path = self._path(config)
        try:
            if path is not None:
                with suppress(OSError):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": _started(os.getpid())}
                    path.write_text(json.dumps(me | {"config": config.to_json()}))
            yield
        finally:
            if path is not None:
                with suppress(OSError):
                    path.unlink()

    def suspects(self, configs: Sequence[Config]) -> set[Config]:
        """Candidates that a process tried last before it ended."""
        if self._place is None:
            return set()
        found = set()
        names = {store.digest(config.to_json())[:16]: config for config in configs}
        for path in self._place.glob(f".trying-{self._request}-*"):
            config = names.get(path.name.split("-")[2])
            with suppress(OSError, ValueError, KeyError, TypeError):
                who = json.loads(path.read_text())
                gone = who["host"] == socket.gethostname() and _started(who["pid"]) != who["start"]
                old = time.time() - path.stat().st_mtime > 3600
                if config is not None and (gone or old):
                    found.add(config)
        return found

    def clear(self, configs: Sequence[Config]) -> None:
        """Forget the markers of processes that are gone, once it is recorded what came of their candidates."""
        names = {store.digest(config.to_json())[:16] for config in configs}
        if self._place is not None:
            for path in self._place.glob(f".trying-{self._request}-*"):
                if path.name.split("-")[2] in names:
                    with suppress(OSError):
                        path.unlink()

    def _path(self, config: Config) -> Path | None:
        if self._place is None:
            return None
        return self._place / f".trying-{self._request}-{store.digest(config.to_json())[:16]}-{os.getpid()}"


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; None when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class Children:
    """Child processes that try candidates for this one. A task is (number of the job, candidate)."""

    def __init__(self, jobs: Sequence[tuple[Operator, Sequence[Any]]]) -> None:
        """jobs: operators with their cases. Raises TypeError for what cannot be sent to another process."""
        try:
            self._jobs = pickle.dumps([(operator, list(cases)) for operator, cases in jobs])
        except Exception as error:
            raise TypeError(f"it cannot be sent to a child process: {_line(error)}") from error
        self._count = len(jobs)
        cores = len(os.sched_getaffinity(0))
        on_gpu = all(operator.device.type == "cuda" for operator, _ in jobs)
        self._workers = min(MOST_CHILDREN, max(cores // 2, 1)) if on_gpu else 1  # to compile side by side

    def try_all(self, tasks: Sequence[Task], progress: Callable[[], None], deadline: float) -> dict[Task, Tried]:
        """(status, note) of each task that was done before the deadline; "slower" for a right result. Raises TypeError
        when the operators cannot be made in another process."""
        workers = max(min(self._workers, len(tasks) // 2), 1)
        each = max(workers // self._count, 1)  # children among which one job's candidates are dealt out
        dealt: list[list[Task]] = [[] for _ in range(workers)]
        seen: dict[int, int] = {}
        for task in tasks:
            seen[task[0]] = place = seen.get(task[0], -1) + 1
            dealt[(task[0] * each + place % each) % workers].append(task)
        with ThreadPoolExecutor(workers, "flashloom-children") as pool:
            parts = pool.map(lambda mine: self._try(_in_turn(mine), progress, deadline), dealt)
            return {task: found for part in parts for task, found in part.items()}

    def _try(self, tasks: list[Task], progress: Callable[[], None], deadline: float) -> dict[Task, Tried]:
        found: dict[Task, Tried] = {}
        waiting, prepare = tasks, True
        while waiting and time.monotonic() < deadline:
            done, end = self._one_child(waiting, prepare, progress, deadline)
            found |= dict(zip(waiting, done))
            waiting = waiting[len(done) :]
            if end is None:
                break
            if waiting and (done or not prepare):
                found[waiting.pop(0)] = ("killed", end)
            elif not done:
                prepare = False  # it died before the first one was tried: while compiling, of whichever
        return found

    def _one_child(
        self, tasks: Sequence[Task], prepare: bool, progress: Callable[[], None], deadline: float
    ) -> tuple[list[Tried], str | None]:
        """Results in order, and how the child ended: None when all were tried or time is up."""
        path = str(Path(flashloom.__file__).parents[1])
        inherited = os.environ.get("PYTHONPATH")
        environment = {**os.environ, "PYTHONPATH": path + (os.pathsep + inherited if inherited else "")}
        command = [sys.executable, "-m", "flashloom.tune.child"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert child.stdin
        assert child.stdout
        done: list[Tried] = []
        try:
            with suppress(BrokenPipeError):
                pickle.dump((self._jobs, list(tasks), prepare, sys.path), child.stdin)
                child.stdin.close()
            lines = _Lines(child.stdout.fileno())
            while len(done) < len(tasks):
                line = lines.next(min(CHILD_S, max(deadline - time.monotonic(), 0.0)))
                if line is None:
                    break
                said = json.loads(line)
                if "error" in said:
                    raise TypeError(said["error"])
                done.append((said["status"], said["note"]))
                progress()
            if len(done) == len(tasks):
                return done, None
            if not lines.ended:
                late = time.monotonic() >= deadline
                return done, None if late else f"no result within {CHILD_S:.0f} s"
            return done, _ending(child.wait(CHILD_S))
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


def _in_turn(tasks: Sequence[Task]) -> list[Task]:
    """The first of every job, then the second of every job: whenever time ends, all have had their share."""
    places: dict[int, int] = {}
    order: list[tuple[int, int]] = []
    for task in tasks:
        places[task[0]] = place = places.get(task[0], -1) + 1
        order.append((place, len(order)))
    return [tasks[i] for _, i in sorted(order)]


class _Lines:
    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._text, self.ended = descriptor, b"", False
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)

    def next(self, seconds: float) -> bytes | None:
        """The next line, or None when it does not come in time or at all."""
        until = time.monotonic() + seconds
        while b"\n" not in self._text:
            if not self._selector.select(max(until - time.monotonic(), 0)):
                return None
            part = os.read(self._descriptor, 1 << 16)
            if not part:
                self.ended = True
                return None
            self._text += part
        line, _, self._text = self._text.partition(b"\n")
        return line


def _ending(code: int) -> str:
    if code >= 0:
        return f"it ended its process with status {code}"
    with suppress(ValueError):
        return f"it ended its process with {signal.Signals(-code).name}"
    return f"it ended its process with signal {-code}"
