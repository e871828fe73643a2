"""Eager `fl.attention` beside torch's SDPA on dense tensors, and what a block pattern saves.

    PYTHONPATH=src:. python benchmarks/dense_calls.py [--device cpu] [result.json]

Every call is launched anew, as a model does, so the host counts where it is the slower: `calls` is the time per call of
a row of them, `host` the time until a call returns with the device idle before. Rounds take turns, and results are
checked against each other first. Of a pattern, the given share of all blocks of keys is kept, at random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import flashloom as fl
from flashloom.bench.machine import describe

ROUNDS = 9
HEADS = (32, 8, 128)
# requests, query tokens, key tokens
SHAPES = [(1, 1024, 1024), (4, 1024, 1024), (16, 1024, 1024), (4, 4096, 4096), (8, 1, 1024), (8, 1, 4096)]
SMALL = [(1, 64, 64), (2, 64, 64)]
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(calls: dict[str, Callable[[], object]], device: torch.device, number: int) -> dict[str, dict[str, float]]:
    """Microseconds by name: per call in a row of `number`, and of the host for one call."""
    rows: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(number):
                call()
            wait(device)
            rows[name].append((time.perf_counter() - start) / number * 1e6)
            for _ in range(5):
                wait(device)
                start = time.perf_counter()
                call()
                host[name].append((time.perf_counter() - start) * 1e6)
    return {name: {"calls": statistics.median(rows[name]), "host": statistics.median(host[name])} for name in calls}


def dense(shape: tuple[int, int, int], heads_first: bool, device: torch.device, number: int) -> dict[str, object]:
    requests, tokens, keys = shape
    q_heads, kv_heads, dim = HEADS
    q = torch.randn(requests, q_heads, tokens, dim, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(requests, kv_heads, keys, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    if not heads_first:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    causal = tokens > 1
    variant = fl.causal if causal else fl.full
    calls: dict[str, Callable[[], object]] = {
        "flashloom": lambda: fl.attention(q, k, v, variant=variant),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
    }
    torch.testing.assert_close(calls["flashloom"](), calls["sdpa"](), atol=3e-2, rtol=3e-2)
    order = "heads first" if heads_first else "tokens first"
    return {"requests, queries, keys": shape, "order": order, **timed(calls, device, number)}


def pattern(share: float, tokens: int, device: torch.device, number: int) -> dict[str, object]:
    q_heads, kv_heads, dim = HEADS
    q = torch.randn(tokens, q_heads, dim, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(tokens, kv_heads, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    kept = torch.rand(tokens // 128, tokens // 128) < share
    kept.fill_diagonal_(True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    kv = fl.BlockSparseKV(fl.RaggedKV([tokens]), indptr, kept.nonzero()[:, 1], block_q=128, block_kv=128)
    attn = fl.Attention(fl.HeadShape(*HEADS), dtype=torch.bfloat16, device=device)
    plan = attn.plan(fl.Batch([tokens], kv=kv))
    return {"share": share, "tokens": tokens, **timed({plan.executor: lambda: plan.run(q, (k, v))}, device, number)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("result", nargs="?")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    on_gpu = device.type == "cuda"
    number = 50 if on_gpu else 5
    found = []
    with torch.no_grad():
        for shape in SHAPES if on_gpu else SMALL:
            for heads_first in (True, False):
                found.append(dense(shape, heads_first, device, number))
                print(found[-1], flush=True)
        for share in SHARES if on_gpu else SHARES[:1]:
            found.append(pattern(share, 8192 if on_gpu else 256, device, number if on_gpu else 1))
            print(found[-1], flush=True)
    if asked.result:
        Path(asked.result).write_text(json.dumps({"machine": describe(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
