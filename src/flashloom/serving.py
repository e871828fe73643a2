"""What serving a model asks of attention: its layers' heads and variants, from a config.json, and every shape of
step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import flashloom as fl
from flashloom import settings
from flashloom.bench.workloads import MODELS, Workload

__all__ = ["attentions", "model_config", "steps"]

# What heads alone do not say of the models known by name (their config.json).
_MORE: dict[str, dict[str, Any]] = {
    "gemma-2-9b": {"sliding_window": 4096, "attn_logit_softcapping": 50.0},
    "gpt-oss-20b": {"sliding_window": 128, "model_type": "gpt_oss"},
    "phi-3-mini": {"sliding_window": 2047},
}
_LONGEST_Q = 8192


def model_config(model: str) -> dict[str, Any]:
    """The configuration of a model known by name, or of a config.json. Raises ValueError for what is neither."""
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as error:  # also what is no text
            raise ValueError(f"{path} is no JSON: {error}; give a model's config.json") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds {type(config).__name__} in place of settings by name: give a config.json")
        return {**config, **(config.get("text_config") or {})}
    if model not in MODELS:
        raise ValueError(f"model {model!r} is neither a config.json nor one of {', '.join(MODELS)}")
    q_heads, kv_heads, dim = MODELS[model]
    return {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "head_dim": dim, **_MORE.get(model, {})}


def attentions(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    tensor_parallel: int | None = None,
) -> list[fl.Attention]:
    """One Attention per kind of layer: causal, with the window, soft cap and sinks that the configuration has.

    dtype: that of the configuration, else bfloat16. tensor_parallel: ranks that share the heads, the setting
    `tensor_parallel_size` unless given. Numbers such as the window are run-time values, so these kernels
    serve
    every window. Raises ValueError for a configuration without heads, or with heads that do not divide.
    """
    try:
        q_heads = int(config["num_attention_heads"])
        dim = int(config.get("head_dim") or config["hidden_size"] // q_heads)
    except KeyError as missing:
        raise ValueError(f"the configuration has no {missing}; give that of a transformer with attention") from None
    except (TypeError, ValueError, ZeroDivisionError):
        names = ("num_attention_heads", "head_dim", "hidden_size")
        said = ", ".join(f"{name}={config[name]!r}" for name in names if name in config)
        raise ValueError(f"the configuration has {said}: heads and widths are whole numbers from 1 on") from None
    kv_heads = int(config.get("num_key_value_heads") or q_heads)
    if tensor_parallel is None:
        tensor_parallel = settings.get().tensor_parallel_size
    if q_heads % tensor_parallel or (kv_heads % tensor_parallel and tensor_parallel % kv_heads):
        raise ValueError(f"{q_heads} query heads and {kv_heads} kv heads do not divide over {tensor_parallel} ranks")
    if "kv_lora_rank" in config:
        rope = int(config["qk_rope_head_dim"])
        heads = fl.HeadShape.mla(q_heads=q_heads // tensor_parallel, latent=int(config["kv_lora_rank"]), rope=rope)
    else:
        heads = fl.HeadShape(q_heads // tensor_parallel, max(kv_heads // tensor_parallel, 1), dim)
    if dtype is None:
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"the configuration has dtype {name!r}, which torch does not know: give dtype=")
    variants: list[fl.Variant] = [fl.causal]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        variants.append(fl.causal & fl.sliding_window(int(config["sliding_window"]) - 1))
    if config.get("attn_logit_softcapping"):
        variants = [variant & fl.softcap(float(config["attn_logit_softcapping"])) for variant in variants]
    if config.get("model_type") == "gpt_oss":
        variants = [variant & fl.sink(torch.zeros(heads.q_heads)) for variant in variants]
    return [fl.Attention(heads, variant=variant, dtype=dtype, kv_dtype=kv_dtype, device="cpu") for variant in variants]


def steps(heads: fl.HeadShape, page_size: int | None) -> Iterator[Workload]:
    """One step of every shape that can pick another kernel: longest and mean query in powers of two."""
    longest = 1
    while longest <= _LONGEST_Q:
        mean = 1
        while mean <= longest:
            short = 1 if mean == 1 else mean // 2
            others = 0 if mean == longest else -(-(longest - mean) // max(mean - short, 1))
            q_lens = (longest, *[short] * others)
            yield Workload(f"longest {longest}, mean {mean}", heads, q_lens, q_lens, page_size)
            mean *= 2
        longest *= 2
