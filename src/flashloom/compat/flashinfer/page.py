"""flashinfer.page: writing keys and values into pages."""

from __future__ import annotations

import torch

from flashloom.compat.flashinfer import _later, utils
from flashloom.compat.flashinfer.jit import gen_page_module
from flashloom.kv_cache import append
from flashloom.kv_cache.views import as_kv

__all__ = ["append_paged_kv_cache", "gen_page_module", "get_batch_indices_positions", "get_seq_lens"]

__getattr__ = _later.names(__name__)


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Store append_key and append_value [tokens, kv_heads, dim] at `positions` of requests `batch_indices` [tokens];
    tokens of request -1 are skipped."""
    k, v = utils._unpack_paged_kv_cache(paged_kv_cache, kv_layout)
    kv = as_kv(k, v, None, None, ragged=False, layout=kv_layout)
    device, page_size = k.device, kv.k.shape[1]
    requests, places = batch_indices.to(device, torch.int64), positions.to(device, torch.int64)
    entry = kv_indptr.to(device)[requests.clamp(min=0)].to(torch.int64) + places // page_size
    pages = kv_indices.to(device)
    if pages.numel() == 0:
        return
    page = pages[entry.clamp(0, pages.numel() - 1)].to(torch.int64)
    slots = (page * page_size + places % page_size).masked_fill(requests < 0, -1)
    append(kv, append_key, append_value, slots)


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and position of each of nnz tokens, int32: those of append_indptr [batch + 1] are the last ones of
    requests of seq_lens [batch] tokens. Tokens behind append_indptr[-1] belong to request -1, at position 0."""
    device = append_indptr.device
    for name, x in (("batch_indices", batch_indices), ("positions", positions)):
        if x is not None:
            utils.check_shape_dtype_device(x, (nnz,), torch.int32, device, name)
    token = torch.arange(nnz, dtype=append_indptr.dtype, device=device)
    request = torch.searchsorted(append_indptr, token, right=True, out_int32=True) - 1
    beyond = token >= append_indptr[-1]
    known = request.clamp(max=max(seq_lens.numel() - 1, 0)) if seq_lens.numel() else torch.zeros_like(request)
    if seq_lens.numel():
        place = seq_lens.to(device)[known] - append_indptr[1:][known] + token
    else:
        place = torch.zeros_like(token)
    found = request.masked_fill(beyond, -1).to(torch.int32), place.masked_fill(beyond, 0).to(torch.int32)
    if batch_indices is not None:
        batch_indices.copy_(found[0])
    if positions is not None:
        positions.copy_(found[1])
    return found[0] if batch_indices is None else batch_indices, found[1] if positions is None else positions


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Lengths [batch] of requests whose pages are kv_indptr [batch + 1], where those are; nothing waits."""
    return torch.clamp(kv_indptr[1:] - kv_indptr[:-1] - 1, min=0) * page_size + kv_last_page_len
