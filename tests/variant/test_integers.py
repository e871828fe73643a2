"""Integers mean what they mean in torch: positions are int64, tensors have their types, and nothing wraps but there."""

from __future__ import annotations

import pytest
import torch
from tests.variant.integers import HEADS, KEYS, mask_of, score_of, truth

import flashloom.variant as v
from flashloom.lower.torch import evaluate
from flashloom.variant.expr import BOOL, DOUBLE, FLOAT, INT32, INT64, topological
from flashloom.variant.ranges import FULL, PARTIAL, SKIP, tile_verdict

HEAD, ROW = torch.arange(HEADS), torch.arange(KEYS)
PLACE = {"q_len": KEYS, "kv_len": KEYS, "batch": 1, "kv_head": 0, "q_start": 0, "kv_start": 0}
AT = {
    **{k: torch.tensor(n, dtype=torch.int32) for k, n in PLACE.items()},
    "q_head": HEAD.int().view(-1, 1, 1), "q_pos": ROW.int().view(1, -1, 1), "kv_pos": ROW.int().view(1, 1, -1),
}  # fmt: skip


def kept_by(variant: v.Variant) -> torch.Tensor:
    if variant.program.mask is None:
        return torch.ones(HEADS, KEYS, KEYS, dtype=torch.bool)
    return evaluate(variant.program, "mask", AT, variant.values).expand(HEADS, KEYS, KEYS)


@pytest.mark.parametrize("block", range(8))
def test_random_masks_are_torchs(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        text, mask = mask_of(seed)
        variant = v.from_flex(mask_mod=mask)
        expected, got = truth(mask, 1), kept_by(variant)
        assert torch.equal(got, expected), f"{seed}: {text}: {int((got != expected).sum())} differ"
        types = {n.dtype for n in topological(variant.program.mask)} if variant.program.mask is not None else set()
        assert types <= {BOOL, INT32, INT64, FLOAT, DOUBLE}, text
        g = torch.Generator().manual_seed(seed)
        for _ in range(12):
            ends = [torch.randint(0, n, (2,), generator=g).sort().values.tolist() for n in (HEADS, KEYS, KEYS)]
            tile = dict(PLACE)
            for name, (low, high) in zip(("q_head", "q_pos", "kv_pos"), ends):
                tile |= {f"{name}_lo": low, f"{name}_hi": high}
            box = expected[tuple(slice(low, high + 1) for low, high in ends)]
            said = tile_verdict(variant.program, variant.values, tile)
            true = FULL if box.all() else PARTIAL if box.any() else SKIP
            assert said in (true, PARTIAL), f"{seed}: {text}: tile {ends}: said {said}, is {true}"


@pytest.mark.parametrize("block", range(4))
def test_random_scores_are_torchs(block: int) -> None:
    logits = torch.linspace(-3, 3, KEYS * KEYS).view(KEYS, KEYS)
    for seed in range(block * 50, block * 50 + 50):
        text, score = score_of(seed)
        variant = v.from_flex(score)
        expected = truth(score, 1, logits)
        got = evaluate(variant.program, "logits", {**AT, "logits": logits}, variant.values).expand_as(expected)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), expected.double(), rtol=1e-6, atol=1e-5, msg=lambda m, t=text: f"{t}: {m}"
        )
