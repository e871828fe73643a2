"""What is asked of an attention kernel, and what a backend must answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, Protocol

import torch

from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.shape import HeadShape
from flashloom.dataclass import dataclass
from flashloom.errors import FlashloomError
from flashloom.kv_cache.cache import KV
from flashloom.variant.expr import Program


@dataclass(frozen=True)
class AttentionSpec:
    """Everything but the device that picks a kernel; all of it is known at plan time. `program` is specialised to the
    head widths; `block_sparse` says that batches carry a block pattern; `name` is the variant's, for people."""

    heads: HeadShape
    program: Program
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    batch_invariant: bool = False
    block_sparse: bool = False
    name: str = field(default="", compare=False)

    @property
    def out_dtype(self) -> torch.dtype:
        """What run() allocates: q's dtype, bfloat16 for 8-bit queries. A caller's `out=` may also be any of the other
        float dtypes."""
        return torch.bfloat16 if self.q_dtype.itemsize == 1 else self.q_dtype


#: Answers with the backend's config for a batch that a tuning record names, or None: then the default serves.
Tuned = Callable[[Batch], Any]


def untuned(batch: Batch) -> None:
    """No record is asked."""


class CannotBuild(FlashloomError, RuntimeError):
    """An executor's kernels cannot be built here: another executor should serve. The message says why."""


def readable(x: torch.Tensor) -> torch.Tensor:
    """A variant's tensor as kernels take it. They clamp indices, and one without elements has no index to clamp to: a
    zero stands for it."""
    return x if x.numel() else x.new_zeros((1,) * x.dim())


class Executor(Protocol):
    """One backend's side of a plan. `Attention` has validated every argument; an executor owns its buffers and never
    hands one out."""

    name: str
    workspace_size: int
    """Bytes of the buffers it owns."""
    tuned: Tuned
    """Set before plan(); asked once where a config is picked. Its configs are valid for the batch."""
    config: Any
    """The config in force, after plan()."""
    captured: bool
    """Set before update(): a CUDA graph may hold the addresses of its buffers."""

    def __init__(self, spec: AttentionSpec, device: torch.device): ...

    @classmethod
    def refuses(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve this, in a few words, or None."""

    def plan(self, batch: Batch, reserve: Reserve | None) -> None:
        """Choose the config, build or load kernels, schedule. May raise kernel.NoCompiler."""

    def update(self, batch: Batch) -> None:
        """Follow new lengths and tables, without compiling; within the reserve no buffer moves."""

    def run(
        self,
        q: torch.Tensor,
        kv: KV,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        *,
        sm_scale: float,
        partial: bool,
        values: tuple[Any, ...],
    ) -> None:
        """Write out [rows, q_heads, value_dim] (float32, float16 or bfloat16, inner stride 1) and lse float32 [rows,
        q_heads] for the batch's tokens; rows beyond them stay untouched. All of q, out and lse may have [requests,
        tokens] in place of the rows, in any strides. `values` are those of program.params."""

    def explain(self) -> str:
        """Which kernel and config serve this plan, and why."""


def guard(*tensors: torch.Tensor) -> Callable[..., bool] | None:
    """A function that says in one call whether tensors have the sizes, strides, dtypes, devices and kinds of these, or
    None where torch offers none or one of them requires gradients."""
    if any(x.requires_grad for x in tensors):
        return None
    try:
        made = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, TypeError):  # not a public name of torch's; without it each argument is looked at in turn
        return None
    return made.check
