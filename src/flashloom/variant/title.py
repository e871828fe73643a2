"""What a variant is called where people read it: `causal & softcap`, from the library's functions and the user's own
classes. Names identify nothing."""

from __future__ import annotations

from typing import Any

from flashloom.variant import library
from flashloom.variant.variant import Variant

__all__ = ["name_of"]

_CALLED = {
    "Full": "full", "Causal": "causal", "LeftWindow": "sliding_window", "RightWindow": "sliding_window",
    "SoftCap": "softcap", "Alibi": "alibi", "RopeHalf": "rope", "RopeInterleaved": "rope", "Sink": "sink",
    "DocumentMask": "document_mask", "PrefixLM": "prefix_lm", "DenseMask": "custom_mask", "RaggedMask": "custom_mask",
    "PackedMask": "packed_mask", "LengthTemperature": "length_temperature", "Sigmoid": "sigmoid",
}  # fmt: skip


def name_of(variant: Variant) -> str:
    """The parts' names, such as "causal & Distance"; a pair of the same name, such as a window's two sides, once."""
    names: list[str] = []
    for part in variant._parts():
        name = _name(part)
        if names[-1:] != [name]:
            names.append(name)
    return " & ".join(names) or "full"


def _name(part: Variant) -> str:
    if type(part).__module__ == "flashloom.variant.flex":  # not imported for this
        functions: list[Any] = [part.__dict__[name] for name in ("score_mod", "mask_mod") if part.__dict__[name]]
        return f"from_flex({', '.join(getattr(f, '__name__', type(f).__name__) for f in functions)})"
    name = type(part).__name__
    if type(part) is Variant:
        return "full"
    return _CALLED.get(name, name) if type(part).__module__ == library.__name__ else name
