"""The first attention call of a process: from an empty store, from a warm one, and from a pack.

    python benchmarks/store_first_call.py --device cuda

Each is a process of its own. The time is that of the first plan and run for llama-3-8b (causal, bfloat16, paged),
decode and then
prefill, after importing and after the device was started; the result is waited for. Writes
benchmarks/results/store_first_call_*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CALL = """
import os, sys, time, torch
if os.environ.get("WITHOUT_TRITON"):
    sys.modules["triton"] = None
import flashloom as fl
from flashloom import store
device, pack = sys.argv[1], sys.argv[2]
if pack:
    fl.use(pack, on_miss="error")
torch.ones(1, device=device).sum().item()
if device == "cpu":
    import flashloom.attention.cpu
else:
    import flashloom.attention.triton_executor

def call(q_lens, kv_lens):
    heads = fl.HeadShape(32, 8, 128)
    pages = sum(-(-n // 16) for n in kv_lens)
    k, v = (torch.ones(pages, 16, 8, 128, dtype=torch.bfloat16, device=device) for _ in "kv")
    q = torch.ones(sum(q_lens), 32, 128, dtype=torch.bfloat16, device=device)
    indptr = [0]
    for n in kv_lens:
        indptr.append(indptr[-1] - (-n // 16))
    table = fl.PageTable.from_csr(indptr, list(range(pages)), [n - (n - 1) // 16 * 16 for n in kv_lens], page_size=16)
    start = time.perf_counter()
    plan = fl.Attention(heads, variant=fl.causal, dtype=torch.bfloat16, device=device).plan(fl.Batch(q_lens=q_lens,
    kv=table))
    out = plan.run(q, (k, v))
    assert abs(out.float().mean().item() - 1) < 1e-2
    return time.perf_counter() - start

decode, prefill = call([1] * 8, [1024] * 8), call([1024], [1024])
print(decode, prefill, store.counters().builds)
"""


def first_call(device: str, cache: str, pack: str = "", **environment: str) -> dict:
    """Milliseconds of the first decode and the first prefill of a new process, and how many kernels it built."""
    done = subprocess.run(
        [sys.executable, "-c", CALL, device, pack],
        env={**os.environ, "FLASHLOOM_CACHE_DIR": cache, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    decode, prefill, builds = done.stdout.split()
    return {
        "decode_ms": round(float(decode) * 1e3, 1),
        "prefill_ms": round(float(prefill) * 1e3, 1),
        "builds": int(builds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()

    import torch

    from flashloom.bench.machine import describe
    from flashloom.target import Target

    place = Path(tempfile.mkdtemp(prefix="flashloom-first-call-"))
    target = Target.here().name if asked.device == "cpu" else "sm{}{}".format(*torch.cuda.get_device_capability())
    store, pack, empty = str(place / "store"), str(place / "llama.loom"), str(place / "empty")
    runs = {"cold": first_call(asked.device, store)}
    print("cold", runs["cold"], flush=True)
    runs["warm store"] = min((first_call(asked.device, store) for _ in range(3)), key=lambda run: run["decode_ms"])
    command = [
        sys.executable,
        "-m",
        "flashloom",
        "pack",
        "build",
        "--target",
        target,
        "--model",
        "llama-3-8b",
        "-o",
        pack,
    ]
    built = subprocess.run(
        command, env={**os.environ, "FLASHLOOM_CACHE_DIR": store}, check=False, capture_output=True, text=True
    )
    if built.returncode:
        raise SystemExit(built.stderr)
    packed = [first_call(asked.device, empty, pack, PATH="/nowhere", CXX="") for _ in range(3)]
    runs["pack, no compiler in PATH"] = min(packed, key=lambda run: run["decode_ms"])
    if asked.device == "cuda":
        bare = [first_call(asked.device, empty, pack, PATH="/nowhere", WITHOUT_TRITON="1") for _ in range(3)]
        runs["pack, no compiler, no Triton"] = min(bare, key=lambda run: run["decode_ms"])
    shutil.rmtree(place)
    for name, run in runs.items():
        print(f"{name:28}", "  ".join(f"{key} {value}" for key, value in run.items()))
    summary = built.stdout.strip().splitlines()[-1].partition(": ")[2]
    print("pack:", summary)
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"store_first_call_{asked.device}.json"
    path.write_text(
        json.dumps({"machine": describe(), "target": target, "runs": runs, "pack": summary}, indent=2) + "\n"
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
