"""How source becomes something that can be called: toolchains on top of the store."""

from typing import Any, Protocol

from flashloom.kernel.cpp import CompileError, NoCompiler
from flashloom.store import Entry

__all__ = ["CompileError", "Kernel", "NoCompiler"]


class Kernel(Protocol):
    """A kernel as it is asked for: what identifies it, and how to get it compiled. Toolchains have one class each."""

    @property
    def name(self) -> str:
        """For people; not part of what identifies it."""

    @property
    def fields(self) -> dict[str, Any]:
        """What identifies it, for the store."""

    def entry(self) -> Entry:
        """It compiled, from a pack, from the store, or built now. Raises store.NoToolchain, store.SealedError or
        CompileError.
        """
