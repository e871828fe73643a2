"""The Hopper executor on CPU tensors: its kernel on an emulated machine, its planner in Triton's interpreter.

Import it in a process with TRITON_INTERPRET=1 and before any kernel file: it puts the emulated language in the place of
Gluon's. `install` then lets the executor serve.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tests.hopper.emulator import language
from tests.hopper.emulator.language import MACHINE, TYPES, Block, Map, Pointer, Type
from tests.hopper.emulator.machine import Machine, Memory

from flashloom import dispatch
from flashloom.attention import hopper_executor
from flashloom.attention.executor import AttentionSpec
from flashloom.kernel import gluon

PROCESSORS = 3
_stand_in = ModuleType("flashloom.attention.kernels.hopper.gluon")
for _name in (
    "barrier", "constexpr_function", "copy_rows", "copy_rows_commit", "copy_rows_wait", "fence_async_shared", "gl",
    "jit", "mbarrier", "reinterpret", "tma_load", "tma_store", "tma_store_wait", "warpgroup_mma", "warpgroup_mma_init",
    "warpgroup_mma_wait",
):  # fmt: skip
    setattr(_stand_in, _name, getattr(language, _name))
assert _stand_in.__name__ not in sys.modules, "the kernels were imported before the emulator"
sys.modules[_stand_in.__name__] = _stand_in

from flashloom.attention.kernels.hopper import consume, step, transpose  # noqa: E402
from flashloom.attention.kernels.hopper.cap import LIMIT  # noqa: E402


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on plans for CPU tensors are the Hopper executor's, or of the Triton kernels that it falls back to."""
    patch = monkeypatch.setattr
    patch(step, "capped", lambda z: Block(torch.tanh(z.x * (LIMIT / 2))))  # assembly, in the kernel, as the next two
    patch(consume, "packed", lambda p, kind: Block(p.x.to(kind.torch)))
    patch(consume, "unpacked", lambda words, kind, layout: words)
    patch(consume, "done", lambda x: x)
    patch(transpose, "four_bytes", lambda x: Block(x.x.clamp(-448, 448).to(torch.float8_e4m3fn)))
    patch(transpose, "regroup", regroup)
    patch(gluon, "TensorMaps", Maps)
    patch(gluon, "launcher", Launch)
    patch(hopper_executor, "Staging", lambda device: SimpleNamespace(errors=[], capacity=0, stream=0))
    patch(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=PROCESSORS))
    patch(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", [f"{__name__}:Emulated"])


def regroup(x: Block) -> Block:
    """Of 16-bit numbers [tokens, pairs], those of the tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of 16, which one thread
    holds in this order: first the low bytes of all of them, then the high ones."""
    tokens, pairs = x.x.shape
    four = x.x.view(tokens // 16, 2, 4, 2, pairs).permute(0, 2, 4, 1, 3).contiguous()  # 16 tokens, t, pair, c, b
    own = four.view(torch.uint8).view(*four.shape[:3], 4, 2)
    swapped = own.transpose(-1, -2).contiguous().view(torch.int16).view(four.shape)
    return Block(swapped.permute(0, 3, 1, 4, 2).reshape(tokens, pairs))


class Maps:
    """As `gluon.TensorMaps`."""

    def __init__(self, box: Sequence[int], dtype: torch.dtype) -> None:
        self._box, self._dtype = box, Type(dtype)

    def of(self, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return lambda address: Map(address, sizes, strides, self._box, self._dtype)


class Launch:
    """As `gluon.MapLaunch`. Each launch interleaves the warps in another way."""

    seeds = itertools.count(1)

    def __init__(self, kernel: gluon.GluonKernel, device: torch.device) -> None:
        self._function, self._signature = kernel.function.load(), kernel.signature
        self._constants = {n: _hook(x) if hasattr(x, "text") else x for n, x in kernel.constants.items()}
        self._maps: list[Map] = []
        self._words: tuple[Any, ...] = ()

    def put(self, maps: Sequence[Map]) -> None:
        self._maps = list(maps)

    def again(self, grid: int, words: tuple[int, ...]) -> None:
        self(grid, (*words, *self._words[len(words) :]))

    def __call__(self, grid: int, words: Sequence[Any]) -> None:
        self._words = tuple(words)
        rest, maps = iter(words), iter(self._maps)
        given: dict[str, Any] = {}
        for name, kind in self._signature.items():
            if isinstance(kind, tuple):
                given[name] = tuple(_argument(next(rest), k) for k in kind)
            else:
                given[name] = next(maps) if kind.startswith("tensordesc") else _argument(next(rest), kind)
        assert not [*rest, *maps], "more arguments than the kernel takes"
        machine = Machine(Emulated.memory, grid, next(self.seeds))
        MACHINE.append(machine)
        try:
            machine.run(lambda: self._function(**given, **self._constants))
        finally:
            MACHINE.pop()


def _argument(x: Any, kind: str) -> Any:
    return Pointer(x, TYPES[kind[1:]]) if kind[0] == "*" else Block(torch.tensor(x, dtype=TYPES[kind].torch))


def _hook(function: Any) -> Any:
    """A function of the variant, from the text that Triton would get."""
    text = re.sub(r"^(import|from) triton.*$", "", function.text, flags=re.MULTILINE)
    space: dict[str, Any] = {"tl": language.gl, "gl": language.gl, "triton": SimpleNamespace(jit=language.jit)}
    exec(text, space)
    return space[function.name]


class Emulated(hopper_executor.HopperExecutor):
    """Serves CPU tensors; says which memory a launch may touch."""

    memory = Memory()
    _lends = False

    @classmethod
    def refuses(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        return hopper_executor.asked.unsuitable(spec)

    def allowed(self, *arguments: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        return arguments

    def _address(self, x: torch.Tensor) -> Any:
        return x if self._lends else x.data_ptr()

    def _mend_words(self, *given: Any) -> tuple[Any, ...]:
        self._lends = True  # the interpreter takes tensors
        self._flats.clear()
        words = super()._mend_words(*given)
        self._lends = False
        self._flats.clear()
        return words

    def again(self, *places: int) -> bool:
        self._last_mender = None  # it cannot take addresses
        return super().again(*places)

    def _grow(self, batch: Any) -> None:
        super()._grow(batch)
        views = self._buffers.views  # the interpreter takes tensors
        self._plan_buffers = (views["items"], views["pages"], views["scratch"], self._buffers.error)

    def run(self, q: Any, kv: Any, out: Any, lse: Any, **more: Any) -> None:
        Emulated.memory = Memory()
        fields = [x for x in more["values"] if isinstance(x, torch.Tensor)]
        own = [
            *self._buffers.views.values(),
            self._counter,
            self._marks,
            self._one_scale,
            kv.k_scale,
            kv.v_scale,
            *fields,
        ]
        Emulated.memory.allow(*self.allowed(q, kv.k, kv.v, out, lse), *own)
        super().run(q, kv, out, lse, **more)
