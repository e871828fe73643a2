"""C++ kernels: explicit flags, one shared library of plain C functions per kernel.

A kernel source includes plain kernel headers, no C++ library and no torch header, and exports functions that take and
answer integers or addresses: ``extern "C" __attribute__((visibility("default"))) int64_t flashloom_<name>(...)``.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any

from flashloom import store
from flashloom.dataclass import dataclass
from flashloom.errors import FlashloomError
from flashloom.kernel.compiler import Compiler, NoCompiler, environment, find_compiler
from flashloom.kernel.load import Module, load
from flashloom.target import Target

__all__ = ["FLAGS", "CompileError", "CppKernel", "NoCompiler", "build", "find_compiler"]

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


class CompileError(FlashloomError, RuntimeError):
    """The compiler refused a kernel's source."""


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
    about: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """What people are told of it, by topic; see store.get_or_build."""

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

    @property
    def label(self) -> str:
        """What it is called in listings and errors."""
        return ", ".join(self.about.values()) or f"{self.name} {self.target}"

    def entry(self) -> store.Entry:
        """The compiled kernel, from the store or built now. Raises NoCompiler, CompileError or SealedError."""
        return store.get_or_build(
            self.fields,
            self._compile,
            toolchain=lambda: find_compiler().identity,
            label=self.label,
            about=self.about,
        )

    def stored(self) -> store.Entry | None:
        """The compiled kernel if it is stored."""
        return store.find(self.fields, lambda: find_compiler().identity)

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
                env=environment(),
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
    about: Mapping[str, str] | None = None,
) -> Module:
    """Compile and load a kernel, or find it: in this process, in a pack, in the store. ``module.get_function(name)``
    is callable.

    Raises NoCompiler, CompileError or store.SealedError.
    """
    kernel = CppKernel(name, source, tuple(include_dirs), target, dict(defines), parts, dict(about or {}))
    request = store.digest(kernel.fields)
    module = _loaded.get(request)
    if module is None:
        module = kernel.load()
        module = _loaded.setdefault(request, module)
    return module
