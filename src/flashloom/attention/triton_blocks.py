"""Block patterns for the Triton kernels: a pattern is one more mask, a table of bools that a variant reads, ANDed with
the program's own.
"""

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
        """Query blocks see the key blocks whose entry of `block_pattern_kept` [query blocks * width] is true."""

        block_pattern_first: PerRequest
        block_pattern_width: int
        block_pattern_kept: torch.Tensor

        def logits_mask(self, at):
            row = self.block_pattern_first[at.batch] + (at.q_pos - at.kv_len + at.q_len) // block_q
            return self.block_pattern_kept[row * self.block_pattern_width + at.kv_pos // block_kv]

    return Blocks


class Pattern:
    """The block pattern of a plan's batches, as values of the mask's fields on a device."""

    def __init__(self, batch: Batch, device: torch.device):
        assert batch.blocks is not None
        self.device, self.sizes = device, (batch.blocks.block_q, batch.blocks.block_kv)
        self.take(batch)

    def take(self, batch: Batch) -> None:
        """Follow another batch. Raises ValueError when its blocks have other sizes."""
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
        starts = torch.from_numpy(first[:-1].astype(np.int32)) if batch.requests else torch.zeros(1, dtype=torch.int32)
        self._variant = _variant(*self.sizes)(
            block_pattern_first=starts.to(self.device),
            block_pattern_width=width,
            block_pattern_kept=torch.from_numpy(kept.reshape(-1)).to(self.device),
        )

    @property
    def values(self) -> tuple[Any, ...]:
        """Values of the fields, after those of the program."""
        return self._variant.values

    def program(self, program: Program) -> Program:
        """The program under the pattern."""
        mine = self._variant.program
        assert mine.mask is not None
        mask = mine.mask if program.mask is None else all_of(program.mask, mine.mask)
        return replace(program, params=(*program.params, *mine.params), mask=mask)
