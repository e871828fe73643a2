"""FlashInfer's meaning of attention in a few lines of float64 torch: one request, keys [tokens, heads, dim]."""

import math

import torch


def attend(q, k, v, *, scale=None, causal=False, window=-1, cap=0.0, mask=None, bias=None, sink=None):
    """(out, base-2 lse) of q [n, heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if bias is not None:
        logits = logits + bias
    if cap:
        logits = cap * torch.tanh(logits / cap)
    q_pos = torch.arange(q.shape[0]).unsqueeze(1) + k.shape[0] - q.shape[0]
    k_pos = torch.arange(k.shape[0])
    keep = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if mask is not None:
        keep &= mask
    elif causal:
        keep &= k_pos <= q_pos
    if window >= 0:
        keep &= k_pos >= q_pos - window
    logits = logits.masked_fill(~keep, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    total = lse if sink is None else torch.logaddexp(lse, sink.double().unsqueeze(1))
    weight = torch.exp(logits - torch.where(total == -torch.inf, 0, total).unsqueeze(-1))
    return torch.einsum("hqk,khd->qhd", weight, v), (lse / math.log(2)).t()


def rotate(x, first, theta=1e4, scale=1.0):
    """llama's rotation of x [n, heads, dim] at positions first, first + 1, ..."""
    half = x.shape[-1] // 2
    angle = (
        (torch.arange(x.shape[0]) + first).double()[:, None] / scale * theta ** -(torch.arange(half).double() / half)
    )
    cos, sin = torch.cos(angle).unsqueeze(1), torch.sin(angle).unsqueeze(1)
    a, b = x.double().split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
