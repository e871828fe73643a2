"""The pytest side of a conformance run: chooses cases, and writes down what came of each."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from flashloom.compat import install
from flashloom.compat.conformance.cases import group, left_out, place, sample

install()

_started = time.monotonic()


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--on", default="cpu")
    group.addoption("--sample", type=int, default=0)
    group.addoption("--shard", default="0/1")
    group.addoption("--seconds", type=float, default=0)
    group.addoption("--report")


class Run:
    """What came of the cases of one process."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.not_reached = 0


_run = Run()


def name_of(item: Any) -> str:
    """A case's name, the same wherever the tests lie and whatever device they were pointed at."""
    return re.sub(r"^.*?tests/", "", item.nodeid).replace("cuda:0", "cpu").replace("cuda", "cpu")


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "solo: of FlashInfer's runner")
    config.addinivalue_line("markers", "long_running: of FlashInfer's runner")
    if config.getoption("--on") == "cpu":
        # what tests ask of the GPU that they were written for
        torch.cuda.get_device_capability = lambda *args: (9, 0)
        torch.cuda.synchronize = lambda *args: None
        torch.cuda.empty_cache = lambda: None
        from flashloom.compat.flashinfer import utils

        utils.get_compute_capability = lambda device: (9, 0)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    device, kept = config.getoption("--on"), []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        reason = left_out(item.nodeid, params, device)
        if reason is None:
            kept.append(item)
        else:
            _run.left_out[reason] += 1
    groups: dict[str, list[Any]] = {}
    for item in kept:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        groups.setdefault(group(name_of(item).partition("[")[0], params), []).append(item)
    limit = config.getoption("--sample") or len(kept)
    shard, shards = map(int, config.getoption("--shard").split("/"))
    load, chosen = [0] * shards, set()
    sizes = {name: (name_of(of[0]).partition("::")[0], len(of)) for name, of in groups.items()}
    for name in sample(sizes, limit):
        to = load.index(min(load))
        load[to] += len(groups[name])
        if to == shard:
            chosen |= {id(item) for item in groups[name]}
    items[:] = [item for item in items if id(item) in chosen]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: Any) -> bool | None:
    limit = item.config.getoption("--seconds")
    if limit and time.monotonic() - _started > limit:
        _run.not_reached += 1
        return True
    torch.manual_seed(int(place(name_of(item)) * (1 << 31)))
    return None


def pytest_runtest_teardown(item: Any) -> None:
    if item.config.getoption("--on") == "cuda" and torch.cuda.memory_reserved() > 4 << 30:
        torch.cuda.empty_cache()  # other processes use the same GPU


def pytest_runtest_logreport(report: Any) -> None:
    name = re.sub(r"^.*?tests/", "", report.nodeid)
    if report.when == "call" or (report.outcome != "passed" and name not in _run.outcomes):
        outcome = "xfailed" if getattr(report, "wasxfail", None) is not None and report.skipped else report.outcome
        _run.outcomes[name] = outcome
        if outcome == "failed":
            _run.failures[name] = str(report.longrepr)[-4000:]
        elif outcome == "skipped":
            _run.failures[name] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)


def pytest_sessionfinish(session: Any) -> None:
    target = session.config.getoption("--report")
    if target:
        Path(target).write_text(
            json.dumps(
                {
                    "left_out": _run.left_out, "outcomes": _run.outcomes, "failures": _run.failures,
                    "not_reached": _run.not_reached, "seconds": time.monotonic() - _started,
                }
            )
        )  # fmt: skip
