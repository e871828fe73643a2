"""flashinfer.triton.cascade: the same merges as flashinfer.cascade, and one over ragged numbers of states."""

from __future__ import annotations

import torch

from flashloom.attention.merge import merge_ragged
from flashloom.compat.flashinfer._plans import base_two
from flashloom.compat.flashinfer._variants import LN2
from flashloom.compat.flashinfer.cascade import merge_state, merge_state_in_place, merge_states

__all__ = ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]


def variable_length_merge_states(
    v: torch.Tensor, s: torch.Tensor, indptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states indptr[i]:indptr[i + 1] of v [states, heads, dim] and s [states, heads] as one, for every i."""
    out, lse = merge_ragged(v, s.float() * LN2, indptr)
    return out, base_two(lse)
