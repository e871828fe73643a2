"""Many processes that need the same kernels at the same time, from an empty store, against one process.

    python benchmarks/store_processes.py --processes 8 --kernels 40

Every process prepares the same attentions; the time is from a barrier after import to the last process' end. Prints a
table and
writes benchmarks/results/store_processes.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path


def attentions(count: int):
    """Attentions that need `count` different kernels."""
    import torch

    import flashloom as fl

    made = [
        fl.Attention(fl.HeadShape(group, 1, dim), variant=variant, dtype=dtype, device="cpu")
        for dim in (64, 128, 80, 96, 256)
        for group in (1, 4)
        for dtype in (torch.bfloat16, torch.float32)
        for variant in (fl.causal, fl.full)
    ]
    return made[:count]


def work(folder: str, count: int, barrier, answers) -> None:
    """One process: import, wait for the others, prepare."""
    import flashloom as fl
    import flashloom.attention.cpu
    from flashloom import store
    from flashloom.kernel.cpp import find_compiler

    find_compiler()
    fl.configure(cache_dir=folder)
    needed = attentions(count)
    batch = fl.Batch(q_lens=[1], kv=fl.RaggedKV([1]))
    barrier.wait()
    start = time.monotonic()
    fl.prepare(needed, [batch])
    answers.put((start, time.monotonic(), store.counters()))


def measure(processes: int, kernels: int) -> dict:
    """Seconds from the barrier to the end, and the sums of the counters."""
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp(prefix="flashloom-bench-")
    barrier, answers = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=work, args=(folder, kernels, barrier, answers)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    found = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    shutil.rmtree(folder)
    return {
        "processes": processes,
        "kernels": kernels,
        "seconds": round(max(end for _, end, _ in found) - min(start for start, _, _ in found), 2),
        **{
            name: sum(getattr(counters, name) for *_, counters in found)
            for name in ("builds", "shared", "hits", "waits")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--kernels", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "store_processes.json")
    asked = parser.parse_args()

    from flashloom.bench.machine import describe
    from flashloom.store.jobs import job_limit

    runs = [measure(1, asked.kernels), measure(asked.processes, asked.kernels)]
    ratio = runs[1]["seconds"] / runs[0]["seconds"]
    for run in runs:
        print("  ".join(f"{name} {value}" for name, value in run.items()))
    print(f"{asked.processes} processes take {ratio:.2f} times as long as one, {job_limit()} compilers at a time")
    report = {"machine": describe(), "jobs": job_limit(), "runs": runs, "ratio": round(ratio, 3)}
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {asked.output}")


if __name__ == "__main__":
    main()
