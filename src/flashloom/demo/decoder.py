"""A small decoder of the Llama architecture with seeded weights, and its plain-SDPA twin.

The model computes everything but attention; how queries meet keys and values is handed in, so that the same weights run
over flashloom's paged cache (serving.py) and over torch's scaled_dot_product_attention (here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# (layer, q [tokens, q_heads, dim], k [tokens, kv_heads, dim], v likewise) -> [tokens, q_heads, dim]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; token ids below 256 are bytes of text."""

    vocabulary: int = 1024
    hidden: int = 512
    layers: int = 4
    q_heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    ffn: int = 1408
    rope_theta: float = 10_000.0
    eps: float = 1e-5


class Decoder:
    """RMSNorm, rotary embedding, grouped-query attention and SwiGLU, as in Llama 2 (Touvron et al. 2023).

    Weights are drawn from a seed with variance 1 / fan-in, those around attention larger: the text it writes means
    nothing, but its tokens depend on the whole context, so that an error in attention changes them.
    """

    def __init__(self, shape: Shape = Shape(), seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

        self.shape = s = shape
        self.embedding = weight(s.vocabulary, s.hidden) * s.hidden**0.5
        self.layers = [
            {
                "q": 2.0 * weight(s.q_heads * s.dim, s.hidden),
                "k": weight(s.kv_heads * s.dim, s.hidden),
                "v": weight(s.kv_heads * s.dim, s.hidden),
                "o": 4.0 * weight(s.hidden, s.q_heads * s.dim),
                "gate": weight(s.ffn, s.hidden),
                "up": weight(s.ffn, s.hidden),
                "down": weight(s.hidden, s.ffn),
            }
            for _ in range(s.layers)
        ]
        self.head = weight(s.vocabulary, s.hidden)
        self.inverse_frequencies = s.rope_theta ** -(torch.arange(0, s.dim, 2, dtype=torch.float64) / s.dim)

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """Next-token logits.

        Args:
            tokens: int64 [tokens], of any number of requests one after another.
            positions: int64 [tokens], the place of each token in its own request.
            rows: int64 [rows], the tokens whose logits are wanted.

        Returns:
            [rows, vocabulary]
        """
        s = self.shape
        angles = torch.outer(positions.double(), self.inverse_frequencies)
        cos, sin = angles.cos().to(self.head.dtype)[:, None], angles.sin().to(self.head.dtype)[:, None]
        x = self.embedding[tokens]
        for i, w in enumerate(self.layers):
            y = F.rms_norm(x, (s.hidden,), eps=s.eps)
            q = rotate(F.linear(y, w["q"]).view(-1, s.q_heads, s.dim), cos, sin)
            k = rotate(F.linear(y, w["k"]).view(-1, s.kv_heads, s.dim), cos, sin)
            v = F.linear(y, w["v"]).view(-1, s.kv_heads, s.dim)
            x = x + F.linear(attend(i, q, k, v).reshape(-1, s.q_heads * s.dim), w["o"])
            y = F.rms_norm(x, (s.hidden,), eps=s.eps)
            x = x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])
        return F.linear(F.rms_norm(x[rows], (s.hidden,), eps=s.eps), self.head)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [tokens, heads, dim] by angles [tokens, 1, dim / 2], halves paired (Su et al. 2021)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def generate_with_sdpa(decoder: Decoder, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens of one request by torch's SDPA over a dense cache: what serving.py must reproduce."""
    s = decoder.shape
    room = len(prompt) + new_tokens
    keys = torch.zeros(s.layers, s.kv_heads, room, s.dim, dtype=decoder.head.dtype)
    values = torch.zeros_like(keys)
    tokens, done, chunk = list[int](), 0, prompt

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = done + len(chunk)
        keys[layer, :, done:end], values[layer, :, done:end] = k.transpose(0, 1), v.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None, layer, :, :end], values[None, layer, :, :end],
            is_causal=len(chunk) > 1, enable_gqa=True,
        )  # fmt: skip
        return out[0].transpose(0, 1)

    for _ in range(new_tokens):
        positions = torch.arange(done, done + len(chunk))
        logits = decoder.logits(torch.tensor(chunk), positions, torch.tensor([len(chunk) - 1]), attend)
        done += len(chunk)
        chunk = [int(logits[0].argmax())]
        tokens += chunk
    return tokens
