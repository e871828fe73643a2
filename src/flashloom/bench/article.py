"""The benchmark that articles on attention kernels show: three shapes, 32 heads of 128, against attention written
naively in PyTorch, softmax(q k^T / sqrt(d)) v with the whole matrix of scores in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import flashloom as fl
from flashloom import store
from flashloom.bench.attention import DTYPES
from flashloom.bench.report import OWN, Row
from flashloom.bench.timing import interleave

HEADS, DIM = 32, 128
SHAPES = ((1, 1024), (4, 2048), (8, 4096))  # (batch, tokens)
SCORES = {"cpu": 1 << 30, "cuda": 1 << 35}  # bytes that the naive form's scores may take at a time
_CHECKED = 16  # query rows of each (batch, head) that are compared with float64


@dataclass(frozen=True)
class Article:
    """One of its shapes, ready to be run; tensors are [batch, heads, tokens, dim]."""

    batch: int
    tokens: int
    dtype: torch.dtype
    device: str
    causal: bool = False

    @property
    def name(self) -> str:
        return f"{'causal' if self.causal else 'full'} {self.batch} x {self.tokens} tokens, {HEADS}x{DIM}"

    @property
    def flops(self) -> float:
        pairs = self.tokens * (self.tokens + 1) / 2 if self.causal else self.tokens**2
        return 4.0 * self.batch * HEADS * pairs * DIM

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Seeded standard normal q, k and v."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.batch, HEADS, self.tokens, DIM)
        q, k, v = (torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) for _ in range(3))
        return q, k, v

    def row(self, rounds: int = 15) -> Row:
        """Time flashloom, the naive form and SDPA, taking turns.

        Raises ArithmeticError when flashloom is further from float64 than its dtype explains.
        """
        q, k, v = self.inputs()
        variant = fl.causal if self.causal else fl.full
        before = store.counters().build_seconds
        calls: dict[str, Callable[[], Tensor]] = {
            OWN: lambda: fl.attention(q, k, v, variant=variant),
            "naive": lambda: naive(q, k, v, self.causal),
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=self.causal),
        }
        errors = {peer: error(call(), q, k, v, self.causal) for peer, call in calls.items()}
        built = store.counters().build_seconds - before
        allowed = {torch.float32: 2e-5, torch.float16: 1e-2}.get(self.dtype, 5e-2)
        if not errors[OWN] <= allowed:
            raise ArithmeticError(f"{self.name}: the error against float64 is {errors[OWN]:.1e}, above {allowed:.0e}")
        wait = torch.cuda.synchronize if self.device == "cuda" else None
        times = interleave(calls, rounds=rounds, warmup=1, synchronize=wait)
        work = (self.flops / 1e12, "TFLOP")
        return Row("article", self.name, DTYPES[self.dtype], times, errors, built or None, work)


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attention as it is written down, over as many heads at a time as `SCORES` allows."""
    batch, heads, tokens, dim = q.shape
    q, k, v = (x.reshape(batch * heads, tokens, dim) for x in (q, k, v))
    step = max(1, SCORES[q.device.type] // (tokens * tokens * q.element_size()))
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1) if causal else None
    parts = []
    for at in range(0, batch * heads, step):
        scores = q[at : at + step] @ k[at : at + step].transpose(-1, -2) * dim**-0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        parts.append(torch.softmax(scores, dim=-1) @ v[at : at + step])
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(batch, heads, tokens, dim)


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Largest absolute difference from float64 over rows spread through the tokens, in the first and last batch and
    head."""
    tokens = q.shape[2]
    rows = torch.linspace(0, tokens - 1, min(_CHECKED, tokens)).round().long().to(q.device)
    worst = 0.0
    for b, h in {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}:
        scores = q[b, h, rows].double() @ k[b, h].double().T * q.shape[3] ** -0.5
        if causal:
            scores.masked_fill_(torch.arange(tokens, device=q.device) > rows[:, None], float("-inf"))
        wanted = torch.softmax(scores, -1) @ v[b, h].double()
        worst = max(worst, float((out[b, h, rows].double() - wanted).abs().max()))
    return worst


def articles(device: str, dtype: torch.dtype | None = None, causal: bool = False) -> list[Article]:
    """The three shapes: float16 on a GPU and bfloat16 on a CPU unless given."""
    dtype = dtype or (torch.float16 if device == "cuda" else torch.bfloat16)
    return [Article(batch, tokens, dtype, device, causal) for batch, tokens in SHAPES]
