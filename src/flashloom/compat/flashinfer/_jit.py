"""`jit_args`: variants given to FlashInfer as CUDA text. Known texts are flashloom variants here; others are refused.

A text is known by its content, spaces aside, never by its name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flashloom as fl
from flashloom.compat.flashinfer._variants import Logits

#: What programs get that ask for the sink variant's text (`jit.attention.variants`).
SINK_TEXT = "/* flashloom: attention sink, sigmoid(lse - sink) times the output */"


@dataclass(frozen=True)
class Known:
    """A variant that comes as text: its own tensors and scalars in the order of run(*args), and what it means."""

    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    make: Callable[..., fl.Variant]
    sm_scale: str | None = None
    """The scalar that is the softmax scale, if there is one."""


_SINK = Known(("sink",), ("sm_scale",), fl.sink, "sm_scale")
_SIGMOID = Known((), ("logits_scale", "sigmoid_bias"), lambda a, b: Logits(scale=float(a), bias=float(b)))
# SHA-256 of known texts without white space
_KNOWN: dict[str, Known] = {
    hashlib.sha256("".join(SINK_TEXT.split()).encode()).hexdigest(): _SINK,
    # FlashInfer's own sink variants, fa2 and fa3
    "b2cf3e18221f06cb437344f9c8177a3970cb9ade4e5a13e38ef12c832f764393": _SINK,
    "42d3489a9f4d11a711400d18749e84747a4da0ce9d905c5b2f3858f5ce6854de": _SINK,
    # sigmoid attention as FlashInfer's examples have it, for its kernels of sm80 and sm90
    "814392dab56111546430405bc82ee42b70f24ae82b88a7246ff7230d05aadc51": _SIGMOID,
    "1284293e950913632bc77cddb20530bb642826b6085ba7038025981dfd1169ae": _SIGMOID,
}


#: jit_kwargs that say how FlashInfer compiles; what they allow is decided by plan() here.
OPTIONS = (
    "use_sliding_window", "use_logits_soft_cap", "use_fp16_qk_reduction", "fp8_enabled", "paged_kv_stride_mode",
    "module_surface",
)  # fmt: skip
#: jit_kwargs that change the result, with the value that asks for nothing.
REFUSED = {"pos_encoding_mode": 0, "use_token_head_sf": False, "v_sf_swizzled": False}


def check_options(jit_kwargs: dict[str, Any] | None) -> None:
    """A wrapper's jit_kwargs. Raises TypeError for unknown names, NotImplementedError for what is not served."""
    for name, value in (jit_kwargs or {}).items():
        if name in REFUSED:
            if value != REFUSED[name]:
                raise NotImplementedError(
                    f"jit_kwargs: {name}={value!r} is not supported by flashloom, only {REFUSED[name]}"
                )
        elif name not in OPTIONS:
            raise TypeError(f"jit_kwargs: unknown {name!r}; FlashInfer has {', '.join([*OPTIONS, *REFUSED])}")


def digest(text: str) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()


def known(jit_args: Sequence[Any]) -> Known:
    """The variant of a wrapper's jit_args. Raises NotImplementedError for text that is not known, ValueError for less
    than FlashInfer's 13 entries."""
    if len(jit_args) < 13:
        raise ValueError(
            f"jit_args has {len(jit_args)} entries: must be uri, dtypes of q, kv, o and indices, two head widths, "
            "names and dtypes of additional tensors and of scalars, the variant's name and its text"
        )
    tensors, scalars, name, text = tuple(jit_args[7]), tuple(jit_args[9]), jit_args[11], jit_args[12]
    found = _KNOWN.get(digest(str(text)))
    if found is None or (tensors, scalars) != (found.tensors, found.scalars):
        raise NotImplementedError(
            f"jit_args: the variant {name!r} is CUDA text that flashloom does not know (digest "
            f"{digest(str(text))[:12]}). Write it as a flashloom.Variant, a few lines of torch code, and use "
            "flashloom.Attention; see docs/tutorial.md"
        )
    return found
