"""Bool masks packed 8 to a byte, as `packed_mask` takes them."""

from __future__ import annotations

import torch

_PLACES = {"little": (1, 2, 4, 8, 16, 32, 64, 128), "big": (128, 64, 32, 16, 8, 4, 2, 1)}


def pack_bits(x: torch.Tensor, bitorder: str = "little") -> torch.Tensor:
    """The elements of `x` (true where not 0), flattened in row-major order, 8 to a byte: uint8 [ceil(n / 8)], the last
    byte filled up with zeros. bitorder: "little" or "big", as in numpy.packbits."""
    bits = x.reshape(-1)
    missing = -bits.numel() % 8
    if missing:
        bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, missing))
    return _join(bits.view(-1, 8) != 0, bitorder)


def pack_segments(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "little") -> tuple[torch.Tensor, torch.Tensor]:
    """The segments x[indptr[i]:indptr[i + 1]] of a flat tensor, each packed from a byte of its own.

    Returns (uint8 bytes, their offsets [segments + 1] in indptr's dtype). Waits for the device, to learn the size."""
    if x.dim() != 1 or indptr.dim() != 1 or indptr.numel() < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, indptr {tuple(indptr.shape)}: must be [n] and [segments + 1]")
    size = (indptr[1:] - indptr[:-1] + 7) // 8
    starts = torch.zeros_like(indptr)
    starts[1:] = torch.cumsum(size, 0)
    byte = torch.arange(int(starts[-1]), device=x.device)
    segment = torch.searchsorted(starts, byte, right=True) - 1 if byte.numel() else byte
    first = indptr.to(torch.int64)[segment] + (byte - starts[segment]) * 8
    bit = first.unsqueeze(1) + torch.arange(8, device=x.device)
    inside = bit < indptr[1:][segment].unsqueeze(1)
    bits = x[bit.clamp_(max=max(x.numel() - 1, 0))] if x.numel() else torch.zeros_like(inside)
    return _join((bits != 0) & inside, bitorder), starts


def _join(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    if bitorder not in _PLACES:
        raise ValueError(f'bitorder={bitorder!r}: must be "little" or "big"')
    return (bits * torch.tensor(_PLACES[bitorder], dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)
