"""Runs generated Triton functions in a simple kernel and compares them with torch. `TRITON_INTERPRET=1 python -m
tests.lower.triton_probe`"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from tests.lower.check import compare
from tests.variant.integers import KEYS, mask_of, score_of, widths
from tests.variant.strategies import Case, cases, conditions, numbers, tile_inputs, variant_of

import flashloom.variant as v
import triton
from flashloom.lower import triton as lower
from flashloom.lower.torch import evaluate

compared = 0


@triton.jit
def score_kernel(
    LOGITS, MASK, BOUNDS, logits, scores, kept, said, at, rows, keys, ROWS: tl.constexpr, KEYS: tl.constexpr, values
):
    row = tl.arange(0, ROWS)
    head = tl.load(rows + row)[:, None]
    q_pos = tl.load(rows + ROWS + row)[:, None]
    kv_pos = tl.arange(0, KEYS)[None, :]
    batch, q_len, kv_len = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    q_start, kv_start = tl.load(at + 3), tl.load(at + 4)
    place = row[:, None] * KEYS + kv_pos
    inside = kv_pos < keys
    x = tl.load(logits + place, mask=inside, other=0.0)
    if LOGITS is not None:
        y = LOGITS(x, batch, head, 0, q_pos, kv_pos, q_len, kv_len, q_start, kv_start, values)
        tl.store(scores + place, y, mask=inside)
    if MASK is not None:
        m = MASK(batch, head, 0, q_pos, kv_pos, q_len, kv_len, q_start, kv_start, values)
        tl.store(kept + place, tl.where(m, 1, 0) + tl.zeros([ROWS, KEYS], tl.int32), mask=inside)
        lo, hi = tl.min(tl.load(rows + ROWS + row), 0), tl.max(tl.load(rows + ROWS + row), 0)
        head_hi = tl.max(tl.load(rows + row), 0)
        every, some = BOUNDS(batch, 0, 0, head_hi, lo, hi, 0, kv_len - 1, q_len, kv_len, q_start, kv_start, values)
        tl.store(said, tl.where(every, 2, tl.where(some, 1, 0)))


def values_of(variant: v.Variant) -> tuple[Any, ...]:
    words: list[Any] = []
    for param, value in zip(variant.program.params, variant.values):
        words += [value] if param.kind == "scalar" else [value, *value.shape, *value.stride()]
    return tuple(words)


def check(case: Case, variant: v.Variant) -> None:
    global compared
    functions = lower.load(variant.program)
    rows = 16
    index = torch.arange(rows).clamp(max=2 * case.q_len - 1)
    heads, q_pos = (index // case.q_len).int(), (index % case.q_len + case.kv_len - case.q_len).int()
    keys, block = case.kv_len, 64
    logits = torch.linspace(-3, 3, rows * block).view(rows, block)
    scores, kept = torch.full((rows, block), float("nan")), torch.full((rows, block), -7, dtype=torch.int32)
    said = torch.full((1,), 1, dtype=torch.int32)
    at = torch.tensor([case.batch, case.q_len, case.kv_len, case.q_start, case.kv_start], dtype=torch.int32)
    score_kernel[(1,)](
        functions.logits_transform, functions.logits_mask, functions.mask_bounds, logits, scores, kept, said, at,
        torch.cat([heads, q_pos]), keys, rows, block, values_of(variant),
    )  # fmt: skip
    fixed = {k: getattr(case, k) for k in ("q_len", "kv_len", "q_start", "kv_start", "batch")}
    tile = {**fixed, "kv_head": 0, "q_head_lo": 0, "q_head_hi": 0, "q_pos_lo": 0, "q_pos_hi": 0, "kv_pos_lo": 0}
    inputs = tile_inputs(case, {**tile, "kv_pos_hi": keys - 1})
    inputs |= {"q_head": heads.view(-1, 1), "q_pos": q_pos.view(-1, 1), "kv_pos": torch.arange(keys).int().view(1, -1)}
    compare(variant, "logits", {**inputs, "logits": logits[:, :keys]}, scores[:, :keys])
    compare(variant, "mask", inputs, kept[:, :keys] != 0)
    if variant.program.mask is not None:
        mask = evaluate(variant.program, "mask", inputs, variant.values)
        exact = 2 if bool(mask.all()) else 1 if bool(mask.any()) else 0
        assert int(said) in (exact, 1), f"{variant.program.mask!r}: verdict {int(said)}, is {exact}"
    compared += 1


@settings(
    max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(cases, conditions, numbers)
def random_variants(case: Case, mask: tuple, score: tuple) -> None:
    check(case, variant_of(case, mask=mask, score=score))


def built_in_variants() -> None:
    case = Case(q_len=5, kv_len=21, q_start=0, kv_start=0, batch=0, seed=1)
    bits = torch.randint(0, 256, (16,), dtype=torch.uint8)
    for variant in [
        v.causal & v.sliding_window(6, 2) & v.softcap(2.0), v.alibi(4), v.document_mask((torch.arange(21) // 8).int()),
        v.prefix_lm(torch.tensor([3])), v.custom_mask(torch.rand(5, 21) < 0.5),
        v.packed_mask(bits, torch.tensor([0, 16])),
        v.length_temperature(4), v.sigmoid(0.5),
    ]:  # fmt: skip
        check(case, variant)


def random_integers() -> None:
    """Integers of every type, negative indices and float64, of which tests/variant say what they are in torch."""
    case = Case(q_len=KEYS, kv_len=KEYS, q_start=0, kv_start=0, batch=1, seed=0)
    for seed in range(24):
        check(case, v.from_flex(score_of(seed)[1], mask_of(seed)[1]))
    for variant in widths():
        check(case, variant)


if __name__ == "__main__":
    built_in_variants()
    random_integers()
    random_variants()
    print(f"{compared} variants agree")
