"""Time candidate configs of the Triton attention kernel on one GPU, to choose the defaults of `config.choose`.

    PYTHONPATH=src python benchmarks/gpu_sweep.py decode|fp8|mla|prefill [result.json]

Every time is a median of CUDA-graph replays in which KV sets rotate through 1.2 GB or more, microseconds per run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import flashloom as fl
from flashloom.attention import triton_executor
from flashloom.attention.kernels.triton import asked
from flashloom.attention.kernels.triton.asked import Form
from flashloom.attention.kernels.triton.config import Config
from flashloom.bench.machine import describe
from flashloom.target import Target

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
G, M, LATENT = fl.HeadShape(32, 8, 128), fl.HeadShape(32, 32, 128), fl.HeadShape.mla(128, 512, 64)
C = Config
DECODE = [C(16, n, w, s, r) for n, w, s, r in (
    (64, 4, 3, 3), (64, 4, 2, 4), (64, 4, 4, 2), (64, 4, 3, 2), (64, 4, 3, 1), (32, 4, 4, 3), (32, 4, 3, 5), (32, 2,
    4, 4), (32, 4, 6, 2),
    (128, 4, 2, 3), (128, 4, 3, 1), (128, 8, 3, 1), (64, 8, 3, 2), (64, 2, 3, 3), (128, 4, 2, 2))]  # fmt: skip
FP8 = [
    C(16, n, w, s, r)
    for n, w, s, r in (
        (128, 4, 3, 2), (128, 4, 2, 2), (128, 4, 2, 3), (64, 4, 4, 2), (64, 4, 3, 3), (64, 4, 3, 4), (128, 8, 3, 1),
        (128, 4, 4, 1), (64, 2, 4, 4), (128, 8, 3, 2),
    )
]  # fmt: skip
MLA = [C(m, n, w, s, r) for m, n, w, s, r in (
    (16, 32, 4, 2, 2), (16, 64, 4, 2, 1), (32, 32, 4, 2, 2), (32, 32, 8, 2, 2), (64, 32, 8, 2, 1), (64, 64, 8, 2, 1),
    (64, 64, 4, 2, 1),
    (64, 32, 4, 2, 1), (32, 64, 8, 2, 1), (64, 32, 8, 3, 1), (128, 32, 8, 2, 1))]  # fmt: skip
PREFILL = [C(m, n, w, s, r) for m, n, w, s, r in (
    (128, 64, 8, 3, 1), (128, 128, 8, 2, 1), (128, 64, 8, 2, 1), (64, 64, 4, 3, 2), (64, 64, 4, 2, 2), (128, 32, 8, 4,
    1), (64, 128, 4, 2, 1),
    (128, 64, 4, 3, 1), (64, 32, 4, 3, 2))]  # fmt: skip
# name, heads, variant, kv dtype, page size (0: ragged), requests, query tokens, keys
ROWS = {
    "decode": [(f"g{h.group} b{b} kv{n}", h, "full", BF16, 16, b, 1, n)
               for h, b, n in ((G, 1, 1024), (G, 1, 4096), (G, 1, 16384), (G, 16, 1024), (G, 16, 4096), (G, 64, 1024),
               (G, 64, 4096),
                               (G, 128, 4096), (M, 1, 1024), (M, 1, 4096), (M, 64, 1024), (M, 64, 4096))],
    "fp8": [(f"fp8 b{b} kv{n}", G, "full", E4M3, 16, b, 1, n) for b, n in ((1, 4096), (16, 1024), (16, 4096), (64,
    4096), (128, 4096))], "mla": [(f"mla b{b} kv{n}", LATENT, "full", BF16, 64, b, 1, n) for b, n in ((1, 4096), (16,
    4096), (64, 4096))],
    "prefill": [(f"{v} {b}x{n} {h.kv_heads}h p{p}", h, v, BF16, p, b, n, n)
                for v, b, n, h, p in (("full", 4, 4096, G, 0), ("causal", 4, 4096, G, 0), ("causal", 16, 1024, G, 0),
                ("full", 4, 4096, G, 16),
                                      ("causal", 1, 16384, G, 0), ("full", 4, 4096, fl.HeadShape(16, 16, 128), 0))],
}  # fmt: skip
LOW = [
    C(16, n, w, s, r)
    for n, w, s, r in (
        (64, 4, 3, 1), (64, 4, 4, 1), (32, 4, 4, 1), (128, 4, 3, 1), (64, 4, 3, 2), (64, 4, 4, 2), (64, 4, 3, 3),
        (128, 4, 2, 2), (128, 4, 2, 3), (32, 4, 4, 3), (64, 2, 4, 2), (64, 2, 3, 3), (32, 2, 4, 4), (128, 8, 3, 1),
    )
]  # fmt: skip
ROWS["low"] = [
    (f"g{h.group} b{b} kv{n}", h, "causal", BF16, 16, b, 1, n)
    for h, b, n in (
        *((G, b, n) for b in (1, 16) for n in (1024, 4096, 16384)),
        *((M, 1, n) for n in (1024, 4096, 16384)),
        *((h, b, 1024) for h, b in ((G, 32), (G, 64), (G, 128), (M, 16), (M, 64))),
    )
]
CONFIGS = {"low": LOW, "decode": DECODE, "fp8": FP8, "mla": MLA, "prefill": PREFILL}


def attention(row, device="cuda"):
    _, heads, variant, kv_dtype, *_ = row
    return fl.Attention(heads, variant=getattr(fl, variant), dtype=BF16, kv_dtype=kv_dtype, device=device)


def build(job):
    """Compile into the store, in a process of its own."""
    row, config = job
    _, heads, variant, kv_dtype, page, *_ = row
    from flashloom.attention.executor import AttentionSpec

    program = getattr(fl, variant).program.specialise(heads.dim, heads.value_dim)
    spec = AttentionSpec(heads, program, BF16, kv_dtype)
    try:
        asked.plan_kernel(spec, config, page > 0, Target("sm90")).entry()
        asked.attend_kernel(spec, Form(BF16), config, page, Target("sm90")).entry()
    except Exception as error:
        return f"{row[0]} {config}: {type(error).__name__} {str(error)[:200]}"
    return ""


def measure(row, config, pool):
    _, heads, _, kv_dtype, page, requests, q_len, keys = row
    triton_executor.choose = lambda need: config
    triton_executor.TritonExecutor._forms = staticmethod(lambda spec: [Form(spec.out_dtype)])
    q = torch.randn(requests * q_len, heads.q_heads, heads.dim, device="cuda", dtype=BF16)
    out = torch.empty(requests * q_len, heads.q_heads, heads.value_dim, device="cuda", dtype=BF16)
    if page:
        pages = requests * keys // page
        table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(requests, -1)
        kv = fl.PageTable.from_block_table(
            table, torch.full((requests,), keys, dtype=torch.int32, device="cuda"), page_size=page
        )
        shape = (pages, page, heads.kv_heads)
    else:
        kv = fl.RaggedKV(torch.full((requests,), keys, dtype=torch.int32, device="cuda"))
        shape = (requests * keys, heads.kv_heads)
    lens = torch.full((requests,), q_len, dtype=torch.int32, device="cuda")
    batch = fl.Batch(q_lens=lens, kv=kv, max_q_len=q_len, tokens=requests * q_len)
    plan = attention(row).plan(batch)
    size = math.prod(shape)
    step = size * (heads.dim + (0 if heads.latent_value else heads.value_dim))
    store = pool.view(kv_dtype)
    sets = []
    for start in range(0, store.numel() - step + 1, step):
        k = store[start : start + size * heads.dim].view(*shape, heads.dim)
        v = (
            k[..., : heads.value_dim]
            if heads.latent_value
            else store[start + size * heads.dim : start + step].view(*shape, heads.value_dim)
        )
        sets.append((k, v))
        if len(sets) * step * kv_dtype.itemsize > 1.2e9 or len(sets) >= 128:
            break
    return graph_time([lambda kv=kv: plan.run(q, kv, out=out) for kv in sets])


def graph_time(calls, rounds=9):
    """Median microseconds per call of replays of a graph that goes through `calls`."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in calls[:3]:
        call()
    end.record()
    torch.cuda.synchronize()
    once = max(begin.elapsed_time(end) * 1000 / len(calls[:3]), 3.0)
    count = max(min(len(calls), int(20000 / once)), min(40, int(20000 / once)), 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    times = []
    for i in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i > 1:
            times.append(begin.elapsed_time(end) * 1000 / count)
    return statistics.median(times)


def host_times():
    """Microseconds of host time per call, the device kept idle or busy alike: medians of 7 x 200 calls."""
    tables = {}
    for where in ("cuda", "cpu"):
        table = torch.randperm(64 * 64, dtype=torch.int32).view(64, 64).to(where)
        lens = torch.full((64,), 1000, dtype=torch.int32, device=where)
        tables[where] = fl.Batch.decode(fl.PageTable.from_block_table(table, lens, page_size=16))
    attn = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda")
    k, v = torch.randn(2, 64 * 64, 16, 8, 128, device="cuda", dtype=BF16)
    cache = fl.PagedKVCache(layers=1, pages=64, page_size=16, heads=G, dtype=BF16, device="cuda")[0]
    kv = type(cache)(k, v)
    q = torch.randn(64, 32, 128, device="cuda", dtype=BF16)
    out = torch.empty_like(q)
    for where, batch in tables.items():
        plan = attn.plan(batch)
        calls = {
            "run(out=)": lambda plan=plan: plan.run(q, kv, out=out),
            "run": lambda plan=plan: plan.run(q, kv),
            "run(tuple, out=)": lambda plan=plan: plan.run(q, (k, v), out=out),
            "update": lambda plan=plan, batch=batch: plan.update(batch),
            "executor.run": lambda plan=plan: plan._executor.run(
                q, kv, out, None, sm_scale=0.1, partial=False, values=plan._values
            ),
            "torch.add(out=)": lambda: torch.add(q, q, out=out),
        }
        for name, call in calls.items():
            times = []
            for _ in range(8):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    call()
                times.append((time.perf_counter() - start) / 200 * 1e6)
            print(f"host {where} {name}: {statistics.median(times[1:]):.1f} us", flush=True)


def main(kinds, path):
    jobs = {}
    for kind in kinds:
        for row in ROWS[kind]:
            for config in CONFIGS[kind]:
                jobs.setdefault((row[1], row[2], row[3], row[4], str(config).rpartition(",")[0]), (row, config))
    start = time.time()
    with ProcessPoolExecutor(16, mp_context=multiprocessing.get_context("spawn")) as workers:
        for problem in workers.map(build, jobs.values()):
            if problem:
                print("build:", problem, flush=True)
    print(f"{len(jobs)} kernels in {time.time() - start:.0f} s", flush=True)
    pool = torch.empty(4_600_000_000, dtype=torch.uint8, device="cuda")
    results = []
    for kind in kinds:
        view = pool.view(BF16)
        for i in range(0, view.numel(), 1 << 28):
            view[i : i + (1 << 28)].normal_()
        if kind == "fp8":
            pool.copy_(pool.view(BF16).to(E4M3).view(torch.uint8).repeat(2))
        for row in ROWS[kind]:
            line = []
            for config in CONFIGS[kind]:
                try:
                    t = measure(row, config, pool)
                except Exception as error:
                    if not line and len(CONFIGS[kind]) > 1 and row is ROWS[kind][0]:
                        raise
                    print(row[0], config, type(error).__name__, str(error)[:150], flush=True)
                    continue
                line.append((t, str(config)))
                results.append({"row": row[0], "config": str(config), "us": t})
            line.sort()
            _, heads, variant, kv_dtype, _, requests, q_len, keys = row
            if kind == "prefill":
                work = (
                    2
                    * requests
                    * q_len
                    * keys
                    * heads.q_heads
                    * (heads.dim + heads.value_dim)
                    / (2 if variant == "causal" else 1)
                )
                shown = [f"{t:.0f}us {work / t / 1e6:.0f}TF [{c}]" for t, c in line]
            else:
                moved = (
                    requests
                    * keys
                    * heads.kv_heads
                    * (heads.dim + (0 if heads.latent_value else heads.value_dim))
                    * kv_dtype.itemsize
                )
                shown = [f"{t:.1f}us {moved / t / 1e3:.0f}GB/s [{c}]" for t, c in line]
            print(f"{row[0]}: " + " | ".join(shown[:7]) + " ... " + " | ".join(shown[7:]), flush=True)
    if path:
        Path(path).write_text(json.dumps({"machine": describe(), "rows": results}, indent=1))


if __name__ == "__main__":
    if "host" in sys.argv:
        host_times()
    wanted = [a for a in sys.argv[1:] if a in ROWS]
    main(wanted, next((a for a in sys.argv[1:] if a.endswith(".json")), None))
