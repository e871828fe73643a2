"""Attention as loops over rows and heads in float64, and small inputs: what the contract's tests compare with."""

from __future__ import annotations

import math

import torch

import flashloom as fl

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def oracle(q, k, v, keep=None, logits=None, scale=None):
    """One request: q [q_len, heads, dim], k, v [kv_len, kv_heads, *]; keep(h, q_pos, kv_pos) and logits(x, h, q_pos,
    kv_pos)."""
    q, k, v = q.double(), k.double(), v.double()
    q_len, heads, _ = q.shape
    kv_len, kv_heads, _ = k.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = torch.zeros(q_len, heads, v.shape[-1], dtype=torch.float64), torch.full((q_len, heads), -math.inf)
    for i in range(q_len):
        pos = kv_len - q_len + i
        for h in range(heads):
            g = h // (heads // kv_heads)
            found, rows = [], []
            for j in range(kv_len):
                if keep is None or keep(h, pos, j):
                    x = float(q[i, h] @ k[j, g]) * scale
                    found.append(x if logits is None else logits(x, h, pos, j))
                    rows.append(v[j, g])
            if found:
                x = torch.tensor(found, dtype=torch.float64)
                lse[i, h] = torch.logsumexp(x, 0)
                out[i, h] = torch.softmax(x, 0) @ torch.stack(rows)
    return out, lse


def close(a, b, dtype=torch.float32):
    torch.testing.assert_close(a.double(), b.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def causal(h, q_pos, kv_pos):
    return kv_pos <= q_pos


def ragged(q_lens, kv_lens, heads, *, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(q_lens), heads.q_heads, heads.dim, generator=g).to(dtype)
    k = torch.randn(sum(kv_lens), heads.kv_heads, heads.dim, generator=g).to(dtype)
    v = torch.randn(sum(kv_lens), heads.kv_heads, heads.value_dim, generator=g).to(dtype)
    return q, k, v


def expected(q, k, v, q_lens, kv_lens, **options):
    parts = [
        oracle(a, b, c, **options)
        for a, b, c in zip(q.split(list(q_lens)), k.split(list(kv_lens)), v.split(list(kv_lens)), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


HEADS = fl.HeadShape(4, 2, 16)


def make(q_lens=(3, 1, 5), kv_lens=(7, 4, 5), heads=HEADS, reserve=None, variant=fl.causal, **options):
    """A ragged plan with its tensors."""
    q, k, v = ragged(q_lens, kv_lens, heads)
    layer = fl.Attention(heads, variant=variant, dtype=torch.float32, device="cpu", **options)
    plan = layer.plan(fl.Batch(q_lens=list(q_lens), kv=fl.RaggedKV(list(kv_lens))), reserve=reserve)
    return plan, q, k, v


def paged(kv_lens, page_size, heads, *, dtype=torch.float32, layout="NHD", spare=3, seed=0):
    """A cache of one layer whose pages are in random order, with its dense contents; unused slots hold NaN."""
    g = torch.Generator().manual_seed(seed)
    need = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(need) + spare, generator=g)
    cache = fl.PagedKVCache(1, sum(need) + spare, page_size, heads, dtype, "cpu", layout=layout)
    cache[0].k.fill_(math.nan)
    cache[0].v.fill_(math.nan)
    k = torch.randn(sum(kv_lens), heads.kv_heads, heads.dim, generator=g).to(dtype)
    v = torch.randn(sum(kv_lens), heads.kv_heads, heads.value_dim, generator=g).to(dtype)
    pages, token = [], 0
    for n, count in zip(kv_lens, need, strict=True):
        mine = order[sum(map(len, pages)) :][:count].tolist()
        for t in range(n):
            cache[0].k[mine[t // page_size], t % page_size] = k[token]
            cache[0].v[mine[t // page_size], t % page_size] = v[token]
            token += 1
        pages.append(mine)
    return cache, k, v, pages


def block_table(pages, junk=-7):
    width = max(map(len, pages), default=0) + 1
    return torch.tensor([row + [junk] * (width - len(row)) for row in pages], dtype=torch.int32).reshape(-1, width)
