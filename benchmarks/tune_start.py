"""What start-up costs with tuning records: plans with a warm cache against plans without records, and a restart of four
ranks that tuned together.

    python benchmarks/tune_start.py

Every start is a process of its own. "records" is what reading them adds: from before the context to after the first
plan of each shape, less the same without records. The four ranks use gloo on this machine, one thread each; a cold
start tunes, a restart must not. Writes benchmarks/results/tune_start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

START = """
import json, sys, time, torch
import flashloom as fl
from flashloom import records
from flashloom.bench.workloads import decode, prefill
from flashloom.tune.attention import batch_of
cache, mode, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(threads)
heads = fl.HeadShape(4, 2, 32)
attention = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, device="cpu")
cases = [decode(heads, b, kv) for b in (1, 8, 32) for kv in (64, 256, 1024)]
cases += [prefill(heads, n) for n in (32, 64)]
batches = [batch_of(case, attention) for case in cases]
if mode == "tune":
    with fl.autotune(tune=False, cache=cache):
        report = fl.tune(attention, batches, "25s")
    print(json.dumps({"seconds": report.seconds, "tuned": report.count("tuned")}))
    raise SystemExit
attention.plan(batches[0])  # the kernel is loaded
start = time.perf_counter()
if mode == "warm":
    with fl.autotune(tune=True, cache=cache) as session:
        plans = [attention.plan(batch) for batch in batches]
    counters, tuned = session.counters, len([o for o in session.report.outcomes if o.status == "tuned"])
else:
    plans, counters, tuned = [attention.plan(batch) for batch in batches], None, 0
first = time.perf_counter() - start
print(json.dumps({"ms": first * 1e3, "plans": len(plans), "tuned": tuned,
                  "hits": counters and counters.hits, "misses": counters and counters.misses}))
"""

RANK = """
import json, sys, time, torch
import torch.distributed as dist
import flashloom as fl
from flashloom.bench.workloads import decode
from flashloom.tune.attention import batch_of
rank, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
heads = fl.HeadShape(4, 2, 32)
attention = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, device="cpu")
cases = [decode(heads, b, kv) for b in (1, 8) for kv in (64, 256, 1024)]
batches = [batch_of(case, attention) for case in cases]
path = fl.tune_cache_path(model="bench", dtype="float32", tp=(rank, 4), root=root)
attention.plan(batches[0])
dist.barrier()
start = time.perf_counter()
with fl.autotune(tune=False, cache=path) as session:
    report = fl.tune(attention, batches, group=True)
    seconds = time.perf_counter() - start
    plans = [attention.plan(batch) for batch in batches]
print(json.dumps({"rank": rank, "seconds": seconds, "digest": report.digest, "errors": report.errors,
                  "statuses": [o.status for o in report.outcomes], "hits": session.counters.hits}))
dist.barrier()
"""


def start(*words: str) -> dict:
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def ranks(root: str) -> list[dict]:
    """One start of four ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", RANK]
    running = [
        subprocess.Popen([*command, str(rank), port, root], stdout=subprocess.PIPE, text=True) for rank in range(4)
    ]
    said = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in running]
    assert len({one["digest"] for one in said}) == 1, said
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    from flashloom.bench.machine import describe

    threads = "1" if os.cpu_count() == 1 else "2"
    with tempfile.TemporaryDirectory() as folder:
        tuning = start(folder, "tune", threads)
        without = [start(folder, "without", threads) for _ in range(options.starts)]
        warm = [start(folder, "warm", threads) for _ in range(options.starts)]
    assert all(one["tuned"] == 0 and one["misses"] == 0 for one in warm), warm
    ms = {name: median(one["ms"] for one in found) for name, found in (("without", without), ("warm", warm))}
    with tempfile.TemporaryDirectory() as folder:
        cold, again = ranks(folder), ranks(folder)
        for left_out in (0, 2):  # two of the four have lost their cache
            for path in Path(folder).rglob(f"rank_tp{left_out}_*"):
                path.rename(path.with_name(f"gone{left_out}"))
        mixed = ranks(folder)
    assert all(set(one["statuses"]) == {"known"} for one in again), again
    assert all(set(one["statuses"]) <= {"known", "taken"} for one in mixed), mixed
    result = {
        "machine": describe(),
        "one process": {
            "tuning_s": tuning["seconds"],
            "plans": warm[0]["plans"],
            "without_records_ms": ms["without"],
            "warm_ms": ms["warm"],
            "records_ms": ms["warm"] - ms["without"],
            "tuned_at_warm_start": 0,
        },
        "four ranks": {
            name: {"seconds": max(one["seconds"] for one in said), "statuses": [one["statuses"] for one in said]}
            for name, said in (("cold", cold), ("restart", again), ("two of four lost their cache", mixed))
        },
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "tune_start.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("one process", "four ranks")}, indent=1))


if __name__ == "__main__":
    main()
