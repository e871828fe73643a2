"""flashinfer.decode: attention of one query token per request (or a few, when tokens are verified)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from flashloom.attention import Batch, Reserve
from flashloom.compat.flashinfer import _later, utils
from flashloom.compat.flashinfer import _plans as plans
from flashloom.compat.flashinfer._single import single_decode_with_kv_cache
from flashloom.compat.flashinfer._tables import trtllm_batch_decode_with_kv_cache, xqa_batch_decode_with_kv_cache
from flashloom.compat.flashinfer._variants import Rules
from flashloom.compat.flashinfer._wrapper import Wrapper, check_buffer, planning, refuse_token_scales, with_lse
from flashloom.compat.flashinfer.jit.attention import gen_batch_decode_module, gen_single_decode_module

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "gen_batch_decode_module",
    "gen_single_decode_module",
    "single_decode_with_kv_cache",
    "trtllm_batch_decode_with_kv_cache",
    "xqa_batch_decode_with_kv_cache",
]

__getattr__ = _later.names(__name__)

#: The order in which plan() once took these, behind page_size.
POSITIONAL = (
    "pos_encoding_mode", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "o_data_type", "data_type",
    "sm_scale", "rope_scale", "rope_theta", "non_blocking", "block_tables", "seq_lens", "fixed_split_size",
    "disable_split_kv",
)  # fmt: skip


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """One query token per request over paged keys and values; see FlashInfer's documentation of the same name.

    float_workspace_buffer: its device is where the wrapper computes; the memory is not used. use_tensor_cores is
    FlashInfer's choice of kernel, which flashloom makes itself; as there, several tokens per request need it."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Sequence[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs)
        self._use_tensor_cores = bool(use_tensor_cores)
        self._paged_kv_indptr_buf, self._paged_kv_indices_buf = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self._qo_indptr_buf: torch.Tensor | None = None
        self._q_len_per_req: int | None = None
        self._page_size = 1
        if use_cuda_graph:
            for name, x in (
                ("paged_kv_indptr_buffer", paged_kv_indptr_buffer),
                ("paged_kv_indices_buffer", paged_kv_indices_buffer),
                ("paged_kv_last_page_len_buffer", paged_kv_last_page_len_buffer),
            ):
                check_buffer(name, x, "cudagraph mode")
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            self._fixed_batch_size = len(paged_kv_last_page_len_buffer)
            if len(paged_kv_indptr_buffer) != self._fixed_batch_size + 1:
                raise ValueError("The size of paged_kv_indptr_buffer should be batch_size + 1")

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    @property
    def resolved_backend(self) -> str:
        return self._backend

    @planning
    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated: Any,
        **options: Any,
    ) -> None:
        """Prepare for a batch: page table in CSR form, heads, and by keyword pos_encoding_mode, window_left,
        logits_soft_cap, q_data_type, kv_data_type, o_data_type, data_type, sm_scale, rope_scale, rope_theta,
        non_blocking, q_len_per_req and the rest of FlashInfer's options. Index arrays may be on the host or the device;
        nothing there is read unless there are several tokens per request."""
        if len(deprecated) > len(POSITIONAL):
            raise TypeError(f"plan() takes at most {len(POSITIONAL)} optional positional arguments after page_size")
        if deprecated:
            warnings.warn(
                "Passing optional arguments to plan() positionally is deprecated; pass them as keyword arguments",
                DeprecationWarning,
                stacklevel=2,
            )
            for name, value in zip(POSITIONAL, deprecated):
                if name in options:
                    raise TypeError(f"plan() got multiple values for argument {name!r}")
                options[name] = value
        self._plan_impl(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **options)

    begin_forward = plan

    def _plan_impl(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        is_causal: bool | None = None,
        use_token_head_sf: bool = False,
    ) -> None:
        refuse_token_scales(use_token_head_sf)
        if window_right != 0:
            raise NotImplementedError(f"window_right={window_right}: decode takes 0, its queries are the last tokens")
        indptr, indices, last_page_len = plans.table(indptr, indices, last_page_len)
        batch_size = len(last_page_len)
        self._check(batch_size, indices, q_len_per_req, fixed_split_size)
        if self._use_cuda_graph:
            assert self._paged_kv_indptr_buf is not None
            assert self._paged_kv_indices_buf is not None
            assert self._paged_kv_last_page_len_buf is not None
            self._paged_kv_indptr_buf.copy_(indptr, non_blocking=non_blocking)
            self._paged_kv_last_page_len_buf.copy_(last_page_len, non_blocking=non_blocking)
            self._paged_kv_indices_buf[: len(indices)].copy_(indices, non_blocking=non_blocking)
        else:
            self._paged_kv_indptr_buf = plans.int32(indptr, self.device, non_blocking)
            self._paged_kv_last_page_len_buf = plans.int32(last_page_len, self.device, non_blocking)
            self._paged_kv_indices_buf = plans.int32(indices, self.device, non_blocking)
        if q_len_per_req > 1:
            lens = plans.on_host(plans.kv_lengths(indptr, last_page_len, page_size))
            if batch_size and int(lens.min()) < q_len_per_req:
                raise ValueError(
                    f"q_len_per_req={q_len_per_req} requires kv_len >= q_len_per_req for every request, but one has "
                    f"kv_len={int(lens.min())}: its earlier rows would attend to an empty KV range."
                )
        causal = q_len_per_req > 1 if is_causal is None else is_causal
        self._set_rules(causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta)
        self._set_types(q_data_type, kv_data_type, o_data_type, data_type)
        self._dims = head_dim, head_dim
        self._batch_invariant = bool(disable_split_kv) or (fixed_split_size or 0) > 0
        self._block_tables = block_tables
        if self._use_tensor_cores:
            self._set_backend(head_dim, head_dim, False)
            if self._asked_backend == "auto" and self._cached_kv_data_type.itemsize > 1:
                self._backend = "fa2"
            if q_len_per_req > 1 and self._backend == "fa3":
                raise NotImplementedError(
                    "q_len_per_req > 1 is currently only supported on the fa2 tensor-core backend."
                )
        elif self._asked_backend == "auto":
            self._backend = "fa2"
        self._page_size, self._q_len_per_req = page_size, q_len_per_req
        self._start(num_qo_heads, num_kv_heads)

    def _check(self, batch_size: int, indices: torch.Tensor, q_len: int, fixed_split_size: int | None) -> None:
        if q_len < 1:
            raise ValueError(f"q_len_per_req must be >= 1, got {q_len}")
        if q_len > 1 and not self._use_tensor_cores:
            raise ValueError("q_len_per_req > 1 requires tensor-core decode (use_tensor_cores=True).")
        if fixed_split_size is not None and fixed_split_size > 0 and not self._use_tensor_cores:
            raise ValueError("fixed_split_size is only supported by tensor core decode for now.")
        if not self._use_cuda_graph:
            return
        if self._q_len_per_req is not None and self._q_len_per_req != q_len:
            raise ValueError(
                f"q_len_per_req is part of the frozen cudagraph shape: this wrapper was planned with "
                f"{self._q_len_per_req}, got {q_len}. Use a separate wrapper per q_len_per_req."
            )
        if batch_size != self._fixed_batch_size:
            raise ValueError(
                f"The batch size should be fixed in cudagraph mode, the runtime batch size {batch_size} mismatches the "
                f"batch size set during initialization {self._fixed_batch_size}"
            )
        assert self._paged_kv_indices_buf is not None
        if len(indices) > len(self._paged_kv_indices_buf):
            raise ValueError("The size of indices should be less than or equal to the allocated buffer")

    def _set_types(self, q: Any, kv: Any, out: Any, both: Any) -> None:
        q = both if q is None else q
        if kv is None:
            kv = q if both is None else both
        self._set_dtypes("float16" if q is None else q, kv, out)

    def _start(self, num_qo_heads: int, num_kv_heads: int) -> None:
        """Plan for what the wrapper's index arrays say now."""
        indptr, last = self._paged_kv_indptr_buf, self._paged_kv_last_page_len_buf
        assert indptr is not None
        assert last is not None
        lens = plans.kv_lengths(indptr, last, self._page_size)
        self._follow_tables(lens, num_qo_heads, num_kv_heads)

    def _follow_tables(self, lens: torch.Tensor, num_qo_heads: int, num_kv_heads: int) -> None:
        indptr, indices = self._paged_kv_indptr_buf, self._paged_kv_indices_buf
        assert indptr is not None
        assert indices is not None
        requests, q_len = lens.numel(), self._q_len_per_req or 1
        starts = utils._get_range_buf(requests + 1, self.device)
        if q_len > 1:
            starts = starts * q_len
        batch = plans.paged(starts, q_len, requests * q_len, indptr, indices, lens, self._page_size)
        reserve = None
        if self._use_cuda_graph:
            reserve = Reserve(requests=requests, tokens=requests * q_len, pages=len(indices))
        self._follow(batch, self._form(num_qo_heads, num_kv_heads, *self._dims), reserve)

    def _plan_as_module(self, *numbers: Any) -> list[int]:
        if len(numbers) < 13:  # without tensor cores: offsets, batch, heads, page size, ...
            indptr, _, q_heads, kv_heads, page_size = numbers[:5]
            last = self._paged_kv_last_page_len_buf
            assert last is not None
            indptr = plans.int32(indptr, self.device, name="indptr")
            lens = plans.kv_lengths(indptr, last, page_size)
        else:
            _, indptr, lens, _, _, q_heads, kv_heads, page_size = numbers[:8]
            indptr = plans.int32(indptr, self.device, name="indptr")
            lens = plans.int32(lens, self.device, name="lengths")
        if self._use_cuda_graph:
            assert self._paged_kv_indptr_buf is not None
            self._paged_kv_indptr_buf.copy_(indptr)
        else:
            self._paged_kv_indptr_buf = indptr
        self._page_size = page_size
        self._follow_tables(lens, q_heads, kv_heads)
        assert self._plan_info is not None
        return self._plan_info

    def workspace_size(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> tuple[int, int]:
        """(bytes of the buffers that a plan for this batch owns, 16). Any workspace of the caller will do."""
        self._check(len(last_page_len), indices, q_len_per_req, fixed_split_size)
        q_dtype = utils.canonicalize_torch_dtype(q_data_type or data_type or "float16")
        kv_dtype = utils.canonicalize_torch_dtype(kv_data_type or data_type or q_dtype)
        indptr, indices, last = (x.to(self.device) for x in plans.table(indptr, indices, last_page_len))
        lens = plans.kv_lengths(indptr, last, page_size)
        starts = utils._get_range_buf(len(last) + 1, self.device) * q_len_per_req
        batch: Batch = plans.paged(
            starts, q_len_per_req, len(last) * q_len_per_req, indptr, indices, lens, page_size
        )  # fmt: skip
        rules = Rules.of(q_len_per_req > 1, window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
        form = plans.Form(num_qo_heads, num_kv_heads, head_dim, head_dim, q_dtype, kv_dtype)
        return self._workspace_size(batch, form, rules)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """Attention of q [batch * q_len_per_req, q_heads, head_dim] over the planned pages: out in q's form, or (out,
        lse) with return_lse: float32 [rows, q_heads], base 2. sinks: float32 [q_heads]."""
        if q_len_per_req is not None:
            warnings.warn(
                "q_len_per_req belongs to plan(); passing it to run() is deprecated", DeprecationWarning, stacklevel=2
            )
        self._check_rows(q, q_len_per_req)
        if window_left is not None:
            assert window_left == self._window_left, (window_left, self._window_left)
        return self._attend(
            q, (paged_kv_cache,), args, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
            return_lse=return_lse, sinks=sinks,
        )  # fmt: skip

    def _check_rows(self, q: torch.Tensor, q_len_per_req: int | None = None) -> None:
        planned = q_len_per_req or self._q_len_per_req or 1
        if q.shape[0] != self._batch_size * planned and self._plans.batch is not None:
            raise ValueError(
                f"q has {q.shape[0]} rows for {self._batch_size} requests, which implies "
                f"q_len_per_req={q.shape[0] / max(self._batch_size, 1):g}, but plan() used {planned}; re-plan with the "
                "matching q_len_per_req"
            )

    run_return_lse = with_lse(run)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
            q, (paged_kv_cache,), (), q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
            override=(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, None),
        )  # fmt: skip

    forward_return_lse = with_lse(forward)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The decode wrapper in CUDA graph mode, over the caller's index buffers."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ):
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )


@planning
def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: str | torch.dtype | None = None,
    kv_data_type: str | torch.dtype | None = None,
    data_type: str | torch.dtype | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """plan() of a decode wrapper that was planned before, for one that writes the index buffers itself: in CUDA graph
    mode `indptr`, `indices` and `last_page_len` are those buffers' contents and are not copied."""
    if self._plan_info is None:
        raise ValueError("fast_decode_plan needs a prior plan() of this wrapper")
    indptr, indices, last_page_len = plans.table(indptr, indices, last_page_len)
    batch_size = len(last_page_len)
    self._check(batch_size, indices, q_len_per_req, fixed_split_size)
    if not self._use_cuda_graph:
        self._paged_kv_indptr_buf = plans.int32(indptr, self.device, non_blocking)
        self._paged_kv_indices_buf = plans.int32(indices, self.device, non_blocking)
        self._paged_kv_last_page_len_buf = plans.int32(last_page_len, self.device, non_blocking)
    self._set_rules(
        q_len_per_req > 1, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta
    )
    if not (q_data_type is kv_data_type is data_type is None):
        self._set_types(q_data_type, kv_data_type, None, data_type)
    self._dims, self._page_size, self._q_len_per_req = (head_dim, head_dim), page_size, q_len_per_req
    self._batch_invariant = bool(disable_split_kv) or (fixed_split_size or 0) > 0
    self._start(num_qo_heads, num_kv_heads)
