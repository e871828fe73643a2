"""The operators that torch.compile sees of FlashInfer's names: a call with the caller's tensors, and results to fill.

A graph holds the handle of a wrapper. What plan() of that wrapper said last is what a compiled run() computes; nothing
of its plans, caches and rules is traced."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashloom.compat.flashinfer.utils import narrow

if TYPE_CHECKING:
    from flashloom.compat.flashinfer._wrapper import Wrapper

_handles = itertools.count(1)
_wrappers: weakref.WeakValueDictionary[int, Wrapper] = weakref.WeakValueDictionary()

_library = torch.library.Library("flashloom_compat", "DEF")
_library.define(
    "append(Tensor key, Tensor value, Tensor batch_indices, Tensor positions, Tensor(a!)[] cache, Tensor kv_indices, "
    "Tensor kv_indptr, Tensor kv_last_page_len, str layout) -> ()"
)
_library.define(
    "run(int wrapper, Tensor q, Tensor[] cache, Tensor?[] tensors, float?[] numbers, Tensor(a!) out, Tensor(b!)? lse, "
    "str lse_base, str lse_layout, str encoding, float?[] rules) -> ()"
)
_library.define(
    "tables(Tensor query, Tensor[] cache, Tensor block_tables, Tensor seq_lens, Tensor? q_indptr, int q_len, "
    "Tensor?[] tensors, float?[] scales, bool causal, int window_left, str layout, Tensor(a!) out, Tensor(b!)? lse) "
    "-> ()"
)
_library.define(
    "single(str call, Tensor q, Tensor k, Tensor v, Tensor?[] tensors, float?[] numbers, str names, str layout, "
    "str encoding, Tensor(a!) out, Tensor(b!)? lse) -> ()"
)


def handle(wrapper: Wrapper) -> int:
    """A number for a wrapper, which it keeps while it lives."""
    number = next(_handles)
    _wrappers[number] = wrapper
    return number


def parts(cache: Any) -> list[Tensor]:
    """A cache as a list: one tensor, or keys and values."""
    return list(cache) if isinstance(cache, tuple) else [cache]


def split(values: tuple) -> tuple[list[Tensor | None], list[float | None]]:
    """Tensors and numbers of mixed values, each None where the other is."""
    tensors = [x if isinstance(x, Tensor) else None for x in values]
    return tensors, [None if x is None or isinstance(x, Tensor) else float(x) for x in values]


def _join(tensors: list[Tensor | None], numbers: list[float | None]) -> list[Any]:
    return [y if x is None else x for x, y in zip(tensors, numbers, strict=True)]


def _cache(cache: list[Tensor]) -> Any:
    return cache[0] if len(cache) == 1 else tuple(cache)


def _append(
    key: Tensor, value: Tensor, batch_indices: Tensor, positions: Tensor, cache: list[Tensor], kv_indices: Tensor,
    kv_indptr: Tensor, kv_last_page_len: Tensor, layout: str,
) -> None:  # fmt: skip
    from flashloom.compat.flashinfer.page import append_paged_kv_cache

    append_paged_kv_cache(
        key, value, batch_indices, positions, _cache(cache), kv_indices, kv_indptr, kv_last_page_len, layout
    )


def _run(
    wrapper: int, q: Tensor, cache: list[Tensor], tensors: list, numbers: list, out: Tensor, lse: Tensor | None,
    lse_base: str, lse_layout: str, encoding: str, rules: list,
) -> None:  # fmt: skip
    found = _wrappers.get(wrapper)
    if found is None:
        raise RuntimeError("the wrapper of this compiled function no longer exists: keep it alive beside the function")
    q_scale, k_scale, v_scale, sinks, *args = _join(tensors, numbers)
    override = None
    if encoding:
        causal, window_left, soft_cap, sm_scale, rope_scale, rope_theta = rules
        given = None if causal is None else bool(causal)
        override = encoding, int(window_left), soft_cap, sm_scale, rope_scale, rope_theta, given
    found._attend(
        q, tuple(cache) if found._ragged else (_cache(cache),), tuple(args), q_scale=q_scale, k_scale=k_scale,
        v_scale=v_scale, out=out, lse=lse, return_lse=lse is not None, lse_base=lse_base,
        lse_layout=lse_layout, sinks=sinks, override=override,
    )  # fmt: skip


def _tables(
    query: Tensor, cache: list[Tensor], block_tables: Tensor, seq_lens: Tensor, q_indptr: Tensor | None, q_len: int,
    tensors: list, scales: list, causal: bool, window_left: int, layout: str, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    from flashloom.compat.flashinfer._tables import attend_tables

    bmm1_scale, bmm2_scale, sinks = _join(tensors, scales)
    attend_tables(
        query, _cache(cache), block_tables, seq_lens, q_indptr, q_len, bmm1_scale, bmm2_scale, causal, window_left,
        layout, sinks, out, lse, lse is not None,
    )  # fmt: skip


def _single(
    call: str, q: Tensor, k: Tensor, v: Tensor, tensors: list, numbers: list, names: str, layout: str, encoding: str,
    out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    from flashloom.compat.flashinfer import _single

    options = dict(zip(names.split(), _join(tensors, numbers), strict=True))
    result = getattr(_single, call)(
        q, k, v, kv_layout=layout, pos_encoding_mode=encoding, return_lse=lse is not None, **options
    )
    if lse is not None:
        result, sums = result
        lse.copy_(sums)
    out.copy_(narrow(result, out.dtype))


for _name, _call in (("append", _append), ("run", _run), ("tables", _tables), ("single", _single)):
    _library.impl(_name, _call, "CompositeExplicitAutograd")
    _library.impl(_name, lambda *args: None, "Meta")
