"""The rows that `flashloom bench attention` can measure, by suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import flashloom as fl
from flashloom.bench.attention import Options, prepare, time_case, time_together
from flashloom.bench.cases import CASES
from flashloom.bench.host import compile_rows, flex_compile_row, overhead_rows
from flashloom.bench.report import Row
from flashloom.bench.workloads import Workload, decode, prefill

LLAMA = fl.HeadShape(32, 8, 128)
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Task:
    """Some rows to be measured, and what to call them meanwhile."""

    title: str
    run: Callable[[], list[Row]]


def tasks(suites: Sequence[str], *, full: bool = False, rounds: int = 15, device: str = "cpu") -> list[Task]:
    """The tasks of the suites, in order. `full`: all shapes, and FlexAttention wherever it runs.

    Raises ValueError for a suite that is not known.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown:
        raise ValueError(f"suite {unknown[0]!r} is not known: use {', '.join(SUITES)}")
    return [task for name in suites for task in SUITES[name](full, Options(rounds, device=device))]


def _timed(suite: str, case: str, workload: Workload, dtype: torch.dtype, options: Options, **more: object) -> Task:
    title = f"{suite}: {case}, {workload.name}"
    return Task(title, lambda: [time_case(CASES[case], workload, dtype, options, suite=suite, **more)])


def _prefill(full: bool, options: Options) -> list[Task]:
    options = replace(options, against=("sdpa", "flex") if full else ("sdpa",))
    lengths = (1024, 2048, 4096)
    bf16 = [_timed("prefill", c, prefill(LLAMA, s), BF16, options) for c in ("full", "causal") for s in lengths]
    f32 = [_timed("prefill", c, prefill(LLAMA, 1024), F32, options) for c in ("full", "causal")]
    return bf16 + f32


def _decode(full: bool, options: Options) -> list[Task]:
    options = replace(options, against=("sdpa", "matmul", "flex") if full else ("sdpa", "matmul"))
    shapes = [(b, kv) for b in (1, 8, 32) for kv in (1024, 4096, 16384)]
    bf16 = [_timed("decode", "causal", decode(LLAMA, b, kv), BF16, options) for b, kv in shapes]
    small = [(b, kv) for b, kv in shapes if b * kv <= 8 * 4096]
    return bf16 + [_timed("decode", "causal", decode(LLAMA, b, kv), F32, options) for b, kv in small]


def _together(suite: str, title: str, base: str, asked: Sequence[tuple], options: Options) -> Task:
    """One task for several calls that are compared with each other: (case, workload, dtype of the keys and values)."""

    def run() -> list[Row]:
        ready = [prepare(CASES[c], w, BF16, options, kv_dtype=kind, suite=suite) for c, w, kind in asked]
        return time_together(ready, options, base=base)

    return Task(f"{suite}: {title}", run)


def _variants(full: bool, options: Options) -> list[Task]:
    """Against compiled FlexAttention, whose compiling takes most of the time; the cost of hooks beside plain causal
    attention; and a narrow window in a long context."""
    heads, flex, alone = fl.HeadShape(8, 2, 128), replace(options, against=("flex",)), replace(options, against=())
    found = [_timed("variants", c, prefill(heads, 1024), BF16, flex) for c in CASES]
    found += [_timed("variants", c, decode(heads, 4, 4096), BF16, flex) for c in CASES]
    names = ("causal", "ALiBi", "soft cap", "window 256")
    shapes = (prefill(LLAMA, 1024), decode(LLAMA, 8, 4096)) if full else (prefill(LLAMA, 1024),)
    hooks = [_together("hooks", w.name, "own causal", [(c, w, None) for c in names], alone) for w in shapes]
    long = [(c, decode(LLAMA, 1, 16384), None) for c in ("full", "window 256")]
    return [*found, *hooks, _together("hooks", "a window at 16k", "own full", long, alone)]


def _dtypes(full: bool, options: Options) -> list[Task]:
    """Eight-bit keys and values beside 16-bit ones, beyond and (full) within the processor's cache."""
    options = replace(options, against=("matmul",))
    shapes = [(32, 4096), (8, 4096), (8, 1024)] if full else [(8, 4096)]
    kinds = (None, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
    return [
        _together(
            "dtypes", f"{b}x{kv}", "own bf16", [("causal", decode(LLAMA, b, kv), kind) for kind in kinds], options
        )
        for b, kv in shapes
    ]


def _overhead(full: bool, options: Options) -> list[Task]:
    return [Task("overhead: calls on the host", lambda: overhead_rows(options.rounds))]


def _compile(full: bool, options: Options) -> list[Task]:
    own = [
        Task(
            "compile: flashloom, new processes",
            lambda: compile_rows(options.rounds if full else min(options.rounds, 5)),
        )
    ]
    return own + ([Task("compile: FlexAttention", lambda: [flex_compile_row()])] if full else [])


SUITES: dict[str, Callable[[bool, Options], list[Task]]] = {
    "prefill": _prefill,
    "decode": _decode,
    "variants": _variants,
    "dtypes": _dtypes,
    "overhead": _overhead,
    "compile": _compile,
}
