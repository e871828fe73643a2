"""Load a compiled library from memory: verified bytes become an anonymous file, so that nothing can change between
check and use.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable

from flashloom.store import Entry

__all__ = ["Module", "load", "openmp_runtime"]

_numbers = itertools.count(1)


class Module:
    """A loaded library. It stays loaded as long as the process lives."""

    def __init__(self, entry: Entry, library: ctypes.CDLL) -> None:
        self.entry = entry
        self._library = library

    def get_function(self, name: str, arguments: int = 1) -> Callable[..., int]:
        """The exported function ``flashloom_<name>``, which takes so many integers or addresses of 64 bits and answers
        a signed one. Calls of it let other Python threads run. Raises AttributeError when the library has none.
        """
        function = self._library["flashloom_" + name]  # every time an object of its own
        function.argtypes = [ctypes.c_void_p] * arguments
        function.restype = ctypes.c_int64
        return function


def load(entry: Entry) -> Module:
    """Load ``kernel.so`` of an entry. Raises OSError when the system's loader refuses it."""
    openmp_runtime()
    return Module(entry, _load_bytes(entry.files["kernel.so"], entry.label))


def _load_bytes(data: bytes, label: str) -> ctypes.CDLL:
    try:
        descriptor = os.memfd_create("flashloom-" + re.sub(r"[^\w.-]+", "-", label)[:200], os.MFD_CLOEXEC)
    except OSError:  # memfd forbidden here
        with tempfile.NamedTemporaryFile(prefix="flashloom-", suffix=".so") as file:
            file.write(data)
            file.flush()
            return ctypes.CDLL(file.name)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        # The loader takes equal paths for equal libraries and descriptors are used again, so every load spells the
        # path anew.
        spelling = "".join("./" if bit == "0" else ".//" for bit in f"{next(_numbers):b}")
        return ctypes.CDLL(f"/proc/self/fd/{spelling}{descriptor}")
    finally:
        os.close(descriptor)


@functools.lru_cache
def openmp_runtime() -> str:
    """Make the OpenMP runtime that torch has loaded visible to kernels, and answer its path.

    Kernels leave GOMP_parallel undefined; a library loaded a second time would bring a second pool of threads.
    """
    import torch  # loads its runtime

    with open("/proc/self/maps") as maps:
        found = re.findall(r"\s(/\S*/lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\d]*)$", maps.read(), re.MULTILINE)
    home = os.path.dirname(os.path.dirname(torch.__file__))
    mine = [path for path in found if path.startswith(home + os.sep + "torch")]
    path = (mine or found or ["libgomp.so.1"])[0]
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return path
