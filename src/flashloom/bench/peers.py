"""What flashloom is timed against: the ways in which PyTorch users compute attention today, each given its best layout.

A peer is made for one case and workload from the same numbers as flashloom's call: q [tokens, q_heads, dim] and k, v
[kv tokens, kv_heads, dim]. It answers a function without arguments, and a function that puts its result into
[tokens, q_heads, dim]; or None where it cannot express the case. Batches are of equal lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flashloom.bench.cases import Case
from flashloom.bench.workloads import Workload
from flashloom.doctor import find_compilers
from flashloom.errors import FlashloomError


class Unable(FlashloomError, RuntimeError):
    """A peer cannot run on this machine; the message says what it needs."""


Peer = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]


def dense(workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous [batch, heads, length, dim] of q, k and v, the layout that SDPA is fastest on."""
    if len(set(workload.q_lens)) > 1 or len(set(workload.kv_lens)) > 1:
        raise ValueError(f"{workload.name}: peers take batches of equal lengths; time flashloom alone with against=[]")
    batch = len(workload.q_lens)
    return tuple(x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous() for x in (q, k, v))


def _flat(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(0, 1)


def _top_left(case: Case, workload: Workload) -> bool | None:
    """SDPA's is_causal for this case: it aligns at the top left, which is right for whole prompts only."""
    if case.sdpa == "full" or (case.sdpa == "causal" and workload.phase == "decode"):
        return False
    return True if case.sdpa == "causal" and workload.phase == "prefill" else None


def sdpa(case: Case, workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Peer | None:
    """torch's scaled_dot_product_attention on contiguous [batch, heads, length, dim], grouped heads by enable_gqa."""
    causal = _top_left(case, workload)
    if causal is None:
        return None
    qd, kd, vd = dense(workload, q, k, v)
    grouped = workload.heads.group > 1
    return lambda: F.scaled_dot_product_attention(qd, kd, vd, is_causal=causal, enable_gqa=grouped), _flat


def matmul(case: Case, workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Peer | None:
    """softmax(q.view(batch, kv_heads, group, dim) @ k^T) @ v: for decode the fastest that plain torch offers on a
    CPU."""
    if workload.phase != "decode" or case.sdpa is None:
        return None
    qd, kd, vd = dense(workload, q, k, v)
    batch, heads = len(workload.q_lens), workload.heads
    qg = (qd * heads.dim**-0.5).view(batch, heads.kv_heads, heads.group, heads.dim)
    return lambda: torch.softmax(qg @ kd.transpose(-1, -2), dim=-1) @ vd, lambda out: out.flatten(1, 2)


def flex(case: Case, workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Peer:
    """torch's FlexAttention through torch.compile, as its documentation tells users to call it; its first call compiles
    and takes seconds. A peer made before must not be called any more."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if q.device.type == "cpu" and not find_compilers():
        raise Unable("FlexAttention needs a compiler (`flashloom doctor` says how to install one)")
    qd, kd, vd = dense(workload, q, k, v)
    q_length, kv_length, heads = qd.shape[2], kd.shape[2], workload.heads
    first = kv_length - q_length  # FlexAttention counts queries from 0
    score = case.score_mod(heads.q_heads) if case.score_mod else None
    score_mod = None if score is None else lambda s, b, h, i, j: score(s, b, h, i + first, j)
    block_mask = None
    if case.mask_mod is not None:
        mask = case.mask_mod
        block_mask = create_block_mask(
            lambda b, h, i, j: mask(b, h, i + first, j), None, None, q_length, kv_length, device=q.device
        )
    torch._dynamo.reset()  # torch compiles 8 forms of a function and runs any further one uncompiled, many times slower
    call, grouped = torch.compile(flex_attention, dynamic=False), heads.group > 1
    return lambda: call(qd, kd, vd, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped), _flat


def masked(case: Case, workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Peer | None:
    """SDPA with the variant written out as a mask: True where a key is kept, or numbers that are added to the scores.
    None for a variant that does more than add."""
    bias = case.bias(workload.heads.q_heads) if case.bias else None
    if bias is None and (case.score_mod is not None or case.mask_mod is None):
        return None
    qd, kd, vd = dense(workload, q, k, v)
    q_length, kv_length, grouped = qd.shape[2], kd.shape[2], workload.heads.group > 1
    head = torch.arange(workload.heads.q_heads)[:, None, None]
    rows = torch.arange(kv_length - q_length, kv_length)[:, None]
    columns = torch.arange(kv_length)
    mask = torch.ones(1, q_length, kv_length, dtype=torch.bool)
    if case.mask_mod is not None:
        mask = mask & case.mask_mod(0, head, rows, columns)  # type: ignore[arg-type]
    if bias is not None:
        mask = bias(head, rows, columns).masked_fill(~mask, float("-inf")).to(q.dtype)
    mask = mask[None].to(q.device)
    return lambda: F.scaled_dot_product_attention(qd, kd, vd, attn_mask=mask, enable_gqa=grouped), _flat


PEERS: dict[str, Callable[[Case, Workload, Tensor, Tensor, Tensor], Peer | None]] = {
    "sdpa": sdpa,
    "matmul": matmul,
    "flex": flex,
    "sdpa + mask": masked,
}
