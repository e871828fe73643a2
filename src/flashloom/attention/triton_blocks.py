"""Block patterns for the Triton kernels: one more mask, a table of bools that a variant reads, ANDed with the program's
own, and for every block of query rows the list of the key tiles that hold any of it, so that no other is visited.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from flashloom.attention.batch import Batch
from flashloom.variant import PerRequest, Variant
from flashloom.variant.expr import Param, Program, all_of

__all__ = ["LISTS", "Pattern"]

#: What the kernel itself reads: [row blocks, key tiles + 1] int32. `before`: visited tiles before each tile; `visited`:
#: their numbers.
LISTS = tuple(Param(f"block_pattern_{name}", "tensor", "int32", 2) for name in ("before", "visited"))


@lru_cache
def _variant(block_q: int, block_kv: int) -> type[Variant]:
    class Blocks(Variant):
        """Query blocks see the key blocks whose entry of `block_pattern_kept` [query blocks * width] is true."""

        block_pattern_first: PerRequest
        block_pattern_width: int
        block_pattern_kept: torch.Tensor

        def logits_mask(self, at):
            row = self.block_pattern_first[at.batch] + (at.q_pos - at.kv_len + at.q_len) // block_q
            return self.block_pattern_kept[row * self.block_pattern_width + at.kv_pos // block_kv]

    return Blocks


class Pattern:
    """The block pattern of a plan's batches, as values of the mask's fields and of the lists on a device."""

    values: tuple[Any, ...]
    """Values of the fields and the lists, after those of the program; after `take`."""

    def __init__(self, batch: Batch, device: torch.device):
        assert batch.blocks is not None
        self.device, self.sizes = device, (batch.blocks.block_q, batch.blocks.block_kv)

    def program(self, program: Program) -> Program:
        """The program under the pattern."""
        one = torch.zeros(1, dtype=torch.int32)
        mine = _variant(*self.sizes)(
            block_pattern_first=one, block_pattern_width=1, block_pattern_kept=torch.zeros(1, dtype=torch.bool)
        ).program
        assert mine.mask is not None
        mask = mine.mask if program.mask is None else all_of(program.mask, mine.mask)
        return replace(program, params=(*program.params, *mine.params, *LISTS), mask=mask)

    def take(self, batch: Batch, group: int, block_m: int, block_n: int) -> None:
        """Follow another batch, for blocks of block_m rows (query token * group + head) and tiles of block_n keys.
        Raises ValueError when the batch's blocks have other sizes."""
        blocks = batch.blocks
        assert blocks is not None
        if (blocks.block_q, blocks.block_kv) != self.sizes:
            raise ValueError(
                f"update: the plan was made for blocks of {self.sizes[0]} queries and {self.sizes[1]} keys, and the "
                f"batch has blocks of {blocks.block_q} and {blocks.block_kv}: make another plan"
            )
        q_lens = np.diff(batch.q_indptr.numpy())
        first = blocks.first_block(q_lens)
        indptr, indices = blocks.block_indptr.numpy(), blocks.block_indices.numpy()
        longest = int(batch.kv_lens.max()) if batch.requests else 0
        width = max(-(-longest // self.sizes[1]), 1)
        if max(int(first[-1]), 1) * width >= 2**31:
            raise ValueError(
                f"a block pattern of {first[-1]} query blocks by {width} key blocks: must have fewer than 2**31 "
                "entries; take larger blocks"
            )
        kept = np.zeros((max(int(first[-1]), 1), width), dtype=bool)
        kept[np.repeat(np.arange(indptr.size - 1), np.diff(indptr)), indices[: indptr[-1]]] = True
        before, visited = lists(kept, first, q_lens * group, self.sizes, longest, group, block_m, block_n)
        starts = torch.from_numpy(first[:-1].astype(np.int32)) if batch.requests else torch.zeros(1, dtype=torch.int32)
        variant = _variant(*self.sizes)(
            block_pattern_first=starts.to(self.device),
            block_pattern_width=width,
            block_pattern_kept=torch.from_numpy(kept.reshape(-1)).to(self.device),
        )
        self.values = (*variant.values, *(torch.from_numpy(x).to(self.device) for x in (before, visited)))


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
