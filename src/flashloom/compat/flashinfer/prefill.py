"""flashinfer.prefill: attention of several query tokens per request, single and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import flashloom as fl
from flashloom.attention import Batch, Reserve
from flashloom.compat.flashinfer import _later, utils
from flashloom.compat.flashinfer import _plans as plans
from flashloom.compat.flashinfer._single import single_prefill_with_kv_cache, single_prefill_with_kv_cache_return_lse
from flashloom.compat.flashinfer._variants import ItemScoring, Rules, packed
from flashloom.compat.flashinfer._wrapper import Wrapper, check_buffer, planning, refuse_token_scales, with_lse
from flashloom.compat.flashinfer.jit.attention import gen_batch_prefill_module, gen_single_prefill_module
from flashloom.kv_cache.cache import KV

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "gen_batch_prefill_module",
    "gen_single_prefill_module",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]

__getattr__ = _later.names(__name__)


def check_copy(name: str, x: torch.Tensor, copy: torch.Tensor | None) -> None:
    """Offsets that are given on the host as well: as FlashInfer has it, in shape and dtype those on the device."""
    if copy is None:
        return
    if copy.device.type != "cpu":
        raise ValueError(f"{name}_cpu is on {copy.device}: must be a CPU tensor")
    if copy.shape != x.shape or copy.dtype != x.dtype:
        raise ValueError(
            f"{name}_cpu is {copy.dtype} {list(copy.shape)}: must be a copy of {name}, {x.dtype} {list(x.shape)}"
        )
    if x.device.type == "cpu" and not torch.equal(x, copy):
        raise ValueError(f"{name}_cpu = {copy.tolist()[:8]} differs from {name} = {x.tolist()[:8]}")


class _Prefill(Wrapper):
    """Offsets of queries, masks of one's own, and item scoring: what paged and ragged prefill share."""

    def _set_masks(
        self, use_cuda_graph: bool, qo_indptr_buf: Any, custom_mask_buf: Any, mask_indptr_buf: Any, **others: Any
    ) -> None:
        if use_cuda_graph:
            for name, x in (("qo_indptr_buf", qo_indptr_buf), *others.items()):
                check_buffer(name, x, "CUDA graph mode")
            self._fixed_batch_size = len(qo_indptr_buf) - 1
        self._qo_indptr_buf, self._custom_mask_buf = qo_indptr_buf, custom_mask_buf
        self._mask_indptr_buf = mask_indptr_buf
        self._qo_indptr_last: int | None = None
        self._max_q_len = 0
        self._max_kv_len = 0

    def _queries(self, qo_indptr: torch.Tensor) -> tuple[int, int, int]:
        """(requests, tokens, longest) of query offsets, which are read for it. In CUDA graph mode the first plan says
        how many tokens there can be, unless max_total_num_rows did."""
        host = plans.host_offsets("qo_indptr", qo_indptr)
        requests, tokens = host.numel() - 1, int(host[-1])
        longest = int((host[1:] - host[:-1]).max()) if requests else 0
        if self._use_cuda_graph:
            if requests != self._fixed_batch_size:
                raise ValueError(
                    f"The batch size should be fixed during the lifecycle of the wrapper in cuda graph mode, the "
                    f"runtime batch size {requests} mismatches the batch size {self._fixed_batch_size} set during "
                    "initialization."
                )
            if self._max_total_num_rows is None:
                self._max_total_num_rows = tokens
            elif tokens > self._max_total_num_rows:
                raise ValueError(
                    f"The total number of rows in qo_indptr {tokens} in cuda graph mode cannot exceed the number of "
                    f"rows set during initialization {self._max_total_num_rows}."
                )
        self._qo_indptr_last, self._max_q_len = tokens, longest
        return requests, tokens, longest

    def _keep(self, name: str, x: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        """An index array on the device: in the caller's buffer in CUDA graph mode."""
        x = plans.int32(x, x.device, name=name.strip("_").removesuffix("_buf"))
        if not self._use_cuda_graph:
            x = x.to(self.device, non_blocking=non_blocking)
            setattr(self, name, x)
            return x
        buffer = getattr(self, name)
        if len(x) > len(buffer):
            raise ValueError(f"The length of {name.strip('_').removesuffix('_buf')} exceeds the allocated buffer size.")
        buffer[: len(x)].copy_(x, non_blocking=non_blocking)
        return buffer

    def _own_mask(
        self,
        custom_mask: torch.Tensor | None,
        packed_custom_mask: torch.Tensor | None,
        q_indptr: torch.Tensor,
        kv_lens: torch.Tensor,
    ) -> fl.Variant | None:
        if custom_mask is None and packed_custom_mask is None:
            return None
        lens = (q_indptr[1:] - q_indptr[:-1]).to(torch.int64) * kv_lens.to(q_indptr.device)
        bits, starts = packed(custom_mask, packed_custom_mask, lens)
        bits, starts = bits.to(self.device).reshape(-1), starts.to(self.device)
        if not self._use_cuda_graph:
            self._custom_mask_buf, self._mask_indptr_buf = bits, starts
            return fl.packed_mask(bits, starts)
        for name in ("custom_mask_buf", "mask_indptr_buf"):
            if not isinstance(getattr(self, f"_{name}"), torch.Tensor):
                raise ValueError(
                    f"{name} must be initialized with a torch.Tensor in cuda graph mode if we use custom mask in "
                    "attention computation."
                )
        if len(bits) > len(self._custom_mask_buf):
            raise ValueError("The length of the packed mask exceeds the allocated buffer size of custom_mask_buf.")
        self._custom_mask_buf[: len(bits)].copy_(bits)
        self._mask_indptr_buf.copy_(starts)
        if self._mask is not None:
            return self._mask  # it reads the buffers
        return fl.packed_mask(self._custom_mask_buf, self._mask_indptr_buf)

    def _item_scoring(self, prefix: Any, positions: Any, length: int, longest: Any) -> fl.Variant | None:
        self._prefix_len_ptr, self._token_pos_in_items_ptr = prefix, positions
        self._token_pos_in_items_len, self._max_item_len_ptr = length, longest
        if prefix is None:
            return None
        prefix = plans.int32(prefix.reshape(-1), self.device, name="prefix_len_ptr")
        flat = plans.int32(positions.reshape(-1), self.device, name="token_pos_in_items_ptr")
        missing = prefix.numel() * length - flat.numel()
        table = torch.nn.functional.pad(flat, (0, max(missing, 0)))[: prefix.numel() * length]
        return ItemScoring(prefix=prefix, position=table.view(prefix.numel(), length))

    def _settle(
        self, mask: fl.Variant | None, fp16_reduction: bool, fixed_split_size: int | None, disable_split_kv: bool
    ) -> None:
        self._mask = mask
        if mask is not None:
            self._take_mask(mask)
        self._set_backend(*self._dims, fp16_reduction)
        # fixed splits, or none, are how FlashInfer makes a result independent of the rest of the batch
        self._batch_invariant = bool(disable_split_kv) or (fixed_split_size or 0) > 0

    def _reserve(self, pages: int | None) -> Reserve | None:
        if not self._use_cuda_graph:
            return None
        return Reserve(requests=self._fixed_batch_size, tokens=self._max_total_num_rows, pages=pages)

    def _check_rows(self, q: torch.Tensor) -> None:
        if q.shape[0] != self._qo_indptr_last:
            raise ValueError(
                f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({self._qo_indptr_last}). For prefill, q must "
                "have shape [total_tokens, num_heads, head_dim] where total_tokens = qo_indptr[-1]."
            )


class BatchPrefillWithPagedKVCacheWrapper(_Prefill):
    """Queries of several requests over paged keys and values; see FlashInfer's documentation of the same name.

    float_workspace_buffer: its device is where the wrapper computes; the memory is not used. Raises KeyError for an
    unknown layout, ValueError for what does not fit."""

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
        jit_args: Sequence[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
        max_total_num_rows: int | None = None,
    ):
        if max_total_num_rows is not None:
            if not use_cuda_graph:
                raise ValueError(
                    "max_total_num_rows is for CUDA graph mode: give use_cuda_graph=True too, or leave it out"
                )
            if type(max_total_num_rows) is not int or max_total_num_rows < 0:
                raise ValueError(f"max_total_num_rows={max_total_num_rows!r}: must be an int of 0 or more")
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs)
        self._max_total_num_rows = max_total_num_rows
        self._set_masks(
            use_cuda_graph, qo_indptr_buf, custom_mask_buf, mask_indptr_buf,
            paged_kv_indptr_buf=paged_kv_indptr_buf, paged_kv_indices_buf=paged_kv_indices_buf,
            paged_kv_last_page_len_buf=paged_kv_last_page_len_buf,
        )  # fmt: skip
        if use_cuda_graph:
            assert paged_kv_indptr_buf is not None
            assert paged_kv_last_page_len_buf is not None
            if len(paged_kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError("The length of paged_kv_indptr_buf should be batch_size + 1.")
            if len(paged_kv_last_page_len_buf) != self._fixed_batch_size:
                raise ValueError("The length of paged_kv_last_page_len_buf should be batch_size.")
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = paged_kv_indptr_buf, paged_kv_indices_buf
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buf
        self._page_size = 1

    @planning
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
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
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Prepare for a batch: query offsets [batch + 1], page table in CSR form, heads, and what is done to logits.

        Index arrays may be on the host or the device; the query offsets are read, which waits for the device. A custom
        mask (bool, flat, row-major per request) takes the place of causal."""
        refuse_token_scales(use_token_head_sf)
        qo_indptr = plans.int32(qo_indptr, qo_indptr.device, name="qo_indptr")
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len = plans.table(
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        )
        self._set_rules(causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        self._set_dtypes(q_data_type, kv_data_type, o_data_type)
        self._dims = head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo
        _, tokens, longest = self._queries(qo_indptr)
        kv_lens = plans.kv_lengths(paged_kv_indptr, paged_kv_last_page_len, page_size)  # where the offsets are
        q_indptr = self._keep("_qo_indptr_buf", qo_indptr, non_blocking)
        indptr = self._keep("_paged_kv_indptr_buf", paged_kv_indptr, non_blocking)
        self._keep("_paged_kv_last_page_len_buf", paged_kv_last_page_len, non_blocking)
        indices = self._keep("_paged_kv_indices_buf", paged_kv_indices, non_blocking)
        self._page_size, self._block_tables = page_size, block_tables
        self._num_qo_heads = num_qo_heads
        mask = self._own_mask(custom_mask, packed_custom_mask, qo_indptr, kv_lens)
        if mask is None:
            mask = self._item_scoring(prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        self._settle(mask, use_fp16_qk_reduction, fixed_split_size, disable_split_kv)
        lens = kv_lens.to(self.device, non_blocking=non_blocking)
        batch = plans.paged(q_indptr, longest, tokens, indptr, indices, lens, page_size)
        reserve = self._reserve(len(indices))
        self._follow(batch, self._form(num_qo_heads, num_kv_heads, *self._dims), reserve)

    begin_forward = plan

    def _plan_as_module(self, *numbers: Any) -> list[int]:
        qo_indptr, kv_indptr, kv_lens, _, _, q_heads, kv_heads, page_size, _, dim, value_dim = numbers[:11]
        _, tokens, longest = self._queries(qo_indptr)
        assert self._paged_kv_indices_buf is not None
        q_indptr, indptr, lens = (
            plans.int32(x, self.device, name=name)
            for name, x in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr), ("lengths", kv_lens))
        )
        self._dims, self._page_size = (dim, value_dim), page_size
        batch = plans.paged(q_indptr, longest, tokens, indptr, self._paged_kv_indices_buf, lens, page_size)
        self._follow(
            batch, self._form(q_heads, kv_heads, dim, value_dim), self._reserve(len(self._paged_kv_indices_buf))
        )
        assert self._plan_info is not None
        return self._plan_info

    def workspace_size(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
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
        o_data_type: str | torch.dtype | None = None,
        **others: Any,
    ) -> tuple[int, int]:
        """(bytes of the buffers that a plan for this batch owns, 16). Any workspace of the caller will do."""
        q_dtype = utils.canonicalize_torch_dtype(q_data_type)
        kv_dtype = q_dtype if kv_data_type is None else utils.canonicalize_torch_dtype(kv_data_type)
        host = plans.host_offsets("qo_indptr", qo_indptr)
        paged_kv_indptr, paged_kv_indices, last = plans.table(
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        )  # fmt: skip
        lens = plans.kv_lengths(paged_kv_indptr, last, page_size)
        longest = int((host[1:] - host[:-1]).max()) if len(host) > 1 else 0
        starts, indptr, indices, lens = (
            plans.int32(x, self.device) for x in (qo_indptr, paged_kv_indptr, paged_kv_indices, lens)
        )
        batch = plans.paged(starts, longest, int(host[-1]), indptr, indices, lens, page_size)
        form = plans.Form(
            num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, q_dtype, kv_dtype
        )  # fmt: skip
        rules = Rules.of(causal, window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
        return self._workspace_size(batch, form, rules)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Attention of q [tokens, q_heads, head_dim_qk] over the planned pages: out [tokens, q_heads, head_dim_vo], or
        (out, lse) with return_lse: float32 [tokens, q_heads], base 2."""
        self._check_rows(q)
        if window_left is not None:
            assert window_left == self._window_left, (window_left, self._window_left)
        return self._attend(
            q, (paged_kv_cache,), args, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
            return_lse=return_lse, lse_base=lse_base, lse_layout=lse_layout, sinks=sinks,
        )  # fmt: skip

    run_return_lse = with_lse(run)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """run() with what is given here in place of what plan() was given."""
        self._check_rows(q)
        return self._attend(
            q, (paged_kv_cache,), (), k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
            override=(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, causal),
        )  # fmt: skip

    forward_return_lse = with_lse(forward)


class BatchPrefillWithRaggedKVCacheWrapper(_Prefill):
    """Queries of several requests over keys and values that lie one request after another; see FlashInfer's
    documentation of the same name."""

    _ragged = True

    def _kv(self, k: torch.Tensor, v: torch.Tensor) -> KV:  # type: ignore[override]
        return self._rows(k, v)

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Sequence[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ):
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs)
        self._set_masks(use_cuda_graph, qo_indptr_buf, custom_mask_buf, mask_indptr_buf, kv_indptr_buf=kv_indptr_buf)
        if use_cuda_graph:
            assert kv_indptr_buf is not None
            if len(kv_indptr_buf) != self._fixed_batch_size + 1:
                raise ValueError(
                    f"The length of kv_indptr_buf ({len(kv_indptr_buf)}) should be the same as qo_indptr_buf "
                    f"({self._fixed_batch_size + 1})."
                )
        self._kv_indptr_buf = kv_indptr_buf

    @planning
    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
        qo_indptr_cpu: torch.Tensor | None = None,
        kv_indptr_cpu: torch.Tensor | None = None,
        uniform_q_len: int | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        """Prepare for a batch: offsets of queries and of keys [batch + 1], heads, and what is done to logits. The query
        offsets are read, which waits for the device unless qo_indptr_cpu holds them too."""
        refuse_token_scales(use_token_head_sf)
        if len(qo_indptr) != len(kv_indptr):
            raise ValueError("The length of qo_indptr and kv_indptr should be the same.")
        for name, x, copy in (("qo", qo_indptr, qo_indptr_cpu), ("kv", kv_indptr, kv_indptr_cpu)):
            check_copy(f"{name}_indptr", x, copy)
        qo_indptr = plans.int32(qo_indptr, qo_indptr.device, name="qo_indptr")
        kv_indptr = plans.int32(kv_indptr, kv_indptr.device, name="kv_indptr")
        plans.check_offsets("kv_indptr", kv_indptr)
        self._set_rules(causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        self._set_dtypes(q_data_type, kv_data_type, o_data_type)
        self._dims = head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo
        _, tokens, longest = self._queries(qo_indptr if qo_indptr_cpu is None else qo_indptr_cpu)
        q_indptr = self._keep("_qo_indptr_buf", qo_indptr, non_blocking)
        keys = self._keep("_kv_indptr_buf", kv_indptr, non_blocking)
        self._num_qo_heads = num_qo_heads
        mask = self._own_mask(custom_mask, packed_custom_mask, qo_indptr, kv_indptr[1:] - kv_indptr[:-1])
        if mask is None:
            mask = self._item_scoring(prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        self._settle(mask, use_fp16_qk_reduction, fixed_split_size, disable_split_kv)
        batch = plans.ragged(q_indptr, longest, tokens, keys)
        self._follow(batch, self._form(num_qo_heads, num_kv_heads, *self._dims), self._reserve(None))

    begin_forward = plan

    def _plan_as_module(self, *numbers: Any) -> list[int]:
        qo_indptr, kv_indptr, _, _, _, q_heads, kv_heads, _, _, dim, value_dim = numbers[:11]
        _, tokens, longest = self._queries(qo_indptr)
        q_indptr = plans.int32(qo_indptr, self.device, name="qo_indptr")
        keys = plans.int32(kv_indptr, self.device, name="kv_indptr")
        self._dims = dim, value_dim
        batch: Batch = plans.ragged(q_indptr, longest, tokens, keys)
        self._follow(batch, self._form(q_heads, kv_heads, dim, value_dim), self._reserve(None))
        assert self._plan_info is not None
        return self._plan_info

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """Attention of q [tokens, q_heads, head_dim_qk] over k [kv_tokens, kv_heads, head_dim_qk] and v [kv_tokens,
        kv_heads, head_dim_vo] (heads first in "HND"): out, or (out, lse) with return_lse, base 2."""
        if o_scale is not None and o_scale != 1.0:
            raise NotImplementedError(
                f"o_scale={o_scale}: FlashInfer's backends disagree whether it multiplies or divides the result; give "
                "the factor as v_scale="
            )
        self._check_rows(q)
        return self._attend(
            q, (k, v), args, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out=out,
            lse=lse, return_lse=return_lse, lse_base=lse_base, lse_layout=lse_layout,
        )  # fmt: skip

    run_return_lse = with_lse(run)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """run() with what is given here in place of what plan() was given."""
        self._check_rows(q)
        return self._attend(
            q, (k, v), (), return_lse=return_lse,
            override=(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, causal),
        )  # fmt: skip

    forward_return_lse = with_lse(forward)
