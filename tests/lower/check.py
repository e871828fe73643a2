"""Comparing a lowering with torch where the answer is well conditioned."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import flashloom.variant as v
from flashloom.lower.torch import evaluate


def compare(variant: v.Variant, hook: str, inputs: Mapping[str, torch.Tensor], got: torch.Tensor) -> None:
    """Values must agree to float32 rounding wherever float32 and float64 evaluation do, and infinities and NaN
    likewise."""
    if getattr(variant.program, hook) is None:
        return
    doubled = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    single = evaluate(variant.program, hook, inputs, variant.values).expand(got.shape)
    double = evaluate(variant.program, hook, doubled, variant.values, torch.float64).expand(got.shape)
    if hook == "mask":
        settled = single == double
        wrong = settled & (got != single)
    else:
        settled = torch.isclose(single.double(), double, rtol=1e-6, atol=1e-6, equal_nan=True)
        wrong = settled & ~torch.isclose(got, single, rtol=2e-5, atol=2e-5, equal_nan=True)
    root = getattr(variant.program, hook)
    where, values = wrong.nonzero()[:3].tolist(), f"{got[wrong][:3]} for {single[wrong][:3]}"
    assert not wrong.any(), f"{root!r}: {int(wrong.sum())} of {wrong.numel()} differ, first at {where}: {values}"
