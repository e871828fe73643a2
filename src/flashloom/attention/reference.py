"""The definition of attention: request by request, in plain torch, in any float dtype, on any device.

Kernels are compared with it, and it serves where there is no kernel. It waits for a GPU (to read lengths), so it
cannot be captured in a graph."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch

from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.executor import AttentionSpec, Tuned, untuned
from flashloom.kv_cache.append import scale_of
from flashloom.kv_cache.cache import KV
from flashloom.kv_cache.views import as_kv
from flashloom.lower.torch import evaluate
from flashloom.variant.expr import Program
from flashloom.variant.variant import Variant

_CHUNK = 1 << 23  # scores held at a time


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Batch,
    variant: Variant | None = None,
    *,
    layout: str = "NHD",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sm_scale: float | None = None,
    partial: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of q [tokens, q_heads, dim] over k, v (ragged [tokens, kv_heads, dim], or pages in `layout`), computed
    in `dtype`.

    Returns out [tokens, q_heads, value_dim] in `dtype` and lse [tokens, q_heads] (None without softmax); rows beyond
    the batch are 0 and -inf."""
    program = Program(()) if variant is None else variant.program
    values = () if variant is None else variant.values
    kv = as_kv(k, v, k_scale, v_scale, ragged=batch.ragged, layout=layout)
    sm_scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device) if program.softmax else None
    attend(
        program.specialise(q.shape[-1], v.shape[-1]),
        values,
        q,
        kv,
        batch.to_host(),
        sm_scale,
        out,
        lse,
        partial=partial,
        dtype=dtype,
    )
    return out, lse


def attend(
    program: Program,
    values: tuple[Any, ...],
    q: torch.Tensor,
    kv: KV,
    batch: Batch,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    partial: bool,
    dtype: torch.dtype,
) -> None:
    """Write the batch's rows of out and lse, computing in `dtype`. The batch is on the host."""
    q_starts, kv_starts, kv_lens = batch.q_indptr.tolist(), batch.kv_indptr.tolist(), batch.kv_lens.tolist()
    heads, kv_heads = q.shape[1], kv.k.shape[2]
    first_block = None if batch.blocks is None else batch.blocks.first_block(batch.q_indptr.diff().numpy())
    for b, kv_len in enumerate(kv_lens):
        start, q_len = q_starts[b], q_starts[b + 1] - q_starts[b]
        if q_len == 0:
            continue
        if kv_len == 0:
            out[start : start + q_len] = 0
            if lse is not None:
                lse[start : start + q_len] = -torch.inf
            continue
        place = {"batch": b, "q_len": q_len, "kv_len": kv_len, "q_start": start, "kv_start": kv_starts[b]}
        scalars = {name: torch.tensor(value, dtype=torch.int32, device=q.device) for name, value in place.items()}
        keys, vals = _gather(kv, batch, b, dtype)  # [kv_len, kv_heads, dim], [kv_len, kv_heads, value_dim]
        if program.key is not None:
            keys = _vector_hook(
                program, "key", keys, values, scalars | {"kv_pos": _column(kv_len, q), "kv_head": _row(kv_heads, q)}
            )
        rows = max(1, _CHUNK // (heads * kv_len))
        for r in range(0, q_len, rows):
            n = min(rows, q_len - r)
            kept = None
            if batch.blocks is not None:
                assert first_block is not None
                kept = _kept(batch.blocks, int(first_block[b]), r, n, kv_len).to(q.device)
            pos = torch.arange(kv_len - q_len + r, kv_len - q_len + r + n, dtype=torch.int32, device=q.device)
            at = slice(start + r, start + r + n)
            o, s = _attend_rows(program, values, q[at].to(dtype), keys, vals, pos, scalars, sm_scale, kept, partial)
            out[at] = o.to(out.dtype)
            if lse is not None:
                lse[at] = s.to(lse.dtype)


def attend_tokens(
    program: Program,
    values: tuple[Any, ...],
    q: torch.Tensor,
    kv: KV,
    batch: Batch,
    sm_scale: float,
    tokens: Sequence[int],
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of some query tokens alone, for checking where all of them would take too long: out [len(tokens),
    q_heads, value_dim] and lse [len(tokens), q_heads] (None without softmax), in `dtype`. The batch is on the host and
    has no block pattern."""
    starts, kv_starts, kv_lens = batch.q_indptr.tolist(), batch.kv_indptr.tolist(), batch.kv_lens.tolist()
    out = torch.zeros(len(tokens), q.shape[1], kv.v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(out.shape[:2], -torch.inf, dtype=dtype, device=q.device) if program.softmax else None
    wanted: dict[int, list[int]] = {}
    for place, token in enumerate(tokens):
        wanted.setdefault(bisect_right(starts, token) - 1, []).append(place)
    for b, places in wanted.items():
        q_len, kv_len = starts[b + 1] - starts[b], kv_lens[b]
        if kv_len == 0:
            continue
        where = {"batch": b, "q_len": q_len, "kv_len": kv_len, "q_start": starts[b], "kv_start": kv_starts[b]}
        scalars = {name: torch.tensor(value, dtype=torch.int32, device=q.device) for name, value in where.items()}
        keys, vals = _gather(kv, batch, b, dtype)
        if program.key is not None:
            inputs = scalars | {"kv_pos": _column(kv_len, q), "kv_head": _row(kv.k.shape[2], q)}
            keys = _vector_hook(program, "key", keys, values, inputs)
        at = torch.tensor([tokens[place] for place in places], dtype=torch.int32, device=q.device)
        pos = at + (kv_len - q_len - starts[b])
        rows = q[at.long()].to(dtype)
        o, s = _attend_rows(program, values, rows, keys, vals, pos, scalars, sm_scale, None, False)
        out[places] = o
        if lse is not None:
            lse[places] = s
    return out, lse


def _attend_rows(
    program: Program,
    values: tuple[Any, ...],
    q: torch.Tensor,  # [n, q_heads, dim]
    k: torch.Tensor,  # [kv_len, kv_heads, dim]
    v: torch.Tensor,  # [kv_len, kv_heads, value_dim]
    q_pos: torch.Tensor,  # [n]
    scalars: dict[str, torch.Tensor],
    sm_scale: float,
    kept: torch.Tensor | None,  # [n, kv_len]
    partial: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, group, dtype = q.shape[1], q.shape[1] // k.shape[1], q.dtype
    head = torch.arange(heads, dtype=torch.int32, device=q.device)
    kv_head = head // group
    per_row = scalars | {
        "q_pos": q_pos.view(-1, 1, 1),
        "q_head": head.view(1, -1, 1),
        "kv_head": kv_head.view(1, -1, 1),
    }
    if program.query is not None:
        q = _vector_hook(program, "query", q, values, per_row)
    logits = torch.einsum("nhd,lhd->hnl", q, k.repeat_interleave(group, 1)) * sm_scale  # [q_heads, n, kv_len]
    per_score = scalars | {
        "q_pos": q_pos.view(1, -1, 1),
        "q_head": head.view(-1, 1, 1),
        "kv_head": kv_head.view(-1, 1, 1),
    }
    per_score["kv_pos"] = torch.arange(k.shape[0], dtype=torch.int32, device=q.device)
    if program.logits is not None:
        logits = evaluate(program, "logits", per_score | {"logits": logits}, values, dtype).expand_as(logits)
    if program.mask is not None:
        mask = evaluate(program, "mask", per_score, values, dtype).expand_as(logits)
        kept = mask if kept is None else mask & kept
    if not program.softmax:
        weights = logits if kept is None else torch.where(kept, logits, 0)
        lse = torch.zeros(q.shape[0], heads, dtype=dtype, device=q.device)
    else:
        if kept is not None:
            logits = torch.where(kept, logits, -torch.inf)
        lse = torch.logsumexp(logits, -1).T  # [n, q_heads]
        # not exp(logits - lse): beside large logits lse does not say how many there are
        weights = torch.where((lse == -torch.inf).T.unsqueeze(-1), 0, torch.softmax(logits, -1))
    out = _weighted_sum(weights, v.repeat_interleave(group, 1), kept)
    if program.output is not None and not partial:
        dims = {
            "dim": _row(out.shape[-1], q),
            "head_dim": torch.tensor(out.shape[-1], dtype=torch.int32, device=q.device),
        }
        out = evaluate(
            program, "output", per_row | dims | {"out": out, "lse": lse.unsqueeze(-1)}, values, dtype
        ).expand_as(out)
    if program.softmax:
        out = torch.where((lse == -torch.inf).unsqueeze(-1), 0, out)
    return out, lse


def _weighted_sum(weights: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """weights [q_heads, n, kv_len] times v [kv_len, q_heads, value_dim], where a row meets no value of a key that is
    not kept: 0 times NaN would be NaN."""
    fine = v.isfinite()
    if kept is None or fine.all():
        return torch.einsum("hnl,lhd->nhd", weights, v)
    odd = (~fine).flatten(1).any(1).nonzero().flatten()
    out, w, x = torch.einsum("hnl,lhd->nhd", weights, torch.where(fine, v, 0)), weights[..., odd], v[odd]
    seen = kept.expand_as(weights)[..., odd]

    def meet(rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hnl,lhd->nhd", (seen & rows).to(v.dtype), values.to(v.dtype)) > 0

    up, down = x == torch.inf, x == -torch.inf
    out = torch.where(meet(w > 0, up) | meet(w < 0, down), out + torch.inf, out)
    out = torch.where(meet(w > 0, down) | meet(w < 0, up), out - torch.inf, out)
    return torch.where(meet(w == 0, up | down) | meet(seen, x.isnan()), torch.nan, out)


def _vector_hook(program: Program, hook: str, x: torch.Tensor, values: tuple[Any, ...], inputs: dict) -> torch.Tensor:
    """query_transform or key_transform of rows x [..., dim]."""
    dims = {"dim": _row(x.shape[-1], x), "head_dim": torch.tensor(x.shape[-1], dtype=torch.int32, device=x.device)}
    return evaluate(program, hook, inputs | dims | {"row": x}, values, x.dtype).expand_as(x)


def _row(n: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32, device=like.device)


def _column(n: int, like: torch.Tensor) -> torch.Tensor:
    return _row(n, like).view(-1, 1, 1)


def _gather(kv: KV, batch: Batch, b: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's keys and values, dense and dequantised."""
    position = torch.arange(int(batch.kv_lens[b]), device=kv.k.device)
    if batch.ragged:
        page, offset = position + int(batch.pages[b]), torch.zeros_like(position)
    else:
        entries = batch.pages[int(batch.page_indptr[b]) : int(batch.page_indptr[b + 1])].to(kv.k.device, torch.int64)
        page, offset = entries[position // batch.page_size], position % batch.page_size
    found = []
    for x, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
        rows = x.view(torch.uint8)[page, offset].view(x.dtype) if x.dtype.itemsize == 1 else x[page, offset]
        rows = rows.to(dtype)
        found.append(rows if scale is None else rows * scale_of(scale, page).to(dtype))
    return found[0], found[1]


def _kept(blocks: Any, first: int, row: int, n: int, kv_len: int) -> torch.Tensor:
    """Which keys the block pattern leaves to query rows row..row + n of a request, bool [n, kv_len]."""
    kept = torch.zeros(n, kv_len, dtype=torch.bool)
    for i in range(n):
        block = first + (row + i) // blocks.block_q
        for j in blocks.block_indices[int(blocks.block_indptr[block]) : int(blocks.block_indptr[block + 1])].tolist():
            kept[i, j * blocks.block_kv : (j + 1) * blocks.block_kv] = True
    return kept


class ReferenceExecutor:
    """Serves everything everywhere, slowly: `attend` in float32."""

    name = "reference"
    workspace_size = 0
    config = None
    tuned: Tuned = staticmethod(untuned)

    def __init__(self, spec: AttentionSpec, device: torch.device):
        self._spec = spec

    @classmethod
    def refuses(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        return None

    def plan(self, batch: Batch, reserve: Reserve | None) -> None:
        self._batch = batch

    def update(self, batch: Batch) -> None:
        self._batch = batch

    def run(
        self,
        q: torch.Tensor,
        kv: KV,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        *,
        sm_scale: float,
        partial: bool,
        values: tuple[Any, ...],
    ) -> None:
        to, to_lse = out, lse
        if q.dim() == 4:
            q, to = q.flatten(0, 1), out.new_empty((q.shape[0] * q.shape[1], *out.shape[2:]))
            to_lse = None if lse is None else lse.new_empty(to.shape[:2])
        attend(
            self._spec.program,
            values,
            q,
            kv,
            self._batch.to_host(),
            sm_scale,
            to,
            to_lse,
            partial=partial,
            dtype=torch.float32,
        )
        if to is not out:
            out.copy_(to.view(out.shape))
            if lse is not None:
                lse.copy_(to_lse.view(lse.shape))  # type: ignore[union-attr]

    def explain(self) -> str:
        return "torch operators, one request after another, in float32; waits for the device where there is one"
