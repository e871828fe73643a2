"""What attention is asked to do in practice: the layer shapes of known models and the batches of each phase, as
data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import flashloom as fl

# Attention layers of published models: query heads, kv heads, head dim (their config.json).
MODELS: dict[str, tuple[int, int, int]] = {
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b": (64, 8, 128),
    "mistral-7b": (32, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "qwen2.5-0.5b": (14, 2, 64),
    "gemma-2-9b": (16, 8, 256),
    "gpt-oss-20b": (64, 8, 64),
    "phi-3-mini": (32, 32, 96),
    "minilm-l6": (12, 12, 32),
}
PHASES = ("prefill", "decode", "append", "mixed")


@dataclass(frozen=True)
class Workload:
    """One attention call: the layer, and per request how many queries (`q_lens`) and keys (`kv_lens`, this step's
    included).

    page_size: tokens per page of the cache; None for contiguous ragged keys and values.
    """

    name: str
    heads: fl.HeadShape
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int | None = 16

    @property
    def phase(self) -> str:
        if all(q == 1 for q in self.q_lens):
            return "decode"
        if any(q == 1 for q in self.q_lens):
            return "mixed"
        return "prefill" if self.q_lens == self.kv_lens else "append"

    @property
    def tokens(self) -> int:
        return sum(self.q_lens)

    def pairs(self, causal: bool, window: int | None = None) -> int:
        """(query, key) pairs over all requests, of one head; `window`: a query sees the last so many keys."""
        if not causal:
            return sum(q * kv for q, kv in zip(self.q_lens, self.kv_lens))
        seen = 0
        for q, kv in zip(self.q_lens, self.kv_lens):
            first, last = kv - q + 1, kv  # keys that the first and the last query see
            full = max(0, last - max(first, window) + 1) if window else 0
            seen += full * (window or 0) + (first + last - full) * (q - full) // 2
        return seen

    def flops(self, causal: bool, window: int | None = None) -> int:
        """Multiplications and additions of both matrix products; masked pairs do not count."""
        return 2 * self.heads.q_heads * (self.heads.dim + self.heads.value_dim) * self.pairs(causal, window)

    def kv_bytes(self, dtype: torch.dtype, window: int | None = None) -> int:
        """Bytes of the keys and values that some query sees, each counted once."""
        keys = sum(min(kv, window + q - 1) if window else kv for q, kv in zip(self.q_lens, self.kv_lens))
        return keys * self.heads.kv_heads * (self.heads.dim + self.heads.value_dim) * dtype.itemsize


def workloads(model: str, phase: str | None = None, *, page_size: int | None = 16) -> list[Workload]:
    """The usual batches of a model's attention layer.

    Args:
        model: one of MODELS, such as "llama-3-8b".
        phase: "prefill", "decode", "append" or "mixed"; None for all of them.

    Raises:
        ValueError: for a model or phase that is not known, naming those that are.
    """
    if model not in MODELS:
        raise ValueError(
            f"model {model!r} is not known: use one of {', '.join(MODELS)}, or make Workload(...) yourself"
        )
    if phase is not None and phase not in PHASES:
        raise ValueError(f"phase {phase!r} is not known: use one of {', '.join(PHASES)}")
    heads = fl.HeadShape(*MODELS[model])
    found = [
        *(prefill(heads, s) for s in (1024, 2048, 4096)),
        *(decode(heads, b, kv, page_size) for b in (1, 8, 32) for kv in (1024, 4096, 16384)),
        Workload("append 4x64 kv 2048", heads, (64,) * 4, (2048,) * 4, page_size),
        Workload("mixed 7x1 + 512 kv 2048", heads, (1,) * 7 + (512,), (2048,) * 8, page_size),
    ]
    return [w for w in found if phase in (None, w.phase)]


def prefill(heads: fl.HeadShape, length: int, batch: int = 1) -> Workload:
    """`batch` whole prompts of `length` tokens over contiguous keys."""
    return Workload(f"prefill {batch}x{length}", heads, (length,) * batch, (length,) * batch, None)


def decode(heads: fl.HeadShape, batch: int, kv: int, page_size: int | None = 16) -> Workload:
    """One token for each of `batch` requests with `kv` tokens in the cache."""
    return Workload(f"decode {batch}x{kv}", heads, (1,) * batch, (kv,) * batch, page_size)
