"""One attention call timed against its peers: same numbers, interleaved rounds, errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import flashloom as fl
from flashloom import store
from flashloom.bench import ceilings
from flashloom.bench.cases import CASES, Case, exact, sampled_rows
from flashloom.bench.machine import Load
from flashloom.bench.peers import PEERS, Unable
from flashloom.bench.report import OWN, Report, Row
from flashloom.bench.timing import Timing, interleave
from flashloom.bench.workloads import Workload
from flashloom.kernel import NoCompiler

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
KV_DTYPES = {torch.float8_e4m3fn: "fp8 e4m3", torch.float8_e5m2: "fp8 e5m2", torch.int8: "int8"}


@dataclass(frozen=True)
class Options:
    """How to time: interleaved rounds, seconds per sample, the peers' names ("sdpa", "matmul", "flex", "sdpa + mask")
    and the device."""

    rounds: int = 15
    sample_time: float = 2e-3
    against: tuple[str, ...] = ("sdpa", "matmul")
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [name for name in self.against if name not in PEERS]
        if unknown:
            raise ValueError(f"against={unknown[0]!r} is not known: use {', '.join(PEERS)}")


def inputs(workload: Workload, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [tokens, q_heads, dim], k [kv tokens, kv_heads, dim] and v [kv tokens, kv_heads, value_dim]."""
    generator, heads, keys = torch.Generator().manual_seed(seed), workload.heads, sum(workload.kv_lens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return (
        normal(workload.tokens, heads.q_heads, heads.dim),
        normal(keys, heads.kv_heads, heads.dim),
        normal(keys, heads.kv_heads, heads.value_dim),
    )


def pages_of(workload: Workload, seed: int = 0) -> tuple[fl.Batch, Tensor]:
    """The batch over randomly permuted pages, and each key token's slot in the cache, int64 [kv tokens]."""
    size = workload.page_size
    assert size is not None
    counts = [-(-kv // size) for kv in workload.kv_lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).int()
    indptr = torch.tensor([0, *counts]).cumsum(0).int()
    last = [kv - (count - 1) * size for kv, count in zip(workload.kv_lens, counts)]
    table = fl.PageTable.from_csr(indptr, order, last, page_size=size)
    slots = torch.cat([
        (order[a:b].long()[:, None] * size + torch.arange(size)).flatten()[:kv]
        for a, b, kv in zip(indptr.tolist(), indptr.tolist()[1:], workload.kv_lens)
    ])  # fmt: skip
    return fl.Batch(q_lens=list(workload.q_lens), kv=table), slots


def arrange(workload: Workload, k: Tensor, v: Tensor) -> tuple[fl.Batch, Tensor, Tensor]:
    """The batch, and k and v as the workload stores them: pages [pages, page_size, kv_heads, dim], or as they are
    when ragged."""
    if workload.page_size is None:
        return fl.Batch(q_lens=list(workload.q_lens), kv=fl.RaggedKV(list(workload.kv_lens))), k, v
    batch, slots = pages_of(workload)
    shape = (len(batch.pages) * workload.page_size, workload.heads.kv_heads)
    stored = []
    for x in (k, v):
        pages = torch.zeros(*shape, x.shape[-1], dtype=x.dtype, device=x.device)
        pages[slots.to(x.device)] = x
        stored.append(pages.unflatten(0, (-1, workload.page_size)))
    return batch, stored[0], stored[1]


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in `dtype` and its scale, float32 [1], so that x is about the stored value times the scale."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (x.abs().amax().float() / largest).reshape(1)
    y = x.float() / scale
    return (y.round().clamp(-127, 127) if dtype == torch.int8 else y).to(dtype), scale


@dataclass
class Prepared:
    """A call of flashloom that is right and ready to be timed, with its peers and ceilings by name.

    limit: (name, call, bytes or flops of the call, as work's unit counts them). work: what flashloom's call does.
    left_out: peers that failed, and why.
    """

    suite: str
    name: str
    dtype: str
    call: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    limit: tuple[str, Callable[[], object], float] | None
    work: tuple[float, str]
    errors: dict[str, float]
    compile_s: float | None
    left_out: dict[str, str] = field(default_factory=dict)

    def row(self, own: Timing, peers: dict[str, Timing], limit: Timing | None) -> Row:
        limits = {self.limit[0]: (self.limit[2], limit)} if self.limit and limit else {}
        times = {OWN: own, **peers}
        done = (times, self.errors, self.compile_s, self.work, limits, self.left_out)
        return Row(self.suite, self.name, self.dtype, *done)


def prepare(
    case: Case,
    workload: Workload,
    dtype: torch.dtype,
    options: Options,
    *,
    kv_dtype: torch.dtype | None = None,
    suite: str = "attention",
    attention: fl.Attention | None = None,
) -> Prepared:
    """Plan and run once, and compare flashloom and the peers that can express the case with float64.

    Raises:
        ArithmeticError: when flashloom's output is further from float64 than its dtype explains; a wrong kernel has
        no speed.
    """
    on_host = inputs(workload, dtype)
    q, k, v = (x.to(options.device) for x in on_host)
    stored_k, stored_v = k, v
    scales: tuple[Tensor, ...] = ()
    if kv_dtype is not None:
        (stored_k, k_scale), (stored_v, v_scale) = quantise(k, kv_dtype), quantise(v, kv_dtype)
        scales = (k_scale, v_scale)
    batch, kc, vc = arrange(workload, stored_k, stored_v)
    if attention is None:
        variant = case.variant(workload.heads.q_heads)
        attention = fl.Attention(workload.heads, variant=variant, dtype=dtype, kv_dtype=kv_dtype, device=options.device)
    before = store.counters().build_seconds
    plan = attention.plan(batch)
    built = store.counters().build_seconds - before
    out = torch.empty(workload.tokens, workload.heads.q_heads, workload.heads.value_dim, dtype=dtype, device=q.device)
    kv = (kc, vc, *scales)
    plan.run(q, kv, out=out)

    made: dict[str, Callable[[], object]] = {}
    outputs, left_out = {OWN: out}, {}
    for peer in options.against:
        try:
            pair = PEERS[peer](case, workload, q, k, v)
            if pair is not None:
                outputs[peer] = pair[1](pair[0]())
                made[peer] = pair[0]
        except RuntimeError as error:  # no compiler, no memory: the others are still worth their time
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            left_out[peer] = why if isinstance(error, Unable) else f"{peer} failed: {why}"
    rows = sampled_rows(workload)
    wanted = exact(case, workload, *on_host, rows)
    errors = {peer: float((o.cpu()[rows].double() - wanted).abs().max()) for peer, o in outputs.items()}
    allowed = _tolerance(dtype, kv_dtype)
    if not errors[OWN] <= allowed:
        raise ArithmeticError(
            f"{case.name}, {workload.name}: the error against float64 is {errors[OWN]:.1e}, above {allowed:.0e}"
        )
    if workload.phase == "decode":
        work = (workload.kv_bytes(kv_dtype or dtype, case.window) / 1e9, "GB")
    else:
        work = (workload.flops(case.causal, case.window) / 1e12, "TFLOP")
    heads = f"{workload.heads.q_heads}/{workload.heads.kv_heads}x{workload.heads.dim}"
    return Prepared(
        suite,
        f"{case.name} {workload.name}, {heads}",
        DTYPES[dtype] if kv_dtype is None else f"{DTYPES[dtype]}, {KV_DTYPES[kv_dtype]} KV",
        lambda: plan.run(q, kv, out=out),
        made,
        _limit(workload, dtype, kc, vc),
        work,
        errors,
        built or None,
        left_out,
    )


def time_together(prepared: Sequence[Prepared], options: Options, *, base: str | None = None) -> list[Row]:
    """Time several calls with their peers and ceilings, all taking turns, and answer a row for each.

    base: a name under which the first call also becomes a peer of the others.
    """
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    for i, p in enumerate(prepared):
        calls |= {(i, OWN): p.call} | {(i, peer): call for peer, call in p.peers.items()}
        calls |= {(i, p.limit[0]): p.limit[1]} if p.limit else {}
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else None
    times = interleave(calls, rounds=options.rounds, sample_time=options.sample_time, synchronize=wait)
    rows = []
    for i, p in enumerate(prepared):
        peers = {peer: times[i, peer] for peer in p.peers}
        if base is not None and i:
            peers[base] = times[0, OWN]
        rows.append(p.row(times[i, OWN], peers, times[i, p.limit[0]] if p.limit else None))
    return rows


def time_case(case: Case, workload: Workload, dtype: torch.dtype, options: Options, **more: Any) -> Row:
    """`prepare` with its arguments, and `time_together` of that alone."""
    return time_together([prepare(case, workload, dtype, options, **more)], options)[0]


def bench(
    attention: fl.Attention,
    workloads: Sequence[Workload],
    against: Sequence[str] = ("sdpa", "matmul"),
    *,
    rounds: int = 15,
) -> Report:
    """Time an Attention on workloads of its own head shape.

    Args:
        against: peers by name: "sdpa", "matmul" (decode), "flex" (compiled FlexAttention), "sdpa + mask". A peer that
            cannot express the variant is left out of the row; peers know the variants of flashloom.bench.cases.

    Raises:
        ValueError: for an unknown peer, no workload, a workload of another head shape, or a variant that cases.py
        does not define.
    """
    options = Options(rounds=rounds, against=tuple(against), device=str(attention.device))
    if not workloads:
        raise ValueError("workloads is empty: pass fl.workloads(model) or Workload(...)")
    case = _case_of(attention)
    for w in workloads:
        if w.heads != attention.heads:
            raise ValueError(f"{w.name} has heads {w.heads} but the Attention has {attention.heads}: make them equal")
    since = Load.now()
    rows = [time_case(case, w, attention.dtype, options, attention=attention) for w in workloads]
    return Report(rows, others=since.others(Load.now()) if since else None)


def _case_of(attention: fl.Attention) -> Case:
    digest = attention.variant.program.digest
    for case in CASES.values():
        if case.variant(attention.heads.q_heads).program.digest == digest:
            return case
    raise ValueError(
        f"bench knows {', '.join(CASES)} but not {attention.variant}: use time_case with a Case of its own"
    )


def _limit(
    workload: Workload, dtype: torch.dtype, k: Tensor, v: Tensor
) -> tuple[str, Callable[[], object], float] | None:
    """What bounds this workload on a CPU: reading the cache, in GB, or the matrix unit, in TFLOP."""
    if k.device.type != "cpu":
        return None
    if workload.phase != "decode":
        call, flops = ceilings.matmul(dtype)
        return ("matmul peak", call, flops / 1e12)
    try:
        read, size = ceilings.reader(k, v)
    except NoCompiler:
        return None
    return ("reading", read, size / 1e9) if size else None


def _tolerance(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> float:
    """Largest absolute error of an output that is an average of standard normal values."""
    if kv_dtype is not None:
        return 0.3
    return {torch.float32: 2e-5, torch.float16: 1e-2}.get(dtype, 5e-2)
