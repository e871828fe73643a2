"""Tile verdicts are never wrong: against brute force over random masks, fields and tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.variant.strategies import Case, cases, conditions, tile_inputs, tiles, variant_of

import flashloom.variant as v
from flashloom.lower.torch import evaluate
from flashloom.variant.ranges import FULL, PARTIAL, SKIP, tile_verdict


def brute_force(variant: v.Variant, case: Case, tile: dict[str, int]) -> int:
    mask = evaluate(variant.program, "mask", tile_inputs(case, tile), variant.values)
    return FULL if bool(mask.all()) else PARTIAL if bool(mask.any()) else SKIP


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), cases, conditions)
def test_verdict_is_never_wrong(data: st.DataObject, case: Case, recipe: tuple) -> None:
    variant = variant_of(case, mask=recipe)
    if variant.program.mask is None:  # folded to True
        return
    tile = data.draw(tiles(case))
    said, true = tile_verdict(variant.program, variant.values, tile), brute_force(variant, case, tile)
    assert said in (true, PARTIAL), f"{variant.program.mask!r}: said {said}, is {true}"


def tile_of(case: Case, **bounds: int) -> dict[str, int]:
    fixed = {k: getattr(case, k) for k in ("q_len", "kv_len", "q_start", "kv_start", "batch")}
    full = {"kv_head": 0, "q_head_lo": 0, "q_head_hi": 3, "q_pos_lo": 0, "q_pos_hi": 0, "kv_pos_lo": 0, "kv_pos_hi": 0}
    return {**fixed, **full, **bounds}


CASE = Case(q_len=64, kv_len=64, q_start=0, kv_start=0, batch=0, seed=0)
DOCUMENTS = torch.arange(64, dtype=torch.int32) // 16
MASK = torch.zeros(64, 64, dtype=torch.bool)
MASK[:16, :16] = True


@pytest.mark.parametrize(
    ("variant", "queries", "keys", "expected"),
    [
        (v.causal, (16, 31), (0, 15), FULL),
        (v.causal, (16, 31), (0, 16), FULL),
        (v.causal, (16, 31), (0, 17), PARTIAL),
        (v.causal, (16, 31), (32, 40), SKIP),
        (v.sliding_window(4), (32, 40), (0, 27), SKIP),
        (v.sliding_window(4), (32, 36), (32, 40), FULL),
        (v.causal & v.sliding_window(8), (32, 39), (31, 32), FULL),
        (v.document_mask(DOCUMENTS), (0, 15), (16, 31), SKIP),
        (v.document_mask(DOCUMENTS), (16, 31), (16, 31), FULL),
        (v.document_mask(DOCUMENTS), (8, 20), (8, 12), PARTIAL),
        (v.prefix_lm(torch.tensor([20])), (0, 7), (8, 19), FULL),
        (v.prefix_lm(torch.tensor([20])), (0, 7), (20, 40), SKIP),
        (v.custom_mask(MASK), (0, 15), (0, 15), FULL),
        (v.custom_mask(MASK), (0, 15), (16, 63), SKIP),
        (v.custom_mask(MASK), (10, 20), (0, 15), PARTIAL),
        (v.from_flex(mask_mod=lambda b, h, q, k: (k // 16) == (q // 16)), (16, 31), (32, 47), SKIP),
        (v.from_flex(mask_mod=lambda b, h, q, k: (k // 16) == (q // 16)), (16, 31), (16, 31), FULL),
    ],
)
def test_verdict_is_tight_where_it_matters(variant, queries, keys, expected) -> None:
    tile = tile_of(CASE, q_pos_lo=queries[0], q_pos_hi=queries[1], kv_pos_lo=keys[0], kv_pos_hi=keys[1])
    assert tile_verdict(variant.program, variant.values, tile) == expected == brute_force(variant, CASE, tile)


@pytest.mark.parametrize("divisor", [-7, -5, -2, -1, 1, 2, 5, 2**31 - 1, -(2**31) + 1])
def test_modulo_and_floor_division_by_any_constant(divisor: int) -> None:
    """Against Python's integers, over all tiles of some sizes: bare, and inside a sum that has to know the range."""
    case = Case(q_len=24, kv_len=24, q_start=0, kv_start=0, batch=0, seed=0)
    masks = {
        "rest": lambda q, k: k + q % divisor > q,
        "negative rest": lambda q, k: k > q - q % divisor,
        "quotient": lambda q, k: k - q // divisor > 3,
        "of a difference": lambda q, k: (q - k) % divisor < (k - q) // divisor,
    }
    for name, mask in masks.items():
        variant = v.from_flex(mask_mod=lambda b, h, q, k, mask=mask: mask(q, k), q_index="absolute")
        kept = torch.tensor([[mask(q, k) for k in range(24)] for q in range(24)])
        for size in (1, 3, 8, 24):
            for q in range(0, 24, size):
                for k in range(0, 24, size):
                    box = kept[q : q + size, k : k + size]
                    tile = tile_of(
                        case, q_pos_lo=q, q_pos_hi=min(23, q + size - 1), kv_pos_lo=k, kv_pos_hi=min(23, k + size - 1)
                    )
                    said = tile_verdict(variant.program, variant.values, tile)
                    true = FULL if box.all() else PARTIAL if box.any() else SKIP
                    assert said in (true, PARTIAL), f"{name} by {divisor}, tile {q} {k} of {size}: {said}, is {true}"
