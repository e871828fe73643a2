"""FlashInfer's numbers and modes as flashloom variants, kept so that the same numbers are the same object."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import flashloom as fl
from flashloom.variant.bits import pack_bits, pack_segments
from flashloom.variant.library import rope_frequencies

KEPT = 512
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@dataclass(frozen=True)
class Rules:
    """What plan() or forward() says of the logits."""

    causal: bool = False
    window_left: int = -1
    soft_cap: float = 0.0
    pos_encoding: str = "NONE"
    rope_scale: float = 1.0
    rope_theta: float = 1e4

    @classmethod
    def of(
        cls,
        causal: bool,
        window_left: int,
        soft_cap: float | None,
        pos_encoding: str,
        rope_scale: float | None,
        rope_theta: float | None,
    ) -> Rules:
        """With FlashInfer's defaults for None. Raises KeyError for an unknown pos_encoding_mode."""
        if pos_encoding not in ("NONE", "ROPE_LLAMA", "ALIBI"):
            raise KeyError(f"Invalid pos_encoding_mode {pos_encoding}")
        return cls(
            bool(causal),
            -1 if window_left is None or window_left < 0 else int(window_left),
            float(soft_cap) if soft_cap is not None and soft_cap > 0 else 0.0,
            pos_encoding,
            1.0 if rope_scale is None else float(rope_scale),
            1e4 if rope_theta is None else float(rope_theta),
        )


class Heads(fl.Variant):
    """Logits times a factor per query head: the scale of 8-bit queries."""

    scale: fl.PerHead

    def logits_transform(self, logits, at):
        return logits * self.scale[at.q_head]


class ItemScoring(fl.Variant):
    """Several items scored behind one prefix: a token behind the prefix sees the prefix, and its own item behind the
    delimiter that opens it. position[request, i] counts from that delimiter, for the i-th token behind the prefix."""

    prefix: fl.PerRequest
    position: torch.Tensor

    def logits_mask(self, at):
        prefix = self.prefix[at.batch]
        behind = at.q_pos - prefix
        opened = at.q_pos - self.position[at.batch, behind]
        return (at.kv_pos <= at.q_pos) & ((behind < 0) | (at.kv_pos < prefix) | (at.kv_pos > opened))


class Logits(fl.Variant):
    """Sigmoid attention with a scale and a bias for the logits."""

    softmax = False
    scale: float
    bias: float

    def logits_transform(self, logits, at):
        return torch.sigmoid(logits * self.scale + self.bias)


def both(*parts: fl.Variant) -> fl.Variant:
    """The composition of those that do anything."""
    found = [part for part in parts if part is not fl.full]
    variant = found[0] if found else fl.full
    for part in found[1:]:
        variant = variant & part
    return variant


@lru_cache(maxsize=KEPT)
def variant(rules: Rules, q_heads: int, dim: int, device: torch.device) -> fl.Variant:
    """The variant of these rules for heads of this number and width."""
    return both(*_encoding(rules, q_heads, dim, device), *_masks(rules))


def _encoding(rules: Rules, q_heads: int, dim: int, device: torch.device) -> list[fl.Variant]:
    parts: list[fl.Variant] = []
    if rules.pos_encoding == "ROPE_LLAMA":
        table = rope_frequencies(dim, rules.rope_theta, rules.rope_scale).to(device)
        parts.append(fl.rope(dim, inv_freq=table))
    elif rules.pos_encoding == "ALIBI":
        parts.append(fl.alibi(fl.alibi_slopes(q_heads).to(device)))
    return [*parts, fl.softcap(rules.soft_cap)] if rules.soft_cap else parts


def _masks(rules: Rules) -> list[fl.Variant]:
    window = [] if rules.window_left < 0 else [fl.sliding_window(rules.window_left)]
    return [fl.causal, *window] if rules.causal else window


def with_mask(rules: Rules, q_heads: int, dim: int, mask: fl.Variant) -> fl.Variant:
    """The rules with a mask of one's own in place of causal."""
    window = [] if rules.window_left < 0 else [fl.sliding_window(rules.window_left)]
    return both(*_encoding(rules, q_heads, dim, mask.values[0].device), mask, *window)


def packed(mask: torch.Tensor | None, bits: torch.Tensor | None, lens: list[int] | torch.Tensor) -> Any:
    """(bits, byte offsets) of a flat bool mask whose requests have `lens` elements, or of what is packed already.
    Raises ValueError for another number of elements than `lens` on the host say."""
    name, given = ("custom_mask", mask) if bits is None else ("packed_custom_mask", bits)
    assert given is not None
    lens = torch.as_tensor(lens)
    if lens.device.type == "cpu":
        want = int(lens.sum() if bits is None else ((lens + 7) // 8).sum())
        if given.numel() != want:
            what = (
                "one element per query and key of each request"
                if bits is None
                else "each request's bits from a new byte"
            )
            raise ValueError(f"{name} has {given.numel()} elements: must have {want}, {what}")
    if given.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {given.dtype}: must be torch.bool, True for what is seen")
    device = given.device
    lens = lens.to(device)
    starts = torch.zeros(lens.numel() + 1, dtype=torch.int64, device=device)
    starts[1:] = torch.cumsum(lens if bits is None else (lens + 7) // 8, 0)
    if bits is not None:
        return bits, starts
    assert mask is not None
    mask = mask.to(torch.bool)
    if lens.numel() == 1:
        packed_bits = pack_bits(mask)
        return packed_bits, torch.tensor([0, packed_bits.numel()], device=device)
    return pack_segments(mask.reshape(-1), starts)


class Instances:
    """Variants made around tensors of the caller, kept while those live here; the oldest ones go."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple, fl.Variant] = OrderedDict()

    def get(self, base: fl.Variant, kind: Any, *values: Any, first: bool = False) -> fl.Variant:
        """base & kind(*values), the new one first if asked. The variant holds the tensors, so an address means the
        same tensor while it is kept."""
        key = (id(base), kind, *(_identity(x) for x in values))
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = both(kind(*values), base) if first else both(base, kind(*values))
            made.__dict__["base"] = base  # keeps its id in use
            if len(self._made) > KEPT:
                self._made.popitem(last=False)
        return made


def _identity(x: Any) -> Any:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x
