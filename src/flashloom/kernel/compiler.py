"""Which C++ compiler there is, and what it says it is: the latter is a part of every C++ kernel's key.

Asking takes a process of its own, which a start that loads all of its kernels should not need. So what a g++ answered
is noted in the store, for the very file that answered.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from typing import Any

from flashloom import settings, store
from flashloom.dataclass import dataclass
from flashloom.store import notes

__all__ = ["Compiler", "NoCompiler", "environment", "find_compiler"]


class NoCompiler(store.NoToolchain):
    """No C++ compiler was found."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: where it is (not part of any key), what it says it is and what it compiles for (part of every
    key).
    """

    path: str
    version: str
    machine: str

    @property
    def identity(self) -> dict[str, str]:
        """What of the toolchain can change the machine code, or where it loads."""
        return {"compiler": self.version, "machine": self.machine, "libc": "-".join(platform.libc_ver())}


def find_compiler() -> Compiler:
    """``FLASHLOOM_CXX`` if it is set, else the first found of ``CXX``, g++, clang++ and c++. Raises NoCompiler."""
    asked = settings.get().cxx
    for name in [asked] if asked else [os.environ.get("CXX", ""), "g++", "clang++", "c++"]:
        path = shutil.which(name)
        if path:
            return _identify(path, *_state_of(path))
    if asked:
        raise NoCompiler(f"the C++ compiler {asked!r} that FLASHLOOM_CXX names was not found; name one that is there")
    raise NoCompiler(
        "no C++ compiler was found (g++, clang++ or c++ in PATH); install one, such as with `apt install g++`, set "
        "FLASHLOOM_CXX, or use a pack with the kernels built ahead"
    )


def environment() -> dict[str, str]:
    """The environment for the compiler, less what would change its output unseen by the key."""
    hidden = {"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX"}
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, "LC_ALL": "C"}


def _state_of(path: str) -> tuple[str, int, int, int, int]:
    """The file behind a path, and all that changes when it does."""
    file = os.path.realpath(path)
    status = os.stat(file)
    return file, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache
def _identify(path: str, *state: Any) -> Compiler:
    """The compiler at this path, whose file has this state: as noted, or as it answers now."""
    noted = notes.recall("compilers", {"state": state})
    if noted is not None:
        return Compiler(path, *noted)
    found = _ask(path)
    if _speaks_for_itself(state[0], found) and _state_of(path) == state:
        notes.remember("compilers", {"state": state}, [found.version, found.machine])
    return found


def _ask(path: str) -> Compiler:
    done = subprocess.run(
        [path, "-v"], capture_output=True, text=True, errors="replace", check=False, env=environment()
    )
    version = re.search(r"^.*\b(?:gcc|clang) version .*$", done.stderr, re.MULTILINE)
    machine = re.search(r"^Target: (.+)$", done.stderr, re.MULTILINE)
    if done.returncode or not version or not machine:
        raise NoCompiler(f"`{path} -v` does not answer as g++ or clang++ do; name one of these in FLASHLOOM_CXX")
    return Compiler(path, version[0].strip(), machine[1].strip())


def _speaks_for_itself(file: str, found: Compiler) -> bool:
    """Whether the answer is written in this very file, as in GCC's own driver. A script or ccache passes on what
    another file says, and clang reads libraries and configuration files, which may change while this one stays."""
    number = re.match(r"gcc version (\S+)", found.version)
    if number is None:
        return False
    try:
        with open(file, "rb") as program:
            text = program.read() if program.read(4) == b"\x7fELF" else b""
    except OSError:  # it may be run, not read
        return False
    return all(word in text for word in (b"gcc version %s", number[1].encode(), found.machine.encode()))
