"""Bool tensors packed 8 to a byte."""

from __future__ import annotations

import torch

from flashloom.variant.bits import pack_bits, pack_segments

__all__ = ["packbits", "segment_packbits"]


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """numpy.packbits of x, flattened: uint8 [ceil(n / 8)]."""
    return pack_bits(x, bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Segments of x, each from a byte of its own: (uint8 bytes, their offsets int32 [segments + 1])."""
    packed, starts = pack_segments(x, indptr.to(x.device), bitorder)
    return packed, starts.to(torch.int32)
