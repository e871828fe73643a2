"""What people are told of an attention kernel: variant, heads, dtypes and phase. It stands beside a stored kernel, for
`flashloom store ls` and `why-miss`; no key depends on it."""

from __future__ import annotations

import torch

from flashloom.attention.executor import AttentionSpec

__all__ = ["BOTH", "DECODE", "PREFILL", "about", "short"]

PREFILL, DECODE, BOTH = "prefill", "decode", "prefill and decode"
_SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "int8",
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2",
}  # fmt: skip


def short(dtype: torch.dtype) -> str:
    """A dtype in a few letters."""
    return _SHORT.get(dtype) or str(dtype).removeprefix("torch.")


def about(spec: AttentionSpec, phase: str, *, any_count: bool = False, form: str = "") -> dict[str, str]:
    """Of a spec's kernel. any_count: it serves every number of kv heads; form: what sets it apart from the usual."""
    heads = spec.heads
    width = f"{heads.dim}" if heads.value_dim == heads.dim else f"{heads.dim}/{heads.value_dim}"
    count = f"{heads.group}:1" if any_count else f"{heads.q_heads}/{heads.kv_heads}"
    q, kv = short(spec.q_dtype), short(spec.kv_dtype)
    found = {
        "variant": spec.name or "unnamed",
        "heads": f"{count}x{width}",
        "dtypes": q if q == kv else f"{q}, {kv} KV",
        "phase": phase,
    }
    return found | ({"form": form} if form else {})
