"""Indices of FlexAttention functions that leave their tensors, against eager FlexAttention: its result, or an error
where it raises an IndexError."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import flashloom as fl
from flashloom import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def by_the_definition():
    """Nothing is compiled: what is refused is refused before a kernel is chosen."""
    with dispatch.only("reference"):
        yield


FORMS = {
    "difference": lambda b, h, i, j: i - j,
    "shifted": lambda b, h, i, j: i - j + 7,
    "sum": lambda b, h, i, j: i + 2 * j - 3,
    "distance": lambda b, h, i, j: (i - j).abs(),
    "bounded": lambda b, h, i, j: torch.clamp(j - i, -2, 3) + 2,
    "half bounded": lambda b, h, i, j: torch.clamp(j - i, min=-2) + 2,
    "blocks": lambda b, h, i, j: (i - j) // 3 + 2,
    "heads": lambda b, h, i, j: h * 3 + j - i,
    "requests": lambda b, h, i, j: 5 * b - j,
    "scaled distance": lambda b, h, i, j: 2 * (j - i).abs() - 4,
    "key": lambda b, h, i, j: j,
    "backwards": lambda b, h, i, j: -1 - j,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_an_index_that_leaves_its_tensor(name, masked):
    rng, form = random.Random(f"{name} {masked}"), FORMS[name]
    seen = set()
    for trial in range(8):
        n, m, requests = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 3)
        places = [
            int(form(*(torch.tensor(x) for x in (b, h, i, j))))
            for b in range(requests)
            for h in range(2)
            for i in range(n)
            for j in range(m)
        ]
        least = max(max(places) + 1, -min(places), 1)  # entries with which no index leaves the tensor
        size = max(least + (0, -1, 2, -3)[trial % 4], 1)
        x = torch.randn(size)
        q, k, v = torch.randn(requests, 2, n, 16), *torch.randn(2, requests, 2, m, 16)

        def score(s, b, h, i, j):
            return s + x[form(b, h, i, j)]  # noqa: B023

        def keep(b, h, i, j):
            return j <= i

        mask = {"mask_mod": keep} if masked else {}
        variant = fl.from_flex(score, **mask)
        if size >= least:
            block = create_block_mask(keep, None, None, n, m, device="cpu") if masked else None
            want = flex_attention(q, k, v, score_mod=score, block_mask=block)
            torch.testing.assert_close(fl.attention(q, k, v, variant=variant), want, rtol=1e-4, atol=1e-5)
            seen.add("right")
        else:
            with pytest.raises(IndexError):
                flex_attention(q, k, v, score_mod=score)
            with pytest.raises(ValueError, match=rf"\[{size}\]"):
                fl.attention(q, k, v, variant=variant)
            seen.add("refused")
    assert "right" in seen
    assert name == "bounded" or "refused" in seen


def test_each_request_counts_with_its_own_lengths():
    """A long query beside few keys, and few queries beside many keys: their sum is what neither alone reaches."""
    x = torch.randn(14)
    variant = fl.from_flex(lambda s, b, h, i, j: s + x[i + j])
    attn = fl.Attention(fl.HeadShape(2, 2, 16), variant=variant, dtype=torch.float32, device="cpu")
    plan = attn.plan(fl.Batch([9, 3], kv=fl.RaggedKV([4, 12])))
    with pytest.raises(ValueError, match=r"\[14\].*indexed with 14 .* 4 queries and 12 keys of request 1"):
        plan.update(fl.Batch([9, 4], kv=fl.RaggedKV([4, 12])))
    plan.update(fl.Batch([9, 4, 0], kv=fl.RaggedKV([4, 11, 99])))


def test_indices_by_lengths_and_absolute_positions():
    x = torch.randn(6)
    last = fl.from_flex(lambda s, b, h, i, j: s + x[i - j], q_index="absolute")
    attn = fl.Attention(fl.HeadShape(2, 2, 16), variant=last, dtype=torch.float32, device="cpu")
    attn.plan(fl.Batch([2], kv=fl.RaggedKV([6])))
    with pytest.raises(ValueError, match="indexed with 6"):
        attn.plan(fl.Batch([1], kv=fl.RaggedKV([7])))
