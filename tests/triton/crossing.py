"""Random cases that cross head width, types, phase, pages and layout, with a float64 witness of their own.

The widths come in turn, every multiple of 8 to 256 and odd ones among them; all else is drawn by seed. Slots that no
request uses hold NaN (int8: 127), outputs start as NaN, and each case is run again after its lengths have changed:
by update, and on a GPU by replays of a captured graph."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch

import flashloom as fl
from flashloom import dispatch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2, I8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
WIDTHS = [*range(8, 257, 8), 1, 3, 17, 33, 50, 65, 77, 90, 100, 127, 130, 161, 193, 250]
TYPES = [*[(q, q) for q in (BF16, F16, F32, E4M3)], *itertools.product((BF16, F16), (E4M3, E5M2, I8)), (F32, I8)]
PHASES = ["decode", "prefill", "append", "mixed", "draft"]
VARIANTS = ["full", "causal", "causal", "window", "softcap", "alibi", "sink"]
# largest ||out - witness|| / ||witness|| of a request, by the type of queries
BOUND = {F32: 1e-5, F16: 3e-3, BF16: 1e-2, E4M3: 4e-2}

Lengths = tuple[list[int], list[int]]  # of queries and of keys


@dataclass
class Case:
    number: int
    dim: int
    value_dim: int
    kv_heads: int
    group: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    phase: str
    kind: str
    page_size: int
    layout: str
    variant: str
    scaled: str
    gap: int  # columns of memory between rows
    lengths: list[Lengths]  # of each step; queries add up to the same

    def __str__(self) -> str:
        types = f"{self.dtype} kv {self.kv_dtype}".replace("torch.", "")
        return (
            f"case {self.number}: {self.kv_heads * self.group} heads on {self.kv_heads} of {self.dim} and "
            f"{self.value_dim}, {types}, {self.phase}, {self.kind} {self.page_size} {self.layout}, {self.variant}, "
            f"scales {self.scaled}, gap {self.gap}, lengths {self.lengths}"
        )


def draw(seed: int, number: int, small: bool = False) -> Case:
    """The case of a seed and a number; small: for the interpreter."""
    rng = random.Random(f"{seed} {number}")
    turn, place = divmod(number, len(WIDTHS))
    order = random.Random(f"widths {seed} {turn}").sample(WIDTHS, len(WIDTHS))
    dim = order[place]
    value_dim = rng.choice([dim, dim, dim, rng.choice(WIDTHS)])
    dtype, kv_dtype = rng.choice(TYPES)
    kind = rng.choice(["paged", "paged", "paged", "ragged", "dense"])
    kv_heads = rng.choice([1, 2] if small else [1, 2, 4, 8])
    group = rng.choice([1, 2, 5] if small else [1, 2, 3, 4, 5, 8, 16])
    phase, requests = rng.choice(PHASES), rng.choice([1, 2] if small else [1, 2, 5, 11])
    longest, most = (70, 40) if small else (2500, 400)
    steps = []
    q_lens: list[int] = []
    for _ in range(2 if small else 3):
        kv_lens = [rng.choice([1, rng.randint(1, 70), rng.randint(1, longest)]) for _ in range(requests)]
        if not q_lens:
            least = {"decode": 1, "draft": rng.randint(1, 8), "append": rng.randint(2, most)}.get(phase, 0)
            q_lens = [least or (rng.choice([1, 1, n]) if phase == "mixed" else n) for n in kv_lens]
            q_lens = [min(n, most, k) for n, k in zip(q_lens, kv_lens)]
        else:
            rng.shuffle(q_lens)
            kv_lens = [max(n, q) for n, q in zip(kv_lens, q_lens)]
        steps.append((list(q_lens), kv_lens))
    return Case(
        number, dim, value_dim, kv_heads, group, dtype, kv_dtype, phase, kind,
        page_size=rng.choice([1, 3, 4, 8, 16, 16, 32, 64, 128]),
        layout=rng.choice(["NHD", "HND"]),
        variant=rng.choice(VARIANTS),
        scaled=rng.choice(["one", "heads", "none"]) if kv_dtype.itemsize == 1 and dtype != E4M3 else "none",
        gap=rng.choice([0, 0, 0, 16, 3]),
        lengths=steps,
    )  # fmt: skip


# --- the witness ---


def witness(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: str, number: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, natural lse) in float64 of one request: q [m, heads, dim], k and v [n, kv_heads, ...], the last query
    beside the last key."""
    m, n, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1).permute(1, 0, 2) for x in (k, v))
    logits = q.permute(1, 0, 2) @ keys.transpose(1, 2) / math.sqrt(q.shape[2])
    behind = torch.arange(n, device=q.device)[None] - (torch.arange(m, device=q.device)[:, None] + n - m)
    if variant == "softcap":
        logits = number * torch.tanh(logits / number)
    if variant == "alibi":
        logits = logits + number.double()[:, None, None] * behind
    if variant != "full":
        logits = logits.masked_fill(behind > 0, -math.inf)
    if variant == "window":
        logits = logits.masked_fill(behind < -number, -math.inf)
    lse = logits.logsumexp(2)
    total = torch.logaddexp(lse, number.double()[:, None]) if variant == "sink" else lse
    weights = torch.exp(logits - total[..., None]).nan_to_num(0.0)
    return (weights @ values).permute(1, 0, 2), lse.T


# --- a case on a device ---


def poisoned(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device=device)
    if dtype.itemsize == 1:
        x.view(torch.uint8).fill_(0x7F)
    else:
        x.fill_(math.nan)
    return x


class Run:
    """The tensors of a case."""

    def __init__(self, case: Case, device: str):
        self.case, self.device = case, device
        self.random = torch.Generator(device).manual_seed(case.number)
        self.heads = fl.HeadShape(case.kv_heads * case.group, case.kv_heads, case.dim, case.value_dim)
        self.requests = len(case.lengths[0][0])
        self.tokens = sum(case.lengths[0][0])
        longest = max(max(kv) for _, kv in case.lengths)
        rows = max(sum(kv) for _, kv in case.lengths)
        self.width = -(-longest // case.page_size)
        pages = self.requests * self.width + 2
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(case.number))
        self.table = order[: self.requests * self.width].view(self.requests, self.width).int()
        outer = {"paged": (pages, case.page_size), "ragged": (rows,), "dense": (self.requests, longest)}[case.kind]
        self.k, self.v = (self.memory(outer, width) for width in (case.dim, case.value_dim))
        self.k_scale, self.v_scale = self.scale(), self.scale()
        heads = self.heads.q_heads
        self.number: Any = {
            "window": case.number * 7 % 90, "softcap": 8.0, "alibi": torch.rand(heads, device=device) * 0.2,
            "sink": torch.randn(heads, device=device),
        }.get(case.variant)  # fmt: skip
        made = {
            "full": lambda: fl.full, "causal": lambda: fl.causal, "alibi": lambda: fl.causal & fl.alibi(self.number),
            "window": lambda: fl.causal & fl.sliding_window(self.number),
            "softcap": lambda: fl.causal & fl.softcap(self.number), "sink": lambda: fl.causal & fl.sink(self.number),
        }  # fmt: skip
        self.attention = fl.Attention(
            self.heads, variant=made[case.variant](), dtype=case.dtype, kv_dtype=case.kv_dtype,
            layout="NHD" if case.kind == "ragged" else case.layout, device=device,
        )  # fmt: skip
        self.q = self.queries()
        out_dtype = BF16 if case.dtype == E4M3 else case.dtype
        # a row more than there are tokens
        self.out = poisoned(self.tokens + 1, heads, case.value_dim, dtype=out_dtype, device=device)
        self.lse = torch.full((self.tokens + 1, heads), math.nan, device=device)

    def memory(self, outer: tuple[int, ...], width: int) -> torch.Tensor:
        """Of keys or values in the case's layout, all poison."""
        case, heads = self.case, self.case.kv_heads
        shape = (outer[0], heads, outer[1]) if case.layout == "HND" and case.kind != "ragged" else (*outer, heads)
        return poisoned(*shape, width + case.gap, dtype=case.kv_dtype, device=self.device)[..., :width]

    def scale(self) -> torch.Tensor | None:
        if self.case.scaled == "none":
            return torch.full((1,), 1 / 40, device=self.device) if self.case.kv_dtype == I8 else None
        size = self.case.kv_heads if self.case.scaled == "heads" else 1
        unit = 1 / 40 if self.case.kv_dtype == I8 else 1.0
        return (torch.rand(size, device=self.device, generator=self.random) + 0.5) * unit

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.random)

    def queries(self) -> torch.Tensor:
        case = self.case
        made = poisoned(self.tokens + 1, self.heads.q_heads, case.dim + case.gap, dtype=case.dtype, device=self.device)[
            ..., : case.dim
        ]
        made.copy_(self.normal(*made.shape))
        return made

    def fill(self, kv_lens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """New keys and values for these lengths, poison elsewhere; answers them in float64 by request."""
        case, found = self.case, []
        starts = [0, *itertools.accumulate(kv_lens)]
        tokens = [torch.arange(n, device=self.device) for n in kv_lens]
        for x in (self.k, self.v):
            x.view(torch.uint8 if x.element_size() == 1 else x.dtype).fill_(0x7F if x.element_size() == 1 else math.nan)
        for b, at in enumerate(tokens):
            pair = []
            for x, scale in ((self.k, self.k_scale), (self.v, self.v_scale)):
                new = self.normal(len(at), case.kv_heads, x.shape[-1])
                new = (new * 40).round().clamp(-127, 127).to(I8) if case.kv_dtype == I8 else new.to(case.kv_dtype)
                bits = new.view(torch.uint8) if new.element_size() == 1 else new
                memory = x.view(torch.uint8) if x.element_size() == 1 else x
                if case.kind == "ragged":
                    memory[starts[b] : starts[b + 1]] = bits
                else:
                    rows = memory.transpose(1, 2) if case.layout == "HND" else memory
                    page = self.table[b].to(self.device)[at // case.page_size].long() if case.kind == "paged" else b
                    rows[page, at % case.page_size if case.kind == "paged" else at] = bits
                factor = 1.0 if scale is None else scale.double()[:, None]
                pair.append(new.float().double() * factor)
            found.append((pair[0], pair[1]))
        return found

    def batch(self, lengths: Lengths, on_device: bool = False) -> fl.Batch:
        q_lens, kv_lens = lengths
        case, more = self.case, {}
        place: Any = list
        if on_device:
            place = lambda x: torch.tensor(x, dtype=torch.int32, device=self.device)  # noqa: E731
            more = {"max_q_len": max(q_lens), "tokens": sum(q_lens)}
        if case.kind == "ragged":
            kv: Any = fl.RaggedKV(kv_lens)
        elif case.kind == "dense":
            kv = fl.DenseKV(self.requests, self.k.shape[2 if case.layout == "HND" else 1], kv_lens)
        else:
            table = self.table.to(self.device) if on_device else self.table
            kv = fl.PageTable.from_block_table(table, place(kv_lens), page_size=case.page_size)
        return fl.Batch(place(q_lens), kv=kv, **more)

    @property
    def kv(self) -> tuple[Any, ...]:
        scales = (self.k_scale, self.v_scale)
        return (self.k, self.v) if scales == (None, None) else (self.k, self.v, *scales)

    def compare(self, lengths: Lengths, kept: list[tuple[torch.Tensor, torch.Tensor]], what: str) -> None:
        """Assert that out and lse are the witness's."""
        start = 0
        for b, (m, (k, v)) in enumerate(zip(lengths[0], kept)):
            rows = slice(start, start + m)
            start += m
            want, want_lse = witness(self.q[rows].float().double(), k, v, self.case.variant, self.number)
            got, lse = self.out[rows].double(), self.lse[rows].double()
            error = float((got - want).norm() / want.norm().clamp(min=1e-30))
            bound = BOUND[self.case.dtype]
            assert error <= bound, f"{what}, request {b}: relative error {error:.1e}, allowed {bound:.0e}; {self.case}"
            off = float((lse - want_lse).abs().max())
            allowed = (2e-6 if self.case.dtype == F32 else 4e-3) * (float(want_lse.abs().max()) + 3)
            assert off <= allowed, f"{what}, request {b}: lse is off by {off:.1e}, allowed {allowed:.0e}; {self.case}"
        assert self.out[start:].isnan().all(), f"{what}: rows beyond the batch were written; {self.case}"
        assert self.lse[start:].isnan().all(), f"{what}: rows of lse beyond the batch were written; {self.case}"

    def executors(self) -> list[str]:
        answers = dispatch.choose(self.attention.spec, torch.device(self.device))
        return [cls.name for cls, reason in answers if reason is None and cls.name != "reference"]

    def check(self, executor: str) -> None:
        case, capturing = self.case, self.device != "cpu" and self.case.kind == "paged"
        longest = max(case.lengths[0][0])
        with dispatch.only(executor):
            plan = self.attention.plan(
                self.batch(case.lengths[0], False),
                reserve=fl.Reserve(requests=self.requests, tokens=self.tokens, pages=self.requests * self.width),
            )
        for step, lengths in enumerate(case.lengths):
            kept = self.fill(lengths[1])
            if step:
                plan.update(self.batch(lengths))
            self.out.fill_(math.nan), self.lse.fill_(math.nan)
            plan.run(self.q, self.kv, out=self.out, lse=self.lse)
            self.compare(lengths, kept, f"{executor}, step {step}")
        if not capturing:
            return
        batch = self.batch(case.lengths[0], on_device=True)
        assert batch.max_q_len == longest
        with dispatch.only(executor):
            plan = self.attention.plan(batch)
        plan.run(self.q, self.kv, out=self.out, lse=self.lse)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.update(batch)
            plan.run(self.q, self.kv, out=self.out, lse=self.lse)
        for step in (1, 2, 0):
            q_lens, kv_lens = case.lengths[step]
            kept = self.fill(kv_lens)
            batch.q_indptr.copy_(torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32))
            batch.kv_lens.copy_(torch.tensor(kv_lens, dtype=torch.int32))
            self.q.copy_(self.normal(*self.q.shape))
            self.out.fill_(math.nan), self.lse.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            self.compare(case.lengths[step], kept, f"{executor}, replay with the lengths of step {step}")


def failures(seed: int, numbers: list[int], device: str, small: bool = False) -> tuple[int, list[str]]:
    """(runs, what failed) of these cases on every backend that serves them. Stops where the device is lost."""
    runs, wrong = 0, []
    with torch.no_grad():
        for number in numbers:
            case = draw(seed, number, small)
            try:
                run = Run(case, device)
                for executor in run.executors():
                    run.check(executor)
                    runs += 1
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {str(error)[:900]} [{case}]")
                if "CUDA error" in str(error) or "illegal" in str(error):
                    break
    return runs, wrong
