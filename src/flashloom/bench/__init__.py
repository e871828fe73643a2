"""Timing against peers: workloads, peers, the timing loop and reports."""

from flashloom.bench.attention import Options, bench, time_case
from flashloom.bench.cases import CASES, Case
from flashloom.bench.report import Report, Row
from flashloom.bench.timing import Timing, interleave
from flashloom.bench.workloads import MODELS, Workload, workloads

__all__ = [
    "CASES",
    "MODELS",
    "Case",
    "Options",
    "Report",
    "Row",
    "Timing",
    "Workload",
    "bench",
    "interleave",
    "time_case",
    "workloads",
]
