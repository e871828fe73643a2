"""Loading and launching a stored GPU kernel through the CUDA driver: no compiler, no toolkit, about 6 microseconds of
host time.

The packed arguments live as long as the launch object; a launch rewrites them in place and calls `cuLaunchKernel`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from flashloom import settings, store
from flashloom.errors import FlashloomError
from flashloom.kernel.resident import Resident
from flashloom.store import Entry

__all__ = ["CudaError", "Function", "Launch", "NoMap", "copy_to_device", "load", "raw_stream", "stream_of"]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_CONFIG = struct.Struct("=7I4xQQI4x")  # CUlaunchConfig: grid, block, shared bytes, stream, attributes, their number
_FORMATS = {"fp32": "f4x", "i32": "i4x", "i64": "q"}


#: The address of torch's current stream of a device, given its index.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


class CudaError(FlashloomError, RuntimeError):
    """The CUDA driver refused a call."""


class NoMap(CudaError):
    """The driver makes no tensor map of a tensor."""


@functools.lru_cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(
            f"the CUDA driver cannot be loaded ({error}): install the NVIDIA driver, or run on the CPU"
        ) from None


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{what} failed with CUDA error {code}: {text.value.decode() if text.value else 'unknown'}")


def _use_context(index: int) -> None:
    """Make the device's primary context, which torch uses, current in this thread."""
    torch.cuda.init()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(device), index), f"finding CUDA device {index}")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), f"the context of CUDA device {index}")
    _check(_driver().cuCtxSetCurrent(context), f"using the context of CUDA device {index}")


def stream_of(address: int, device: torch.device) -> torch.cuda.Stream:
    """torch's stream of an address; ExternalStream makes a new stream of 0, which is the default stream."""
    return torch.cuda.ExternalStream(address, device=device) if address else torch.cuda.default_stream(device)


def copy_to_device(to: int, start: int, size: int, device: torch.device) -> None:
    """Start the copy of `size` bytes from pinned memory at `start` to device memory at `to`, on torch's current
    stream of the device."""
    with contextlib.nullcontext() if torch._C._cuda_getDevice() == device.index else torch.cuda.device(device):
        stream = ctypes.c_void_p(raw_stream(device.index))
        places = ctypes.c_void_p(to), ctypes.c_void_p(start), ctypes.c_size_t(size)
        code = _driver().cuMemcpyHtoDAsync_v2(*places, stream)
        if code == _INVALID_CONTEXT:  # the first CUDA call of this thread
            _use_context(device.index)
            code = _driver().cuMemcpyHtoDAsync_v2(*places, stream)
        if code:
            _check(code, f"copying {size} bytes to {device}")


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Within it a module may also be loaded while this thread captures a CUDA graph."""
    mode = ctypes.c_int(_RELAXED)
    _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def _after_fork() -> None:
    """In the child of a process that used a GPU: whatever would call the driver says what is wrong at once."""
    global _use_context, copy_to_device, raw_stream
    if torch.cuda._is_in_bad_fork():
        _use_context = copy_to_device = raw_stream = Launch._fire = _no_gpu  # type: ignore[assignment,method-assign]
        Function.__del__ = _leave  # type: ignore[assignment,method-assign]


def _no_gpu(*arguments: object) -> Any:
    raise RuntimeError(
        "this process was forked from one that used a GPU, and CUDA does not work across a fork: start it with "
        'multiprocessing.get_context("spawn"), or compute on the CPU here'
    )


def _leave(function: Function) -> None:
    """The module belongs to the parent."""


os.register_at_fork(after_in_child=_after_fork)


class Function:
    """A kernel loaded on one device."""

    def __init__(self, entry: Entry, device: torch.device):
        self.entry, self.device = entry, device
        self.threads, self.shared = entry.metadata["num_warps"] * 32, entry.metadata["shared"]
        if entry.metadata["global_scratch_size"] or entry.metadata["profile_scratch_size"]:
            raise CudaError(f"kernel {entry.label} wants scratch memory, which this launcher does not give")
        with torch.cuda.device(device), _loading():
            _use_context(device.index)
            module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
            _check(
                _driver().cuModuleLoadData(ctypes.byref(module), entry.files["kernel.cubin"]), f"loading {entry.label}"
            )
            self.module = module
            name = entry.metadata["name"].encode()
            _check(
                _driver().cuModuleGetFunction(ctypes.byref(self.handle), module, name),
                f"finding {entry.metadata['name']}",
            )
            if self.shared > 48 << 10:
                _check(
                    _driver().cuFuncSetAttribute(self.handle, _MAX_DYNAMIC_SHARED, self.shared),
                    f"{entry.label}: {self.shared} B shared memory",
                )

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # modules may be gone by then
        module = self.__dict__.get("module")
        if module and not finalizing() and not torch.cuda.is_current_stream_capturing():
            with torch.cuda.device(self.device):
                torch.cuda.synchronize()
                _driver().cuModuleUnload(module)


_functions: Resident[Function] = Resident(lambda: settings.get().resident)


def load(kernel: Any, device: torch.device) -> Function:
    """The kernel (a `TritonKernel`) on this device; from the store, or compiled now. One module per kernel and device
    in a process."""
    return _functions.get(_key(kernel, device), lambda: _load(kernel, kernel.entry(), device))


def find(kernel: Any, device: torch.device) -> Function | None:
    """The same if it is loaded or stored; nothing is compiled."""
    key = _key(kernel, device)
    found = _functions.peek(key)
    if found is None:
        entry = kernel.stored()
        return None if entry is None else _functions.get(key, lambda: _load(kernel, entry, device))
    return found


def _key(kernel: Any, device: torch.device) -> tuple[str, int]:
    return store.digest(kernel.fields), device.index


def _load(kernel: Any, entry: Entry, device: torch.device) -> Function:
    try:
        return Function(entry, device)
    except CudaError as error:
        entry.reject(str(error))
        return Function(kernel.entry(), device)


class _Heads(dict[int, Any]):
    """Functions that write so many 8-byte integers to the beginning of a buffer, each made when it is first needed."""

    def __init__(self, buffer: ctypes.Array[Any]):
        self._buffer = buffer

    def __missing__(self, n: int) -> Callable[..., None]:
        made = self[n] = functools.partial(struct.Struct(f"={n}q").pack_into, self._buffer, 0)
        return made


class Launch:
    """A function with its packed arguments. `types`: those of the run-time arguments in order, tuples flattened."""

    __slots__ = (
        "_array", "_buffer", "_call", "_config", "_device", "_function", "_grid", "_heads", "_pack", "_set", "_stream",
    )  # fmt: skip

    def __init__(self, function: Function, types: Sequence[str]):
        self._function, self._device = function, function.device.index
        packer = struct.Struct("=" + "".join("q" if kind[0] == "*" else _FORMATS[kind] for kind in types) + "qq")
        self._buffer = ctypes.create_string_buffer(packer.size)
        self._pack = functools.partial(packer.pack_into, self._buffer, 0)
        self._heads = _Heads(self._buffer)
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._grid, self._stream = 0, 0
        self._set = functools.partial(_CONFIG.pack_into, self._config, 0)
        start = ctypes.addressof(self._buffer)
        self._bind((ctypes.c_void_p * (len(types) + 2))(*(start + 8 * i for i in range(len(types) + 2))))

    def _bind(self, array: ctypes.Array[Any]) -> None:
        """Launch with these places of the arguments from now on. Everything is given as a pointer that is made once,
        because most of a launch's time in Python is the conversion of numbers."""
        self._array = array
        config, places = ctypes.c_void_p(ctypes.addressof(self._config)), ctypes.c_void_p(ctypes.addressof(array))
        handle = ctypes.c_void_p(self._function.handle.value)
        self._call = functools.partial(_driver().cuLaunchKernelEx, config, handle, places, ctypes.c_void_p())

    def __call__(self, grid: int, words: Sequence[Any]) -> None:
        """Launch `grid` blocks on torch's current stream of the device."""
        if grid == 0:
            return
        self._pack(*words, 0, 0)  # two scratch pointers that the kernel does not use
        self._fire(grid)

    def again(self, grid: int, words: tuple[int, ...]) -> None:
        """Launch with the arguments of the last call, but for the first ones, 8-byte integers each."""
        self._heads[len(words)](*words)
        self._fire(grid)

    def _fire(self, grid: int) -> None:
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self._fire(grid)
            return
        stream = raw_stream(self._device)
        if stream != self._stream or grid != self._grid:
            self._set(grid, 1, 1, self._function.threads, 1, 1, self._function.shared, stream, 0, 0)
            self._grid, self._stream = grid, stream
        code = self._call()
        if code == _INVALID_CONTEXT:  # the first CUDA call of this thread
            _use_context(self._device)
            code = self._call()
        if code:
            _check(code, f"launching {self._function.entry.label}")
