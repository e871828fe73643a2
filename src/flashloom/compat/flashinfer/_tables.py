"""Attention over block tables in one call, with plans kept: FlashInfer's xqa and trtllm entry points."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch.compiler import is_compiling

import flashloom as fl
from flashloom.attention import Batch, Plan, Reserve
from flashloom.compat.flashinfer import _ops, utils
from flashloom.compat.flashinfer._plans import NO_LENGTH, Form, attention, base_two, int32, scale_tensor, wide_pages
from flashloom.compat.flashinfer._variants import Instances, Rules, variant
from flashloom.kv_cache import PageTable
from flashloom.kv_cache.integers import offsets, on_host
from flashloom.kv_cache.views import as_kv

PLANS_KEPT = 64  # per thread
#: trtllm_batch_decode_with_kv_cache's further arguments: values that ask for nothing, and those that choose a schedule.
OTHERS = {
    "bmm1_scale_log2": None, "enable_block_sparse_attention": False, "cp_world": 1, "cp_rank": 0,
    "causal_seqlens_kv_global": None, "request_order": None, "request_order_plan": None, "sparse_top_k": 0,
}  # fmt: skip
IGNORED = {"multi_ctas_kv_counter_buffer", "bf16q_fp8kv_transform_mode", "length_aware_schedule"}


class _Recent(threading.local):
    def __init__(self) -> None:
        self.plans: OrderedDict[tuple, Plan] = OrderedDict()
        self.captured: dict[tuple, Plan] = {}  # graphs read their buffers: these stay
        self.instances = Instances()


_recent = _Recent()


def _plan(form: Form, chosen: fl.Variant, batch: Batch, device: torch.device, width: int) -> Plan:
    """A plan that follows the batch. In a captured graph a replay reads the same tables and lengths again."""
    key = (form, chosen.program.digest, batch.page_size, batch.requests, batch.max_q_len, width, device)
    plans = _recent.plans
    plan = plans.get(key)
    if plan is None and key in _recent.captured:
        plan = plans[key] = _recent.captured[key]
    if plan is None or not plan.fits(batch):
        if utils.capturing(device):
            raise RuntimeError(
                f"there is no plan yet for {batch.requests} requests of these heads and dtypes, and none can be made "
                "while a CUDA graph is captured: call it once with such tensors before"
            )
        reserve = Reserve(tokens=max(batch.requests * batch.max_q_len, batch.tokens or 0))
        plan = plans[key] = attention(form, chosen, device).plan(batch, reserve=reserve)
        if len(plans) > PLANS_KEPT:
            plans.popitem(last=False)
    else:
        plans.move_to_end(key)
        plan.update(batch)
        if utils.capturing(device):
            _recent.captured[key] = plan
    return plan


def attend_tables(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    q_indptr: torch.Tensor | None,
    q_len: int,
    bmm1_scale: float | torch.Tensor,
    bmm2_scale: float | torch.Tensor,
    causal: bool,
    window_left: int,
    kv_layout: str,
    sinks: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    return_lse: bool,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """query [tokens, q_heads, dim], q_len tokens per request or as q_indptr [requests + 1] says (q_len: the most).
    bmm2_scale is the whole factor of the result."""
    if is_compiling():
        owners = _ops.parts(kv_cache)
        if out is None:
            out = query.new_empty((*query.shape[:2], owners[-1].shape[-1]), dtype=out_dtype or query.dtype)
        if return_lse and lse is None:
            lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        torch.ops.flashloom_compat.tables(
            query, owners, block_tables, seq_lens, q_indptr, q_len, *_ops.split((bmm1_scale, bmm2_scale, sinks)),
            causal, window_left, kv_layout, out, lse if return_lse else None,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    k, v = utils._unpack_paged_kv_cache(kv_cache, kv_layout)
    if k.dtype == torch.uint8:
        raise NotImplementedError("NVFP4 KV caches (uint8 with kv_cache_sf) are not supported by flashloom yet")
    if block_tables.dim() != 2:
        raise NotImplementedError(
            "tables of their own for keys and for values are not supported: give [requests, pages]"
        )
    heads, page_size = (k.shape[2], k.shape[1]) if kv_layout == "NHD" else (k.shape[1], k.shape[2])
    device, requests = query.device, seq_lens.numel()
    lens = int32(seq_lens.reshape(-1), device, name="seq_lens")
    if block_tables.dtype is torch.int64 and device.type != "cpu":  # as `table` of wrappers' plans does
        used = torch.arange(block_tables.shape[1], device=device) * page_size < lens.unsqueeze(1)
        lens = lens.masked_fill(wide_pages(block_tables.to(device), used), NO_LENGTH)
    pages = int32(block_tables, device, name="block_tables")
    table = PageTable.from_block_table(pages, lens, page_size=page_size)
    if q_indptr is None:
        if query.shape[0] != requests * q_len:
            raise ValueError(
                f"query has {query.shape[0]} rows for {requests} requests of q_len_per_req={q_len}: must be "
                f"{requests * q_len}"
            )
        starts = utils._get_range_buf(requests + 1, device) * q_len
    else:
        if on_host(q_indptr):
            host = offsets("offsets of queries", q_indptr)
            q_len = int((host[1:] - host[:-1]).max()) if requests else 0
            if int(host[-1]) != query.shape[0]:
                raise ValueError(
                    f"query has {query.shape[0]} rows but its offsets end at {int(host[-1])}: must be equal"
                )
        starts = int32(q_indptr, device, name="offsets of queries")
    if device.type == "cpu":
        batch = Batch(q_indptr=starts, kv=table)
    else:
        batch = Batch(q_indptr=starts, kv=table, max_q_len=q_len, tokens=query.shape[0])
    form = Form(query.shape[1], heads, query.shape[2], v.shape[-1], query.dtype, k.dtype)
    rules = Rules.of(causal and q_len > 1, window_left, None, "NONE", None, None)
    chosen = variant(rules, form.q_heads, form.dim, device)
    if sinks is not None:
        chosen = _recent.instances.get(chosen, fl.sink, utils.sinks_of(sinks, form.q_heads, form.kv_heads))
    plan = _plan(form, chosen, batch, device, block_tables.shape[1])
    k_scale: Any = None
    sm_scale = 1.0
    if isinstance(bmm1_scale, torch.Tensor):
        k_scale = bmm1_scale
    else:
        sm_scale = float(bmm1_scale)
    in_kernel = isinstance(bmm2_scale, torch.Tensor) or k.dtype.itemsize == 1
    kv = as_kv(
        k, v, scale_tensor(k_scale, device), scale_tensor(bmm2_scale, device) if in_kernel else None, ragged=False,
        layout=kv_layout,
    )  # fmt: skip
    wanted = out_dtype or (query.dtype if out is None else out.dtype)
    shape = (*query.shape[:2], form.value_dim)
    if out is not None:
        rows = out.flatten(0, -3) if out.dim() > 3 else out  # [requests, tokens of each, q_heads, dim] will do
        utils.check_shape_dtype_device(rows, shape, wanted, device, "out")
    target = out.view(shape) if out is not None and wanted.itemsize > 1 else None
    if target is None:
        target = query.new_empty(shape, dtype=wanted if wanted.itemsize > 1 else torch.float32)
    if return_lse and lse is None:
        lse = query.new_empty(shape[:2], dtype=torch.float32)
    plan.run(query, kv, out=target, lse=lse if return_lse else None, variant=chosen, sm_scale=sm_scale)
    if not in_kernel and bmm2_scale != 1.0:
        target.mul_(bmm2_scale)
    if wanted.itemsize == 1:
        small = utils.narrow(target, wanted)
        target = small if out is None else out.copy_(small.view(out.shape))
    if not return_lse:
        return target if out is None else out
    assert lse is not None
    return (target if out is None else out), base_two(lse)


def xqa_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: float | torch.Tensor = 1.0,
    bmm2_scale: float | torch.Tensor = 1.0,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    enable_pdl: bool | None = None,
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: torch.Tensor | None = None,
    kv_cache_sf: Any = None,
    q_cu_seq_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of query [batch * q_len_per_req, q_heads, dim] over block tables [batch, pages] and lengths [batch];
    bmm1_scale multiplies logits, bmm2_scale the result, whatever o_scale is: that only says how FlashInfer's kernel
    splits the factor of a float8 result. Several tokens per request are causal. The workspace is not used. out: in the
    query's dtype unless given. Raises NotImplementedError for a mask of draft tokens."""
    if mask is not None:
        raise NotImplementedError(
            "xqa_batch_decode_with_kv_cache(mask=...): masks of draft tokens are not supported yet"
        )
    return attend_tables(
        query, kv_cache, block_tables, seq_lens, q_cu_seq_lens, q_len_per_req or 1, bmm1_scale, bmm2_scale, True,
        window_left, kv_layout, sinks, out, None, False,
    )  # fmt: skip


def trtllm_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int,
    bmm1_scale: float | torch.Tensor = 1.0,
    bmm2_scale: float | torch.Tensor = 1.0,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | str | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    sinks: Any = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    backend: str = "auto",
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: torch.Tensor | None = None,
    max_q_len: int | None = None,
    cum_seq_lens_q: torch.Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    kv_cache_sf: Any = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    **others: Any,
) -> Any:
    """Attention over block tables; as `xqa_batch_decode_with_kv_cache`, with "HND" the layout unless said otherwise.
    Raises NotImplementedError for outputs in FP4, masks of draft tokens, and what only Blackwell kernels have."""
    utils.check_backend(backend, ("auto", "trtllm-gen", "xqa"))
    for name in others.keys() - OTHERS.keys() - IGNORED:
        raise TypeError(f"trtllm_batch_decode_with_kv_cache() got an unexpected keyword argument {name!r}")
    if others.get("cp_world", 1) == 1:
        others = {name: value for name, value in others.items() if not name.startswith("cp_")}
    refused = {"mask": mask, "out_dtype": out_dtype == "nvfp4", **others}
    refused["o_sf_scale"] = o_sf_scale is not None
    for name, value in refused.items():
        asks = value is not None and not (isinstance(value, (int, float)) and value == (OTHERS.get(name) or 0))
        if asks and name not in IGNORED:
            raise NotImplementedError(f"trtllm_batch_decode_with_kv_cache({name}=...) is not supported by flashloom")
    if isinstance(sinks, (list, tuple)):
        if len(sinks) > 1:
            raise ValueError(f"sinks holds {len(sinks)} tensors: give one, [q_heads] or [kv_heads, group]")
        sinks = sinks[0] if sinks else None
    dtype = None if out_dtype is None else utils.canonicalize_torch_dtype(out_dtype)
    if (cum_seq_lens_q is None) != (max_q_len is None):
        raise ValueError("cum_seq_lens_q and max_q_len belong together: give both, or neither")
    q_len = max_q_len or q_len_per_req or 1
    return attend_tables(
        query, kv_cache, block_tables, seq_lens, cum_seq_lens_q, q_len, bmm1_scale, bmm2_scale, True, window_left,
        kv_layout, sinks, out, lse, return_lse, dtype,
    )  # fmt: skip
