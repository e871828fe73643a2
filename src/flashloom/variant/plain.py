"""Kernels read a tensor's memory, so what a tensor says must be what lies there."""

from __future__ import annotations

import torch

_KEYS = torch._C.DispatchKey
_OTHER = (
    ("FuncTorchBatched", "is inside torch.vmap: give the whole batch to one call, without vmap"),
    ("FuncTorchGradWrapper", "is inside torch.func.grad, vjp or jvp, and flashloom computes no gradients"),
    ("Functionalize", "is inside torch.func.functionalize, where it has no memory: call flashloom outside of it"),
    ("Python", "holds no memory of its own (fake and other wrapping tensors): give the plain tensor"),
    ("Negative", "is a view that negates its memory (torch.imag of a conjugate is one): give .resolve_neg()"),
    ("Conjugate", "is a view that conjugates its memory: give .resolve_conj()"),
    ("ZeroTensor", "is a zero tensor without memory: give .clone()"),
)
_OTHER_KEYS = tuple((getattr(_KEYS, key), words) for key, words in _OTHER if hasattr(_KEYS, key))


_TRANSFORMED = tuple(getattr(_KEYS, k) for k in ("Python", "FuncTorchBatched", "Functionalize") if hasattr(_KEYS, k))
#: The depth of torch.func's transforms that are under way, or None.
transforming = torch._C._functorch.maybe_current_level
_usual: set[int] = set()  # sets of keys that were found to be plain


def transformed(x: object) -> bool:
    """Whether it is a tensor on which torch does something else with operators than to compute them: a fake one, or one
    in torch.vmap or torch.func.functionalize. These know flashloom's operators as they know torch's."""
    if not isinstance(x, torch.Tensor):
        return False
    keys = torch._C._dispatch_keys(x)
    return keys.raw_repr() not in _usual and any(keys.has(key) for key in _TRANSFORMED) and not x.is_nested


def plain(name: str, x: torch.Tensor) -> None:
    """Raises TypeError unless the elements of `x` lie in memory as they are, in strides."""
    keys = torch._C._dispatch_keys(x)
    if keys.raw_repr() in _usual:
        return
    if x.layout is not torch.strided or x.is_nested:
        what = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a {what} tensor: give a dense one")
    for key, words in _OTHER_KEYS:
        if keys.has(key):
            kind = "" if type(x) in (torch.Tensor, torch.nn.Parameter) else f" ({type(x).__name__})"
            raise TypeError(f"{name}{kind} {words}")
    _usual.add(keys.raw_repr())
