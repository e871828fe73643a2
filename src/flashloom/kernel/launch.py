"""One way to call a Triton kernel: on a GPU by the CUDA driver, in Triton's interpreter by the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashloom.kernel import cuda
from flashloom.kernel.triton import TritonKernel

__all__ = ["Launcher", "launcher"]

Launcher = Callable[[int, Sequence[Any]], None]
"""Called with the number of programs and the flat run-time arguments: addresses (in the interpreter tensors) and
numbers."""


def launcher(kernel: TritonKernel, device: torch.device) -> Launcher:
    """The kernel ready to launch on `device`, compiled if the store lacks it."""
    if device.type == "cuda":
        flat: list[str] = []
        for kind in kernel.signature.values():
            flat += kind if isinstance(kind, tuple) else [kind]
        return cuda.Launch(cuda.load(kernel, device), flat)
    return _Interpreted(kernel)


class _Interpreted:
    def __init__(self, kernel: TritonKernel):
        self._kernel, self._function, self._constants = kernel, kernel.function.load(), kernel.loaded_constants()

    def __call__(self, grid: int, words: Sequence[Any]) -> None:
        if grid == 0:
            return
        arguments: dict[str, Any] = {}
        rest = list(words)
        for name, kind in self._kernel.signature.items():
            n = len(kind) if isinstance(kind, tuple) else 1
            taken, rest = rest[:n], rest[n:]
            arguments[name] = tuple(taken) if isinstance(kind, tuple) else taken[0]
        self._function[(grid,)](**arguments, **self._constants)
