"""Sizes that a variant's tensors need for a batch: what its hooks index with positions, requests and heads, as they are
or by steps that only rise, reaches an entry that is known before anything runs.

Kernels clamp every index, so that what masked-out pairs read is harmless. A tensor that ends before the positions of
the batch do is no such case: its last entry would stand for all further ones."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from flashloom.dataclass import dataclass
from flashloom.variant.expr import Expr, Program, topological

if TYPE_CHECKING:
    from flashloom.attention.batch import Batch
    from flashloom.attention.shape import HeadShape
    from flashloom.variant.variant import Variant

__all__ = ["Read", "Sizes", "reads"]

_OF_BATCH = {
    "kv_pos": ("at.kv_pos", "keys in a request"),
    "q_pos": ("at.q_pos", "keys in a request"),
    "row": ("the query's number in the step", "query tokens in a request"),
    "batch": ("at.batch", "requests"),
}
_OF_HEADS = {"q_head": ("at.q_head", "query heads"), "kv_head": ("at.kv_head", "kv heads")}
_WORDS = {**_OF_BATCH, **_OF_HEADS}


@dataclass(frozen=True)
class Read:
    """One axis of a field that a hook indexes with `steps` of `source`, a name of `_WORDS`."""

    param: int
    axis: int
    source: str
    steps: tuple[tuple[str, int], ...]

    def last(self, largest: int) -> int:
        """The largest index, for the largest value of the source."""
        for step, by in self.steps:
            if step == "mul":
                largest *= by
            elif step == "add":
                largest += by
            elif step == "floordiv":
                largest //= by
            else:
                largest = min(largest, by) if step == "min" else max(largest, by)
        return largest


def reads(program: Program, but: Collection[int] = ()) -> tuple[Read, ...]:
    """Those of the program's tensors of any rank and of its packed bits, without the params at the places `but`."""
    if not any(p.kind in ("tensor", "bits") and p.rank for p in program.params):
        return ()
    hooks = (program.query, program.key, program.logits, program.mask, program.output)
    place = {param: i for i, param in enumerate(program.params)}
    found: dict[Read, None] = {}
    for node in topological(*(e for e in hooks if e is not None)):
        param = node.attr
        if node.op == "load" and param.kind in ("tensor", "bits") and place[param] not in but:
            for axis, index in enumerate(node.args):
                rising = _rising(index)
                if rising is not None:
                    found[Read(place[param], axis, *rising)] = None
    return tuple(found)


def _rising(e: Expr) -> tuple[str, tuple[tuple[str, int], ...]] | None:
    """An index as rising steps of one source, each of whose values occurs; None for any other."""
    from flashloom.attention.linear import RISING, Step, linear

    terms, constant = linear(e)
    if terms.get("q_pos") and terms.get("kv_len") == -terms["q_pos"] and terms.get("q_len") == terms["q_pos"]:
        terms = {"row": terms["q_pos"], **{k: v for k, v in terms.items() if k not in ("q_pos", "kv_len", "q_len")}}
    if len(terms) != 1:
        return None
    ((source, factor),) = terms.items()
    if factor < 1:
        return None
    if isinstance(source, str):
        if source not in _WORDS:
            return None
        before: tuple[str, tuple[tuple[str, int], ...]] = (source, ())
    else:
        inner = _rising(source.of) if isinstance(source, Step) and source.op in RISING else None
        if inner is None:
            return None
        before = inner[0], (*inner[1], (source.op, source.by))
    steps = before[1]
    if factor != 1:
        steps = (*steps, ("mul", factor))
    return before[0], (*steps, ("add", constant)) if constant else steps


class Sizes:
    """What the sizes of a variant's tensors are held against."""

    def __init__(self, variant: Variant):
        parts = variant._parts()
        known = [getattr(part, name) for part in parts for name in part._sized]
        self._program = variant.program
        found = reads(self._program, {i for i, x in enumerate(variant.values) if any(x is one for one in known)})
        self._heads = tuple(read for read in found if read.source in _OF_HEADS)
        self._batch = tuple(read for read in found if read.source in _OF_BATCH)
        self._parts = any(part._sized for part in parts)
        flex = [x for part in parts if part._all_pairs for _, x in part._fields()]
        places = {i for i, x in enumerate(variant.values) if any(x is one for one in flex)}
        self._pairs: Any = ()
        if places:
            from flashloom.attention.pairs import pair_reads

            self._pairs = pair_reads(self._program, places)
        #: Whether a batch matters at all.
        self.of_batch = bool(self._batch or self._parts or self._pairs)

    def check_heads(self, values: tuple[Any, ...], heads: HeadShape) -> None:
        """Raise ValueError where the heads leave a tensor."""
        if self._heads:
            largest = {"q_head": heads.q_heads, "kv_head": heads.kv_heads}
            self._check(self._heads, values, largest, "the attention has")

    def check_batch(self, variant: Variant, values: tuple[Any, ...], heads: HeadShape, batch: Batch) -> None:
        """Raise ValueError where a batch leaves a tensor, as far as the host knows its sizes."""
        if not self.of_batch or not batch.requests or (batch.longest is not None and not all(batch.longest)):
            return  # nothing is read
        if self._batch:
            largest = {"batch": batch.requests}
            if batch.longest is not None:
                largest["row"], largest["kv_pos"] = batch.longest
                largest["q_pos"] = largest["kv_pos"]
            self._check(self._batch, values, largest, "the batch has")
        if self._pairs and batch.host:
            from flashloom.attention.pairs import check_pairs

            check_pairs(self._pairs, self._program, values, heads, batch)
        if self._parts:
            for part in variant._parts():
                part._check_batch(batch, heads)

    def _check(self, found: tuple[Read, ...], values: tuple[Any, ...], largest: dict[str, int], whose: str) -> None:
        for read in found:
            size, value = largest.get(read.source), values[read.param]
            if not size or not isinstance(value, torch.Tensor) or not value.numel():
                continue  # one without an element is refused by the batches that read it
            param = self._program.params[read.param]
            have = value.numel() * 8 if param.kind == "bits" else value.shape[read.axis]
            last = read.last(size - 1)
            if last >= have:
                index, what = _WORDS[read.source]
                shape = f"{have} bits" if param.kind == "bits" else f"shape {list(value.shape)}"
                raise ValueError(
                    f"the variant's {param.name} has {shape} but {whose} {size} {what}, and axis "
                    f"{read.axis} is indexed with {index}{' by steps,' if read.steps else ','} up to {last}: give an "
                    "entry for each, or clamp the index where the last entry stands for all further ones"
                )
