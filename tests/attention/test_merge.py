"""Partial results joined, against attention over all keys in float64."""

from __future__ import annotations

import pytest
import torch

import flashloom as fl
from flashloom.attention.merge import merge_many, merge_ragged

EMPTY = [-torch.inf, torch.inf]  # flashloom's sign of a part without keys, and flash-attention's


def part(q, k, v):
    """(out, lse) in float64 by rows; rows over no keys hold NaN, which must not count."""
    if not len(k):
        return torch.full((*q.shape[:2], v.shape[-1]), torch.nan), torch.full(q.shape[:2], -torch.inf)
    s = torch.einsum("nhd,mhd->nhm", q.double(), k.double())
    return torch.einsum("nhm,mhd->nhd", s.softmax(-1), v.double()).float(), s.logsumexp(-1).float()


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("sizes", [(4, 6), (0, 10), (10, 0)])
def test_a_part_without_keys_has_no_weight(sizes, empty):
    q, k, v = torch.randn(7, 3, 8), torch.randn(10, 3, 8), torch.randn(10, 3, 8)
    want, want_lse = part(q, k, v)
    parts = [part(q, k[: sizes[0]], v[: sizes[0]]), part(q, k[sizes[0] :], v[sizes[0] :])]
    marked = [(out, lse.masked_fill(lse == -torch.inf, empty)) for out, lse in parts]
    got, lse = fl.merge(*marked[0], *marked[1])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)
    outs, lses = (torch.stack(x, 1) for x in zip(*marked, strict=True))
    for got, lse in (
        merge_many(outs, lses),
        merge_ragged(outs.flatten(0, 1), lses.flatten(0, 1), torch.arange(0, 15, 2)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("a", EMPTY)
@pytest.mark.parametrize("b", EMPTY)
def test_where_no_part_saw_a_key_the_row_is_zero(a, b):
    bad = torch.full((2, 3, 8), torch.nan)
    rows = torch.full((2, 3), a), torch.full((2, 3), b)
    results = [fl.merge(bad, rows[0], bad, rows[1])]
    results.append(merge_many(torch.stack([bad, bad], 1), torch.stack(rows, 1)))
    results.append(merge_ragged(bad.repeat(2, 1, 1), torch.cat(rows), torch.tensor([0, 2, 4])))
    for out, lse in results:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def test_parts_of_softmax_are_not_added():
    a, b = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match="needs both lse"):
        fl.merge(a, None, b, None)
    with pytest.raises(ValueError, match="needs both lse"):
        fl.merge(a, None, b, None, variant=fl.softcap(3.0))
    out, lse = fl.merge(a, None, b, None, variant=fl.sigmoid())
    assert lse is None
    torch.testing.assert_close(out, a + b)
