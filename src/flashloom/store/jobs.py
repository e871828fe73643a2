"""How many compilers may run at a time: CPUs and memory that this process may really use, shared by all of a host's
processes.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashloom import settings
from flashloom.store.locks import Busy, Lock, local_folder, take

__all__ = ["JOB_BYTES", "job_limit", "job_slot"]

JOB_BYTES = 600 << 20  # what one compiler is taken to need at its peak


def job_limit(root: Path = Path("/")) -> int:
    """``FLASHLOOM_JOBS``, or the CPUs of the affinity mask and cgroup, no more than free memory serves, at least 1.

    ``root`` is where /proc and /sys are looked for (tests give another one).
    """
    if settings.get().jobs:
        return int(settings.get().jobs or 1)
    cpus = min(float(len(os.sched_getaffinity(0))), _cgroup_cpus(root))
    return max(1, min(int(cpus), _free_bytes(root) // JOB_BYTES))


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process' cgroup and its ancestors, for version 1 and 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = base / path.lstrip("/")
        while folder != base:
            yield folder
            folder = folder.parent
        yield base


def _cgroup_cpus(root: Path) -> float:
    limit = float("inf")
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.strip().isdigit():
            limit = min(limit, int(quota) / int(period))
    return limit


def _free_bytes(root: Path) -> int:
    free = 1 << 60
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for folder in _cgroup_folders(root, "memory"):
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, used = _text(folder / limit), _text(folder / usage)
            if most.isdigit() and used.isdigit():
                reclaimable = 0
                for line in _text(folder / "memory.stat").splitlines():
                    if line.startswith(("inactive_file ", "total_inactive_file ")):
                        reclaimable = int(line.split()[1])
                free = min(free, int(most) - int(used) + reclaimable)
    return max(free, 0)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@contextmanager
def job_slot(done: Callable[[], bool]) -> Iterator[None]:
    """Hold one of this host's places for a compiler.

    Waits while all are taken, unless ``done()`` says that the wait has lost its purpose, or no place changed hands for
    ``FLASHLOOM_WAIT`` seconds (their holders are stopped, or very slow): then goes on without one.
    """
    lock = _wait_for_slot(done)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _wait_for_slot(done: Callable[[], bool]) -> Lock | None:
    folder = local_folder()
    if folder is None:
        return None
    paths = [folder / f"job-{i}" for i in range(job_limit())]
    for round in itertools.count(1):
        youngest = float("inf")
        for path in random.sample(paths, len(paths)):
            answer = take(path)
            if isinstance(answer, Lock):
                return answer
            if not isinstance(answer, Busy):
                return None
            youngest = min(youngest, answer.age)
        if youngest > settings.get().wait or (round % 10 == 0 and done()):
            break
        time.sleep(random.uniform(0.02, 0.06))
    return None
