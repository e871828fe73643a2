"""What a figure was taken on: the machine, the versions, the date and the command, for the JSON beside every table."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from flashloom import settings

PACKAGES = ("flashloom", "torch", "triton", "numpy", "transformers")


def describe() -> dict[str, object]:
    """Processor, cores, memory, threads, GPU, versions, UTC date and command line of this process, and flashloom's
    commit: that of the git checkout it was imported from (with a + when files differ from it), of a copy without git
    that of the variable ``FLASHLOOM_COMMIT``, else None.
    """
    from flashloom.doctor import find_compilers

    compilers = find_compilers()
    found: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "compiler": compilers[0][1] if compilers else None,
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "commit": commit(Path(__file__).resolve().parents[3]),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return found


def command() -> str:
    """The command line, with the program's name alone instead of its path."""
    words = [
        "flashloom" if Path(sys.argv[0]).stem in ("flashloom", "__main__", "cli") else Path(sys.argv[0]).name,
        *sys.argv[1:],
    ]
    return shlex.join(words)


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit(tree: Path) -> str | None:
    """The commit of a source tree, with a + when files differ from it; without git that of the settings."""
    named = settings.get().commit
    if not (tree / ".git").exists():
        return named
    try:

        def run(*words):
            return subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, timeout=10)

        head, changed = (
            run("rev-parse", "--short=12", "HEAD"),
            run("status", "--porcelain", "--untracked-files=no", "src"),
        )
    except (OSError, subprocess.TimeoutExpired):
        return named
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") or named


@dataclass(frozen=True)
class Load:
    """What the processors that this process may use have done since the machine started, and this process of it, in
    seconds. Its children count once they have ended."""

    clock: float
    busy: float
    own: float
    processors: int

    @classmethod
    def now(cls) -> Load | None:
        """As of now; None where the system does not say."""
        try:
            return cls.read(Path("/proc/stat").read_text(), os.sched_getaffinity(0))
        except (OSError, AttributeError, ValueError):
            return None

    @classmethod
    def read(cls, stat: str, processors: set[int]) -> Load:
        """From the text of /proc/stat: user, nice, system, idle, iowait, irq, softirq and steal by processor."""
        ticks = 0
        for line in stat.splitlines():
            name, *numbers = line.split()
            if name.removeprefix("cpu").isdigit() and int(name[3:]) in processors:
                counted = [int(number) for number in numbers[:8]]
                ticks += sum(counted) - sum(counted[3:5])
        busy = ticks / os.sysconf("SC_CLK_TCK")
        return cls(time.monotonic(), busy, sum(os.times()[:4]), len(processors))

    def others(self, now: Load | None) -> float | None:
        """The share of the processors' time that others have taken from then to now; None where that is too short, or
        not known."""
        if now is None or now.clock - self.clock < 0.2:
            return None
        share = (now.busy - self.busy - (now.own - self.own)) / ((now.clock - self.clock) * self.processors)
        return min(max(share, 0.0), 1.0)
