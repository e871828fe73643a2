"""The variants that are timed, each written twice: for flashloom and as FlexAttention's functions.

The second form also serves as an independent definition: `exact` evaluates it in float64 for the error columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import flashloom as fl
from flashloom.bench.workloads import Workload

Mod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A variant for heads of a given count. `sdpa`: how torch's SDPA expresses it ("full", "causal"), None where only
    a mask would; `bias`: what its score_mod adds, where that is all it does, of head, query and key."""

    name: str
    variant: Callable[[int], fl.Variant]
    score_mod: Callable[[int], Mod] | None = None
    mask_mod: MaskMod | None = None
    sdpa: str | None = None
    window: int | None = None
    bias: Callable[[int], Callable[[Tensor, Tensor, Tensor], Tensor]] | None = None

    @property
    def causal(self) -> bool:
        return self.mask_mod is not None


def _causal(b, h, q, kv):
    return kv <= q


def _window(b, h, q, kv):
    return (kv <= q) & (kv > q - 256)


def _softcap(heads: int) -> Mod:
    return lambda score, b, h, q, kv: 30.0 * torch.tanh(score / 30.0)


def _alibi(heads: int) -> Mod:
    slopes = fl.alibi_slopes(heads)
    return lambda score, b, h, q, kv: score + slopes[h] * (kv - q)


def _bias(heads: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    slopes = fl.alibi_slopes(heads)
    return lambda h, q, kv: slopes[h] * (kv - q)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("full", lambda heads: fl.full, sdpa="full"),
        Case("causal", lambda heads: fl.causal, mask_mod=_causal, sdpa="causal"),
        Case("window 256", lambda heads: fl.causal & fl.sliding_window(255), mask_mod=_window, window=256),
        Case("soft cap", lambda heads: fl.causal & fl.softcap(30.0), score_mod=_softcap, mask_mod=_causal),
        Case("ALiBi", lambda heads: fl.causal & fl.alibi(heads), score_mod=_alibi, mask_mod=_causal, bias=_bias),
    )
}


def sampled_rows(workload: Workload, limit: int = 16) -> Tensor:
    """Query tokens to compare: up to `limit`, evenly spread over the batch, int64."""
    return torch.linspace(0, workload.tokens - 1, min(limit, workload.tokens)).long().unique()


def exact(case: Case, workload: Workload, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """The case's output for some query tokens, in float64.

    Args:
        q: [tokens, q_heads, dim]; k: [kv tokens, kv_heads, dim] and v: [kv tokens, kv_heads, value_dim], requests one
        after another.
        rows: int64 query tokens, ascending.

    Returns:
        float64 [rows, q_heads, value_dim]
    """
    heads = workload.heads
    q_ends, kv_ends = (torch.tensor(lens).cumsum(0) for lens in (workload.q_lens, workload.kv_lens))
    requests = torch.searchsorted(q_ends, rows, right=True)
    head = torch.arange(heads.q_heads)[:, None, None]
    out = []
    for b in requests.unique():
        own, length = rows[requests == b], workload.kv_lens[b]
        keys = slice(int(kv_ends[b]) - length, int(kv_ends[b]))
        place = (length - (q_ends[b] - own))[None, :, None]
        at = torch.arange(length)[None, None, :]
        grouped = q[own].double().unflatten(1, (heads.kv_heads, heads.group))
        score = torch.einsum("rhgd,khd->hgrk", grouped, k[keys].double()).flatten(0, 1) * heads.dim**-0.5
        if case.score_mod is not None:
            score = case.score_mod(heads.q_heads)(score, b, head, place, at)
        if case.mask_mod is not None:
            score = score.masked_fill(~case.mask_mod(b, head, place, at), float("-inf"))
        weights = score.softmax(-1).unflatten(0, (heads.kv_heads, heads.group))
        out.append(torch.einsum("hgrk,khd->rhgd", weights, v[keys].double()).flatten(1, 2))
    return torch.cat(out)
