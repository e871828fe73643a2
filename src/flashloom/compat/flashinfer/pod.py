"""flashinfer.pod: one request's prefill together with a batch of decodes, here one call after the other."""

from __future__ import annotations

from typing import Any

import torch

from flashloom.compat.flashinfer import _later
from flashloom.compat.flashinfer._single import single_prefill_with_kv_cache
from flashloom.compat.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from flashloom.compat.flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

__all__ = ["BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"]

__getattr__ = _later.names(__name__)


class PODWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """Decode over pages as planned, and the prefill of one request over dense keys and values."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        jit_args: Any = None,
    ):
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, False, paged_kv_indptr_buffer, paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer, jit_args=jit_args,
        )  # fmt: skip

    def run(  # type: ignore[override]
        self,
        q_p: torch.Tensor,
        k_p: torch.Tensor,
        v_p: torch.Tensor,
        q_d: torch.Tensor,
        paged_kv_cache_d: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: torch.Tensor | None = None,
        packed_custom_mask_d: torch.Tensor | None = None,
        causal_d: bool = False,
        kv_layout_d: str = "NHD",
        pos_encoding_mode_d: str = "NONE",
        sm_scale_d: float | None = None,
        window_left_d: int = -1,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
    ) -> Any:
        """(out of the prefill, out of the decodes); with return_lse_p or return_lse_d the part is (out, lse). What is
        said of the decodes here, plan() must have said: FlashInfer ignores it here."""
        if custom_mask_d is not None or packed_custom_mask_d is not None:
            raise NotImplementedError("custom_mask_d: decodes with a mask of their own are not supported")
        self._check_decodes(
            pos_encoding_mode=(pos_encoding_mode_d, "NONE"), sm_scale=(sm_scale_d, None),
            kv_layout=(kv_layout_d, "NHD"), window_left=(window_left_d, -1), rope_scale=(rope_scale_d, None),
            rope_theta=(rope_theta_d, None),
        )  # fmt: skip
        prefill = single_prefill_with_kv_cache(
            q_p, k_p, v_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, causal=causal_p,
            kv_layout=kv_layout_p, pos_encoding_mode=pos_encoding_mode_p, sm_scale=sm_scale_p,
            window_left=window_left_p, rope_scale=rope_scale_p, rope_theta=rope_theta_p, return_lse=return_lse_p,
        )  # fmt: skip
        decode = super().run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse_d
        )
        return prefill, decode

    def _check_decodes(self, **said: tuple[Any, Any]) -> None:
        """Raise ValueError where run() says another rule of the decodes than plan() did."""
        for name, (value, default) in said.items():
            planned = getattr(self, f"_{name}")
            if value not in (default, planned):
                raise ValueError(f"{name}_d={value!r}, but plan() was given {planned!r}: say it to plan()")


class BatchPODWithPagedKVCacheWrapper:
    """Prefills and decodes of two batches over pages, planned together."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD"):
        self._prefill, self._decode = (
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout) for _ in range(2)
        )
        self._asked: tuple[tuple, dict[str, Any]] | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    def plan(
        self,
        qo_indptr_p: torch.Tensor,
        kv_indptr_p: torch.Tensor,
        kv_indices_p: torch.Tensor,
        last_page_len_p: torch.Tensor,
        qo_indptr_d: torch.Tensor,
        kv_indptr_d: torch.Tensor,
        kv_indices_d: torch.Tensor,
        last_page_len_d: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Prepare both batches. Whether the prefills are causal is said by run(), so their kernels follow there."""
        options: dict[str, Any] = {
            "pos_encoding_mode": pos_encoding_mode, "window_left": window_left, "q_data_type": q_data_type,
            "kv_data_type": kv_data_type or data_type, "sm_scale": sm_scale, "rope_scale": rope_scale,
            "rope_theta": rope_theta, "non_blocking": non_blocking,
        }  # fmt: skip
        heads = num_qo_heads, num_kv_heads, head_dim, page_size
        self._prefill._plans.batch = None  # until run() plans it
        self._asked = (qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p, *heads), options
        self._causal: bool | None = None
        self._decode.plan(qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d, *heads, **options)

    def run(
        self,
        q_p: torch.Tensor,
        paged_kv_cache_p: Any,
        q_d: torch.Tensor,
        paged_kv_cache_d: Any,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        return_lse: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """(out of the prefills, out of the decodes), each (out, lse) with return_lse. The three scales are those of
        the decodes, as in FlashInfer."""
        if self._asked is None:
            raise RuntimeError(f"{type(self).__name__}: call plan() before run()")
        arrays, options = self._asked
        masks = custom_mask_p is not None or packed_custom_mask_p is not None
        if masks or self._causal != causal_p:
            self._prefill.plan(
                *arrays, causal=causal_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, **options
            )
            self._causal = None if masks else causal_p
        prefill = self._prefill.run(q_p, paged_kv_cache_p, return_lse=return_lse)
        return prefill, self._decode.run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse
        )

    def end_forward(self) -> None:
        """Nothing to do; the name is of earlier versions."""
