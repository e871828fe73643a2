"""One way to call a Triton kernel: on a GPU by the CUDA driver, in Triton's interpreter by the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        return cuda.Launch(cuda.load(kernel, device), _flat(kernel))
    return _Interpreted(kernel)


def launchers(
    kernels: Sequence[TritonKernel], device: torch.device, later: Sequence[TritonKernel] = ()
) -> tuple[list[Launcher], list[Launcher | None]]:
    """The same of several kernels: those that are stored one after another, which threads would only slow down, the
    others compiled side by side. Of `later` those that must be compiled are None; they follow meanwhile."""
    asked = [*kernels, *later]
    found: list[Launcher | None]
    if device.type == "cuda":
        functions = [cuda.find(kernel, device) for kernel in asked]
        found = [None if f is None else cuda.Launch(f, _flat(kernel)) for f, kernel in zip(functions, asked)]
    else:
        found = [None] * len(asked)
    # what must be compiled now, and what may not be compiled at all, which then says why
    missing = [i for i, made in enumerate(found) if made is None]
    waiting = [i for i in missing if i >= len(kernels) and device.type == "cuda" and asked[i].may_build()]
    missing = [i for i in missing if i not in waiting]
    if missing:
        with ThreadPoolExecutor(4) as pool:
            for i, made in zip(missing, pool.map(lambda i: launcher(asked[i], device), missing)):
                found[i] = made
    for i in waiting:  # after the others, whose compiling they would slow down
        asked[i].build_meanwhile()
    return [made for made in found[: len(kernels)] if made is not None], found[len(kernels) :]


def _flat(kernel: TritonKernel) -> list[str]:
    """Types of the run-time arguments, tuples flattened."""
    flat: list[str] = []
    for kind in kernel.signature.values():
        flat += kind if isinstance(kind, tuple) else [kind]
    return flat


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
