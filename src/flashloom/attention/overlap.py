"""Whether a result would be written over what the same call reads. Only what is certain counts: tensors that interleave
in one buffer are left alone, and so is what is too tangled to tell."""

from __future__ import annotations

import torch

__all__ = ["Apart", "overlap"]


def extent(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not x.numel():
        return 0
    return (sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1) * x.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the tensors certainly have a byte in common."""
    if not (a.numel() and b.numel()):
        return False
    start = a.data_ptr() - b.data_ptr()
    if not -extent(a) < start < extent(b):
        return False
    (run_a, outer_a), (run_b, outer_b) = _runs(a), _runs(b)
    steps = {step for _, step in (*outer_a, *outer_b)}
    if len(steps) > 1 or max(len(outer_a), len(outer_b)) > 1:
        return start == 0
    # runs of a and b, both every `step` bytes: some of a's begins within some of b's, or the other way round
    step = steps.pop() if steps else 1 << 62
    times_a, times_b = (outer[0][0] if outer else 1 for outer in (outer_a, outer_b))
    least = max(-((start + run_a - 1) // step), 1 - times_b)
    most = min((run_b - 1 - start) // step, times_a - 1)
    return least <= most


def _runs(x: torch.Tensor) -> tuple[int, list[tuple[int, int]]]:
    """(bytes of a run without a gap, (number, step in bytes) of the axes along which such runs repeat)."""
    size = x.element_size()
    run = size
    outer: list[tuple[int, int]] = []
    for step, n in sorted((s * size, n) for n, s in zip(x.shape, x.stride()) if n > 1 and s):
        if step <= run:
            run += (n - 1) * step
        elif outer and outer[-1][0] * outer[-1][1] == step:
            outer[-1] = (outer[-1][0] * n, outer[-1][1])
        else:
            outer.append((n, step))
    return run, outer


class Apart:
    """For calls with tensors of one form: whether a result at an address is clear of the inputs, or lies among one of
    them just as in the call that was looked at in full."""

    __slots__ = ("_k", "_q", "_v")

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, known: tuple[int, ...]):
        own = -extent(out)
        self._q, self._k, self._v = ((own, extent(x), known[3] - at) for x, at in zip((q, k, v), known))

    def __call__(self, q: int, k: int, v: int, out: int) -> bool:
        low, high, known = self._q
        if low < out - q < high and out - q != known:
            return False
        low, high, known = self._k
        if low < out - k < high and out - k != known:
            return False
        low, high, known = self._v
        return not (low < out - v < high and out - v != known)
