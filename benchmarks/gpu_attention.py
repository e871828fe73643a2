"""Decode, skewed and prefill attention on one GPU against the peers that torch brings: CUDA-graph replays, interleaved.

    PYTHONPATH=src python benchmarks/gpu_attention.py benchmarks/results/gpu_attention.json

KV sets rotate through 1.2 GB or more, pages are permuted. Peers: torch SDPA over dense KV (the best of its backends
that takes the row; it gathers no pages), FlexAttention compiled. Every figure is the median of 9 interleaved rounds.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import flashloom as fl

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
G, M = fl.HeadShape(32, 8, 128), fl.HeadShape(32, 32, 128)
ROUNDS = 9
SKEWED = {
    "1x65536 + 15x1024": [65536] + [1024] * 15,
    "1x32768 + 63x512": [32768] + [512] * 63,
    "4x16384 + 60x1024": [16384] * 4 + [1024] * 60,
}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def graph(calls):
    """(graph, number of calls in it): a graph that goes through `calls`, long enough to time."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    once = max((time.perf_counter() - start) / 2, 5e-6)
    count = max(2, min(max(len(calls), 40), int(10e-3 / once)))
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for i in range(count):
            calls[i % len(calls)]()
    return recorded, count


def compare(candidates):
    """name -> (median, lowest, highest) microseconds per call, taking turns."""
    graphs = {}
    for name, calls in candidates.items():
        try:
            graphs[name] = graph(calls)
        except Exception as error:
            torch.cuda.synchronize()
            print(f"  {name}: {type(error).__name__} {str(error)[:100]}", flush=True)
    samples = {name: [] for name in graphs}
    for i in range(ROUNDS + 1):
        for name, (recorded, count) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            recorded.replay()
            end.record()
            torch.cuda.synchronize()
            if i:
                samples[name].append(begin.elapsed_time(end) * 1000 / count)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in samples.items()}


def decode(heads, lens, kv_dtype, pool, page=16):
    """Candidates for one query token per request; peers only where all lengths agree."""
    pages = sum(-(-n // page) for n in lens)
    width = max(-(-n // page) for n in lens)
    table, order, start = torch.zeros(len(lens), width, dtype=torch.int32), torch.randperm(pages).int(), 0
    for b, n in enumerate(lens):
        need = -(-n // page)
        table[b, :need] = order[start : start + need]
        start += need
    kv = fl.PageTable.from_block_table(
        table.cuda(), torch.tensor(lens, dtype=torch.int32, device="cuda"), page_size=page
    )
    plan = fl.Attention(heads, variant=fl.causal, dtype=BF16, kv_dtype=kv_dtype, device="cuda").plan(
        fl.Batch.decode(kv)
    )
    q = torch.randn(len(lens), heads.q_heads, heads.dim, device="cuda", dtype=BF16)
    out = torch.empty_like(q)
    shape = (pages, page, heads.kv_heads, heads.dim)
    size, store = math.prod(shape), pool.view(kv_dtype)
    number = max(1, min(store.numel() // (2 * size), 64, -(-int(1.2e9) // (2 * size * kv_dtype.itemsize))))
    halves = [store[i * size : (i + 1) * size] for i in range(2 * number)]
    sets = [(halves[2 * i].view(shape), halves[2 * i + 1].view(shape)) for i in range(number)]
    plan.run(q, sets[0], out=out)
    found = {"flashloom": [lambda s=s: plan.run(q, s, out=out) for s in sets]}
    if len(set(lens)) == 1 and kv_dtype == BF16 and lens[0] % page == 0:
        dense = (len(lens), lens[0], heads.kv_heads, heads.dim)
        q4 = q.view(len(lens), heads.q_heads, 1, heads.dim)
        views = [tuple(x.view(dense).transpose(1, 2) for x in pair) for pair in sets]
        for name, backend in BACKENDS.items():

            def call(k, v, backend=backend):
                with sdpa_kernel(backend):
                    return sdpa(q4, k, v, enable_gqa=True)

            found[f"sdpa {name} (dense)"] = [lambda kv=kv, call=call: call(*kv) for kv in views]
    return found


def prefill(heads, batch, n, causal, flex):
    q = torch.randn(batch, n, heads.q_heads, heads.dim, device="cuda", dtype=BF16)
    k, v = torch.randn(2, batch, n, heads.kv_heads, heads.dim, device="cuda", dtype=BF16)
    lens = torch.full((batch,), n, dtype=torch.int32, device="cuda")
    attn = fl.Attention(heads, variant=fl.causal if causal else fl.full, dtype=BF16, device="cuda")
    plan = attn.plan(fl.Batch(q_lens=lens, kv=fl.RaggedKV(lens), max_q_len=n, tokens=batch * n))
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out = torch.empty_like(flat[0])
    found = {"flashloom": [lambda: plan.run(flat[0], (flat[1], flat[2]), out=out)]}
    q4, k4, v4 = (x.transpose(1, 2) for x in (q, k, v))
    for name, backend in BACKENDS.items():

        def call(backend=backend):
            with sdpa_kernel(backend):
                return sdpa(q4, k4, v4, is_causal=causal, enable_gqa=True)

        found[f"sdpa {name}"] = [call]
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, n, n, device="cuda") if causal else None
        found["flex"] = [lambda: compiled(q4, k4, v4, block_mask=mask, enable_gqa=True)]
    return found


def main(path):
    torch.manual_seed(0)
    pool = torch.empty(4_400_000_000, dtype=torch.uint8, device="cuda")
    rows = []

    def row(kind, name, candidates, moved=0, work=0):
        times = compare(candidates)
        own = times["flashloom"][0]
        rate = f"{moved / own / 1e3:.0f} GB/s" if moved else f"{work / own / 1e6:.0f} TFLOP/s"
        shown = ", ".join(f"{n} {t[0]:.1f} ({t[1]:.1f}-{t[2]:.1f})" for n, t in times.items())
        print(f"{kind} {name}: {rate}; {shown}", flush=True)
        micros = {n: {"median": t[0], "low": t[1], "high": t[2]} for n, t in times.items()}
        rows.append({"kind": kind, "row": name, "bytes": moved, "flops": work, "us": micros})

    def fill(kv_dtype):
        values = pool.view(BF16)
        for i in range(0, values.numel(), 1 << 28):
            values[i : i + (1 << 28)].normal_()
        if kv_dtype == E4M3:
            half = values.numel() // 2
            for i in range(0, half, 1 << 28):  # in place: float8 of the first half, over bytes already read
                end = min(i + (1 << 28), half)
                pool[i:end] = values[i:end].to(E4M3).view(torch.uint8)
            pool[half : 2 * half] = pool[:half]

    fill(BF16)
    table = [(G, b, n) for b in (1, 16, 64, 128) for n in (1024, 4096, 16384)]
    table += [(M, b, n) for b in (1, 64) for n in (1024, 4096, 16384)]
    for heads, b, n in table:
        moved = b * n * heads.kv_heads * heads.dim * 4
        if moved <= pool.numel():
            name = f"{heads.q_heads}/{heads.kv_heads} batch {b} kv {n}"
            row("decode", name, decode(heads, [n] * b, BF16, pool), moved)
    for name, lens in SKEWED.items():
        row("skewed decode 32/8", name, decode(G, lens, BF16, pool), sum(lens) * G.kv_heads * G.dim * 4)
    for causal, batch, n in ((False, 4, 4096), (True, 4, 4096), (True, 16, 1024), (True, 1, 16384)):
        work = 4 * batch * n * n * G.q_heads * G.dim // (2 if causal else 1)
        name = f"{'causal' if causal else 'full'} {batch}x{n}"
        row("prefill 32/8", name, prefill(G, batch, n, causal, n == 4096), 0, work)
    fill(E4M3)
    for b, n in ((1, 4096), (16, 1024), (16, 4096), (64, 4096), (128, 4096)):
        row("fp8 decode 32/8", f"batch {b} kv {n}", decode(G, [n] * b, E4M3, pool), b * n * G.kv_heads * G.dim * 2)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    import triton

    about = {
        "machine": torch.cuda.get_device_name(), "driver": driver, "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "flashloom": "0.1.0", "command": f"PYTHONPATH=src python {' '.join(sys.argv)}", "rounds": ROUNDS,
        "unit": "microseconds per call, median and range of CUDA-graph replays",
    }  # fmt: skip
    Path(path).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "gpu_attention.json")
