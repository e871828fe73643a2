"""The Hopper kernel on a GPU: checked against float64, then timed beside torch's SDPA and, where they are installed,
FlashInfer and FlashAttention-4, whose outputs are compared with ours first.

    PYTHONPATH=src:. python benchmarks/gpu_prefill.py [result.json [--time]]

--time: even if a check failed. Each step is a process of its own with a time limit, so that a kernel that hangs costs
no more than that. Inputs are drawn anew; outputs and whatever must not be read start as NaN. Times are medians of
CUDA-graph replays in interleaved rounds; a causal row counts half the operations.
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
from functools import partial
from pathlib import Path

import torch
from benchmarks import flashinfer_prefill
from benchmarks import gpu_peers as peers
from tests.triton.cases import BF16, F16, Case, H, alibi, causal, check, gemma, holes, sinks, window

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.hopper import asked, config
from flashloom.attention.triton_executor import TritonExecutor
from flashloom.target import Target

ROUNDS, LIMIT, BOUND = 11, 150, 2e-2  # seconds, relative error of a peer
Q_STAGES = config.q_stages
G, M = H(32, 8, 128), H(16, 16, 128)


def plain_cap(case, device):
    return fl.causal & fl.softcap(30.0)


CHECKS = {
    "dense and ragged": [
        Case([256], [256], H(4, 4, 128), BF16, kind="dense"),
        Case([128, 128], [128, 128], H(2, 2, 128), BF16, kind="dense", variant=causal),
        Case([300, 1000], [300, 1000], G, BF16, kind="ragged", variant=causal),
        Case([300, 1000], [300, 1000], G, F16, kind="ragged"),
        Case([1, 2, 3, 129, 127, 64, 65, 5], [1, 2, 3, 129, 127, 64, 65, 5], G, BF16, kind="ragged", variant=causal),
        Case([500, 7, 260], [100, 900, 260], G, F16, kind="ragged", variant=causal),
        Case([300, 5, 0, 80], [300, 0, 7, 200], G, BF16, kind="ragged", variant=causal),
        Case([1500, 700], [1500, 2300], M, BF16, kind="dense", variant=causal),
        Case([900], [900], G, BF16, kind="ragged", variant=causal, sm_scale=-0.1),
        Case([2000] * 3, [2000] * 3, G, BF16, kind="ragged", variant=causal),
    ],
    "paged": [
        Case([300, 1000], [300, 1000], G, BF16, page_size=16, variant=causal),
        Case([300, 40, 700], [1300, 2040, 701], G, F16, page_size=8, variant=causal),
        Case([300, 1000], [300, 1500], G, BF16, page_size=64, layout="HND", variant=causal),
        Case([300, 100], [300, 1500], G, BF16, page_size=128, variant=causal),
        Case([300, 100], [300, 1500], G, BF16, page_size=256),
        Case([300, 100], [333, 1500], G, BF16, page_size=48, variant=causal),
        Case([30, 50, 100], [333, 1500, 5000], G, BF16, page_size=16, variant=causal),
        Case([30, 50, 100], [333, 1500, 5000], G, BF16, page_size=16, variant=causal, on_device=True),
        Case([90, 50], [333, 1500], H(24, 4, 128), BF16, page_size=16, variant=causal),
        Case([2048, 1, 1, 1], [2048, 4000, 300, 1], G, BF16, page_size=16, variant=causal),
    ],
    "widths": [
        Case([300, 500], [300, 1000], H(8, 2, 64), BF16, kind="ragged", variant=causal),
        Case([300, 500], [300, 1000], H(8, 2, 64), F16, page_size=16, variant=causal),
        Case([300, 500], [300, 1000], H(8, 2, 256), BF16, kind="ragged", variant=causal),
        Case([30, 50], [300, 1000], H(8, 2, 256), F16, page_size=16, variant=causal),
        Case([300, 500], [300, 1000], H(8, 8, 192, 128), BF16, kind="ragged", variant=causal),
        Case([300, 500], [300, 1000], H(8, 4, 96), BF16, kind="ragged", variant=causal),
        Case([300, 500], [300, 1000], H(8, 4, 80), F16, page_size=16, variant=causal),
        Case([300], [300], H(5, 1, 128), BF16, page_size=16, odd_strides=True, variant=causal),
    ],
    "variants": [
        Case([300, 1000], [300, 1000], G, F16, kind="ragged", variant=window),
        Case([300, 600], [300, 1500], G, BF16, page_size=16, variant=gemma),
        Case([300, 600], [300, 1500], G, BF16, kind="ragged", variant=alibi),
        Case([60, 40], [300, 1500], G, BF16, page_size=16, variant=alibi),
        Case([300, 600], [300, 1500], G, BF16, kind="ragged", variant=sinks),
        Case([60, 40], [300, 1500], G, BF16, kind="ragged", variant=sinks),
        Case([300], [900], G, BF16, kind="ragged", variant=holes),
        Case([300, 600], [300, 1500], G, BF16, kind="ragged", variant=plain_cap),
        Case([300, 600], [300, 1500], G, BF16, kind="ragged", variant=sinks, partial=True),
    ],
}  # fmt: skip

# other ways to run the kernel, timed beside the default one, by the rows they are tried on
TRIED: dict[str, dict[str, dict]] = {
    "64 of 100-8000": {"queries loaded one tile at a time": {"q_stages": 1}},
}
SHAPES = [(16, 1024), (4, 4096), (1, 16384)]


def _row(kind: str, q: list[int], kv: list[int], heads: fl.HeadShape, variant: str, page: int = 0) -> dict:
    same = len(set(q)) == len(set(kv)) == 1
    shape = f"{len(q)}x{q[0]}" + (f" on {kv[0]}" if q != kv else "") if same else kind
    name = f"{variant} {shape} {heads.q_heads}/{heads.kv_heads}x{heads.dim}" + (f" page {page}" if page else "")
    return {"kind": kind, "q": q, "kv": kv, "heads": heads, "variant": variant, "page": page, "name": name}


def _rows() -> list[dict]:
    """What is timed: lengths, heads, variant, page size (0: ragged)."""
    rows = []
    for heads in (G, M):
        for b, s in SHAPES:
            for variant in ("causal", "full"):
                rows.append(_row("prefill", [s] * b, [s] * b, heads, variant))
                if heads == G:
                    rows.append(_row("paged", [s] * b, [s] * b, heads, variant, 16))
    for kind, dim in (("narrow", 64), ("wide", 256)):
        rows += [_row(kind, [4096] * 4, [4096] * 4, H(16, 16, dim), v) for v in ("causal", "full")]
    rows += [_row(v, [4096] * 4, [4096] * 4, G, v) for v in ("alibi", "softcap", "documents")]
    rows += [_row("pages", [4096] * 4, [4096] * 4, G, "causal", page) for page in (1, 4, 8, 64)]
    mixed = [int(x) for x in torch.linspace(100, 8000, 64)]
    rows.append(_row("64 of 100-8000", mixed, mixed, G, "causal"))
    for q, n, kv in ((32, 8, 4096), (16, 32, 2048), (512, 1, 16384), (128, 1, 32768), (2048, 1, 2048), (256, 4, 1024)):
        rows.append(_row("append", [q] * n, [kv] * n, G, "causal", 16))
    for q, n, kv in (
        (1, 16, 4096),
        (1, 64, 1024),
        (1, 64, 4096),
        (1, 128, 4096),
        (4, 16, 4096),
        (4, 64, 4096),
        (16, 64, 1024),
    ):
        rows.append(_row("decode", [q] * n, [kv] * n, G, "causal", 16))
    rows.append(_row("8192 and 32 decodes on 8192", [8192] + [1] * 32, [8192] + [8192] * 32, G, "causal", 16))
    rows.append(_row("2048 and 64 decodes on 4096", [2048] + [1] * 64, [2048] + [4096] * 64, G, "causal", 16))
    return rows


def _variant(name: str, heads: fl.HeadShape, device: str) -> fl.Variant:
    if name == "alibi":
        return fl.alibi(fl.alibi_slopes(heads.q_heads).to(device)) & fl.causal
    if name == "documents":  # of 1000 tokens
        return fl.causal & fl.document_mask((torch.arange(16384, device=device) // 1000).to(torch.int32))
    return {"causal": fl.causal, "full": fl.full, "softcap": fl.causal & fl.softcap(30.0)}[name]


def _compile(number: int) -> float:
    """Compile the kernels of one job into the store; in a process without a GPU context."""
    start = time.perf_counter()
    job = _jobs()[number]
    if len(job) == 2:  # the Triton kernels for comparison
        spec, (longest, mean, page) = job
        for kernel in TritonExecutor.kernels(spec, Target("sm90"), longest, mean, page):
            kernel.entry()
        return time.perf_counter() - start
    heads, dtype, variant, page, negative, mean, changes = job
    program = variant.program.specialise(heads.dim, heads.value_dim)
    spec = AttentionSpec(heads, program, dtype, dtype)
    chosen = asked.choose(spec, mean, page)
    config.q_stages = (lambda *_: changes["q_stages"]) if "q_stages" in changes else Q_STAGES
    chosen = replace(chosen, **{n: x for n, x in changes.items() if n != "q_stages"})
    target = Target("sm90")
    asked.plan_kernel(spec, chosen, page > 0, target).entry()
    form = replace(asked.usual(spec, chosen, page), negative=negative)
    asked.attend_kernel(spec, form, chosen, page, target).entry()
    return time.perf_counter() - start


def _against_triton(row: dict) -> bool:
    return row["kind"] not in ("prefill", "paged", "narrow", "wide")


def _jobs() -> list[tuple]:
    jobs: dict[str, tuple] = {}
    for case in (c for cases in CHECKS.values() for c in cases):
        variant = case.variant(case, "cpu") if case.variant else fl.full
        mean = -(-sum(case.q_lens) // len(case.q_lens))
        page = case.page_size if case.kind == "paged" else 0
        job: tuple = (case.heads, case.dtype, variant, page, (case.sm_scale or 1) < 0, mean, {})
        jobs[f"{job[:2]}{variant.program.digest}{job[3:5]}{mean >= 256}"] = job
    for row in _rows():
        heads, variant, page = row["heads"], _variant(row["variant"], row["heads"], "cpu"), row["page"]
        mean = -(-sum(row["q"]) // len(row["q"]))
        for name, changes in {"": {}, **TRIED.get(row["kind"], {})}.items():
            job = (heads, BF16, variant, page, False, mean, changes)
            jobs[f"{heads}{variant.program.digest}{page}{name}{mean >= 256}"] = job
        if _against_triton(row):
            spec = AttentionSpec(heads, variant.program.specialise(heads.dim, heads.value_dim), BF16, BF16)
            jobs[row["name"]] = (spec, (max(row["q"]), mean, page))
    return list(jobs.values())


def compile_all() -> None:
    """Compile what the checks and timings need, side by side."""
    with ProcessPoolExecutor(15, multiprocessing.get_context("fork")) as pool:
        seconds = list(pool.map(_compile, range(len(_jobs()))))
    print(f"{len(seconds)} kernels compiled, {statistics.median(seconds):.1f} s each", flush=True)


def check_group(name: str) -> None:
    """Run one group of checks; prints a line per case and fails at the end if any failed."""
    torch.cuda.init()
    failed = 0
    for case in CHECKS[name]:
        print(f"  .. {case}", flush=True)
        try:
            error, lse_error = check(case, "cuda", "hopper")
            print(f"  ok {error:.1e} {lse_error:.1e}", flush=True)
        except AssertionError as problem:
            failed += 1
            print(f"  WRONG {str(problem)[:300]}", flush=True)
    sys.exit(1 if failed else 0)


def _graph(call: Callable[[], object]) -> Callable[[], None]:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda: (graph.replay(), call)[0]  # a graph needs alive what its call holds


def _time(calls: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Samples in seconds per call, in interleaved rounds."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(call: Callable[[], None], n: int) -> float:
        start.record()
        for _ in range(n):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / n / 1e3

    counts = {name: max(1, int(8e-3 / sample(call, 2))) for name, call in calls.items()}
    names, samples = list(calls), {name: [] for name in calls}
    for i in range(ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(sample(calls[name], counts[name]))
    return samples


def _plan(row: dict, changes: dict | None = None, executor: str = "hopper"):
    """(replay of a run, its out) of flashloom for a row."""
    heads, page = row["heads"], row["page"]
    q, k, v = row["inputs"]
    saved = config.choose, config.q_stages
    changes = changes or {}
    try:
        if "q_stages" in changes:
            config.q_stages = lambda *_: changes["q_stages"]
        rest = {n: x for n, x in changes.items() if n != "q_stages"}
        config.choose = lambda *a: replace(saved[0](*a), **rest)
        if page:
            needs = [-(-n // page) for n in row["kv"]]
            if "order" not in row:
                shape = (sum(needs), page, heads.kv_heads, heads.dim)
                row["order"] = torch.randperm(sum(needs)).int()
                row["parts"] = tuple(torch.randn(shape, device="cuda", dtype=BF16) for _ in "kv")
            starts, parts = torch.tensor([0, *needs]).cumsum(0).int(), row["parts"]
            kv = fl.PageTable.from_csr(starts, row["order"], [n - (m - 1) * page for n, m in zip(row["kv"], needs)],
                                       page_size=page)  # fmt: skip
        else:
            kv, parts = fl.RaggedKV(row["kv"]), (k, v)
        with dispatch.only(executor):
            attn = fl.Attention(heads, variant=_variant(row["variant"], heads, "cuda"), dtype=BF16, device="cuda")
            plan = attn.plan(fl.Batch(row["q"], kv=kv))
    finally:
        config.choose, config.q_stages = saved
    out = torch.full_like(q, float("nan"))
    replay = _graph(lambda: plan.run(q, parts, out=out))
    return (lambda: (replay(), plan, parts)[0]), out


def _peers(row: dict) -> dict[str, peers.Maker]:
    """What else computes this row, by name."""
    heads, variant, page = row["heads"], row["variant"], row["page"]
    plain, found = variant in ("causal", "full"), {}
    if plain and row["q"] == [row["kv"][0]] * len(row["kv"]) and not page:
        dense = [x.view(len(row["q"]), -1, *x.shape[1:]).transpose(1, 2) for x in row["inputs"]]
        made = peers.sdpa(dense[0], [dense[1:]], variant == "causal")
        found = {name.removeprefix("sdpa "): make for name, make in made.items()}
    names = ["paged" if page else "ragged"] if plain and page in (0, 16) and heads.dim <= 128 else []
    names += ["batch_attention", "pod"] if "decodes" in row["kind"] else []
    for name in names if peers.FLASHINFER else ():
        found[f"flashinfer {name}"] = partial(_flashinfer, name, row)
    if plain or variant == "softcap":
        softcap = 30.0 if variant == "softcap" else 0.0
        parts, order = (row["parts"], row["order"]) if page else (row["inputs"][1:], None)
        lengths = (row["q"], row["kv"], variant != "full")
        found |= peers.fa4(heads, *lengths, row["inputs"][0], [parts], order, page, softcap)
    return found


def _flashinfer(name: str, row: dict) -> tuple[peers.Call, list[peers.Call]]:
    call = getattr(flashinfer_prefill, name)(row)
    return (lambda: torch.cat(call())) if name == "pod" else call, [call]


def time_rows(path: str, resume: bool) -> None:
    """Time every row and print a table; in TFLOP/s."""
    result: dict = {"machine": peers.about(), "rounds": ROUNDS, "left_out": {}, "rows": []}
    if resume:
        saved = json.loads(Path(path).read_text())
        result |= {name: saved[name] for name in ("left_out", "rows")}
    done = {entry["row"] for entry in result["rows"]}

    def save() -> None:
        Path(path).write_text(json.dumps(result, indent=1))

    set_up = peers.SetUp(result["left_out"], save, lambda calls: _graph(calls[0]))
    result["set_up_s"] = set_up.seconds
    for row in _rows():
        if row["name"] in done:
            continue
        heads = row["heads"]
        shapes = [(sum(row["q"]), heads.q_heads, heads.dim), *[(sum(row["kv"]), heads.kv_heads, heads.dim)] * 2]
        row["inputs"] = [torch.randn(shape, device="cuda", dtype=BF16) for shape in shapes]
        calls, outs = {}, {}
        calls["flashloom"], outs["flashloom"] = _plan(row)
        for name, changes in TRIED.get(row["kind"], {}).items():
            calls[name], outs[name] = _plan(row, changes)
        if _against_triton(row):
            calls["triton"], outs["triton"] = _plan(row, executor="triton")
        calls["flashloom"]()
        errors, left_out = {}, {}
        for name, make in _peers(row).items():
            got = set_up(name, make, outs["flashloom"], BOUND)
            if isinstance(got, str):
                left_out[name] = got
                print(f"  {name}: {got}", flush=True)
            else:
                calls[name], errors[name] = got
        samples = _time(calls)
        for name, out in outs.items():
            assert not out.isnan().any(), (name, row["name"])
        pairs = sum(q * kv - (q * q / 2 if row["variant"] != "full" else 0) for q, kv in zip(row["q"], row["kv"]))
        flops = 4 * heads.q_heads * heads.dim * pairs
        entry: dict = {"row": row["name"]}
        for name, taken in samples.items():
            middle = statistics.median(taken)
            quarter = statistics.quantiles(taken, n=4)
            entry[name] = {
                "tflops": flops / middle * 1e-12, "median_s": middle, "spread": (quarter[2] - quarter[0]) / middle,
            }  # fmt: skip
            if name in errors:
                entry[name]["error"] = errors[name]
        print(entry["row"].ljust(40), *(f"{n} {x['tflops']:.0f}" for n, x in entry.items() if n != "row"), flush=True)
        result["rows"].append(entry | ({"left_out": left_out} if left_out else {}))
        save()
        for name in ("inputs", "parts", "order"):
            row.pop(name, None)
        del calls, outs


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else "gpu_prefill.json"
    start = time.perf_counter()
    compile_all()
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    steps = [subprocess.Popen([sys.executable, __file__, "--check", name], stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT) for name in CHECKS]  # fmt: skip
    ok = True
    for name, step in zip(CHECKS, steps):
        try:
            text, _ = step.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            step.kill()
            text = step.communicate()[0] + "\nTIME LIMIT"
        ok = ok and step.returncode == 0
        print(f"{name}: exit {step.returncode}\n{text[-3500:]}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    if ok or "--time" in sys.argv:
        ok = peers.supervise([sys.executable, __file__, "--rows", path], 2 * LIMIT) == 0 and ok
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    if "--check" in sys.argv:
        check_group(sys.argv[-1])
    elif "--rows" in sys.argv:
        time_rows(sys.argv[sys.argv.index("--rows") + 1], "--resume" in sys.argv)
    else:
        main()
