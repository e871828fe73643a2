"""Kernels read a tensor's memory, so what a tensor says must be what lies there."""

from __future__ import annotations

import torch

_KEYS = torch._C.DispatchKey
_OTHER = (
    ("FuncTorchBatched", "is inside torch.vmap: give the whole batch to one call, without vmap"),
    ("FuncTorchGradWrapper", "is inside torch.func.grad, vjp or jvp, and flashloom computes no gradients"),
    ("Functionalize", "is inside torch.func.functionalize, where it has no memory: call flashloom outside of it"),
    ("Meta", "is on the device meta and holds no numbers: make it on the device where attention runs"),
    ("Python", "holds no memory of its own (fake and other wrapping tensors): give the plain tensor"),
    ("Negative", "is a view that negates its memory (torch.imag of a conjugate is one): give .resolve_neg()"),
    ("Conjugate", "is a view that conjugates its memory: give .resolve_conj()"),
    ("ZeroTensor", "is a zero tensor without memory: give .clone()"),
)
_OTHER_KEYS = tuple((getattr(_KEYS, key), words) for key, words in _OTHER if hasattr(_KEYS, key))


def plain(name: str, x: torch.Tensor) -> None:
    """Raises TypeError unless the elements of `x` lie in memory as they are, in strides."""
    if x.layout is not torch.strided or x.is_nested:
        what = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a {what} tensor: give a dense one")
    keys = torch._C._dispatch_keys(x)
    for key, words in _OTHER_KEYS:
        if keys.has(key):
            kind = "" if type(x) in (torch.Tensor, torch.nn.Parameter) else f" ({type(x).__name__})"
            raise TypeError(f"{name}{kind} {words}")
