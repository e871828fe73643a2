"""C++ kernels: found g++ or clang++, explicit flags, one shared library of plain C functions per kernel.

A kernel source includes plain kernel headers, no C++ library and no torch header, and exports functions that take and
answer integers or addresses: ``extern "C" __attribute__((visibility("default"))) int64_t flashloom_<name>(...)``.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashloom import settings, store
from flashloom.kernel.load import Module, load
from flashloom.target import Target

__all__ = ["FLAGS", "CompileError", "Compiler", "CppKernel", "NoCompiler", "build", "find_compiler"]

FLAGS = (
    "-std=c++17",
    "-O2",  # compiles a quarter faster than -O3; what of -O3 the kernels miss is in GCC_FLAGS
    "-fPIC",
    "-shared",
    "-fwrapv",  # integer overflow in user hooks wraps, as in torch
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-stack-protector",
    "-fvisibility=hidden",  # kernels have equal names within: none may be bound to another's
    "-Wl,--as-needed",  # no libstdc++ at run time
)
GCC_FLAGS = ("-ftree-partial-pre", "-fipa-cp-clone", "-fvect-cost-model=dynamic")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


class NoCompiler(store.NoToolchain):
    """No C++ compiler was found."""


class CompileError(RuntimeError):
    """The compiler refused a kernel's source."""


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
            return _identify(path, os.stat(path).st_mtime_ns)
    if asked:
        raise NoCompiler(f"the C++ compiler {asked!r} that FLASHLOOM_CXX names was not found; name one that is there")
    raise NoCompiler(
        "no C++ compiler was found (g++, clang++ or c++ in PATH); install one, such as with `apt install g++`, set "
        "FLASHLOOM_CXX, or use a pack with the kernels built ahead"
    )


@functools.lru_cache
def _identify(path: str, mtime_ns: int) -> Compiler:
    """Ask the compiler for its version. The file's time only says when to ask again within this process."""
    done = subprocess.run(
        [path, "-v"], capture_output=True, text=True, errors="replace", check=False, env=_environment()
    )
    version = re.search(r"^.*\b(?:gcc|clang) version .*$", done.stderr, re.MULTILINE)
    machine = re.search(r"^Target: (.+)$", done.stderr, re.MULTILINE)
    if done.returncode or not version or not machine:
        raise NoCompiler(f"`{path} -v` does not answer as g++ or clang++ do; name one of these in FLASHLOOM_CXX")
    return Compiler(path, version[0].strip(), machine[1].strip())


def _environment() -> dict[str, str]:
    """The environment for the compiler, less what would change its output unseen by the key."""
    hidden = {"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX"}
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, "LC_ALL": "C"}


@dataclass(frozen=True)
class CppKernel:
    """One kernel to compile: what is asked of the compiler, and no more."""

    name: str
    source: str = field(repr=False)
    include_dirs: tuple[Path, ...]
    target: Target
    defines: Mapping[str, str | int] = field(default_factory=dict)
    parts: int = 1
    """Translation units: the source is compiled so many times at once, with FL_PART = 0, 1, ..., and linked."""

    def __post_init__(self) -> None:
        if not self.target.is_cpu:
            raise ValueError(f"kernel {self.name!r} is C++ and its target {self.target} a GPU; give a CPU target")

    @functools.cached_property
    def flags(self) -> tuple[str, ...]:
        """Compiler flags in the order they are given."""
        return (*FLAGS, *self.target.flags, *(f"-D{name}={value}" for name, value in sorted(self.defines.items())))

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """What identifies the kernel, for the store. Headers are read here."""
        return {
            "kind": "cpp",
            "source": store.digest(self.source),
            "includes": _includes(self.source, self.include_dirs),
            "target": self.target.name,
            "flags": list(FLAGS + GCC_FLAGS + self.target.flags),
            "defines": {name: str(value) for name, value in self.defines.items()},
            "parts": self.parts,
        }

    def entry(self) -> store.Entry:
        """The compiled kernel, from the store or built now. Raises NoCompiler, CompileError or SealedError."""
        return store.get_or_build(
            self.fields,
            self._compile,
            toolchain=lambda: find_compiler().identity,
            label=f"{self.name} {self.target}",
        )

    def load(self) -> Module:
        """The compiled kernel, loaded; raises what ``entry`` raises. An entry that does not load is set aside and
        built anew.
        """
        entry = self.entry()
        try:
            return load(entry)
        except OSError as error:
            entry.reject(str(error))
            return load(self.entry())

    def _compile(self, folder: Path) -> None:
        compiler = find_compiler()
        wanted = "aarch64" if self.target.name == "aarch64" else "x86_64"
        if not compiler.machine.startswith(wanted):
            raise NoCompiler(
                f"{compiler.path} compiles for {compiler.machine}, not for {self.target}; name a compiler for it in "
                f"FLASHLOOM_CXX, such as {wanted}-linux-gnu-g++"
            )
        (folder / "kernel.cpp").write_text(self.source)
        includes = [f"-I{path}" for path in self.include_dirs]
        flags = [*self.flags, *(GCC_FLAGS if "gcc version" in compiler.version else ())]
        if self.parts == 1:
            commands = [[compiler.path, *flags, *includes, "-o", "kernel.so", "kernel.cpp", "-lm"]]
        else:
            objects = [f"part{i}.o" for i in range(self.parts)]
            commands = [
                [compiler.path, *flags, *includes, f"-DFL_PART={i}", "-c", "-o", part, "kernel.cpp"]
                for i, part in enumerate(objects)
            ]
        self._together(compiler, commands, folder)
        if self.parts > 1:
            self._together(compiler, [[compiler.path, *flags, "-o", "kernel.so", *objects, "-lm"]], folder)
            for part in objects:
                (folder / part).unlink()

    def _together(self, compiler: Compiler, commands: list[list[str]], folder: Path) -> None:
        """Run commands of the compiler at the same time; raises CompileError for the first that fails."""
        running = [
            subprocess.Popen(
                command,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=_environment(),
            )
            for command in commands
        ]
        errors = [child.communicate()[1] for child in running]
        for command, child, text in zip(commands, running, errors):
            if child.returncode:
                (folder / "compile.log").write_text(" ".join(command) + "\n" + text)
                raise CompileError(_explain(self.name, compiler, child.returncode, text, folder))


def _explain(name: str, compiler: Compiler, code: int, errors: str, folder: Path) -> str:
    lines = [
        line
        for line in errors.splitlines()
        if re.search(r"\b(fatal )?error:|undefined reference|[Kk]illed|No space left", line)
    ]
    last = (lines or errors.strip().splitlines() or [f"no message, exit status {code}"])[-1].strip()
    if code < 0 or "illed" in last:
        hint = "\n  it was killed, probably for want of memory: set FLASHLOOM_JOBS=1"
    elif "unrecognized" in errors or "unknown argument" in errors:
        hint = "\n  this compiler is too old for the target: install a newer one, or set FLASHLOOM_TARGET"
    elif "No space left" in errors:
        hint = "\n  make room, or set TMPDIR to a folder with room"
    else:
        hint = ""
    return (
        f"{last}{hint}\n  while {compiler.path} ({compiler.version}) compiled kernel {name!r}"
        f"\n  source: {folder / 'kernel.cpp'}\n  log:    {folder / 'compile.log'}"
    )


def _includes(source: str, folders: Sequence[Path]) -> dict[str, str]:
    """Digests of all headers that the source includes and that these folders have, by their name in the folder.

    Headers of the compiler and of the system are covered by the compiler's version. Every #include counts, also one
    that the preprocessor would leave out.
    """
    places = [os.path.normpath(folder) for folder in folders]
    found: dict[str, str] = {}
    pending = [(quoted, angled, "") for quoted, angled in _INCLUDE.findall(source)]
    while pending:
        quoted, angled, beside = pending.pop()
        near = [beside] if quoted and beside else []
        for place in [*near, *places]:
            path = os.path.normpath(os.path.join(place, quoted or angled))
            with suppress(FileNotFoundError, NotADirectoryError):
                status = os.stat(path)
                name = next((path[len(p) + 1 :] for p in places if path.startswith(p + os.sep)), os.path.basename(path))
                if name not in found:
                    found[name], inner = _scan(path, status.st_ctime_ns, status.st_ino, status.st_size)
                    pending += [(*include, os.path.dirname(path)) for include in inner]
                break
        else:
            if quoted:
                raise CompileError(f'#include "{quoted}" is in none of {", ".join([*near, *places])}')
    return found


@functools.lru_cache(4096)
def _scan(path: str, *status: int) -> tuple[str, list[tuple[str, str]]]:
    """A header's digest and what it includes. Its status says when to read it again within this process."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    return store.digest(text), _INCLUDE.findall(text)


_loaded: dict[str, Module] = {}


def build(
    source: str,
    include_dirs: Iterable[Path],
    target: Target,
    defines: Mapping[str, str | int],
    name: str,
    parts: int = 1,
) -> Module:
    """Compile and load a kernel, or find it: in this process, in a pack, in the store. ``module.get_function(name)``
    is callable.

    Raises NoCompiler, CompileError or store.SealedError.
    """
    kernel = CppKernel(name, source, tuple(include_dirs), target, dict(defines), parts)
    request = store.digest(kernel.fields)
    module = _loaded.get(request)
    if module is None:
        module = kernel.load()
        module = _loaded.setdefault(request, module)
    return module
