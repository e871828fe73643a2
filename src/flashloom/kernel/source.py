"""What a GPU kernel is made of, by content: a kernel file is read to identify it and imported only to compile it,
because importing it imports Triton, which a host with stored kernels may lack.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import flashloom
from flashloom.dataclass import dataclass

__all__ = ["Named", "Number", "Source"]


class Named(Protocol):
    """Something of a kernel that is known by what it says, and turned into Triton's object when it is compiled."""

    @property
    def identity(self) -> Any:
        """What identifies it, as JSON."""

    def load(self) -> Any:
        """The object; imports Triton."""


@dataclass(frozen=True)
class Number:
    """A type of numbers of Triton's language, such as "float16"."""

    name: str

    @property
    def identity(self) -> Any:
        return self.name

    def load(self) -> Any:
        import triton.language as tl

        return getattr(tl, self.name)


@dataclass(frozen=True)
class Source:
    """The jit function `name` of a module of flashloom."""

    module: str
    name: str

    @property
    def identity(self) -> Any:
        """The function's name, and the digest of its file and of all files of flashloom that it imports."""
        return [self.name, _digest(self.module)]

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


@functools.lru_cache
def _digest(module: str) -> str:
    files = files_of(module)
    summary = hashlib.sha256()
    for name in sorted(files):
        summary.update(hashlib.sha256(files[name]).digest())
    return summary.hexdigest()


def files_of(module: str) -> dict[str, bytes]:
    """The bytes of a module's file and of those of flashloom that it imports, by module; packages' own files, which
    hold no code, are left out."""
    found: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if name in found or path is None:
            continue
        found[name] = path.read_bytes()
        for imported in _imports(found[name].decode()):
            if imported.startswith("."):
                raise ValueError(f"{name} has a relative import; kernel files name modules in full, to be identified")
            waiting.append(imported)
    return found


def _imports(text: str) -> Iterator[str]:
    """What lines of `import a.b` and `from a.b import c, d` may name: modules, and names in them."""
    for line in text.splitlines():
        words = line.split(None, 3)
        if len(words) == 4 and words[0] == "from" and words[2] == "import":
            yield words[1]
            names = words[3].removeprefix("(").partition("#")[0].partition(")")[0]
            yield from (f"{words[1]}.{part.split()[0]}" for part in names.split(",") if part.strip())
        elif len(words) > 1 and words[0] == "import":
            yield words[1]


def _path(module: str) -> Path | None:
    """The file of a module of flashloom, or None for a package and for anything else."""
    if not module.startswith("flashloom."):
        return None
    path = Path(flashloom.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None
