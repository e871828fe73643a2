"""What `gpu_attention.py` times flashloom against on a GPU: torch SDPA, FlexAttention and, where it can be imported,
FlashInfer with each of its backends. Every function answers names with lists of calls, one per set of keys and values.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FLASHINFER = importlib.util.find_spec("flashinfer") is not None
_DECODE = {
    "cuda cores": {"use_tensor_cores": False},
    "tensor cores": {"use_tensor_cores": True, "backend": "fa2"},
    "cudnn": {"backend": "cudnn"},
}


@lru_cache
def workspace(purpose):
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def sdpa(q, pairs, causal=False):
    """q [batch, heads, tokens, dim] over dense (k, v) of the same form."""

    def calls(backend):
        def call(k, v):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return [lambda kv=kv: call(*kv) for kv in pairs]

    return {f"sdpa {name}": calls(backend) for name, backend in BACKENDS.items()}


def flex(q, pairs, case, heads):
    """FlexAttention with the case's score and mask functions; queries are the last of the keys' positions."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, keys = q.shape[2], pairs[0][0].shape[2]
    first, score, mask = keys - queries, None, None
    if case.score_mod is not None:
        with torch.device("cuda"):
            modify = case.score_mod(heads.q_heads)

        def score(s, b, h, i, j):
            return modify(s, b, h, i + first, j)

    if case.mask_mod is not None:
        mask = create_block_mask(
            lambda b, h, i, j: case.mask_mod(b, h, i + first, j), None, None, queries, keys, device="cuda"
        )
    torch._dynamo.reset()  # torch compiles 8 forms of a function and runs any further one uncompiled
    call = torch.compile(flex_attention, dynamic=False)
    return {"flex": [lambda kv=kv: call(q, *kv, score_mod=score, block_mask=mask, enable_gqa=True) for kv in pairs]}


def _ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def flashinfer_decode(heads, lens, kv_dtype, q, out, sets, order, page):
    """FlashInfer's batch decode over the same pages (k, v) [pages, page, kv_heads, dim]; `order`: their numbers."""
    if not FLASHINFER:
        return {}
    import flashinfer

    used = [-(-n // page) for n in lens]
    starts = torch.tensor([0, *used]).cumsum(0).int()
    last, order = _ints([(n - 1) % page + 1 for n in lens]), order.cuda()
    found = {}
    for name, options in _DECODE.items():
        if name == "cudnn" and kv_dtype != q.dtype:
            continue
        try:
            plan = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(name), "NHD", **options)
            shape = (heads.q_heads, heads.kv_heads, heads.dim, page)
            plan.plan(starts.cuda(), order, last, *shape, q_data_type=q.dtype, kv_data_type=kv_dtype)
            found[f"flashinfer {name}"] = [lambda s=s, plan=plan: plan.run(q, s, out=out) for s in sets]
        except Exception as error:
            print(f"  flashinfer {name}: {type(error).__name__} {str(error)[:120]}", flush=True)
    table = torch.zeros(len(lens), max(used), dtype=torch.int32)
    for b, n in enumerate(used):
        table[b, :n] = order[starts[b] : starts[b + 1]].cpu()
    table, lengths, longest, scale = table.cuda(), _ints(lens), max(lens), heads.dim**-0.5

    def xqa(kv):
        return flashinfer.decode.trtllm_batch_decode_with_kv_cache(
            q, kv, workspace("xqa"), table, lengths, longest, bmm1_scale=scale, bmm2_scale=1.0, out=out,
            kv_layout="NHD", backend="xqa",
        )  # fmt: skip

    return found | {"flashinfer xqa": [lambda s=s: xqa(s) for s in sets]}


def flashinfer_prefill(heads, batch, n, causal, q, k, v, out):
    """FlashInfer's ragged prefill of `batch` requests of n tokens, [tokens, heads, dim]."""
    if not FLASHINFER:
        return {}
    import flashinfer

    indptr, found = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * n, {}
    for backend in ("fa3", "fa2"):
        try:
            plan = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(backend), "NHD", backend=backend)
            dtypes = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
            plan.plan(indptr, indptr, heads.q_heads, heads.kv_heads, heads.dim, causal=causal, **dtypes)
            found[f"flashinfer {backend}"] = [lambda plan=plan: plan.run(q, k, v, out=out)]
        except Exception as error:
            print(f"  flashinfer {backend}: {type(error).__name__} {str(error)[:120]}", flush=True)
    return found
