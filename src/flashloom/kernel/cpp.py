"""C++ kernels: found g++ or clang++, explicit flags, one shared library per kernel with the TVM-FFI C ABI.

A kernel source includes ``<tvm/ffi/c_api.h>`` and plain kernel headers, no C++ library and no torch header, and exports
``extern "C" int __tvm_ffi_<name>(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result)``.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashloom import settings, store
from flashloom.kernel.load import Module, load
from flashloom.target import Target

__all__ = ["FLAGS", "CompileError", "Compiler", "CppKernel", "NoCompiler", "build", "find_compiler"]

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fwrapv",  # integer overflow in user hooks wraps, as in torch
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-stack-protector",
    "-Wl,--as-needed",  # no libstdc++ at run time
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


class NoCompiler(store.NoToolchain):
    """No C++ compiler was found."""


class CompileError(RuntimeError):
    """The compiler refused a kernel's source."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: where it is (not part of any key) and what it says it is (part of every key)."""

    path: str
    version: str

    @property
    def identity(self) -> dict[str, str]:
        """What of the toolchain can change the machine code, or where it loads."""
        return {"compiler": self.version, "libc": "-".join(platform.libc_ver())}


def find_compiler() -> Compiler:
    """``FLASHLOOM_CXX``, ``CXX``, else g++, clang++ or c++ from PATH. Raises NoCompiler with what to do."""
    asked = settings.get().cxx or os.environ.get("CXX", "").strip()
    for name in [asked] if asked else ["g++", "clang++", "c++"]:
        path = shutil.which(name)
        if path:
            return _identify(path, os.stat(path).st_mtime_ns)
    if asked:
        raise NoCompiler(
            f"the C++ compiler {asked!r} that FLASHLOOM_CXX or CXX names was not found; name one that is there"
        )
    raise NoCompiler(
        "no C++ compiler was found (g++, clang++ or c++ in PATH); install one, such as with `apt install g++`, set "
        "FLASHLOOM_CXX, or use a pack with the kernels built ahead"
    )


@functools.lru_cache
def _identify(path: str, mtime_ns: int) -> Compiler:
    """Ask the compiler for its version. The file's time only says when to ask again within this process."""
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, env=_environment())
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        raise NoCompiler(
            f"`{path} --version` failed: {(answer.stderr.strip().splitlines() or ['no output'])[-1]}; set FLASHLOOM_CXX"
        )
    return Compiler(path, lines[0])


def _environment() -> dict[str, str]:
    """The environment for the compiler, less what would change its output unseen by the key."""
    hidden = {"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX"}
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, "LC_ALL": "C"}


@functools.lru_cache
def _abi_include_dirs() -> tuple[Path, ...]:
    from tvm_ffi import libinfo

    return tuple(
        dict.fromkeys(Path(path) for path in (libinfo.find_include_path(), libinfo.find_dlpack_include_path()))
    )


@dataclass(frozen=True)
class CppKernel:
    """One kernel to compile: what is asked of the compiler, and no more."""

    name: str
    source: str = field(repr=False)
    include_dirs: tuple[Path, ...]
    target: Target
    defines: Mapping[str, str | int] = field(default_factory=dict)

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
            "includes": _includes(self.source, (*self.include_dirs, *_abi_include_dirs())),
            "target": self.target.name,
            "flags": list(FLAGS + self.target.flags),
            "defines": {name: str(value) for name, value in self.defines.items()},
        }

    def entry(self) -> store.Entry:
        """The compiled kernel, from the store or built now. Raises NoCompiler, CompileError or SealedError."""
        return store.get_or_build(
            self.fields, self._compile, toolchain=lambda: find_compiler().identity, label=self.name
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
        (folder / "kernel.cpp").write_text(self.source)
        includes = [f"-I{path}" for path in (*self.include_dirs, *_abi_include_dirs())]
        command = [compiler.path, *self.flags, *includes, "-o", "kernel.so", "kernel.cpp", "-lm"]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", env=_environment(), check=False
        )
        if done.returncode:
            log = folder / "compile.log"
            log.write_text(" ".join(command) + "\n" + done.stdout + done.stderr)
            raise CompileError(_explain(self.name, compiler, done.returncode, done.stderr, folder))


def _explain(name: str, compiler: Compiler, code: int, errors: str, folder: Path) -> str:
    lines = [
        line
        for line in errors.splitlines()
        if re.search(r"\b(fatal )?error:|undefined reference|[Kk]illed|No space left", line)
    ]
    last = (
        lines[-1].strip() if lines else (errors.strip().splitlines() or [f"no message, exit status {code}"])[-1].strip()
    )
    hint = "\n  it was killed, probably for want of memory: set FLASHLOOM_JOBS=1" if code < 0 or "illed" in last else ""
    return (
        f"{last}{hint}\n  while {compiler.path} ({compiler.version}) compiled kernel {name!r}"
        f"\n  source: {folder / 'kernel.cpp'}\n  log:    {folder / 'compile.log'}"
    )


def _includes(source: str, folders: Iterable[Path]) -> dict[str, str]:
    """Digests of all headers that the source includes and that these folders have, by the name they are included by.

    Headers of the compiler and of the system are covered by the compiler's version. Every #include counts, also one
    that the
    preprocessor would leave out.
    """
    folders = tuple(folders)
    found: dict[str, str] = {}
    pending: list[tuple[str, Path | None]] = [(source, None)]
    while pending:
        text, place = pending.pop()
        for quoted, angled in _INCLUDE.findall(text):
            name = quoted or angled
            near = [place] if place is not None and quoted else []
            path = next((folder / name for folder in [*near, *folders] if (folder / name).is_file()), None)
            if path is None and quoted:
                raise CompileError(f'#include "{name}" is in none of {", ".join(map(str, [*near, *folders]))}')
            if path is not None:
                body = path.read_text()
                shown = _shown(path, folders)
                if shown not in found:
                    found[shown] = store.digest(body)
                    pending.append((body, path.parent))
    return found


def _shown(path: Path, folders: Iterable[Path]) -> str:
    """The header's name relative to its include folder: the same wherever the package is installed."""
    path = Path(os.path.normpath(path))
    for folder in folders:
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return path.name


_loaded: dict[str, Module] = {}
_loading = threading.Lock()


def build(
    source: str, include_dirs: Iterable[Path], target: Target, defines: Mapping[str, str | int], name: str
) -> Module:
    """Compile and load a kernel, or find it: in this process, in a pack, in the store. ``module.get_function(name)``
    is callable.

    Raises NoCompiler, CompileError or store.SealedError.
    """
    kernel = CppKernel(name, source, tuple(include_dirs), target, dict(defines))
    request = store.digest(kernel.fields)
    module = _loaded.get(request)
    if module is None:
        module = kernel.load()
        with _loading:
            module = _loaded.setdefault(request, module)
    return module
