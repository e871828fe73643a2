"""flashinfer.page: writing keys and values into pages."""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from flashloom.compat.flashinfer import _later, _ops, utils
from flashloom.compat.flashinfer import _plans as plans
from flashloom.compat.flashinfer.jit import gen_page_module
from flashloom.kv_cache import append
from flashloom.kv_cache.integers import INT32_MAX
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
    tokens of request -1 are skipped.

    A token whose position lies outside its request's pages, whose request is none or whose page number is none raises
    ValueError where the index arrays are on the host; on a device, where nothing is read, it is skipped."""
    if is_compiling():
        torch.ops.flashloom_compat.append(
            append_key, append_value, batch_indices, positions, _ops.parts(paged_kv_cache), kv_indices, kv_indptr,
            kv_last_page_len, kv_layout,
        )  # fmt: skip
        return
    k, v = utils._unpack_paged_kv_cache(paged_kv_cache, kv_layout)
    kv = as_kv(k, v, None, None, ragged=False, layout=kv_layout)
    tokens = append_key.shape[0]
    for name, x in (("batch_indices", batch_indices), ("positions", positions)):
        if tuple(x.shape) != (tokens,):
            raise ValueError(f"{name} has shape {list(x.shape)}: must be [tokens] = [{tokens}], as append_key has")
    arrays = batch_indices, positions, kv_indptr, kv_indices
    host = all(x.device.type == "cpu" for x in arrays)
    if host:
        plans.check_offsets("kv_indptr", kv_indptr, kv_indices)
    requests, places, indptr, indices = (
        (x if x.dtype in (torch.int32, torch.int64) else x.to(torch.int64)).to(x.device if host else k.device)
        for x in arrays
    )
    pages, page_size = kv.k.shape[:2]
    slots = _slots(requests, places, indptr, indices, pages, page_size)
    if host:
        outside = (slots < 0) & (requests != -1)
        if bool(outside.any()):
            at = int(outside.to(torch.int8).argmax())
            raise ValueError(_outside(int(requests[at]), int(places[at]), indptr, pages, page_size))
    append(kv, append_key, append_value, slots.to(k.device))


def _slots(
    requests: torch.Tensor,
    places: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    pages: int,
    page_size: int,
) -> torch.Tensor:
    """page * page_size + offset of each token, int64; -1 for what lies in no page of its request."""
    if len(indptr) < 2 or not indices.numel():
        return torch.full_like(requests, -1, dtype=torch.int64)
    row = requests.clamp(0, len(indptr) - 2)
    first, last = indptr.unfold(0, 2, 1)[row].unbind(-1)
    number = places.div(page_size, rounding_mode="floor")
    entry = first + number
    held = entry.clamp(0, indices.numel() - 1)
    page = indices[held].to(torch.int64)
    outside = (requests != row) | (entry < first) | (entry >= last) | (entry != held)
    outside |= page.clamp(0, pages - 1) != page
    return torch.add(places, page - number, alpha=page_size).masked_fill_(outside, -1)


def _outside(request: int, position: int, indptr: torch.Tensor, pages: int, page_size: int) -> str:
    count = len(indptr) - 1
    if not 0 <= request < count:
        return f"batch_indices holds {request}: must be 0 to {count - 1}, or -1 to skip the token"
    own = int(indptr[request + 1]) - int(indptr[request])
    if not 0 <= position < own * page_size:
        return (
            f"a token of request {request} has position {position}, but the request has {own} pages of {page_size}: "
            f"must be 0 to {own * page_size - 1}; give the request more pages before appending"
        )
    return f"request {request}'s page of position {position} is no page of the cache, which has {pages}"


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
    # a position beyond 32 bits stays beyond every page
    place = place.masked_fill(beyond, 0).clamp(-INT32_MAX, INT32_MAX)
    found = request.masked_fill(beyond, -1).to(torch.int32), place.to(torch.int32)
    if batch_indices is not None:
        batch_indices.copy_(found[0])
    if positions is not None:
        positions.copy_(found[1])
    return found[0] if batch_indices is None else batch_indices, found[1] if positions is None else positions


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Lengths [batch] of requests whose pages are kv_indptr [batch + 1], where those are; nothing waits."""
    return torch.clamp(kv_indptr[1:] - kv_indptr[:-1] - 1, min=0) * page_size + kv_last_page_len
