"""NaN is never hidden: a query's reaches its row alone, a value's the rows that see it."""

from __future__ import annotations

import math

import pytest
import torch

import flashloom as fl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 4, 80])
def test_nan_reaches_the_rows_that_see_it(dtype: torch.dtype, q_len: int) -> None:
    kv_len = q_len + 40
    q, k, v = (torch.randn(n, h, 64, dtype=dtype) for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2)))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fl.attention(q, k, v, variant=fl.causal, return_lse=True)

    clean, lse = attend(q, k, v)
    bad = q.clone()
    bad[-1, 1, 3] = math.nan
    out, out_lse = attend(bad, k, v)
    assert out[-1, 1].isnan().all()
    assert out_lse[-1, 1].isnan()
    out[-1, 1], out_lse[-1, 1] = clean[-1, 1], lse[-1, 1]
    torch.testing.assert_close(out, clean)
    torch.testing.assert_close(out_lse, lse)

    bad = v.clone()
    bad[-1, 0, 5] = math.nan
    out, out_lse = attend(q, k, bad)
    assert out[-1, :2, 5].isnan().all()
    assert not out[:, 2:].isnan().any()
    torch.testing.assert_close(out_lse, lse)
