"""Block patterns for the Triton kernels: beside the mask, for every block of query rows the list of the key tiles that
hold any of it, so that no other is visited.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import numpy as np
import torch

from flashloom.attention import blocks
from flashloom.attention.batch import Batch
from flashloom.variant.expr import Param, Program

__all__ = ["LISTS", "Pattern"]

#: What the kernel itself reads: [row blocks, key tiles + 1] int32. `before`: visited tiles before each tile; `visited`:
#: their numbers.
LISTS = tuple(Param(f"block_pattern_{name}", "tensor", "int32", 2) for name in ("before", "visited"))


class Pattern(blocks.Pattern):
    """The block pattern of a plan's batches, as values of the mask's fields and of the lists on a device. A later
    batch's are written to the same memory, as a captured run expects; only where they are too large do they get another
    one."""

    def __init__(self, batch: Batch, device: torch.device):
        super().__init__(batch, device)
        self._tensors: list[torch.Tensor] = []

    def program(self, program: Program) -> Program:
        """The program under the pattern."""
        masked = super().program(program)
        return replace(masked, params=(*masked.params, *LISTS))

    def read(self, batch: Batch, group: int, block_m: int, block_n: int) -> list[np.ndarray]:
        """What `write` writes for a batch, for blocks of block_m rows (query token * group + head) and tiles of block_n
        keys. Raises what `table` does."""
        first, kept = self.table(batch)
        rows = np.diff(batch.q_indptr.numpy()) * group
        longest = int(batch.kv_lens.max()) if batch.requests else 0
        return [first, kept, *lists(kept, first, rows, self.sizes, longest, group, block_m, block_n)]

    def holds(self, found: list[np.ndarray]) -> bool:
        """Whether `write` keeps the memory, or begins."""
        return all(n <= m for x, to in zip(found, self._tensors) for n, m in zip(x.shape, to.shape))

    def write(self, found: list[np.ndarray], requests: int, tokens: int, row_blocks: int) -> None:
        """Follow the batch of these, with room for batches of so many requests, query tokens and blocks of rows."""
        least = ((requests,), (tokens // self.sizes[0] + requests,), (row_blocks,), (row_blocks,))
        if not self._tensors or not self.holds(found):
            room = [to.shape for to in self._tensors] or least
            shapes = [
                [max(sizes) for sizes in zip_longest(x.shape, have, wanted, fillvalue=0)]
                for x, have, wanted in zip(found, room, least)
            ]
            self._tensors = [
                torch.zeros(shape, dtype=torch.from_numpy(x).dtype, device=self.device)
                for x, shape in zip(found, shapes)
            ]
            self.values = (*self.fields(*self._tensors[:2]), *self._tensors[2:])
        for x, to in zip(found, self._tensors):
            to[tuple(slice(n) for n in x.shape)].copy_(torch.from_numpy(x))


def lists(
    kept: np.ndarray, first: np.ndarray, rows: np.ndarray, sizes: tuple[int, int], longest: int, group: int,
    block_m: int, block_n: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`LISTS` for kept [query blocks, key blocks], the requests' first query blocks and numbers of rows, and the most
    keys of a request. Row blocks are numbered through the requests, as the planner does."""
    count = -(-rows.astype(np.int64) // block_m)
    request = np.repeat(np.arange(rows.size), count)
    row = (np.arange(request.size) - np.repeat(np.cumsum(count) - count, count)) * block_m
    last = np.minimum(row + block_m, rows[request]) - 1
    tile = np.arange(max(-(-longest // block_n), 1))
    by_rows = _any(kept, first[request] + row // group // sizes[0], first[request] + last // group // sizes[0], 0)
    some = _any(by_rows, tile * block_n // sizes[1], (tile * block_n + block_n - 1) // sizes[1], 1)
    before = np.zeros((max(request.size, 1), tile.size + 1), dtype=np.int32)
    visited = np.zeros_like(before)
    if request.size:
        np.cumsum(some, axis=1, out=before[:, 1:])
        visited[:, :-1] = np.argsort(~some, axis=1, kind="stable")
    return before, visited


def _any(x: np.ndarray, low: np.ndarray, high: np.ndarray, axis: int) -> np.ndarray:
    """Whether any entry from low[i] to high[i], inclusive and cut to the array, is true."""
    sums = np.insert(np.cumsum(x, axis=axis, dtype=np.int32), 0, 0, axis=axis)
    return np.take(sums, high + 1, axis=axis, mode="clip") > np.take(sums, low, axis=axis, mode="clip")
