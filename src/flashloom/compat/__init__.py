"""Other libraries' names on flashloom: `install()` serves `import flashinfer` by flashloom.compat.flashinfer.

    import flashloom.compat
    flashloom.compat.install()
    import flashinfer                                # flashloom's kernels behind FlashInfer's names

`python -m flashloom.compat script.py args...` does so for a program, `pytest -p flashloom.compat.pytest_plugin` for a
test run."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from email.message import Message
from types import ModuleType
from typing import Any

__all__ = ["install", "installed"]

NAME = "flashinfer"
OURS = "flashloom.compat.flashinfer"
DISTRIBUTION = "flashinfer-python"


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata is told of flashinfer-python."""

    def read_text(self, filename: str) -> str | None:
        from flashloom.compat.flashinfer.version import __version__

        if filename not in ("METADATA", "PKG-INFO"):
            return None
        message = Message()
        message["Metadata-Version"], message["Name"], message["Version"] = "2.1", DISTRIBUTION, __version__
        message["Summary"] = "FlashInfer's names, served by flashloom"
        return message.as_string()

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: flashinfer is served by flashloom and has no files of its own")


class _Finder(importlib.metadata.DistributionFinder):
    """Finds flashinfer and its submodules in flashloom.compat.flashinfer: the same module objects."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != NAME:
            return None
        ours = OURS + fullname.removeprefix(NAME)
        if ours not in sys.modules and importlib.util.find_spec(ours) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Loader(ours), is_package=True)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        name = None if context is None else context.name
        if name is None or name.lower().replace("_", "-").replace(".", "-") == DISTRIBUTION:
            yield _Distribution()


class _Loader(importlib.abc.Loader):
    def __init__(self, ours: str):
        self._ours = ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._ours)
        self._kept = module.__spec__, getattr(module, "__loader__", None)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import system has put the other name's spec on the module, which stays flashloom's
        module.__spec__, module.__loader__ = self._kept
        if self._ours == OURS:
            # under both names at once: loading a submodule later would put it in the place of a function of its name
            for name in [name for name in sys.modules if name.startswith(f"{OURS}.")]:
                sys.modules.setdefault(NAME + name.removeprefix(OURS), sys.modules[name])


def install() -> None:
    """Serve `import flashinfer`, its submodules and its distribution's version by flashloom, in this process. Nothing
    is imported yet; a second call does nothing. Raises RuntimeError if the real flashinfer is imported already."""
    present = sys.modules.get(NAME)
    if present is not None and present is not sys.modules.get(OURS):
        where = getattr(present, "__file__", None) or "an unknown place"
        raise RuntimeError(
            f"flashinfer is imported already, from {where}: call flashloom.compat.install() before anything imports it"
        )
    if not installed():
        sys.meta_path.insert(0, _Finder())


def installed() -> bool:
    """Whether `import flashinfer` is served by flashloom."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)
