"""flashinfer.cascade: joining partial results, and attention over prefixes that requests share."""

from __future__ import annotations

from typing import Any

import torch

from flashloom.attention import merge
from flashloom.attention.merge import merge_many
from flashloom.compat.flashinfer import _later, utils
from flashloom.compat.flashinfer._plans import base_two
from flashloom.compat.flashinfer._single import single_prefill_with_kv_cache
from flashloom.compat.flashinfer._variants import LN2
from flashloom.compat.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from flashloom.compat.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]

__getattr__ = _later.names(__name__)


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two partial results over disjoint keys as one: v [tokens, heads, dim], s [tokens, heads] base-2 lse."""
    out, lse = merge(v_a, s_a.float() * LN2, v_b, s_b.float() * LN2)
    assert lse is not None
    return out, base_two(lse)


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """merge_state into v and s; with a mask [tokens] only where it is true."""
    out, lse = merge_state(v, s, v_other, s_other)
    if mask is not None:
        rows = mask.to(torch.bool)
        out, lse = torch.where(rows[:, None, None], out, v), torch.where(rows[:, None], lse, s.float())
    v.copy_(out)
    s.copy_(lse)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Any number of partial results: v [tokens, states, heads, dim], s [tokens, states, heads] base-2 lse."""
    out, lse = merge_many(v, s.float() * LN2)
    return out, base_two(lse)


def refuse_distances(levels: int, window_left: int | None, pos_encoding_mode: str) -> None:
    """Refuse what depends on the distance of a key: a level does not know the lengths of the others."""
    window = window_left is not None and window_left >= 0
    if levels > 1 and (window or pos_encoding_mode in ("ALIBI", "ROPE_LLAMA")):
        asked = f"window_left={window_left}" if window else f"pos_encoding_mode={pos_encoding_mode!r}"
        raise NotImplementedError(
            f"a cascade cannot do {asked}: its levels count positions each from their own start, not along the whole "
            "sequence. Give BatchPrefillWithPagedKVCacheWrapper one page table with the shared pages in front of each "
            "request's own"
            + (
                ""
                if pos_encoding_mode != "ROPE_LLAMA"
                else ", or rotate queries and keys before they are stored (pos_encoding_mode='NONE')"
            )
        )


class MultiLevelCascadeAttentionWrapper:
    """Attention over keys in levels: prefixes that many requests share first, what is a request's own last. Each level
    is planned with query offsets of its own, and the results are merged."""

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[torch.Tensor] | None = None,
    ):
        self._use_cuda_graph, self._num_levels, self._kv_layout = use_cuda_graph, num_levels, kv_layout
        none: list[Any] = [None] * num_levels
        buffers = zip(
            qo_indptr_buf_arr or none, paged_kv_indptr_buf_arr or none, paged_kv_indices_buf_arr or none,
            paged_kv_last_page_len_buf_arr or none, strict=True,
        )  # fmt: skip
        self._batch_prefill_wrappers = [
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, use_cuda_graph, *four)
            for four in buffers
        ]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: list[torch.Tensor]
    ) -> None:
        for wrapper, workspace in zip(self._batch_prefill_wrappers, int_workspace_buffers, strict=True):
            wrapper.reset_workspace_buffer(float_workspace_buffer, workspace)

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        """Prepare every level; causal concerns the last one. Raises NotImplementedError for what depends on a key's
        distance: each level counts positions from its own start."""
        try:
            self._plan_levels(
                (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len),
                num_qo_heads, num_kv_heads, head_dim, page_size, causal=causal, pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction, sm_scale=sm_scale, window_left=window_left,
                logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta,
                q_data_type=q_data_type, kv_data_type=kv_data_type,
            )  # fmt: skip
        except BaseException:
            for wrapper in self._batch_prefill_wrappers:  # one new level beside former ones would be no batch at all
                wrapper._plans.batch = None
            raise

    def _plan_levels(self, arrays: tuple, *sizes: int, causal: bool, **options: Any) -> None:
        for name, levels in zip(("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"), arrays):
            if len(levels) != self._num_levels:
                raise ValueError(f"{name} is given for {len(levels)} levels: this cascade has {self._num_levels}")
        refuse_distances(self._num_levels, options["window_left"], options["pos_encoding_mode"])
        for i, (wrapper, level) in enumerate(zip(self._batch_prefill_wrappers, zip(*arrays, strict=True), strict=True)):
            wrapper.plan(*level, *sizes, causal=causal and i == self._num_levels - 1, **options)
        rows = {int(wrapper._qo_indptr_last or 0) for wrapper in self._batch_prefill_wrappers}
        if len(rows) > 1:
            raise ValueError(f"qo_indptr of the levels end at {sorted(rows)}: every level must have all query tokens")

    begin_forward = plan

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Nothing to do: strides of keys and values are run-time arguments, independent of each other."""

    def run(self, q: torch.Tensor, paged_kv_cache: Any) -> torch.Tensor:
        """Attention of q [tokens, q_heads, head_dim] over all levels of one cache."""
        out, lse = self._batch_prefill_wrappers[-1].run(q, paged_kv_cache, return_lse=True)
        for wrapper in self._batch_prefill_wrappers[:-1]:
            merge_state_in_place(out, lse, *wrapper.run(q, paged_kv_cache, return_lse=True))
        return out

    forward = run

    def end_forward(self) -> None:
        """Nothing to do; the name is of earlier versions."""


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decode over one dense prefix that all requests share, and pages of their own."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"):
        utils._check_kv_layout(kv_layout)
        self._batch_decode_wrapper = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        self._batch_decode_wrapper.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: str | torch.dtype = "float16",
    ) -> None:
        self._batch_decode_wrapper.plan(
            unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
            page_size, q_data_type=data_type, kv_data_type=data_type,
        )  # fmt: skip

    def forward(self, q: torch.Tensor, k_shared: torch.Tensor, v_shared: torch.Tensor, unique_kv_cache: Any) -> Any:
        scale = self._batch_decode_wrapper._sm_scale
        shared = single_prefill_with_kv_cache(
            q, k_shared, v_shared, kv_layout=self._kv_layout, sm_scale=scale, return_lse=True
        )
        own = self._batch_decode_wrapper.run(q, unique_kv_cache, return_lse=True)
        return merge_state(*shared, *own)[0]

    def end_forward(self) -> None:
        """Nothing to do; the name is of earlier versions."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Prefill over one dense prefix that all requests share, and pages of their own."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"):
        utils._check_kv_layout(kv_layout)
        self._batch_prefill_wrapper = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        self._batch_prefill_wrapper.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        self._batch_prefill_wrapper.plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
            page_size, q_data_type=q_data_type, kv_data_type=kv_data_type,
        )  # fmt: skip

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Nothing to do: strides of keys and values are run-time arguments, independent of each other."""

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: Any,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Any:
        shared = single_prefill_with_kv_cache(
            q, k_shared, v_shared, causal=False, kv_layout=self._kv_layout, sm_scale=sm_scale, return_lse=True
        )
        own = self._batch_prefill_wrapper.forward_return_lse(
            q, unique_kv_cache, causal=causal, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta
        )
        return merge_state(*shared, *own)[0]

    def end_forward(self) -> None:
        """Nothing to do; the name is of earlier versions."""
