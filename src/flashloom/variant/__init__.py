"""Attention variants: written as torch code, traced to a small expression IR."""

from flashloom.variant.flex import from_flex
from flashloom.variant.library import (
    alibi,
    alibi_slopes,
    causal,
    custom_mask,
    document_mask,
    full,
    length_temperature,
    packed_mask,
    prefix_lm,
    rope,
    rope_frequencies,
    sigmoid,
    sink,
    sliding_window,
    softcap,
)
from flashloom.variant.trace import TraceError
from flashloom.variant.variant import Bits, PerHead, PerKeyToken, PerKVHead, PerQueryToken, PerRequest, Scalar, Variant

__all__ = [
    "Bits", "PerHead", "PerKVHead", "PerKeyToken", "PerQueryToken", "PerRequest", "Scalar", "TraceError", "Variant",
    "alibi", "alibi_slopes", "causal", "custom_mask", "document_mask", "from_flex", "full", "length_temperature",
    "packed_mask", "prefix_lm",
    "rope", "rope_frequencies", "sigmoid", "sink", "sliding_window", "softcap",
]  # fmt: skip
