"""The rows that `flashloom bench attention` can measure, by suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

import flashloom as fl
from flashloom.bench.attention import Options, time_case
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
    return Task(title, lambda: [time_case(CASES[case], workload, dtype, options, suite=suite, **more)])  # type: ignore[arg-type]


def _prefill(full: bool, options: Options) -> list[Task]:
    options = replace(options, against=("sdpa", "flex") if full else ("sdpa",))
    lengths = (1024, 2048, 4096) if full else (1024, 2048)
    bf16 = [_timed("prefill", c, prefill(LLAMA, s), BF16, options) for c in ("full", "causal") for s in lengths]
    f32 = [_timed("prefill", c, prefill(LLAMA, 1024), F32, options) for c in ("full", "causal")]
    return bf16 + f32


def _decode(full: bool, options: Options) -> list[Task]:
    options = replace(options, against=("sdpa", "matmul", "flex") if full else ("sdpa", "matmul"))
    shapes = [(b, kv) for b in (1, 8, 32) for kv in (1024, 4096, 16384)] if full else [(1, 4096), (8, 1024), (8, 4096)]
    bf16 = [_timed("decode", "causal", decode(LLAMA, b, kv), BF16, options) for b, kv in shapes]
    small = [(b, kv) for b, kv in shapes if b * kv <= 32 * 4096]
    return bf16 + [_timed("decode", "causal", decode(LLAMA, b, kv), F32, options) for b, kv in small]


def _variants(full: bool, options: Options) -> list[Task]:
    """Against compiled FlexAttention, whose compiling takes most of the time; and a narrow window in a long context."""
    heads, options = fl.HeadShape(8, 2, 128), replace(options, against=("flex",))
    found = [_timed("variants", c, prefill(heads, 1024), BF16, options) for c in CASES]
    if full:
        found += [_timed("variants", c, decode(heads, 4, 4096), BF16, options) for c in CASES]
    alone = replace(options, against=())
    long = [_timed("variants", c, decode(LLAMA, 1, 16384), BF16, alone) for c in ("full", "window 256")]
    return found + long


def _dtypes(full: bool, options: Options) -> list[Task]:
    """Eight-bit keys and values beside 16-bit ones, beyond and (full) within the processor's cache."""
    options = replace(options, against=("matmul",))
    shapes = [(32, 4096), (8, 1024)] if full else [(8, 4096)]
    kinds = (None, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
    return [
        _timed("dtypes", "causal", decode(LLAMA, b, kv), BF16, options, kv_dtype=kind)
        for b, kv in shapes
        for kind in kinds
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
