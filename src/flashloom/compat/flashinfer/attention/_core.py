"""Mixed batches, and prefill with attention sinks."""

from __future__ import annotations

from typing import Any

import torch

from flashloom.compat.flashinfer import _plans as plans
from flashloom.compat.flashinfer._jit import SINK_TEXT
from flashloom.compat.flashinfer._wrapper import Wrapper, planning
from flashloom.compat.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper


class BatchAttention(Wrapper):
    """Prefill, append and decode of one mixed batch over pages, by one plan. `device`: where it computes."""

    _tokens = 0

    def __init__(self, kv_layout: str = "NHD", device: str = "cuda"):
        super().__init__(torch.empty(0, dtype=torch.uint8, device=device), kv_layout, False, "auto", None)

    @planning
    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Prepare for a batch: offsets of queries and of pages [batch + 1], page numbers, lengths [batch]."""
        if use_profiler:
            raise NotImplementedError("use_profiler=True: flashloom's kernels write no profile into a buffer")
        host = plans.host_offsets("qo_indptr", qo_indptr)
        tokens, longest = int(host[-1]), int((host[1:] - host[:-1]).max()) if len(host) > 1 else 0
        self._tokens = tokens
        self._set_rules(causal, -1, logits_soft_cap, "NONE", sm_scale, None, None)
        self._set_dtypes(q_data_type, kv_data_type, None)
        self._dims, self._page_size = (head_dim_qk, head_dim_vo), page_size
        q_indptr, indptr, indices, lens = (
            x.to(self.device)
            for x in (
                plans.int32(qo_indptr, qo_indptr.device),
                *plans.table(kv_indptr, kv_indices, kv_len_arr, "kv_len_arr"),
            )
        )
        batch = plans.paged(q_indptr, longest, tokens, indptr, indices, lens, page_size)
        self._follow(batch, self._form(num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo))

    def run(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [tokens, q_heads, head_dim_vo], lse float32 [tokens, q_heads], base 2)."""
        if self._plans.batch is not None and q.shape[0] != self._tokens:
            raise ValueError(f"q has {q.shape[0]} rows but plan() was given {self._tokens} query tokens: must be equal")
        if logits_soft_cap > 0 and self._logits_soft_cap <= 0:
            raise ValueError("logits_soft_cap used in kernel run but not provided in plan()")
        return self._attend(q, (kv_cache,), (), k_scale=k_scale, v_scale=v_scale, out=out, lse=lse, return_lse=True)


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """Paged prefill with one sink logit per query head: run(q, kv, sinks, sm_scale)."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ):
        jit_args = (
            "batch_prefill_attention_sink", q_data_type, kv_data_type, q_data_type, torch.int32, head_dim_qk,
            head_dim_vo, ["sink"], ["float"], ["sm_scale"], ["double"], "AttentionSink", SINK_TEXT,
        )  # fmt: skip
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf,
            paged_kv_indices_buf, paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, backend, jit_args,
        )  # fmt: skip
