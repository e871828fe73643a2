"""Attention over block tables in one call, with plans kept: FlashInfer's xqa and trtllm entry points."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch

import flashloom as fl
from flashloom.attention import Batch, Plan, Reserve
from flashloom.compat.flashinfer import utils
from flashloom.compat.flashinfer._plans import Form, attention, base_two, scale_tensor
from flashloom.compat.flashinfer._variants import Instances, Rules, variant
from flashloom.kv_cache import PageTable
from flashloom.kv_cache.views import as_kv

PLANS_KEPT = 64  # per thread


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
    o_scale: float = 1.0,
) -> Any:
    """query [tokens, q_heads, dim], q_len tokens per request or as q_indptr [requests + 1] says (q_len: the most)."""
    k, v = utils._unpack_paged_kv_cache(kv_cache, kv_layout)
    if k.dtype == torch.uint8:
        raise NotImplementedError("NVFP4 KV caches (uint8 with kv_cache_sf) are not supported by flashloom yet")
    if block_tables.dim() != 2:
        raise NotImplementedError(
            "tables of their own for keys and for values are not supported: give [requests, pages]"
        )
    heads, page_size = (k.shape[2], k.shape[1]) if kv_layout == "NHD" else (k.shape[1], k.shape[2])
    device, requests = query.device, seq_lens.numel()
    lens = seq_lens.reshape(-1).to(device)
    table = PageTable.from_block_table(
        block_tables.to(device, torch.int32), lens.to(torch.int64).to(torch.int32), page_size=page_size
    )
    if q_indptr is None:
        starts = utils._get_range_buf(requests + 1, device) * q_len
    else:
        starts = q_indptr.to(device, torch.int32)
    if device.type == "cpu":
        batch = Batch(q_indptr=starts, kv=table)
    else:
        batch = Batch(q_indptr=starts, kv=table, max_q_len=q_len, tokens=query.shape[0])
    form = Form(query.shape[1], heads, query.shape[2], v.shape[-1], query.dtype, k.dtype)
    rules = Rules.of(causal and q_len > 1, window_left, None, "NONE", None, None)
    chosen = variant(rules, form.q_heads, form.dim, device)
    if sinks is not None:
        chosen = _recent.instances.get(chosen, fl.sink, sinks)
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
    wanted = (
        out.dtype if out is not None else out_dtype or (torch.bfloat16 if query.dtype.itemsize == 1 else query.dtype)
    )
    shape = (*query.shape[:2], form.value_dim)
    target = out.view(shape) if out is not None and wanted.itemsize > 1 else None
    if target is None:
        target = query.new_empty(shape, dtype=wanted if wanted.itemsize > 1 else torch.float32)
    if return_lse and lse is None:
        lse = query.new_empty(shape[:2], dtype=torch.float32)
    plan.run(query, kv, out=target, lse=lse if return_lse else None, variant=chosen, sm_scale=sm_scale)
    if not in_kernel and bmm2_scale != 1.0:
        target.mul_(bmm2_scale)
    if wanted.itemsize == 1:
        limit = torch.finfo(wanted).max
        small = (target / o_scale).clamp(-limit, limit).to(wanted)
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
    bmm1_scale multiplies logits, bmm2_scale the result. Several tokens per request are causal. The workspace is not
    used. Raises NotImplementedError for a mask of draft tokens."""
    if mask is not None:
        raise NotImplementedError(
            "xqa_batch_decode_with_kv_cache(mask=...): masks of draft tokens are not supported yet"
        )
    return attend_tables(
        query, kv_cache, block_tables, seq_lens, q_cu_seq_lens, q_len_per_req or 1, bmm1_scale, bmm2_scale, True,
        window_left, kv_layout, sinks, out, None, False, None, 1.0 if o_scale is None else o_scale,
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
    others.pop("multi_ctas_kv_counter_buffer", None)
    if others.get("cp_world") == 1:
        others = {name: value for name, value in others.items() if not name.startswith("cp_")}
    for name, value in {"mask": mask, "o_sf_scale": o_sf_scale, **others}.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"trtllm_batch_decode_with_kv_cache({name}=...) is not supported by flashloom")
    if isinstance(sinks, (list, tuple)):
        sinks = sinks[0] if sinks else None
    dtype = None if out_dtype is None else utils.canonicalize_torch_dtype(out_dtype)
    q_len = max_q_len if cum_seq_lens_q is not None and max_q_len else q_len_per_req or 1
    return attend_tables(
        query, kv_cache, block_tables, seq_lens, cum_seq_lens_q, q_len, bmm1_scale, bmm2_scale, True, window_left,
        kv_layout, sinks, out, lse, return_lse, dtype, 1.0 if o_scale is None else o_scale,
    )  # fmt: skip
