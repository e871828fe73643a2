"""FlashInfer's kernels on the rows of `gpu_prefill.py`, where it is installed. Each answers what a CUDA graph can
capture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

BF16 = torch.bfloat16


def _workspace() -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def _int(x: list[int]) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def _starts(lengths: list[int]) -> torch.Tensor:
    return _int([0, *accumulate(lengths)])


def _pages(row: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr, indices, tokens on the last page)."""
    page = row["page"]
    needs = [-(-n // page) for n in row["kv"]]
    return _starts(needs), row["order"].cuda(), _int([n - (m - 1) * page for n, m in zip(row["kv"], needs)])


def ragged(row: dict) -> Callable[[], torch.Tensor]:
    """BatchPrefillWithRaggedKVCacheWrapper, fa3."""
    import flashinfer

    heads = row["heads"]
    q, k, v = row["inputs"]
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(), "NHD", backend="fa3")
    wrapper.plan(
        _starts(row["q"]), _starts(row["kv"]), heads.q_heads, heads.kv_heads, heads.dim,
        causal=row["variant"] == "causal", q_data_type=BF16, kv_data_type=BF16,
    )  # fmt: skip
    return lambda: wrapper.run(q, k, v)


def paged(row: dict) -> Callable[[], torch.Tensor]:
    """BatchPrefillWithPagedKVCacheWrapper, fa3."""
    import flashinfer

    heads = row["heads"]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa3")
    wrapper.plan(
        _starts(row["q"]), *_pages(row), heads.q_heads, heads.kv_heads, heads.dim, row["page"],
        causal=row["variant"] == "causal", q_data_type=BF16, kv_data_type=BF16,
    )  # fmt: skip
    return lambda: wrapper.run(row["inputs"][0], row["parts"])


def batch_attention(row: dict) -> Callable[[], torch.Tensor]:
    """BatchAttention: prefill and decode in one launch."""
    import flashinfer

    heads = row["heads"]
    indptr, indices, _ = _pages(row)
    wrapper = flashinfer.BatchAttention(kv_layout="NHD")
    wrapper.plan(
        _starts(row["q"]), indptr, indices, _int(row["kv"]), heads.q_heads, heads.kv_heads, heads.dim, heads.dim,
        row["page"], causal=True, q_data_type=BF16, kv_data_type=BF16,
    )  # fmt: skip
    out = torch.empty_like(row["inputs"][0])
    lse = torch.empty(out.shape[:2], device="cuda")
    return lambda: wrapper.run(row["inputs"][0], row["parts"], out=out, lse=lse)[0]
