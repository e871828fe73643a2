"""`fl.Attention` as the tuner sees it: a case is a Batch (or a Workload of its heads)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from flashloom import dispatch, records
from flashloom.attention import Attention, Batch, Reserve
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.recorded import Fixed
from flashloom.attention.reference import attend_tokens
from flashloom.attention.tuning import Choice, Facts, candidates, question, valid
from flashloom.bench.attention import pages_of
from flashloom.bench.workloads import Workload
from flashloom.errors import FlashloomError
from flashloom.kv_cache import PagedKVCache, PageTable, RaggedKV
from flashloom.kv_cache.cache import KV
from flashloom.records import Question
from flashloom.store.jobs import job_limit
from flashloom.target import Target
from flashloom.variant import Variant
from flashloom.variant.expr import Program

__all__ = ["AttentionOperator", "NothingToTune", "batch_of"]

CHECKED = 8  # query tokens that are compared with the reference in float64; all others with the default's
#: Largest error of a token's result, as a share of its norm, by what holds the least of queries, keys and results.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
TOLERANCE_8_BIT = 6e-2


class NothingToTune(FlashloomError, ValueError):
    """There is one way only to compute this."""


def batch_of(case: Batch | Workload, attention: Attention) -> Batch:
    """A batch as it is, or that of a workload. Raises TypeError for what is neither, ValueError for other heads."""
    if isinstance(case, Batch):
        return case
    if not isinstance(case, Workload):
        raise TypeError(f"{type(case).__name__} cannot be tuned for: give fl.Batch objects or fl.workloads(...)")
    if case.heads != attention.heads:
        raise ValueError(f"{case.name} has heads {case.heads} but the Attention has {attention.heads}: make them equal")
    if case.page_size is None:
        return Batch(q_lens=list(case.q_lens), kv=RaggedKV(list(case.kv_lens)))
    return pages_of(case)[0]


class Inputs:
    """Random queries, keys and values for a batch, and where results go."""

    def __init__(self, attention: Attention, batch: Batch) -> None:
        heads, device = attention.heads, attention.device
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.batch = batch
        rows = int(batch.q_indptr[-1])
        self.q = normal(rows, heads.q_heads, heads.dim).to(attention.dtype)
        out_dtype = attention.spec.out_dtype
        self.out = torch.empty(rows, heads.q_heads, heads.value_dim, dtype=out_dtype, device=device)
        kv_dtype = attention.kv_dtype
        scale = 1 / 32 if kv_dtype == torch.int8 else 1.0 if kv_dtype.itemsize == 1 else None
        page_size = 1 if batch.ragged else batch.page_size
        ends = batch.pages.long() + (batch.kv_lens.long() if batch.ragged else 1)
        pages = max(int(ends.max()) if ends.numel() else 1, 1)
        cache = PagedKVCache(
            1, pages, page_size, heads, kv_dtype, device, layout=attention.layout, k_scale=scale, v_scale=scale
        )
        self.kv: KV = cache[0]
        for x in (self.kv.k, self.kv.v) if not heads.latent_value else (self.kv.k,):
            for page in range(0, pages, 4096):  # random numbers are float32: a few at a time
                part = x[page : page + 4096]
                y = normal(*part.shape) * (32 if kv_dtype == torch.int8 else 1)
                if kv_dtype == torch.int8:
                    y = y.round().clamp(-127, 127)
                part.copy_(y.to(kv_dtype) if kv_dtype.itemsize > 1 or kv_dtype == torch.int8 else y)
        self.expected: torch.Tensor | None = None
        self.tokens: list[int] = []
        self.whole: torch.Tensor | None = None


class AttentionOperator:
    """See `tune.operator.Operator`. Raises NothingToTune for batch-invariant attention, whose config may not depend on
    the batch."""

    def __init__(self, attention: Attention, reserve: Reserve | None = None) -> None:
        if attention.spec.batch_invariant:
            raise NothingToTune("batch-invariant attention takes one config for all batches, so none can be tuned")
        self.attention, self.reserve, self.device = attention, reserve, attention.device_before("tuning")

    def __reduce__(self) -> tuple[Any, ...]:
        a = self.attention
        return _rebuilt, (
            (
                a.heads,
                a.variant.program,
                a.values,
                a.dtype,
                a.kv_dtype,
                a.layout,
                a.sm_scale,
                a.batch_invariant,
                str(a.device),
            ),
            self.reserve,
        )

    @property
    def _spec(self) -> AttentionSpec:
        return self.attention.spec

    def _facts(self, case: Batch) -> Facts:
        return Facts.of(case, self.reserve, self.device)

    def question(self, case: Batch) -> tuple[Question, tuple[int, ...]]:
        if case.blocks is not None:
            raise NothingToTune("block patterns have one kernel only")
        return question(self._spec, self.device), self._facts(case).bucket(self.device.type == "cpu")

    def describe(self, case: Batch) -> str:
        f = self._facts(case)
        queries = f"{f.max_q}" if f.mean_q == f.max_q else f"{f.mean_q}..{f.max_q}"
        keys = f" over {f.mean_kv}" if f.mean_kv else ""
        return f"{f.requests} x {queries}{keys}" + (f", pages of {f.page_size}" if f.page_size else ", no pages")

    def default(self, case: Batch) -> Choice:
        with records.entered(Fixed(None)):
            plan = self.attention.plan(case.to_host(), reserve=self.reserve)
        if plan.executor == "reference":
            raise NothingToTune("only the torch reference serves this here")
        return Choice(plan.executor, plan._executor.config)

    def candidates(self, case: Batch, default: Choice) -> Sequence[Choice]:
        return candidates(self._spec, self.device, self._facts(case), default)

    def valid(self, config: Choice, case: Batch) -> bool:
        return valid(config, self._spec, self.device, self._facts(case))

    def dangerous(self, config: Choice) -> bool:
        return config.backend != "cpu"  # an illegal access spoils the CUDA context of the whole process

    def inputs(self, case: Batch) -> Inputs:
        host = case.to_host()
        if isinstance(host.kv, PageTable):  # as many pages as the batch takes, not as many as its cache has
            lens = host.kv_lens.tolist()
            counts = [-(-n // host.page_size) for n in lens]
            order = torch.randperm(max(sum(counts), 1), generator=torch.Generator().manual_seed(0)).int()
            last = [n - max(count - 1, 0) * host.page_size for n, count in zip(lens, counts)]
            indptr = torch.tensor([0, *counts]).cumsum(0).int()
            table = PageTable.from_csr(indptr, order[: sum(counts)], last, page_size=host.page_size)
            host = Batch(q_indptr=host.q_indptr, kv=table, max_q_len=host.max_q_len)
        return Inputs(self.attention, host)

    def run(self, config: Choice, case: Batch, inputs: Inputs) -> Callable[[], object]:
        with records.entered(Fixed(config)):
            plan = self.attention.plan(inputs.batch, reserve=self.reserve)
        if plan.executor != config.backend or plan._executor.config != config.config:
            raise RuntimeError(f"{config} was asked for, and {plan.executor} serves with {plan._executor.config}")
        q, kv, out = inputs.q, inputs.kv, inputs.out
        return lambda: plan.run(q, kv, out=out)

    def check(self, case: Batch, inputs: Inputs) -> str | None:
        if inputs.expected is None:
            self._expect(inputs)
        assert inputs.expected is not None
        attention, out = self.attention, inputs.out
        allowed = TOLERANCE_8_BIT
        if min(attention.dtype.itemsize, attention.kv_dtype.itemsize) > 1:
            allowed = max(TOLERANCE[t] for t in (attention.dtype, attention.kv_dtype, out.dtype))
        error = _error(out[inputs.tokens].double(), inputs.expected)
        if not error <= allowed:
            return f"its error against the reference is {error:.1e}, above {allowed:.0e}"
        if inputs.whole is None:
            inputs.whole = out.clone()
            return None
        error = max(  # in parts, since both are wanted in float32
            (_error(a.float(), b.float()) for a, b in zip(out.split(4096), inputs.whole.split(4096))), default=0.0
        )
        return None if error <= 2 * allowed else f"it differs from the default's result by {error:.1e}"

    def _expect(self, inputs: Inputs) -> None:
        starts = inputs.batch.q_indptr.tolist()
        requests = [b for b in range(len(starts) - 1) if starts[b + 1] > starts[b]]
        lens = inputs.batch.kv_lens.tolist()
        chosen = {requests[0], requests[-1], max(requests, key=lambda b: lens[b])} if requests else set()
        chosen |= {max(requests, key=lambda b: starts[b + 1] - starts[b])} if requests else set()
        each = max(CHECKED // max(len(chosen), 1), 1)
        for b in sorted(chosen):
            ends = torch.linspace(starts[b], starts[b + 1] - 1, min(each, starts[b + 1] - starts[b]))
            inputs.tokens += ends.long().unique().tolist()
        a = self.attention
        program = a.spec.program
        inputs.expected, _ = attend_tokens(
            program, a.values, inputs.q, inputs.kv, inputs.batch, a.sm_scale, inputs.tokens
        )

    def prepare(self, configs: Iterable[Choice], case: Batch) -> None:
        facts, kernels = self._facts(case), []
        target = Target.here() if self.device.type == "cpu" else self._gpu()
        for config in configs:
            with suppress(ValueError):
                kernels += dispatch.kernels_of(self._spec, target, config.backend, config.config, facts.page_size, True)

        def build(kernel: Any) -> None:
            with suppress(Exception):  # the trial of the config says what is wrong with it
                kernel.entry()

        with ThreadPoolExecutor(job_limit(), "flashloom-tune") as pool:
            list(pool.map(build, kernels))

    def _gpu(self) -> Target:
        return Target.of(self.device)


class _Traced(Variant):
    """A variant by what was traced of it, for a process that cannot import its class."""

    def __init__(self, program: Program, values: tuple[Any, ...]) -> None:
        self.__dict__["_traced"] = (program, values)


def _rebuilt(recipe: tuple[Any, ...], reserve: Reserve | None) -> AttentionOperator:
    heads, program, values, dtype, kv_dtype, layout, sm_scale, invariant, device = recipe
    attention = Attention(
        heads, variant=_Traced(program, values), dtype=dtype, kv_dtype=kv_dtype, layout=layout, sm_scale=sm_scale,
        batch_invariant=invariant, device=device,
    )  # fmt: skip
    return AttentionOperator(attention, reserve)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error of a token, as a share of its norm; NaN where something is not a number."""
    if not found.numel():
        return 0.0
    wrong = (found - wanted).flatten(1).norm(dim=1)
    norm = wanted.flatten(1).norm(dim=1)
    floor = 1e-3 * norm.max().clamp(min=1e-30)  # a token whose values cancel has no scale of its own
    return float((wrong / torch.maximum(norm, floor)).amax())
