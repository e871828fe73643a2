"""The Hopper kernel with float8_e4m3fn elements: checked against float64, then timed beside its bfloat16 self.

    PYTHONPATH=src:. python benchmarks/hopper_fp8.py [result.json]

The checks and the timings are processes of their own with a time limit, so that a kernel that hangs costs no more than
that; all of it takes under two minutes on 16 cores, but for a peer that builds its kernels first. Times are medians of
CUDA-graph replays in interleaved rounds; a causal row counts half the operations. `TRIED` are other ways to cut the
kernel, timed on the rows of 4x4096. The Triton kernels, which multiply the same inputs in bfloat16, are timed and
judged too, and so is FlashInfer's fp8 kernel of FlashAttention-3 where it is installed.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from benchmarks import gpu_peers as peers
from benchmarks.gpu_prefill import _graph, _time
from tests.triton.cases import BF16, E4M3, Case, H, alibi, causal, check, gemma, sinks

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.hopper import asked, config
from flashloom.attention.triton_executor import TritonExecutor
from flashloom.target import Target

HEADS, NARROW = H(32, 8, 128), H(16, 16, 64)
LIMIT, BUILDS = 60, 600  # seconds of a step, and what FlashInfer may take beside that to build its kernels once
CHECKS = [
    Case([300, 1000], [300, 1000], HEADS, E4M3, kind="ragged", variant=causal),
    Case([2000] * 3, [2000] * 3, HEADS, E4M3, kind="ragged", scales="head"),
    Case([300, 5, 0, 80], [300, 0, 7, 200], HEADS, E4M3, kind="ragged", variant=causal, scales="one"),
    Case([300, 1000], [300, 1500], HEADS, E4M3, page_size=16, variant=causal, scales="head"),
    Case([300, 100], [333, 1500], HEADS, E4M3, page_size=48, layout="HND", variant=gemma),
    Case([300, 600], [300, 1500], H(8, 2, 64), E4M3, kind="ragged", variant=alibi),
    Case([60, 40], [300, 1500], HEADS, E4M3, page_size=64, variant=sinks),
]
SHAPES = ((4, 4096), (16, 1024), (1, 16384))
ROWS = [(h, name, b, n) for h in (HEADS, NARROW) for b, n in SHAPES for name in ("causal", "full")]
VARIANTS = {"causal": fl.causal, "full": fl.full}
TRIED: dict[str, dict[str, int]] = {
    "216 registers": {"registers": 216, "other_registers": 40},
    "3 stages": {"stages": 3},
    "64 keys": {"block_n": 64, "box": 64},
}


def _jobs() -> list[tuple[Any, ...]]:
    """(spec, mean query, page size, changes; None: the Triton kernels) of all that is checked or timed."""
    jobs = []
    for case in CHECKS:
        program = (case.variant(case, "cpu") if case.variant else fl.full).program
        page = case.page_size if case.kind == "paged" else 0
        jobs.append((case.heads, program, E4M3, -(-sum(case.q_lens) // len(case.q_lens)), page, {}))
    for variant in VARIANTS.values():
        jobs += [(h, variant.program, dtype, 1024, 0, {}) for h in (HEADS, NARROW) for dtype in (E4M3, BF16)]
        jobs += [(h, variant.program, E4M3, 1024, 0, None) for h in (HEADS, NARROW)]
        jobs += [(HEADS, variant.program, E4M3, 1024, 0, changes) for changes in TRIED.values()]
    return jobs


def _compile(number: int) -> float:
    start = time.perf_counter()
    heads, program, dtype, mean, page, changes = _jobs()[number]
    spec = AttentionSpec(heads, program.specialise(heads.dim, heads.value_dim), dtype, dtype)
    if changes is None:
        for kernel in TritonExecutor.kernels(spec, Target("sm90"), mean, mean, page):
            kernel.entry()
        return time.perf_counter() - start
    chosen = replace(asked.choose(spec, mean, page), **changes)
    asked.plan_kernel(spec, chosen, page > 0, Target("sm90")).entry()
    asked.attend_kernel(spec, asked.usual(spec, chosen, page), chosen, page, Target("sm90")).entry()
    return time.perf_counter() - start


def check_all() -> None:
    """Every case against float64; fails at the end if any failed."""
    failed = 0
    for case in CHECKS:
        try:
            print("  ok", *(f"{x:.1e}" for x in check(case, "cuda", "hopper")), case, flush=True)
        except AssertionError as problem:
            failed += 1
            print(f"  WRONG {str(problem)[:300]}", flush=True)
    sys.exit(1 if failed else 0)


def _quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x over a scale per head, in E4M3; the scales)."""
    scale = x.abs().amax((0, 2)).float() / 448
    return (x.float() / scale[:, None]).to(E4M3), scale


def _plan(
    heads: H, variant: str, b: int, n: int, q: Any, kv: Any, changes: dict[str, int], executor: str = "hopper"
) -> tuple[Callable[[], None], Any]:
    saved = config.choose
    config.choose = lambda *a: replace(saved(*a), **changes)
    try:
        with dispatch.only(executor):
            attn = fl.Attention(heads, variant=VARIANTS[variant], dtype=q.dtype, device="cuda")
            plan = attn.plan(fl.Batch([n] * b, kv=fl.RaggedKV([n] * b)))
    finally:
        config.choose = saved
    out = torch.full(q.shape, float("nan"), dtype=BF16, device="cuda")
    replay = _graph(lambda: plan.run(q, kv, out=out))
    return (lambda: (replay(), plan, kv)[0]), out


def _flashinfer(heads: H, variant: str, b: int, n: int, q: Any, k: Any, v: Any, scales: Any) -> Any:
    """(replay, its out) of FlashInfer's kernel, or None."""
    try:
        import flashinfer

        space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        starts = torch.tensor([0, *accumulate([n] * b)], dtype=torch.int32, device="cuda")
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD", backend="fa3")
        wrapper.plan(
            starts, starts, heads.q_heads, heads.kv_heads, heads.dim, causal=variant == "causal", q_data_type=E4M3,
            kv_data_type=E4M3, o_data_type=BF16,
        )  # fmt: skip
        out = wrapper.run(q, k, v, *scales)
        replay = _graph(lambda: wrapper.run(q, k, v, *scales))
        return lambda: (replay(), wrapper, space)[0], out
    except Exception as error:  # a peer that is not there, or cannot do it, is no reason to stop
        print(f"  no flashinfer: {type(error).__name__} {str(error)[:160]}", flush=True)
        return None


def _exact(variant: str, n: int, q: Any, k: Any, v: Any) -> torch.Tensor:
    """The last 128 rows of the first request in float64."""
    group, dim = q.shape[1] // k.shape[1], q.shape[2]
    q, k, v = q[n - 128 : n].double(), *(x[:n].double().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
    if variant == "causal":
        logits = logits.masked_fill(torch.ones(128, n, device="cuda").triu(n - 127).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)


def time_rows(path: str) -> None:
    """Time and judge every row: TFLOP/s, and relative errors against float64."""
    results: list[dict[str, Any]] = []
    about, present = peers.about(), True
    for heads, variant, b, n in ROWS:
        counts = (heads.q_heads, heads.kv_heads, heads.kv_heads)
        q, k, v = (torch.randn(b * n, h, heads.dim, device="cuda", dtype=BF16) for h in counts)
        (q8, q_scale), (k8, k_scale), (v8, v_scale) = (_quantised(x) for x in (q, k, v))
        # the kernel has no scale of queries: they are used as they are, and the keys' scale is that of the group's
        one = q_scale.max()
        q8 = (q.float() / one).to(E4M3)
        kv = (k8, v8, k_scale * one, v_scale)
        calls, outs = {}, {}
        calls["bfloat16"], outs["bfloat16"] = _plan(heads, variant, b, n, q, (k, v), {})
        calls["e4m3"], outs["e4m3"] = _plan(heads, variant, b, n, q8, kv, {})
        calls["triton"], outs["triton"] = _plan(heads, variant, b, n, q8, kv, {}, "triton")
        for name, changes in TRIED.items() if n == 4096 and heads == HEADS else ():
            calls[name], outs[name] = _plan(heads, variant, b, n, q8, kv, changes)
        scales = (one.repeat(heads.q_heads), k_scale, v_scale)
        peer = _flashinfer(heads, variant, b, n, q8, k8, v8, scales) if present else None
        present = peer is not None
        if peer is not None:
            calls["flashinfer"], outs["flashinfer"] = peer
        samples = _time(calls)
        inputs = _exact(
            variant, n, q8.double() * one, k8.double() * k_scale[:, None], v8.double() * v_scale[:, None]
        )  # fmt: skip
        whole = _exact(variant, n, q, k, v)
        entry: dict[str, Any] = {"row": f"{variant} {b}x{n} {heads.q_heads}/{heads.kv_heads}x{heads.dim}"}
        entry["e4m3 inputs in float64"] = float((inputs - whole).norm() / whole.norm())
        flops = 4 * heads.q_heads * heads.dim * b * n * n / (2 if variant == "causal" else 1)
        for name, taken in samples.items():
            middle, quarter = statistics.median(taken), statistics.quantiles(taken, n=4)
            entry[name] = {"tflops": flops / middle * 1e-12, "spread": (quarter[2] - quarter[0]) / middle}
            if name in outs:
                assert not outs[name].isnan().any(), (name, entry["row"])
                got = outs[name][n - 128 : n].double()
                entry[name]["error"] = float((got - whole).norm() / whole.norm())
                if name != "bfloat16":
                    entry[name]["error of arithmetic"] = float((got - inputs).norm() / inputs.norm())
        entry["e4m3 to bfloat16"] = entry["e4m3"]["tflops"] / entry["bfloat16"]["tflops"]
        results.append(entry)
        Path(path).write_text(json.dumps({"machine": about, "rows": results}, indent=1))
        print(json.dumps(entry, default=str), flush=True)


def main() -> None:
    path, start = sys.argv[1] if len(sys.argv) > 1 else "hopper_fp8.json", time.perf_counter()
    with ProcessPoolExecutor(15, multiprocessing.get_context("fork")) as pool:
        print(len(list(pool.map(_compile, range(len(_jobs()))))), "kernels compiled", flush=True)
    for step, limit in ((["--check"], LIMIT), (["--rows", path], LIMIT + BUILDS * peers.FLASHINFER)):
        done = subprocess.run([sys.executable, __file__, *step], timeout=limit, check=False)
        print(f"{step[0]}: exit {done.returncode}, {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode:
            sys.exit(1)


if __name__ == "__main__":
    if "--check" in sys.argv:
        check_all()
    elif "--rows" in sys.argv:
        time_rows(sys.argv[-1])
    else:
        main()
