"""What attention costs beside its kernels: calls, plans, compiling, and the first result of a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import flashloom as fl
from flashloom.bench.report import OWN, Row
from flashloom.bench.timing import Timing, interleave

# Run in a child with an empty or a filled store: seconds from imported packages to the first result, and in the
# compiler.
FIRST_RESULT = """
import json, sys, time, torch, flashloom as fl
from flashloom import store
heads = fl.HeadShape(32, 8, 128)
pages = fl.PageTable.from_block_table([list(range(64))], [1024], page_size=16)
batch = fl.Batch.decode(pages) if sys.argv[1] == "decode" else fl.Batch(q_lens=[256], kv=pages)
q = torch.randn(batch.tokens, 32, 128, dtype=torch.bfloat16)
kv = tuple(torch.randn(64, 16, 8, 128, dtype=torch.bfloat16) for _ in range(2))
start = time.perf_counter()
fl.Attention(heads, variant=fl.causal, dtype=torch.bfloat16).plan(batch).run(q, kv)
print(json.dumps(dict(first=time.perf_counter() - start, build=store.counters().build_seconds)))
"""
FLEX_FIRST_RESULT = """
import json, time, torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
q, k = torch.randn(1, 32, 256, 128, dtype=torch.bfloat16), torch.randn(1, 8, 1024, 128, dtype=torch.bfloat16)
start = time.perf_counter()
mask = create_block_mask(lambda b, h, i, j: j <= i + 768, None, None, 256, 1024, device="cpu")
torch.compile(flex_attention)(q, k, k, block_mask=mask, enable_gqa=True)
print(json.dumps(dict(first=time.perf_counter() - start)))
"""


def overhead_rows(rounds: int) -> list[Row]:
    """Calls so small that the host's part is nearly all of them: run, plan, update and append."""
    heads, requests = fl.HeadShape(8, 2, 64), 64
    attention = fl.Attention(heads, variant=fl.causal, dtype=torch.bfloat16)
    one, many = (_decode_batch(n) for n in (1, requests))
    small = attention.plan(one)
    large = attention.plan(many)
    cache = fl.PagedKVCache(layers=1, pages=4 * requests, page_size=16, heads=heads, dtype=torch.bfloat16, device="cpu")
    q, kv = torch.randn(1, 8, 64, dtype=torch.bfloat16), cache[0]
    out, lse = torch.empty_like(q), torch.empty(1, 8)
    k = torch.randn(1, 2, 64, dtype=torch.bfloat16)
    slots = one.slots()
    alone = attention.plan(one)
    alone.run(q, kv, out=out)
    kernel = alone._executor  # which keeps the arguments of its only run
    calls = {
        "the kernel alone, one request of 16 tokens": lambda: kernel._run(kernel._address),
        "run(out=), the same": lambda: small.run(q, kv, out=out),
        "run(out=, lse=), the same": lambda: small.run(q, kv, out=out, lse=lse, return_lse=True),
        "run, the same, new output": lambda: small.run(q, kv),
        f"plan of {requests} requests": lambda: attention.plan(many),
        f"update of {requests} requests": lambda: large.update(many),
        f"Batch.decode of {requests} requests": lambda: _decode_batch(requests),
        "append of one token": lambda: fl.append(kv, k, k, slots),
    }
    times = interleave(calls, rounds=rounds, sample_time=5e-3)
    return [Row("overhead", name, "bf16", {OWN: timing}) for name, timing in times.items()]


def compile_rows(rounds: int) -> list[Row]:
    """Compiling into an empty store, and the first result of a new process from a filled one, in child processes."""
    rows = []
    for kind in ("decode", "prefill"):
        cold, warm, build = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            for i in range(rounds):
                cold.append(_child(FIRST_RESULT, kind, FLASHLOOM_CACHE_DIR=f"{folder}/{i}"))
                build.append(cold[-1]["build"])
                warm.append(_child(FIRST_RESULT, kind, FLASHLOOM_CACHE_DIR=f"{folder}/{i}"))
        first = Timing(tuple(c["first"] for c in cold))
        name = f"first result of a new process, {kind}"
        rows.append(Row("compile", f"{name}, empty store", "bf16", {OWN: first}, compile_s=sorted(build)[rounds // 2]))
        rows.append(Row("compile", f"{name}, from the store", "bf16", {OWN: Timing(tuple(w["first"] for w in warm))}))
    return rows


def flex_compile_row() -> Row:
    """FlexAttention's first result with an empty compiler cache, once: it takes tens of seconds."""
    with tempfile.TemporaryDirectory() as folder:
        found = _child(FLEX_FIRST_RESULT, TORCHINDUCTOR_CACHE_DIR=folder)
    return Row("compile", "first result of a new process, prefill", "bf16", {"flex": Timing((found["first"],))})


def _decode_batch(requests: int) -> fl.Batch:
    table = torch.arange(4 * requests, dtype=torch.int32).view(requests, 4)
    return fl.Batch.decode(fl.PageTable.from_block_table(table, [16] * requests, page_size=16))


def _child(code: str, *arguments: str, **environment: str) -> dict[str, float]:
    source = str(Path(fl.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"a child process of the benchmark failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
