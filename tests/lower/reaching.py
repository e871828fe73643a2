"""Variants that index every kind of field with all that may stand in an index, far outside of the tensor too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import flashloom as fl

POSITIONS = ("batch", "q_head", "kv_head", "q_pos", "kv_pos", "q_len", "kv_len")
OWN = {"head": ("q_head",), "kv_head": ("kv_head",), "request": ("batch",), "key": ("q_pos", "kv_pos")}
KINDS = {
    "head": fl.PerHead, "kv_head": fl.PerKVHead, "request": fl.PerRequest, "query": fl.PerQueryToken,
    "key": fl.PerKeyToken, "bits": fl.Bits, "vector": torch.Tensor, "matrix": torch.Tensor, "bytes": torch.Tensor,
    "wide": torch.Tensor, "double": torch.Tensor,
}  # fmt: skip


def _indices(kind: str, at: Any) -> list[Any]:
    if kind == "query":
        return [at.q_pos]
    names = OWN.get(kind, POSITIONS)
    found = [getattr(at, name) for name in names]
    q, k, h = at.q_pos, at.kv_pos, at.q_head
    found += [k * 1000, k * -1000, q - k, k - q + h, ~k, k - 2**31, k + 2**31, k * 2**40, q * -(2**50), (k - 3) // 2]
    found += [
        q % 5 - 9,
        torch.clamp(k, 2, 2**33),
        (k * 7).to(torch.int8),
        torch.where(q > k, 10**9, -(10**9)),
        h + 10**9,
    ]
    return found


def _hooks(kind: str) -> dict[str, Any]:
    def values(self: Any, at: Any) -> list[Any]:
        indices = _indices(kind, at)
        if kind == "matrix":
            return [self.x[i, j] for i, j in zip(indices, indices[1:] + indices[:1])]
        return [self.x[i] for i in indices]

    def logits_transform(self: Any, logits: Any, at: Any) -> Any:
        for value in values(self, at):
            logits = logits + torch.where(value, 0.1, 0.0) if kind == "bits" else logits + value * 0.01
        return logits

    def logits_mask(self: Any, at: Any) -> Any:
        kept = at.kv_pos <= at.q_pos + 3
        for value in values(self, at):
            # through the key's position: the interpreter makes floats of a row's comparison beside those of keys
            seen = value | (at.kv_pos % 7 > 0) if kind == "bits" else torch.where(value > -90, at.kv_pos, -1) >= 0
            kept = kept & seen
        return kept

    return {"logits_transform": logits_transform, "logits_mask": logits_mask, "__annotations__": {"x": KINDS[kind]}}


def reaching(kind: str, place: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Callable[..., fl.Variant]:
    """A function of (case, device) that makes the variant; `place` puts its tensor where it shall lie."""

    def variant(case: Any, device: Any) -> fl.Variant:
        heads, g = case.heads, torch.Generator().manual_seed(1)
        sizes = {
            "head": heads.q_heads, "kv_head": heads.kv_heads, "request": len(case.q_lens), "query": sum(case.q_lens),
            "key": sum(case.kv_lens),
        }  # fmt: skip
        shape = (3, 5) if kind == "matrix" else (sizes.get(kind, 7),)
        x = torch.randn(shape, generator=g)
        if kind in ("bytes", "bits"):
            x = torch.randint(0, 255, shape, generator=g, dtype=torch.uint8)
        elif kind == "wide":
            x = torch.randint(-50, 50, shape, generator=g)
        elif kind == "double":
            x = x.double()
        return type(f"Reaching{kind.title()}", (fl.Variant,), _hooks(kind))(x=place(x.to(device)))

    variant.__name__ = f"reaching-{kind}"
    return variant
