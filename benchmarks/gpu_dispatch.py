"""Which of its own kernels flashloom takes for append steps on a GPU, and which would have been the fastest.

    PYTHONPATH=src:. python benchmarks/gpu_dispatch.py [result.json] [--cells N] [--seed S]

Cells are drawn in a seeded order from query tokens x keys x requests x page size (0: ragged), such that every two
values of two dimensions meet; a few batches of mixed lengths and other heads follow. Each executor is planned alone
(`dispatch.only`) and by default, its output is compared with float64 on a few rows, and then CUDA-graph replays take
turns, over sets of keys and values that together exceed the L2 cache. Work is counted for what the mask keeps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.executor import AttentionSpec
from flashloom.bench.machine import describe
from flashloom.target import Target

BF16 = torch.bfloat16
GRID: dict[str, tuple[int, ...]] = {
    "q": (16, 32, 64, 128, 256, 512),
    "kv": (4096, 8192, 16384, 32768, 65536, 131072),
    "batch": (1, 2, 4, 8, 16),
    "page": (0, 1, 16),
}
HEADS = fl.HeadShape(32, 8, 128)
KNOWN = ("hopper", "triton")
ROUNDS, SAMPLE_S, BOUND = 9, 2.5e-3, 1e-2  # relative error of a row
CACHE = 256 << 20  # bytes of keys and values that are gone through before any comes again
ALLOWED = 1.05  # the default's time over the best one's


@dataclass(frozen=True)
class Cell:
    """One causal batch: query tokens and keys of each request, page size (0: ragged), heads."""

    q: tuple[int, ...]
    kv: tuple[int, ...]
    page: int
    heads: fl.HeadShape = HEADS

    def __str__(self) -> str:
        h, mixed = self.heads, len(set(zip(self.q, self.kv))) > 1
        lengths = f"{len(self.q)}x{self.q[0]} on {self.kv[0]}"
        if mixed:
            lengths = f"{len(self.q)} of {min(self.q)}-{max(self.q)} on {min(self.kv)}-{max(self.kv)}"
        return f"{lengths} {h.q_heads}/{h.kv_heads}x{h.dim} " + (f"page {self.page}" if self.page else "ragged")

    @property
    def flops(self) -> int:
        pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(self.q, self.kv))
        return 2 * self.heads.q_heads * (self.heads.dim + self.heads.value_dim) * pairs

    @property
    def row_bytes(self) -> int:
        """Of one token's keys, or values."""
        return self.heads.kv_heads * self.heads.dim * BF16.itemsize


def cells(count: int, seed: int) -> list[Cell]:
    """`count` cells of the grid, those first in which every two values of two dimensions meet; then the others."""
    every = list(itertools.product(*GRID.values()))
    random.Random(seed).shuffle(every)

    def meetings(c: tuple[int, ...]) -> set[tuple[int, ...]]:
        return {(i, j, c[i], c[j]) for i, j in itertools.combinations(range(4), 2)}

    missing = set().union(*map(meetings, every))
    chosen: list[tuple[int, ...]] = []
    while missing:
        best = max((len(meetings(c) & missing), -i, c) for i, c in enumerate(every))[2]
        chosen.append(best)
        every.remove(best)
        missing -= meetings(best)
    known = [(128, 32768, 1, 16), (128, 32768, 1, 0)]
    chosen = list(dict.fromkeys([*known, *chosen, *every]))[:count]
    found = [Cell((q,) * b, (kv,) * b, page) for q, kv, b, page in chosen]
    draw = random.Random(seed + 1)
    for page in (0, 1, 16):  # one long request among short ones, and lengths drawn anew
        found.append(Cell((128,) * 16, (131072, *[1024] * 15), page))
        n = draw.choice((3, 5, 9, 14))
        found.append(
            Cell(
                tuple(int(16 * 32 ** draw.random()) for _ in range(n)),
                tuple(int(4096 * 32 ** draw.random()) for _ in range(n)),
                page,
            )
        )
    for q_heads, kv_heads, dim in ((16, 16, 128), (64, 8, 128), (8, 1, 128), (32, 8, 64), (16, 4, 256), (40, 8, 128)):
        for q, kv, n in ((64, 32768, 1), (200, 16384, 2), (24, 65536, 4)):
            found.append(Cell((q,) * n, (kv,) * n, 16, fl.HeadShape(q_heads, kv_heads, dim)))
    return found


def _kernels(wanted: list[Cell]) -> list[Any]:
    """What those cells may need, each once."""
    found: dict[Any, Any] = {}
    for heads, page, longest, mean in {(c.heads, c.page, max(c.q), -(-sum(c.q) // len(c.q))) for c in wanted}:
        spec = AttentionSpec(heads, fl.causal.program.specialise(heads.dim, heads.value_dim), BF16, BF16)
        for kernel in dispatch.kernels(spec, Target("sm90"), longest, mean, page):
            found.setdefault(repr(kernel), kernel)
    return sorted(found.values(), key=lambda kernel: type(kernel).__name__)  # those of Gluon take longest


def _compile(kernel: Any) -> float:
    start = time.perf_counter()
    kernel.entry()
    return time.perf_counter() - start


def compile_all(wanted: list[Cell]) -> None:
    """Compile the kernels into the store, side by side, in processes without a GPU context."""
    start, workers = time.perf_counter(), max(1, (multiprocessing.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(min(workers, 16), multiprocessing.get_context("fork")) as pool:
        seconds = list(pool.map(_compile, _kernels(wanted)))
    print(f"{len(seconds)} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Queries [heads, dim] of one token on keys and values [n, kv heads, dim], in float64, a head at a time."""
    group, rows = q.shape[0] // k.shape[1], []
    for head in range(k.shape[1]):
        mine, keys, values = q[head * group : (head + 1) * group].double(), k[:, head].double(), v[:, head].double()
        rows.append((mine @ keys.T * q.shape[1] ** -0.5).softmax(-1) @ values)
    return torch.cat(rows)


class Inputs:
    """Random queries, and sets of keys and values, of a cell."""

    def __init__(self, cell: Cell, pool: torch.Tensor):
        heads, page = cell.heads, cell.page
        self.cell = cell
        self.q = torch.randn(sum(cell.q), heads.q_heads, heads.dim, device="cuda", dtype=BF16)
        needs = [-(-n // page) for n in cell.kv] if page else list(cell.kv)
        self.starts = [0, *itertools.accumulate(needs)]
        shape = (sum(needs), *([page] if page else []), heads.kv_heads, heads.dim)
        size = math.prod(shape)
        count = min(max(-(-CACHE // (4 * size)), 1), 16, pool.numel() // (2 * size))
        parts = pool[: 2 * count * size].view(2 * count, *shape)
        self.sets = [(parts[2 * i], parts[2 * i + 1]) for i in range(count)]
        self.order = torch.randperm(sum(needs), device="cuda", dtype=torch.int32) if page else None

    def batch(self) -> fl.Batch:
        cell, page = self.cell, self.cell.page
        if not page:
            return fl.Batch(cell.q, kv=fl.RaggedKV(cell.kv))
        last = [n - (-(-n // page) - 1) * page for n in cell.kv]
        assert self.order is not None
        return fl.Batch(cell.q, kv=fl.PageTable.from_csr(self.starts, self.order.cpu(), last, page_size=page))

    def error(self, out: torch.Tensor) -> float:
        """The largest relative error of a few rows of a run on the first set."""
        cell, worst = self.cell, 0.0
        firsts = [0, *itertools.accumulate(cell.q)]
        for request, token in {(0, 0), (len(cell.q) - 1, cell.q[-1] - 1), (len(cell.q) // 2, cell.q[0] // 2)}:
            token = min(token, cell.q[request] - 1)
            k, v = (x[self.starts[request] : self.starts[request + 1]] for x in self.sets[0])
            if self.order is not None:
                where = self.order[self.starts[request] : self.starts[request + 1]].long()
                k, v = (x[where].flatten(0, 1) for x in self.sets[0])
            n = cell.kv[request] - cell.q[request] + token + 1
            want = _exact(self.q[firsts[request] + token], k[:n], v[:n])
            got = out[firsts[request] + token].double()
            worst = max(worst, float((got - want).norm() / want.norm()))
        return worst


def _replay(plan: Any, inputs: Inputs, out: torch.Tensor) -> tuple[Callable[[], None], int]:
    """(replays of runs over all sets, how many runs one is)."""
    for kv in inputs.sets[:2]:
        plan.run(inputs.q, kv, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for kv in inputs.sets:
            plan.run(inputs.q, kv, out=out)
    return lambda: (graph.replay(), plan)[0], len(inputs.sets)


def _time(calls: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds per run, in rounds that begin with another one each."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(name: str, n: int) -> float:
        call, runs = calls[name]
        start.record()
        for _ in range(n):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / (n * runs) / 1e3

    counts = {name: max(1, round(SAMPLE_S / (sample(name, 1) * calls[name][1]))) for name in calls}
    names, samples = list(calls), {name: [] for name in calls}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(sample(name, counts[name]))
    return samples


def measure(cell: Cell, pool: torch.Tensor) -> dict[str, Any]:
    """The cell's entry in the results."""
    inputs, outs, calls = Inputs(cell, pool), {}, {}
    entry: dict[str, Any] = {"cell": str(cell), "q": cell.q, "kv": cell.kv, "page": cell.page}
    if len(set(cell.q)) == len(set(cell.kv)) == 1:
        entry |= {"q": cell.q[0], "kv": cell.kv[0]}
    entry |= {"batch": len(cell.q), "tflop": cell.flops * 1e-12}
    for name in (*KNOWN, "default"):
        with dispatch.only(None if name == "default" else name):
            attn = fl.Attention(cell.heads, variant=fl.causal, dtype=BF16, device="cuda")
            plan = attn.plan(inputs.batch())
        outs[name] = torch.full_like(inputs.q, float("nan"))
        plan.run(inputs.q, inputs.sets[0], out=outs[name])
        error = inputs.error(outs[name])
        assert error < BOUND, f"{cell}: {name} is off by {error:.1e}"
        calls[name] = _replay(plan, inputs, outs[name])
        entry[name] = {"error": error, "workspace": plan._executor.workspace_size}
        if name == "default":
            entry["takes"] = plan.executor
    samples = _time(calls, ROUNDS)
    for name, taken in samples.items():
        assert not outs[name].isnan().any(), f"{cell}: rows that {name} did not write"
        middle, quarter = statistics.median(taken), statistics.quantiles(taken, n=4)
        entry[name] |= {"median_s": middle, "spread": (quarter[2] - quarter[0]) / middle}
        entry[name] |= {"tflops": cell.flops / middle * 1e-12}
    entry["lost"] = entry["default"]["median_s"] / min(entry[name]["median_s"] for name in KNOWN)
    return entry


def _line(entry: dict[str, Any]) -> str:
    us = "".join(f"{entry[n]['median_s'] * 1e6:10.1f}" for n in (*KNOWN, "default"))
    return f"{entry['cell']:42}{us}  {entry['takes']:7}{entry['lost']:6.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default="gpu_dispatch.json")
    parser.add_argument("--cells", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wanted, start = cells(options.cells, options.seed), time.perf_counter()
    compile_all(wanted)
    torch.manual_seed(options.seed)
    size = max(sum(-(-n // max(c.page, 1)) * max(c.page, 1) for n in c.kv) * c.row_bytes for c in wanted)
    pool = torch.empty(max(2 * size, 2 * CACHE) // BF16.itemsize, device="cuda", dtype=BF16)
    for part in pool.split(1 << 28):
        part.normal_()
    result: dict[str, Any] = {"machine": describe(), "rounds": ROUNDS, "allowed": ALLOWED, "cells": []}
    print(f"{'us per run':42}{'hopper':>10}{'triton':>10}{'default':>10}  takes    lost", flush=True)
    for cell in wanted:
        entry = measure(cell, pool)
        result["cells"].append(entry)
        print(_line(entry), flush=True)
    Path(options.path).write_text(json.dumps(result, indent=1))
    lost = sorted((e for e in result["cells"] if e["lost"] > ALLOWED), key=lambda e: -e["lost"])
    print(f"\n{len(result['cells'])} cells in {time.perf_counter() - start:.0f} s; the default loses more than 5 % in:")
    print(*(map(_line, lost)), "none" if not lost else "", sep="\n")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
