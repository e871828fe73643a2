"""Attention on one GPU beside its peers: CUDA-graph replays, interleaved; then what the calls cost the host.

    PYTHONPATH=src:. python benchmarks/gpu_attention.py benchmarks/results/gpu_attention.json [KIND...]

KV sets rotate through 1.2 GB or more, pages are permuted. Peers are those of `gpu_peers.py`: torch SDPA over dense KV
(it gathers no pages), FlexAttention compiled, FlashInfer and FlashAttention-4 over the same pages where they are
installed. What each computes is compared with flashloom's output first; a peer that fails, differs or takes too long
to set up is left out of the row, which says why. Every figure is the median of 11 interleaved rounds of about 6 ms.
KIND: decode, skewed, variants, prefill, fp8, host; all of them by default.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from benchmarks import gpu_peers as peers

import flashloom as fl
from flashloom import dispatch
from flashloom.bench.cases import CASES

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
G, M = fl.HeadShape(32, 8, 128), fl.HeadShape(32, 32, 128)
ROUNDS, ROUND = 11, 6e-3  # seconds
BOUND = {BF16: 2e-2, E4M3: 1e-1}  # relative, by the dtype of keys and values: some peers round to it again
UNIT = "microseconds per call, median and range of CUDA-graph replays; error: relative, against flashloom"
SKEWED = {
    "1x65536 + 15x1024": [65536] + [1024] * 15,
    "1x32768 + 63x512": [32768] + [512] * 63,
    "4x16384 + 60x1024": [16384] * 4 + [1024] * 60,
}
KINDS = ("decode", "skewed", "variants", "prefill", "fp8", "host")
FLEX_CASES = ("causal", "window 256", "soft cap", "ALiBi")


def record(calls, count):
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for i in range(count):
            calls[i % len(calls)]()
    return recorded


def elapsed(recorded):
    """Seconds that one replay takes on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    recorded.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def graph(calls):
    """(graph, number of calls in it, the calls, which it needs alive): goes through `calls` for about ROUND seconds."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    few = min(len(calls), 8)
    short = record(calls, few)
    elapsed(short)
    once = max(elapsed(short) / few, 1e-6)
    count = max(2, min(1024, round(ROUND / once)))
    if count > len(calls):
        count -= count % len(calls)  # every set as often
    return record(calls, count), count, calls


def compare(graphs):
    """name -> (median, lowest, highest) microseconds per call, taking turns."""
    samples = {name: [] for name in graphs}
    for i in range(ROUNDS + 1):
        for name, (recorded, count, _) in graphs.items():
            taken = elapsed(recorded) * 1e6 / count
            if i:
                samples[name].append(taken)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in samples.items()}


def pages_of(lens, page):
    """(block table, page numbers in the order of the table's entries in use) of permuted pages."""
    used = [-(-n // page) for n in lens]
    table, order, start = torch.zeros(len(lens), max(used), dtype=torch.int32), torch.randperm(sum(used)).int(), 0
    for b, need in enumerate(used):
        table[b, :need] = order[start : start + need]
        start += need
    return table, order


def own_decode(heads, lens, variant, kv_dtype, table, page):
    kv = fl.PageTable.from_block_table(
        table.cuda(), torch.tensor(lens, dtype=torch.int32, device="cuda"), page_size=page
    )
    attention = fl.Attention(heads, variant=variant, dtype=BF16, kv_dtype=kv_dtype, device="cuda")
    return attention.plan(fl.Batch.decode(kv))


def sets_of(pool, shape, kv_dtype):
    """As many (k, v) of this shape as keep any cache from holding them."""
    size, store = math.prod(shape), pool.view(kv_dtype)
    number = max(1, min(store.numel() // (2 * size), 64, -(-int(1.2e9) // (2 * size * kv_dtype.itemsize))))
    halves = [store[i * size : (i + 1) * size].view(shape) for i in range(2 * number)]
    return list(zip(halves[::2], halves[1::2], strict=True))


def in_order(pair, order, form):
    """The pages of a pair gathered into dense keys and values [batch, heads, tokens, dim]."""
    return tuple(x[order.cuda().long()].view(form).transpose(1, 2) for x in pair)


def decode(heads, lens, kv_dtype, pool, page=16):
    """(own calls, peers) for one query token per request; those over dense KV only where all lengths agree."""
    table, order = pages_of(lens, page)
    plan = own_decode(heads, lens, fl.causal, kv_dtype, table, page)
    q = torch.randn(len(lens), heads.q_heads, heads.dim, device="cuda", dtype=BF16)
    out = torch.empty_like(q)
    sets = sets_of(pool, (order.numel(), page, heads.kv_heads, heads.dim), kv_dtype)
    own = {"flashloom": [lambda s=s: plan.run(q, s, out=out) for s in sets]}
    found = peers.flashinfer_decode(heads, lens, kv_dtype, q, torch.empty_like(q), sets, order, page)
    if kv_dtype == BF16:
        found |= peers.fa4(heads, [1] * len(lens), lens, True, q, sets, order, page)
    if len(set(lens)) == 1 and kv_dtype == BF16 and lens[0] % page == 0:
        form = (len(lens), lens[0], heads.kv_heads, heads.dim)
        pairs = [tuple(x.view(form).transpose(1, 2) for x in pair) for pair in sets]
        first = in_order(sets[0], order, form)
        dense = peers.sdpa(q.view(len(lens), heads.q_heads, 1, heads.dim), pairs, in_order=first)
        found |= {f"{name} (dense)": make for name, make in dense.items()}
    return own, found


def prefill(heads, batch, n, case, only_flex=False):
    """(own calls, peers) for requests of n tokens each."""
    q = torch.randn(batch, n, heads.q_heads, heads.dim, device="cuda", dtype=BF16)
    k, v = torch.randn(2, batch, n, heads.kv_heads, heads.dim, device="cuda", dtype=BF16)
    lens = torch.full((batch,), n, dtype=torch.int32, device="cuda")
    layout = fl.Batch(q_lens=lens, kv=fl.RaggedKV(lens), max_q_len=n, tokens=batch * n)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out = torch.empty_like(flat[0])
    variant = on_gpu(case, heads)
    attention = fl.Attention(heads, variant=variant, dtype=BF16, device="cuda")
    with dispatch.only("triton"):
        plans = {"flashloom": attention.plan(layout)}
    best = attention.plan(layout)
    if best.executor != "triton":
        plans = {"flashloom": best, "flashloom triton": plans["flashloom"]}
    own = {name: [lambda plan=p: plan.run(flat[0], (flat[1], flat[2]), out=out)] for name, p in plans.items()}
    q4, k4, v4 = (x.transpose(1, 2) for x in (q, k, v))
    if only_flex:
        return own, peers.flex(q4, [(k4, v4)], case, heads)
    causal = case.mask_mod is not None
    found = peers.flashinfer_prefill(heads, batch, n, causal, *flat, torch.empty_like(out))
    found |= peers.fa4(heads, [n] * batch, [n] * batch, causal, flat[0], [(flat[1], flat[2])])
    return own, found | peers.sdpa(q4, [(k4, v4)], causal)


def on_gpu(case, heads):
    """The case's variant with its tensors on the GPU."""
    with torch.device("cuda"):
        return case.variant(heads.q_heads)


def decode_variant(heads, batch, n, case, pool, page=16):
    """(own calls, peers): a variant over pages, and FlexAttention over dense KV."""
    table, order = pages_of([n] * batch, page)
    plan = own_decode(heads, [n] * batch, on_gpu(case, heads), BF16, table, page)
    q = torch.randn(batch, heads.q_heads, heads.dim, device="cuda", dtype=BF16)
    out = torch.empty_like(q)
    sets = sets_of(pool, (order.numel(), page, heads.kv_heads, heads.dim), BF16)
    form = (batch, n, heads.kv_heads, heads.dim)
    pairs = [tuple(x.view(form).transpose(1, 2) for x in pair) for pair in sets]
    own = {"flashloom": [lambda s=s: plan.run(q, s, out=out) for s in sets]}
    first = in_order(sets[0], order, form)
    return own, peers.flex(q.view(batch, heads.q_heads, 1, heads.dim), pairs, case, heads, first)


def host_times(pool):
    """Microseconds of host time per call, none of them waited for: the median of 15 rounds of 100."""
    lens, page, q = [1024] * 16, 16, torch.randn(16, 32, 128, device="cuda", dtype=BF16)
    table, order = pages_of(lens, page)
    plan, out = own_decode(G, lens, fl.causal, BF16, table, page), torch.empty_like(q)
    cache = fl.PagedKVCache(layers=2, pages=order.numel(), page_size=page, heads=G, dtype=BF16, device="cuda")
    pair, device_batch = (cache[1].k, cache[1].v), plan.batch
    kv = fl.PageTable.from_block_table(table, lens, page_size=page)
    on_host = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(fl.Batch.decode(kv))
    layers = [cache[0], cache[1]]
    lens_host = torch.tensor(lens, dtype=torch.int32)

    def new_batch():
        on_host.update(fl.Batch.decode(fl.PageTable.from_block_table(table, lens_host, page_size=page)))

    calls = {
        "run(q, cache[i], out=)": lambda: plan.run(q, layers[0], out=out),
        "run(q, (k, v), out=)": lambda: plan.run(q, pair, out=out),
        "run(q, cache[i])": lambda: plan.run(q, layers[1]),
        "run(q, cache[i], out=), layer by layer": lambda: [plan.run(q, layer, out=out) for layer in layers],
        "update(batch), on the device": lambda: plan.update(device_batch),
        "update(batch), on the host": lambda: on_host.update(kv_batch),
        "new table, new batch and update, on the host": new_batch,
    }
    kv_batch = on_host.batch
    rows = {}
    for name, call in calls.items():
        for _ in range(50):
            call()
        torch.cuda.synchronize()
        rounds = []
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(100):
                call()
            rounds.append((time.perf_counter() - start) * 1e4)
            torch.cuda.synchronize()
        share = 2 if "layer by layer" in name else 1
        rows[name] = {"median": statistics.median(rounds) / share, "low": min(rounds) / share}
        print(f"host {name}: {rows[name]['median']:.1f} us (lowest {rows[name]['low']:.1f})", flush=True)
    return rows


def measure(path, kinds, resume):
    torch.manual_seed(0)
    path = Path(path)
    result = {"machine": peers.about(), "rounds": ROUNDS, "unit": UNIT}
    result |= {"left_out": {}, "set_up_s": {}, "rows": [], "host": {}}
    if resume:
        result |= {name: x for name, x in json.loads(path.read_text()).items() if name in ("left_out", "rows", "host")}
    rows, done = result["rows"], {(r["kind"], r["row"]) for r in result["rows"]}

    def save():
        path.write_text(json.dumps(result, indent=1) + "\n")

    set_up = peers.SetUp(result["left_out"], save, graph)
    result["set_up_s"] = set_up.seconds
    pool = torch.empty(4_400_000_000, dtype=torch.uint8, device="cuda")

    def row(kind, name, make, moved=0, work=0, bound=BOUND[BF16]):
        if (kind, name) in done:
            return
        own, found = make()
        expected = own["flashloom"][0]().clone()
        graphs = {n: graph(calls) for n, calls in own.items()}
        errors = {n: peers.relative_error(calls[0](), expected) for n, calls in own.items() if n != "flashloom"}
        left_out = {}
        for n, maker in found.items():
            got = set_up(n, maker, expected, bound)
            if isinstance(got, str):
                left_out[n] = got
                print(f"  {n}: {got}", flush=True)
            else:
                graphs[n], errors[n] = got
        times = compare(graphs)
        first = times["flashloom"][0]
        rate = f"{moved / first / 1e3:.0f} GB/s" if moved else f"{work / first / 1e6:.0f} TFLOP/s"
        shown = ", ".join(f"{n} {t[0]:.1f} ({t[1]:.1f}-{t[2]:.1f})" for n, t in times.items())
        print(f"{kind} {name}: {rate}; {shown}", flush=True)
        micros = {n: {"median": t[0], "low": t[1], "high": t[2]} for n, t in times.items()}
        for n, error in errors.items():
            micros[n]["error"] = error
        entry = {"kind": kind, "row": name, "bytes": moved, "flops": work, "us": micros}
        rows.append(entry | ({"left_out": left_out} if left_out else {}))
        save()

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

    if "host" in kinds and not result["host"]:
        result["host"] = host_times(pool)
        save()
    fill(BF16)
    table = [(G, b, n) for b in (1, 16, 64, 128) for n in (1024, 4096, 16384)]
    table += [(M, b, n) for b in (1, 64) for n in (1024, 4096, 16384)]
    for heads, b, n in table if "decode" in kinds else ():
        moved = b * n * heads.kv_heads * heads.dim * 4
        if moved <= pool.numel():
            name = f"{heads.q_heads}/{heads.kv_heads} batch {b} kv {n}"
            row("decode", name, partial(decode, heads, [n] * b, BF16, pool), moved)
    for name, lens in SKEWED.items() if "skewed" in kinds else ():
        row("skewed decode 32/8", name, partial(decode, G, lens, BF16, pool), sum(lens) * G.kv_heads * G.dim * 4)
    for case, batch, n in (("full", 4, 4096), ("causal", 4, 4096), ("causal", 16, 1024), ("causal", 1, 16384)):
        if "prefill" in kinds:
            work = 4 * batch * n * n * G.q_heads * G.dim // (2 if case == "causal" else 1)
            row("prefill 32/8", f"{case} {batch}x{n}", partial(prefill, G, batch, n, CASES[case]), 0, work)
    for name in FLEX_CASES if "variants" in kinds else ():
        moved = 16 * (256 if "window" in name else 4096) * G.kv_heads * G.dim * 4
        row("decode 32/8 batch 16 kv 4096", name, partial(decode_variant, G, 16, 4096, CASES[name], pool), moved)
        work = 4 * 4 * 4096 * (256 if "window" in name else 2048) * G.q_heads * G.dim
        row("prefill 32/8 4x4096", name, partial(prefill, G, 4, 4096, CASES[name], only_flex=True), 0, work)
    if "fp8" in kinds:
        fill(E4M3)
    for b, n in ((1, 4096), (16, 1024), (16, 4096), (64, 4096), (128, 4096)) if "fp8" in kinds else ():
        moved = b * n * G.kv_heads * G.dim * 2
        row("fp8 decode 32/8", f"batch {b} kv {n}", partial(decode, G, [n] * b, E4M3, pool), moved, bound=BOUND[E4M3])
    save()


if __name__ == "__main__":
    if "--rows" in sys.argv:
        path, *kinds = [x for x in sys.argv[1:] if not x.startswith("--")]
        measure(path, kinds, "--resume" in sys.argv)
    else:
        arguments = sys.argv[1:] if len(sys.argv) > 1 else ["gpu_attention.json"]
        sys.exit(peers.supervise([sys.executable, __file__, "--rows", *arguments[:1], *(arguments[1:] or KINDS)]))
