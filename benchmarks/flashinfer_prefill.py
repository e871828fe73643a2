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


def _pages(row: dict, first: int = 0, last: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr, indices, tokens on the last page) of requests first to last."""
    page = row["page"]
    needs, before = ([-(-n // page) for n in kv] for kv in (row["kv"][first:last], row["kv"][:first]))
    indices = row["order"][sum(before) : sum(before) + sum(needs)]
    lasts = [n - (m - 1) * page for n, m in zip(row["kv"][first:last], needs)]
    return _starts(needs), indices.to(row["inputs"][0].device), _int(lasts)


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


def pod(row: dict) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """BatchPODWithPagedKVCacheWrapper: the first request as the prefill, the others as decodes, in one launch. Answers
    both results."""
    import flashinfer

    heads, chunk, q = row["heads"], row["q"][0], row["inputs"][0]
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(_workspace(), "NHD")
    wrapper.plan(
        _starts([chunk]), *_pages(row, 0, 1), _starts(row["q"][1:]), *_pages(row, 1), heads.q_heads, heads.kv_heads,
        heads.dim, row["page"], q_data_type=BF16, kv_data_type=BF16,
    )  # fmt: skip
    return lambda: wrapper.run(q[:chunk], row["parts"], q[chunk:], row["parts"], causal_p=True)
