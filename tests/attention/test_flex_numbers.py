"""Random FlexAttention functions over integers of every type, negative indices and float64: eager FlexAttention's
result, by the CPU kernels."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from tests.variant.integers import HEADS, KEYS, mask_of, score_of
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flashloom as fl


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("seed", range(1000, 1008))
def test_random_functions(seed: int) -> None:
    torch.manual_seed(seed)
    (text, mask), (_, score) = mask_of(seed), score_of(seed)
    q, k, v = (torch.randn(2, HEADS, KEYS, 32) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is eager
        blocks = create_block_mask(mask, 2, HEADS, KEYS, KEYS, device="cpu")
        expected = flex_attention(q, k, v, score_mod=score, block_mask=blocks)
    got = fl.attention(q, k, v, variant=fl.from_flex(score, mask))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5, msg=lambda m: f"{text}: {m}")
