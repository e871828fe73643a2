"""Block patterns for kernels: one more mask, a table of bools that a variant reads, ANDed with the program's own."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from flashloom.attention.batch import Batch
from flashloom.variant import PerRequest, Variant
from flashloom.variant.expr import Program, all_of

__all__ = ["Pattern"]


@lru_cache
def _variant(block_q: int, block_kv: int) -> type[Variant]:
    class Blocks(Variant):
        """Query blocks see the key blocks whose entry of `block_pattern_kept` [query blocks, key blocks] is true."""

        block_pattern_first: PerRequest
        block_pattern_kept: torch.Tensor

        def logits_mask(self, at):
            row = self.block_pattern_first[at.batch] + (at.q_pos - at.kv_len + at.q_len) // block_q
            return self.block_pattern_kept[torch.clamp(row, 0, 2**30), at.kv_pos // block_kv]

    return Blocks


class Pattern:
    """The block pattern of a plan's batches, as values of the mask's fields on a device."""

    values: tuple[Any, ...]
    """Values of the fields, after those of the program; after `take`."""

    def __init__(self, batch: Batch, device: torch.device):
        assert batch.blocks is not None
        self.device, self.sizes = device, (batch.blocks.block_q, batch.blocks.block_kv)
        self._joined: tuple[Any, ...] = (None, None, ())

    def program(self, program: Program) -> Program:
        """The program under the pattern."""
        one = torch.zeros(1, dtype=torch.int32)
        mine = _variant(*self.sizes)(
            block_pattern_first=one, block_pattern_kept=torch.zeros(1, 1, dtype=torch.bool)
        ).program
        assert mine.mask is not None
        mask = mine.mask if program.mask is None else all_of(program.mask, mine.mask)
        return replace(program, params=(*program.params, *mine.params), mask=mask)

    def take(self, batch: Batch) -> None:
        """Follow another batch. Raises what `table` does."""
        self.values = self.fields(*(torch.from_numpy(x).to(self.device) for x in self.table(batch)))

    def fields(self, first: torch.Tensor, kept: torch.Tensor) -> tuple[Any, ...]:
        """Values for what `table` answers."""
        return _variant(*self.sizes)(block_pattern_first=first, block_pattern_kept=kept).values

    def table(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Each request's first query block, int32 [requests or 1], and what a batch's blocks keep, bool [query blocks,
        key blocks of the longest request]. Raises ValueError when the batch's blocks have other sizes."""
        blocks = batch.blocks
        assert blocks is not None
        if (blocks.block_q, blocks.block_kv) != self.sizes:
            raise ValueError(
                f"update: the plan was made for blocks of {self.sizes[0]} queries and {self.sizes[1]} keys, and the "
                f"batch has blocks of {blocks.block_q} and {blocks.block_kv}: make another plan"
            )
        first = blocks.first_block(np.diff(batch.q_indptr.numpy()))
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
        return first[: max(batch.requests, 1)].astype(np.int32), kept

    def after(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The program's values and those of the pattern; the same object for the same ones."""
        of, mine, joined = self._joined
        if of is not values or mine is not self.values:
            joined = (*values, *self.values)
            self._joined = values, self.values, joined
        return joined
