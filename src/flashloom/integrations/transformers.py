"""flashloom as the attention of transformers 5.

    from flashloom.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flashloom")
    model.generate_batch(prompts)  # continuous batching, by `paged|flashloom` (transformers_paged.py)

The mask function is registered with the attention function: without it transformers passes no mask at all, and padded
batches are silently wrong. Masks stay descriptions (transformers_masks.py), and each becomes a variant and a batch:
keys
of padding are not read, and rows that see no key, or that nothing reads (an encoder's padding), are requests without
keys: no work, and zeros.
"""

from __future__ import annotations

import threading
from types import FunctionType

import torch
from torch import Tensor

from flashloom.integrations.transformers_masks import Mask, dense_layout, flashloom_mask, unmasked_layout
from flashloom.integrations.transformers_paged import paged_attention

NAME = "flashloom"
_claiming = threading.Lock()


def register(name: str = NAME) -> None:
    """Make `name` an attention implementation of transformers, and `paged|name` one of its continuous batching
    (`generate_batch`). Calling it again changes nothing.

    Raises ImportError when transformers is absent or older than 5.
    """
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            f"transformers {transformers.__version__} is too old for flashloom: pip install 'transformers>=5'"
        )
    transformers.AttentionInterface.register(name, flashloom_attention)
    transformers.AttentionInterface.register(f"paged|{name}", paged_attention)
    transformers.AttentionMaskInterface.register(name, flashloom_mask)
    _claim(name)


def _claim(name: str) -> None:
    """Tell transformers that `name` is not the flash-attn package, for which it takes every name with "flash" in it.

    One function decides that, and some sixty modules have imported it by name; so its code changes, not its places.
    """
    from transformers.utils import generic

    test = generic.is_flash_attention_requested
    with _claiming:
        if not hasattr(generic, "_not_flash_attn"):
            asks = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__)
            generic._asks_for_flash_attn, generic._not_flash_attn = asks, set()
            test.__code__ = _is_flash_attention_requested.__code__
        generic._not_flash_attn.add(name)


def _is_flash_attention_requested(config=None, requested_attention_implementation=None, version=None):
    # runs as transformers' own function, with the names of its module
    name = requested_attention_implementation if config is None else config._attn_implementation
    if isinstance(name, str) and name.removeprefix("paged|") in _not_flash_attn:  # type: ignore[name-defined] # noqa: F821
        return False
    return _asks_for_flash_attn(config, requested_attention_implementation, version)  # type: ignore[name-defined] # noqa: F821


def flashloom_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [batch, q_heads, q_length, dim]; key, value: [batch, kv_heads, kv_length, dim or value dim].
        attention_mask: what flashloom_mask returned, a dense bool (True keeps) or float (added) mask
            [batch or 1, heads or 1, q_length, kv_length], or None: then causal or not by `is_causal`, else the
            module's.
        s_aux: attention sinks [q_heads].

    Returns:
        [batch, q_length, q_heads, value dim], and None for the weights, which are never computed. Rows of padding are
        0.

    Raises:
        NotImplementedError: for dropout, attention weights and position_bias.
    """
    if torch.compiler.is_compiling():  # plans are Python objects: a compiled model breaks its graph here
        return _out_of_graphs(
            module, query, key, value, attention_mask, scaling, dropout, is_causal, sliding_window, softcap, s_aux,
            position_bias, **kwargs,
        )  # fmt: skip
    if dropout:
        raise NotImplementedError(
            f"dropout={dropout}: flashloom computes inference; call model.eval() or use 'sdpa' to train"
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions=True: flashloom never forms the weights; use attn_implementation='eager'"
        )
    if position_bias is not None:
        raise NotImplementedError("position_bias is not supported by flashloom's transformers integration: use 'sdpa'")
    if isinstance(attention_mask, Mask):
        layout = attention_mask.posed(key.shape[2])
    elif attention_mask is not None:
        layout = dense_layout(attention_mask, query, key)
    else:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        layout = unmasked_layout(query, key, bool(causal), sliding_window)
    if s_aux is None:
        again = layout.repeat(query, key, value, scaling, softcap)
        if again is not None:
            return again, None
    batch, q_heads, q_length, dim = query.shape
    heads = (q_heads, key.shape[1], dim, value.shape[-1])
    variant = layout.posed.with_logits(softcap, s_aux)
    plan, variant_of_layer = layout.plan(heads, query.dtype, key.dtype, scaling, query.device, variant)
    q = query.transpose(1, 2).reshape(batch * q_length, q_heads, dim)
    out = plan.run(q, (key.transpose(1, 2), value.transpose(1, 2)), variant=variant_of_layer)
    out = out.view(batch, q_length, q_heads, value.shape[-1])
    if s_aux is None and variant_of_layer is None and q.data_ptr() == query.data_ptr():
        layout.keep(plan, query, key, value, out, scaling, softcap)
    return out, None


_out_of_graphs = torch.compiler.disable(flashloom_attention)  # costs microseconds in every call
