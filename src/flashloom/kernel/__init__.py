"""How source becomes something that can be called: toolchains on top of the store."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from flashloom.store import Entry

if TYPE_CHECKING:
    from flashloom.kernel.compiler import NoCompiler
    from flashloom.kernel.cpp import CompileError

__all__ = ["CompileError", "Kernel", "NoCompiler"]


def __getattr__(name: str) -> Any:
    """The errors of the C++ toolchain, which GPU kernels do without."""
    if name not in ("CompileError", "NoCompiler"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flashloom.kernel import cpp

    return getattr(cpp, name)


class Kernel(Protocol):
    """A kernel as it is asked for: what identifies it, and how to get it compiled. Toolchains have one class each."""

    @property
    def name(self) -> str:
        """For people; not part of what identifies it."""

    @property
    def label(self) -> str:
        """What it is called in listings and errors: variant, heads, dtypes, phase, where they are known."""

    @property
    def about(self) -> Mapping[str, str]:
        """The same by topic."""

    @property
    def fields(self) -> dict[str, Any]:
        """What identifies it, for the store."""

    def entry(self) -> Entry:
        """It compiled, from a pack, from the store, or built now. Raises store.NoToolchain, store.SealedError or
        CompileError.
        """
