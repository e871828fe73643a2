"""Rows whose scores a number fills, such as torch.finfo(torch.float32).min: the mean of their values, as in torch."""

from __future__ import annotations

import pytest
import torch

import flashloom as fl

LOW = torch.finfo(torch.float32).min
N = 150
TABLE = torch.where(torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.4, LOW, 0.0)
TABLE[:9] = LOW
DROPPED = TABLE != 0
NARROW = torch.where(DROPPED, torch.finfo(torch.bfloat16).min, 0.0).bfloat16()


class Filled(fl.Variant):
    """The number is a field, whose value no kernel knows."""

    low: float

    def logits_transform(self, logits, at):
        return torch.where(at.q_pos % 4 == 0, self.low, logits)


CASES = {
    "where": (lambda s, b, h, i, j: torch.where(i % 4 < 2, LOW, s), lambda s, i, j: torch.where(i % 4 < 2, LOW, s)),
    "beside others": (
        lambda s, b, h, i, j: torch.where(DROPPED[i, j], LOW, s),
        lambda s, i, j: torch.where(DROPPED, LOW, s),
    ),
    "a table": (lambda s, b, h, i, j: s + TABLE[i, j], lambda s, i, j: s + TABLE),
    "a table of bfloat16": (lambda s, b, h, i, j: s + NARROW[i, j], lambda s, i, j: s + NARROW.double()),
    "a product": (lambda s, b, h, i, j: s + DROPPED[i, j].float() * LOW, lambda s, i, j: s + DROPPED.double() * LOW),
    "with -inf": (
        lambda s, b, h, i, j: torch.where(j > i, -torch.inf, torch.where(i % 4 < 2, LOW, s)),
        lambda s, i, j: torch.where(j > i, -torch.inf, torch.where(i % 4 < 2, LOW, s)),
    ),
    "1e30": (lambda s, b, h, i, j: torch.where(i < 9, -1e30, s), lambda s, i, j: torch.where(i < 9, -1e30, s)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [N, 3])
def test_filled_rows_are_means(name, dtype, rows):
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 64, dtype=dtype) for n in (rows, N, N))
    score, plain = CASES[name]
    i, j = torch.arange(N).view(-1, 1), torch.arange(N)
    scores = torch.empty(2, rows, N, dtype=torch.float64)
    for h in range(2):
        s = q[0, h].double() @ k[0, h].double().T / 8
        wide = torch.zeros(N, N, dtype=torch.float64)
        wide[:rows] = s
        scores[h] = plain(wide, i, j)[:rows]
    # float32 absorbs what is added to its lowest number
    scores = scores.clamp(min=LOW).masked_fill(scores == -torch.inf, -torch.inf)
    scores = torch.where((scores < LOW / 2) & (scores > -torch.inf), LOW, scores)
    expected = torch.softmax(scores, -1) @ v[0].double()
    got = fl.attention(q, k, v, variant=fl.from_flex(score))[0]
    torch.testing.assert_close(got.double(), expected, atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=0)


def test_a_number_that_is_a_field():
    q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
    got = fl.attention(q, k, v, variant=Filled(low=LOW))
    torch.testing.assert_close(got[:, :, ::4], v.mean(2, keepdim=True).expand(-1, -1, 10, -1), atol=1e-5, rtol=0)
    plain = fl.attention(q, k, v)
    torch.testing.assert_close(got[:, :, 1::4], plain[:, :, 1::4], atol=1e-5, rtol=0)
    excluded = fl.attention(q, k, v, variant=Filled(low=-torch.inf))
    assert torch.equal(excluded[:, :, ::4], torch.zeros(1, 2, 10, 32))


def test_what_cannot_fill_costs_nothing():
    """Slopes and scales are factors; hooks that only multiply by them are as they were."""
    for variant in (fl.alibi(4), fl.softcap(30.0), fl.length_temperature(64)):
        assert "eq(" not in repr(variant.program.logits)
    large = fl.from_flex(lambda s, b, h, i, j: torch.where(j > i, LOW, s)).program.logits
    assert "max(" not in repr(large)
