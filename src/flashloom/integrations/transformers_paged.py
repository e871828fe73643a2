"""`paged|flashloom`: transformers' continuous batching over flashloom's paged kernels.

The cache's tensors are seen as pages where they lie; only new tokens are written. What a step's requests read is worked
out by the first layer of each group (full or sliding attention) and serves the other layers of the step:

- prompts that begin: the new keys and values themselves, one request after another
- full attention: pages of the cache's blocks
- sliding attention while every request decodes: the slots of the rolling buffer, as pages of one token
- sliding attention in a step that also reads prompts: the copy that transformers makes, since writing the new tokens
  overwrites old ones that they still see
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flashloom as fl
from flashloom.integrations.transformers_plans import VARIANTS, Layout, Posed


class Step:
    """What the layers of one forward pass share: the offsets of the queries and, by group of layers, what they read."""

    def __init__(self, mark: Tensor):
        self.mark = mark  # the step's own tensor of offsets; a new step brings another
        self.offsets = mark.cpu().numpy()
        self.decoding = bool((np.diff(self.offsets) == 1).all())  # every request has one new token
        self.groups: dict[int, Layout] = {}


_steps: weakref.WeakKeyDictionary[Any, Step] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one layer as continuous batching calls it.

    Args:
        query: [1, q_heads, tokens, dim], the requests' new tokens one after another; key, value: [1, kv_heads, tokens,
            dim].
        cache: transformers' PagedAttentionCache, whose tensors are [slots, kv_heads, dim].
        cu_seq_lens_q, cu_seq_lens_k: offsets of the requests' queries and keys, int32 [requests + 1]; those of keys by
            kind of layer where a model has two.
        read_index, write_index: by group of layers, the slots of the keys that requests see, and of the new ones.

    Returns:
        [1, tokens, q_heads, dim], and None for the weights.

    Raises:
        ValueError: without a paged cache. NotImplementedError: for dropout, and within a CUDA graph.
    """
    if cache is None or cu_seq_lens_q is None or cu_seq_lens_k is None or read_index is None or write_index is None:
        raise ValueError("'paged|flashloom' is for continuous batching (generate_batch); elsewhere use 'flashloom'")
    if dropout:
        raise NotImplementedError(f"dropout={dropout}: flashloom computes inference; call model.eval()")
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError("'paged|flashloom' plans each step on the host: leave out use_cuda_graph=True")
    step = _steps.get(cache)
    if step is None or step.mark is not cu_seq_lens_q:
        step = _steps[cache] = Step(cu_seq_lens_q)
    group, place = cache.layer_index_to_group_indices[module.layer_idx]
    window, read, write = cache.sliding_windows[module.layer_idx], read_index[group], write_index[group]
    in_cache = read.numel() > 0 and (window == 1 or step.decoding)
    if in_cache:
        size = cache.block_size if window == 1 else 1
        kv = tuple(_written(x[place], states, write, size) for x, states in (
            (cache.key_cache, key), (cache.value_cache, value)
        ))  # fmt: skip
    else:
        kv = cache.update(key, value, module.layer_idx, read_index, write_index)
    layout = step.groups.get(group)
    if layout is None:
        offsets = cu_seq_lens_k
        if isinstance(offsets, dict):
            offsets = offsets["full_attention" if window == 1 else "sliding_attention"]
        batch = _batch(step.offsets, offsets.cpu().numpy(), read, write, cache, window) if in_cache else _ragged(
            step.offsets, offsets.cpu().numpy()
        )  # fmt: skip
        layout = step.groups[group] = Layout(batch, VARIANTS.get(("paged", window), lambda: _posed(window)))
    if scaling is None:
        scaling = float(module.scaling)  # type: ignore[arg-type]
    if s_aux is None:
        again = layout.repeat(query, *kv, scaling, softcap)
        if again is not None:
            return again, None
    variant = layout.posed.with_logits(softcap, s_aux)
    heads = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    plan, variant_of_layer = layout.plan(heads, query.dtype, kv[0].dtype, scaling, query.device, variant)
    out = plan.run(query[0].transpose(0, 1), kv, variant=variant_of_layer)[None]
    if s_aux is None and variant_of_layer is None:
        layout.keep(plan, query, *kv, out, scaling, softcap)
    return out, None


def _posed(window: int) -> Posed:
    return Posed(fl.causal if window == 1 else fl.causal & fl.sliding_window(window - 1))


def _written(tensor: Tensor, states: Tensor, slots: Tensor, page_size: int) -> Tensor:
    """The cache tensor with the new states [1, kv_heads, tokens, dim] in their slots, as pages."""
    tensor.index_copy_(0, slots, states[0].transpose(0, 1))
    return tensor.view(-1, page_size, *tensor.shape[1:])


def _batch(q: np.ndarray, k: np.ndarray, read: Tensor, write: Tensor, cache: Any, window: int) -> fl.Batch:
    """Requests whose keys lie in the cache; q, k: offsets."""
    lens = np.diff(k)
    if window == 1:
        size = cache.block_size
        count = -(-lens // size)
        indptr = np.concatenate([[0], np.cumsum(count)])
        block = np.arange(indptr[-1]) - np.repeat(indptr[:-1], count)
        first = torch.from_numpy(np.repeat(k[:-1], count) + block * size)  # where each block's first slot is listed
        pages = read[first.to(read.device)].cpu() // size
    else:
        size, indptr = 1, k
        pages = read[: k[-1]].cpu()
        pages[pages == cache.sentinel_index] = write[: q[-1]].cpu()
    lengths, starts = torch.from_numpy(lens).int(), torch.from_numpy(indptr).int()
    kv = fl.PageTable(lengths, starts, pages.int(), size)
    return fl.Batch(q_indptr=torch.from_numpy(q), kv=kv)


def _ragged(q: np.ndarray, k: np.ndarray) -> fl.Batch:
    return fl.Batch(q_indptr=torch.from_numpy(q), kv=fl.RaggedKV(indptr=torch.from_numpy(k)))
