"""Indices of FlexAttention functions: eager FlexAttention computes them for every pair of a query and a key, whatever
the mask says, and one that leaves its tensor is an IndexError there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flashloom.attention.linear import Step, linear
from flashloom.dataclass import dataclass
from flashloom.variant.expr import Expr, Program, topological

if TYPE_CHECKING:
    from flashloom.attention.batch import Batch
    from flashloom.attention.shape import HeadShape

__all__ = ["PairRead", "check_pairs", "pair_reads"]

Spans = Mapping[str, tuple[np.ndarray, np.ndarray]]  # least and largest value of a source, by request
_SOURCES = {"row", "kv_pos", "batch", "q_head", "kv_head", "q_len", "kv_len"}


@dataclass(frozen=True)
class Index:
    """constant + factors of sources that vary apart from each other, or factor * step(inner) + constant."""

    terms: tuple[tuple[str, int], ...]
    constant: int
    inner: Index | None = None
    step: tuple[str, int] = ("abs", 0)
    factor: int = 1

    def span(self, of: Spans) -> tuple[Any, Any]:
        """The least and the largest index, by request; both occur."""
        if self.inner is None:
            low: Any = self.constant
            high: Any = self.constant
            for name, factor in self.terms:
                ends = factor * of[name][0], factor * of[name][1]
                low, high = low + np.minimum(*ends), high + np.maximum(*ends)
            return low, high
        low, high = self.inner.span(of)
        name, by = self.step
        if name == "abs":
            low, high = np.where((low <= 0) & (high >= 0), 0, np.minimum(abs(low), abs(high))), np.maximum(-low, high)
        elif name == "floordiv":
            low, high = low // by, high // by
        else:
            cut = np.minimum if name == "min" else np.maximum
            low, high = cut(low, by), cut(high, by)
        ends = self.factor * low + self.constant, self.factor * high + self.constant
        return np.minimum(*ends), np.maximum(*ends)


@dataclass(frozen=True)
class PairRead:
    """One axis of a field and its index."""

    param: int
    axis: int
    index: Index


def pair_reads(program: Program, places: Collection[int]) -> tuple[PairRead, ...]:
    """Those of the params at these places whose indices the host can bound exactly."""
    if not places:
        return ()
    place = {param: i for i, param in enumerate(program.params)}
    found: dict[PairRead, None] = {}
    for node in topological(program.logits, program.mask):
        if node.op == "load" and place[node.attr] in places and node.attr.kind == "tensor":
            for axis, e in enumerate(node.args):
                index = _index(e)
                if index is not None:
                    found[PairRead(place[node.attr], axis, index)] = None
    return tuple(found)


def _index(e: Expr) -> Index | None:
    terms, constant = linear(e)
    position = terms.pop("q_pos", 0)
    for name, sign in (("row", 1), ("kv_len", 1), ("q_len", -1)):
        terms[name] = terms.get(name, 0) + sign * position
    terms = {term: factor for term, factor in terms.items() if factor}
    if {"q_head", "kv_head"} <= terms.keys():  # one follows from the other
        return None
    if terms.keys() <= _SOURCES:
        return Index(tuple(terms.items()), constant)
    if len(terms) > 1:
        return None
    ((step, factor),) = terms.items()
    inner = _index(step.of) if isinstance(step, Step) else None
    return None if inner is None else Index((), constant, inner, (step.op, step.by), factor)


def check_pairs(
    found: tuple[PairRead, ...], program: Program, values: tuple[Any, ...], heads: HeadShape, batch: Batch
) -> None:
    """Raise ValueError where a pair of the batch leaves a tensor. The batch is on the host."""
    q, kv = np.diff(batch.q_indptr.numpy()).astype(np.int64), batch.kv_lens.numpy().astype(np.int64)
    number = np.flatnonzero((q > 0) & (kv > 0))
    q, kv = q[number], kv[number]
    zero = np.zeros_like(q)
    of = {
        "row": (zero, q - 1), "kv_pos": (zero, kv - 1), "batch": (number, number), "q_len": (q, q), "kv_len": (kv, kv),
        "q_head": (zero, zero + heads.q_heads - 1), "kv_head": (zero, zero + heads.kv_heads - 1),
    }  # fmt: skip
    for read in found:
        value = values[read.param]
        if not isinstance(value, torch.Tensor) or not value.numel() or not number.size:
            continue
        low, high = (np.broadcast_to(x, number.shape) for x in read.index.span(of))
        size = value.shape[read.axis]
        wrong = (low < -size) | (high >= size)
        if wrong.any():
            at = int(wrong.argmax())
            reached = int(high[at]) if high[at] >= size else int(low[at])
            raise ValueError(
                f"the variant's {program.params[read.param].name} has shape {list(value.shape)}, and axis {read.axis} "
                f"is indexed with {reached} by a pair among the {q[at]} queries and {kv[at]} keys of request "
                f"{number[at]}, masked or not: eager FlexAttention raises an IndexError there; clamp the index, or "
                "give a larger tensor"
            )
