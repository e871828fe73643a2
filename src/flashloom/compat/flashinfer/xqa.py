"""flashinfer.xqa: decode into a tensor of the caller."""

from __future__ import annotations

import torch

from flashloom.compat.flashinfer import _later, utils
from flashloom.compat.flashinfer._tables import attend_tables

__all__ = ["xqa"]

__getattr__ = _later.names(__name__)


def xqa(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    workspace_buffer: torch.Tensor,
    semaphores: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    sinks: torch.Tensor | None = None,
    q_scale: float | torch.Tensor = 1.0,
    kv_scale: float | torch.Tensor = 1.0,
    sliding_win_size: int = 0,
    kv_layout: str = "NHD",
    sm_count: int | None = None,
    enable_pdl: bool | None = None,
    rcp_out_scale: float = 1.0,
    q_seq_len: int = 1,
    mask: torch.Tensor | None = None,
    *,
    q_cu_seq_lens: torch.Tensor | None = None,
    k_sf_cache: torch.Tensor | None = None,
    v_sf_cache: torch.Tensor | None = None,
) -> None:
    """Decode of q [batch, 1, (q_seq_len,) q_heads, dim] into `output`; logits are scaled by q_scale * kv_scale /
    sqrt(dim). sliding_win_size: tokens of the window, 0 for none. Raises NotImplementedError for a draft mask."""
    if mask is not None:
        raise NotImplementedError("xqa(mask=...): masks of draft tokens are not supported yet")
    rows = q.reshape(-1, *q.shape[-2:])
    k, v = utils._unpack_paged_kv_cache((k_cache, v_cache), kv_layout)
    heads, size = (k.shape[2], k.shape[1]) if kv_layout == "NHD" else (k.shape[1], k.shape[2])
    if (heads, size) != (num_kv_heads, page_size):
        raise ValueError(
            f"num_kv_heads={num_kv_heads} and page_size={page_size}, but k_cache is {list(k_cache.shape)} in "
            f"{kv_layout!r}: {heads} heads, pages of {size}"
        )
    form = rows.shape[1], v.shape[-1]
    if tuple(output.shape[-2:]) != form or output.numel() != rows.shape[0] * form[0] * form[1]:
        raise ValueError(f"output has shape {list(output.shape)}: must be q's, {[*q.shape[:-1], v.shape[-1]]}")
    scale = q_scale * kv_scale * q.shape[-1] ** -0.5
    target = output.view(rows.shape[0], *form)
    factor = (
        kv_scale * rcp_out_scale if output.dtype.itemsize == 1 else kv_scale
    )  # FlashInfer scales float8 results only
    attend_tables(
        rows, (k, v), page_table, seq_lens, q_cu_seq_lens, q_seq_len, scale, factor, True,
        sliding_win_size - 1 if sliding_win_size else -1, kv_layout, sinks, target, None, False,
    )  # fmt: skip
