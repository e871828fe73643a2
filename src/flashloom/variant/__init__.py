"""Attention variants: written as torch code, traced to a small expression IR."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from flashloom.variant.flex import from_flex

__all__ = [
    "Bits", "PerHead", "PerKVHead", "PerKeyToken", "PerQueryToken", "PerRequest", "Scalar", "TraceError", "Variant",
    "alibi", "alibi_slopes", "causal", "custom_mask", "document_mask", "from_flex", "full", "length_temperature",
    "packed_mask", "prefix_lm",
    "rope", "rope_frequencies", "sigmoid", "sink", "sliding_window", "softcap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """FlexAttention's functions are read by code that other variants do without."""
    if name != "from_flex":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashloom.variant.flex import from_flex

    return from_flex
