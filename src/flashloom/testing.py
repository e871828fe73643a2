"""Random attention cases compared with the float64 reference: `python -m flashloom.testing fuzz --cases 1000 --seed 0`.

A case is two numbers: one draws the kernel (heads, dtypes, the form of the variant), one the batch, memory layout and
values. Kernels are compiled, so a run draws few of them and many cases for each. On a GPU (`--device cuda`) every
backend that serves a case computes it, in several processes (`--jobs`). A failing case prints the command that repeats
it."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from flashloom import dispatch, variant
from flashloom.attention import Attention, Batch, HeadShape, Reserve
from flashloom.attention.reference import attention_reference
from flashloom.kv_cache import DenseKV, KVLayout, PageTable, RaggedKV
from flashloom.variant import Variant

#: Rounding of results and of what kernels keep between their two products, relative to the largest value involved.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_POISON = math.nan


def tolerance(*dtypes: torch.dtype) -> float:
    """What a kernel computing with these dtypes may be off by, relative to the largest value; 8-bit inputs are exact
    themselves."""
    return max(TOLERANCE.get(d, 0.0) for d in dtypes)


def assert_close(got: torch.Tensor, want: torch.Tensor, tol: float, name: str = "out") -> None:
    """Raise AssertionError unless every element of `got` is within tol * max(1, |want|) of `want`; infinities and
    NaN must be the same."""
    got, want = got.double().cpu(), want.double().cpu()
    error = torch.where((got == want) | (got.isnan() & want.isnan()), 0, (got - want).abs())
    wrong = ~(error <= torch.where(want.isfinite(), tol * want.abs().clamp(min=1), 0))
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}{list(at)} is {float(got[at])} and should be {float(want[at])}; {int(wrong.sum())} of "
            f"{wrong.numel()} elements differ by up to "
            f"{float(error[wrong].max()):.3g} (allowed {tol:.2g})"
        )


def assert_near(got: torch.Tensor, want: torch.Tensor, tol: float, more: torch.Tensor | None = None) -> None:
    """Raise AssertionError unless got - want is within tol of want as a whole, by their norms, and of `more`: results
    that are all small, as of many keys, have to be right, too."""
    got, want = got.double().cpu(), want.double().cpu()
    error, size = float((got - want).norm()), float(want.norm())
    allowed = tol * size + (0.0 if more is None else float(more.norm()))
    if not error <= allowed:
        error, allowed = error / max(size, 1e-300), allowed / max(size, 1e-300)
        raise AssertionError(f"out is {error:.2g} of its size away from what it should be (allowed {allowed:.2g})")


# --- what a case is ---


@dataclass(frozen=True)
class Kernel:
    """What is compiled."""

    heads: HeadShape
    dtype: torch.dtype
    kv_dtype: torch.dtype
    parts: tuple[str, ...]  # keys of PARTS
    batch_invariant: bool


@dataclass
class Lengths:
    """What a part of a variant may ask about a batch."""

    heads: HeadShape
    q_lens: list[int]
    kv_lens: list[int]
    draw: random.Random
    generator: torch.Generator

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator, dtype=torch.int32)


def _mask_areas(c: Lengths) -> list[int]:
    return [n * length for n, length in zip(c.q_lens, c.kv_lens)]


def _ragged_mask(c: Lengths) -> Variant:
    areas = _mask_areas(c)
    indptr = torch.tensor([0, *(areas or [0])]).cumsum(0)
    return variant.custom_mask(c.integers(3, max(sum(areas), 1)) > 0, indptr)


def _packed_mask(c: Lengths) -> Variant:
    sizes = [-(-a // 8) for a in _mask_areas(c)]
    indptr = torch.tensor([0, *(sizes or [0])]).cumsum(0)
    return variant.packed_mask(c.integers(256, max(sum(sizes), 1)).to(torch.uint8), indptr)


def _dense_mask(c: Lengths) -> Variant:
    shape = (max(len(c.q_lens), 1), max([1, *c.q_lens]), max([1, *c.kv_lens]))
    return variant.custom_mask(c.integers(4, *shape) > 0)


def _flex(c: Lengths) -> Variant:
    bias = c.normal(c.heads.q_heads, 32)

    def score(score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + bias[h, torch.abs(q - kv) % 32]

    return variant.from_flex(score, lambda b, h, q, kv: (q // 4 >= kv // 4) | (kv % 7 == h), q_index="absolute")


class Temperature(Variant):
    """A variant with a field of every per-something kind."""

    by_request: variant.PerRequest
    by_kv_head: variant.PerKVHead
    by_query: variant.PerQueryToken
    by_key: variant.PerKeyToken
    scale: variant.Scalar

    def logits_transform(self, logits: Any, at: Any) -> Any:
        heat = self.by_request[at.batch] * self.by_kv_head[at.kv_head] * self.by_query[at.q_pos]
        return logits * heat * self.scale + self.by_key[at.kv_pos]

    def output_transform(self, out: Any, lse: Any, at: Any) -> Any:
        return out * (1.0 + 0.5 * torch.cos(at.dim * 1.0))


def _temperature(c: Lengths) -> Variant:
    return Temperature(
        by_request=c.normal(max(len(c.q_lens), 1)).abs().clamp(0.2, 1.5),
        by_kv_head=c.normal(c.heads.kv_heads).abs().clamp(0.2, 1.5),
        by_query=c.normal(max(sum(c.q_lens), 1)).abs().clamp(0.2, 1.5),
        by_key=c.normal(max(sum(c.kv_lens), 1)),
        scale=c.draw.uniform(0.5, 1.0),
    )


PARTS: dict[str, Callable[[Lengths], Variant]] = {
    "causal": lambda c: variant.causal,
    "window": lambda c: variant.sliding_window(c.draw.choice([0, 1, 7, 63, 64, 1000])),
    "window2": lambda c: variant.sliding_window(c.draw.choice([0, 5, 100]), c.draw.choice([0, 3, 40])),
    "softcap": lambda c: variant.softcap(c.draw.choice([1.0, 5.0, 30.0])),
    "alibi": lambda c: variant.alibi(c.normal(c.heads.q_heads) * 0.1),
    "sink": lambda c: variant.sink(c.normal(c.heads.q_heads)),
    "prefix": lambda c: variant.prefix_lm(c.integers(50, max(len(c.q_lens), 1))),
    "documents": lambda c: variant.document_mask(c.integers(3, max(sum(c.kv_lens), 1))),
    "mask": _dense_mask,
    "ragged_mask": _ragged_mask,
    "packed_mask": _packed_mask,
    "rope": lambda c: variant.rope(c.heads.dim // 2 * 2, theta=1000.0),
    "rope_part": lambda c: variant.rope(max(c.heads.dim // 4 * 2, 2), theta=1000.0, interleaved=True),
    "log_n": lambda c: variant.length_temperature(c.draw.choice([8, 100])),
    "sigmoid": lambda c: variant.sigmoid(c.draw.uniform(-1, 1)),
    "flex": _flex,
    "temperature": _temperature,
}
_NEEDS_SOFTMAX = {"sink"}


def draw_kernel(seed: int) -> Kernel:
    """The kernel of a seed."""
    draw = random.Random(f"kernel {seed}")
    kv_heads = draw.choice([1, 1, 2, 3])
    dim, other = (draw.choice([64, 128, draw.randrange(8, 257, 8), draw.randrange(3, 257)]) for _ in range(2))
    heads = HeadShape(kv_heads * draw.choice([1, 2, 3, 4, 5, 8]), kv_heads, dim, draw.choice([dim, dim, other]))
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16, torch.bfloat16])
    kv_dtype = draw.choice([dtype] * 4 + [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
    parts = draw.sample(sorted(PARTS), draw.choice([0, 1, 1, 1, 2, 2, 3]))
    if "sigmoid" in parts:
        parts = [p for p in parts if p not in _NEEDS_SOFTMAX]
    if {"rope", "rope_part"} <= set(parts):
        parts.remove("rope_part")
    if dim == 8 and "rope_part" in parts:
        parts.remove("rope_part")
    return Kernel(heads, dtype, kv_dtype, tuple(parts), draw.random() < 0.3)


def _lengths(draw: random.Random) -> tuple[list[int], list[int]]:
    style = draw.choice(["decode", "decode", "prefill", "append", "mixed", "mixed", "skewed"])
    q_lens, kv_lens = [], []
    for i in range(draw.choice([0, 1, 1, 2, 3, 5, 8])):
        kv = draw.choice([0, 1, 2, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 200, draw.randrange(400)])
        if style == "skewed":
            kv = draw.randrange(1000, 3000) if i == 0 else kv % 20
        if style in ("decode", "skewed"):
            q = 1
        elif style == "prefill":
            q, kv = kv, kv
        elif style == "append":
            q = draw.randrange(kv + 1)
        else:
            q = draw.choice([0, 1, 1, 3, 8, kv, draw.randrange(70)])  # more queries than keys, too
        q_lens.append(min(q, 150))
        kv_lens.append(kv)
    return q_lens, kv_lens


@dataclass
class Case:
    """A case with its tensors; `kv` is what run() takes."""

    kernel: Kernel
    layout: str
    batch: Batch
    variant: Variant
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    sm_scale: float | None
    partial: bool
    out_dtype: torch.dtype
    padding: int  # rows of q beyond the batch
    update_from: Batch | None  # plan for this batch first

    def __str__(self) -> str:
        k, b = self.kernel, self.batch
        kind = f"{type(b.kv).__name__} page {b.page_size}"
        short = [str(d).removeprefix("torch.") for d in (k.dtype, k.kv_dtype, self.out_dtype)]
        return (
            f"{k.heads} {short[0]} kv {short[1]} out {short[2]} {'+'.join(k.parts) or 'full'} {kind} {self.layout} q "
            f"{b.q_indptr.diff().tolist()} "
            f"kv {b.kv_lens.tolist()} strides q {self.q.stride()} k {self.k.stride()} v {self.v.stride()} scales "
            f"{[None if s is None else tuple(s.shape) for s in (self.k_scale, self.v_scale)]} partial {self.partial} "
            "invariant "
            f"{k.batch_invariant} updated {self.update_from is not None}"
        )


STRIDES = ("plain", "plain", "wide", "offset", "swapped")


def _strided(x: torch.Tensor, draw: random.Random, styles: tuple[str, ...]) -> torch.Tensor:
    """The same values in memory with gaps, another order of dimensions, or an offset; gaps hold NaN. Inner stride 1."""
    style = draw.choice(styles)
    if style == "plain":
        return x
    order = list(range(x.dim()))
    if style == "swapped":
        order[0], order[-2] = order[-2], order[0]
    shape = [x.shape[i] for i in order]
    pad = draw.choice([1, 3, 8, 16]) if style != "swapped" else 0
    shape[-1] += pad
    memory = torch.zeros(shape, dtype=torch.float32).fill_(_POISON).to(x.dtype)
    start = draw.randrange(pad + 1) if style == "offset" else 0
    view = memory[..., start : start + x.shape[-1]].permute(order)  # a swap undoes itself
    view.copy_(x)
    return view


def _values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator)
    return (x * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.to(dtype)


def _scale(form: str, pages: int, kv_heads: int, dtype: torch.dtype, c: Lengths) -> torch.Tensor | None:
    if form == "none":
        # int8 without a scale would make logits in the thousands
        return torch.full((1,), 1 / 40) if dtype == torch.int8 else None
    shape = {"one": (1,), "heads": (kv_heads,), "pages": (pages, kv_heads)}[form]
    return (torch.rand(shape, generator=c.generator) + 0.5) * (1 / 40 if dtype == torch.int8 else 1.0)


def draw_case(kernel_seed: int, case_seed: int, device: str = "cpu") -> Case:
    """The case of two seeds for a device, its tensors on the CPU."""
    kernel, draw = draw_kernel(kernel_seed), random.Random(f"case {kernel_seed} {case_seed}")
    q_lens, kv_lens = _lengths(draw)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    c = Lengths(kernel.heads, q_lens, kv_lens, draw, generator)
    # GPU kernels are compiled for a size of pages and for how rows are aligned: each has few of these there
    fixed = draw if device == "cpu" else random.Random(f"layout {kernel_seed}")
    kind, layout = fixed.choice(["paged", "paged", "ragged", "dense"]), draw.choice(["NHD", "HND"])
    styles = STRIDES if device == "cpu" or fixed.random() < 0.4 else ("plain", "plain", "swapped")
    heads, rows = kernel.heads, sum(kv_lens)
    updated = draw.random() < 0.3 and not {"mask", "ragged_mask", "packed_mask"} & set(
        kernel.parts
    )  # of these lengths alone
    kv: KVLayout
    first: KVLayout | None = None
    if kind == "ragged":
        pages, page_size, kv = 0, 1, RaggedKV(kv_lens)
        used = torch.arange(rows).view(-1, 1)
        first = RaggedKV([n // 2 for n in kv_lens])
    elif kind == "dense":
        page_size = max([1, *kv_lens]) + draw.choice([0, 0, 3])
        pages = len(kv_lens)
        kv = DenseKV(pages, page_size, kv_lens)
        used = torch.arange(pages).view(-1, 1)
        first = DenseKV(pages, page_size, [n // 2 for n in kv_lens])
    else:
        page_size = fixed.choice([1, 2, 3, 4, 8, 16, 16, 16, 32, 64, 128])
        need = [-(-n // page_size) for n in kv_lens]
        pages = sum(need) + draw.choice([1, 5])
        order = torch.randperm(pages, generator=generator)
        rows_of = torch.split(order[: sum(need)], need)
        width = max([1, *need]) + draw.choice([0, 2])
        table = torch.full((len(need), width), draw.choice([-1, 2**30]), dtype=torch.int32)
        for row, mine in zip(table, rows_of):
            row[: len(mine)] = mine
        if draw.random() < 0.5:
            kv = PageTable.from_block_table(table, kv_lens, page_size=page_size)
            first = PageTable.from_block_table(table, [n // 2 for n in kv_lens], page_size=page_size)
        else:
            indptr = torch.tensor([0, *need]).cumsum(0)
            last = [n - (m - 1) * page_size if m else 0 for n, m in zip(kv_lens, need)]
            kv = PageTable.from_csr(indptr, order[: sum(need)], last, page_size=page_size)
        used = table
    batch = Batch(q_lens, kv=kv)
    token_rows = (rows,) if kind == "ragged" else (pages, page_size)
    k = _values((*token_rows, heads.kv_heads, heads.dim), kernel.kv_dtype, generator)
    v = _values((*token_rows, heads.kv_heads, heads.value_dim), kernel.kv_dtype, generator)
    if kind != "ragged":
        _poison(k, v, used, kv_lens, page_size)
    k, v = _strided(k, draw, styles), _strided(v, draw, styles)
    if layout == "HND" and kind != "ragged":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    padding = draw.choice([0, 0, 3])
    q = torch.randn(sum(q_lens) + padding, heads.q_heads, heads.dim, generator=generator).to(kernel.dtype)
    forms = ["none", "one", "heads"] + (["pages"] if kind != "ragged" else [])
    scaled = kernel.kv_dtype.itemsize == 1 or draw.random() < 0.1
    scales = [
        _scale(draw.choice(forms) if scaled else "none", pages, heads.kv_heads, kernel.kv_dtype, c) for _ in range(2)
    ]
    chosen: Variant = variant.full
    for part in kernel.parts:
        chosen = chosen & PARTS[part](c)
    return Case(
        kernel=kernel,
        layout=layout,
        batch=batch,
        variant=chosen,
        q=_strided(q, draw, styles),
        k=k,
        v=v,
        k_scale=scales[0],
        v_scale=scales[1],
        sm_scale=draw.choice([None, None, 0.3 / math.sqrt(heads.dim)]),
        partial=draw.random() < 0.2,
        out_dtype=draw.choice([kernel.dtype] * 3 + [torch.float32]),
        padding=padding,
        update_from=Batch([min(n, 1) for n in q_lens], kv=first) if updated and first is not None else None,
    )


def _poison(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, kv_lens: list[int], page_size: int) -> None:
    """NaN (int8: the largest value) in every slot that no request uses."""
    used = torch.zeros(k.shape[0], page_size, dtype=torch.bool)
    for row, n in zip(table.tolist(), kv_lens):
        for start in range(0, n, page_size):
            used[row[start // page_size], : n - start] = True
    for x in (k, v):
        junk = torch.tensor([127.0 if x.dtype == torch.int8 else _POISON]).to(x.dtype)
        if x.dtype.itemsize == 1:
            x.view(torch.uint8)[~used] = junk.view(torch.uint8)
        else:
            x[~used] = junk


# --- running ---


def check_case(case: Case, executor: str | None = None, device: str = "cpu") -> str:
    """Run a case on an executor (the one dispatch chooses, unless named) and compare with the float64 reference.
    Returns the executor's name; raises AssertionError where they differ."""
    kernel, heads, softmax = case.kernel, case.kernel.heads, case.variant.program.softmax
    scales = (case.k_scale, case.v_scale)
    want, want_lse = attention_reference(
        case.q, case.k, case.v, case.batch, case.variant, layout=case.layout, k_scale=scales[0], v_scale=scales[1],
        sm_scale=case.sm_scale, partial=case.partial,
    )  # fmt: skip
    on = _Mover(device)
    layer = Attention(
        heads, variant=on.variant(case.variant), dtype=kernel.dtype, kv_dtype=kernel.kv_dtype, layout=case.layout,
        sm_scale=case.sm_scale, batch_invariant=kernel.batch_invariant, device=device,
    )  # fmt: skip
    with dispatch.only(executor):
        if case.update_from is None:
            plan = layer.plan(case.batch)
        else:
            plan = layer.plan(case.update_from, reserve=Reserve(requests=case.batch.requests, tokens=case.batch.tokens))
            plan.update(case.batch)
    rows = case.q.shape[0]
    out = torch.full((rows, heads.q_heads, heads.value_dim), math.nan, dtype=case.out_dtype, device=device)
    lse = torch.full((rows, heads.q_heads), math.nan, device=device) if softmax else None
    kv = (on(case.k), on(case.v), *(None if s is None else on(s) for s in scales))
    plan.run(on(case.q), kv, out=out, lse=lse, partial=case.partial)
    tokens = rows - case.padding
    each = tolerance(kernel.dtype, case.out_dtype)
    largest = want[:tokens].abs().max().item() if tokens else 1.0  # rounding is relative to the terms of the sums
    tol = each * max(1.0, largest * (1.0 if softmax else 2.0))
    try:
        assert_close(out[:tokens], want[:tokens], tol)
        assert_near(out[:tokens], want[:tokens], each)
    except AssertionError:
        rounding = _rounding(case, want[:tokens])
        assert_close(out[:tokens], want[:tokens], tol + 2 * float(rounding.abs().max()))
        assert_near(out[:tokens], want[:tokens], each, 2 * rounding)
    if not out[tokens:].isnan().all():
        raise AssertionError("rows of out beyond the batch were written")
    if lse is not None and want_lse is not None:
        assert_close(lse[:tokens], want_lse[:tokens], tolerance(kernel.dtype))
        if not lse[tokens:].isnan().all():
            raise AssertionError("rows of lse beyond the batch were written")
        empty = want_lse[:tokens] == -math.inf
        if not (out[:tokens].cpu()[empty] == 0).all():
            raise AssertionError("a row with nothing to attend to is not 0")
    return plan.executor


def _rounding(case: Case, want: torch.Tensor) -> torch.Tensor:
    """What float32, which hooks are defined in, does to the definition itself: the angle of a rotation by a position in
    the thousands, for one, is off by more than the bound."""
    got, _ = attention_reference(
        case.q, case.k, case.v, case.batch, case.variant, layout=case.layout, k_scale=case.k_scale,
        v_scale=case.v_scale, sm_scale=case.sm_scale, partial=case.partial, dtype=torch.float32,
    )  # fmt: skip
    return got[: want.shape[0]].double() - want


class _Mover:
    """Takes tensors to a device with their strides."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.device == "cpu":
            return x
        storage = x.untyped_storage().to(device=torch.device(self.device))
        return torch.empty(0, dtype=x.dtype, device=self.device).set_(storage, x.storage_offset(), x.shape, x.stride())

    def variant(self, v: Variant) -> Variant:
        if self.device == "cpu":
            return v
        moved = object.__new__(type(v))
        moved.__dict__.update(v.__dict__)
        program, values = v.program, v.values
        on_device = tuple(x.to(self.device) if isinstance(x, torch.Tensor) else x for x in values)
        moved.__dict__["_traced"] = (program, on_device)
        return moved


def backends(case: Case, device: str) -> list[str | None]:
    """The backends that check a case: on a GPU all that have kernels for it, else the one that dispatch chooses."""
    if device == "cpu":
        return [None]
    spec = Attention(
        case.kernel.heads, variant=case.variant, dtype=case.kernel.dtype, kv_dtype=case.kernel.kv_dtype,
        batch_invariant=case.kernel.batch_invariant,
    ).spec  # fmt: skip
    answers = dispatch.choose(spec, torch.device(device))
    return [cls.name for cls, refusal in answers if refusal is None and cls.name != "reference"] or [None]


def fuzz(
    cases: int,
    seed: int = 0,
    kernels: int = 40,
    executor: str | None = None,
    device: str = "cpu",
    keep_going: bool = False,
    seconds: float = math.inf,
    share: tuple[int, int] | None = None,
) -> int:
    """Check `cases` random cases spread over `kernels` kernels; prints each failing one with the command that repeats
    it. Returns the number of failures (stopping at the first unless keep_going). Begins no case after `seconds`.
    share: (i, n) are every n-th of the kernels from the i-th on, and the summary is JSON."""
    served: Counter[str] = Counter()
    failures, start = 0, time.perf_counter()
    first, step = share or (0, 1)
    for i in range(cases):
        kernel = i * kernels // cases
        if kernel % step != first:
            continue
        if time.perf_counter() - start > seconds or (failures and (not keep_going or _lost(device))):
            break
        kernel_seed = seed * 100_000 + kernel
        case = draw_case(kernel_seed, i, device)
        for name in [executor] if executor else backends(case, device):
            try:
                served[check_case(case, name, device)] += 1
            except Exception as error:
                failures += 1
                options = f" --executor {name}" * bool(name) + f" --device {device}" * (device != "cpu")
                print(f"FAILED python -m flashloom.testing case {kernel_seed} {i}{options}")
                print(f"  {case}\n  {type(error).__name__}: {error}", flush=True)
                break
        if share is None and sys.stderr.isatty() and i % 20 == 0:
            print(f"\r{i + 1}/{cases} cases, {failures} failed", end="", file=sys.stderr, flush=True)
    print(json.dumps([served, failures]) if share else _summary(served, failures, seed, kernels, start))
    return failures


def _summary(served: Counter[str], failures: int, seed: int, kernels: int, start: float) -> str:
    by = ", ".join(f"{n} by {name}" for name, n in served.items())
    took = f"{kernels} kernels, {time.perf_counter() - start:.0f} s"
    return f"{sum(served.values())} cases passed ({by}), {failures} failed; seed {seed}, {took}"


def _lost(device: str) -> bool:
    """Whether a kernel's illegal access has cost this process its device."""
    try:
        if device != "cpu":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _in_processes(arguments: list[str], options: argparse.Namespace) -> int:
    """The failures of `options.jobs` processes, each with a share of the kernels."""
    start = time.perf_counter()

    def run(i: int) -> tuple[Counter[str], int]:
        command = [sys.executable, "-m", "flashloom.testing", *arguments, "--share", str(i), str(options.jobs)]
        last = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for last in process.stdout or ():
                if not last.startswith("["):
                    print(last, end="", flush=True)
        if process.returncode in (0, 1) and last.startswith("["):
            passed, failed = json.loads(last)
            return Counter(passed), failed
        print(f"FAILED process {i} of {options.jobs} ended with exit code {process.returncode}", flush=True)
        return Counter(), 1

    with ThreadPoolExecutor(options.jobs) as pool:
        shares = list(pool.map(run, range(options.jobs)))
    served, failures = sum((share[0] for share in shares), Counter()), sum(share[1] for share in shares)
    print(_summary(served, failures, options.seed, options.kernels, start))
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashloom.testing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    many = commands.add_parser("fuzz", help="check many random cases")
    many.add_argument("--cases", type=int, default=1000)
    many.add_argument("--seed", type=int, default=0)
    many.add_argument("--kernels", type=int, default=40, help="how many are drawn, each compiled once or a few times")
    many.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    many.add_argument("--seconds", type=float, default=math.inf, help="after which no case is begun")
    many.add_argument("--jobs", type=int, help="processes (default: 1; on a GPU as many as cores, 14 at most)")
    many.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)  # (i, n): of one of n processes
    one = commands.add_parser("case", help="repeat one case")
    one.add_argument("kernel_seed", type=int)
    one.add_argument("case_seed", type=int)
    for command in (many, one):
        command.add_argument("--executor", help="use this one (reference, cpu, triton, ...) instead of the best")
        command.add_argument("--device", default="cpu")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.command == "fuzz":
        for name in ("cases", "kernels"):
            if getattr(options, name) < 1:
                parser.error(f"--{name} {getattr(options, name)}: give 1 or more")
    if options.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here; leave --device out")
    if options.command == "fuzz":
        options.jobs = options.jobs or (min(os.cpu_count() or 1, 14) if options.device != "cpu" else 1)
        if options.jobs > 1 and not options.share:
            return int(_in_processes(arguments, options) > 0)
        failed = fuzz(
            options.cases, options.seed, options.kernels, options.executor, options.device, options.keep_going,
            options.seconds, options.share,
        )  # fmt: skip
        return int(failed > 0)
    case = draw_case(options.kernel_seed, options.case_seed, options.device)
    print(case)
    print(f"passed by {check_case(case, options.executor, options.device)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
