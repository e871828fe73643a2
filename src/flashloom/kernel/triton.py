"""Triton kernels for a named target: compiled on any machine, kept in the store, launched without Triton's own
launcher.

A `TritonKernel` says what is asked: the jit function, the types of its run-time arguments and its constants. On a host
without a GPU it compiles all the same; `kernel.cuda` loads the result. Triton is imported to compile, and for nothing
else: what is stored is identified, found, loaded and launched without it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import torch

from flashloom import store
from flashloom.dataclass import dataclass
from flashloom.kernel.source import Source
from flashloom.target import Target

__all__ = ["POINTERS", "TritonKernel", "interpreting", "pointer"]

_importing = threading.Lock()
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


def pointer(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to elements of `dtype`."""
    return POINTERS[dtype]


def interpreting() -> bool:
    """Whether Triton's functions run in its interpreter (TRITON_INTERPRET=1 when Triton was first imported)."""
    if not sys.modules.get("triton") and not (os.environ.get("TRITON_INTERPRET") and installed()):
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache
def toolchain() -> dict[str, str]:
    """What of the toolchain decides the machine code: Triton's version (it brings its own assembler), as the installed
    package states it. Raises store.NoToolchain."""
    if not installed():
        raise store.NoToolchain(
            "Triton is not installed: install flashloom[gpu], or use a pack with the kernels built ahead"
        )
    try:
        return {"triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:  # a build of its own, not installed as a package
        import triton

        return {"triton": triton.__version__}


@dataclass(frozen=True)
class TritonKernel:
    """One kernel to compile.

    signature: run-time arguments by name, in the function's order, as Triton names types (a tuple of them for a tuple
    argument); constants: every other argument, functions and types of numbers as `Named`; aligned: names of pointers
    that are multiples of 16 bytes; about: what people are told of it, by topic.
    """

    function: Source
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    target: Target
    num_warps: int
    num_stages: int
    about: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.function.name

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """What identifies the kernel, for the store: source digests, types, constants, target, options."""
        return {
            "kind": "triton",
            "function": self.function.identity,
            "signature": [[name, _plain(kind)] for name, kind in self.signature.items()],
            "constants": {name: _constant(value) for name, value in self.constants.items()},
            "aligned": list(self.aligned),
            "target": self.target.name,
            "options": {"num_warps": self.num_warps, "num_stages": self.num_stages, "line_info": False},
        }

    @property
    def label(self) -> str:
        """What it is called in listings and errors."""
        return ", ".join(self.about.values()) or f"triton {self.name} {self.target}"

    def entry(self) -> store.Entry:
        """The compiled kernel, `kernel.cubin` with its metadata, from the store or built now. Raises NoToolchain or
        SealedError."""
        return store.get_or_build(
            self.fields,
            self._build,
            toolchain=toolchain,
            label=self.label,
            about=self.about,
        )

    def stored(self) -> store.Entry | None:
        """The compiled kernel if it is stored."""
        return store.find(self.fields, toolchain)

    def may_build(self) -> bool:
        """Whether it is compiled where it is missing."""
        return store.may_build(toolchain)

    def build_meanwhile(self) -> None:
        """Begin to compile it in a thread of its own, for the one who will ask for it."""
        store.meanwhile(self.entry)

    def compile(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(texts and binaries by stage, metadata), without a store and without Triton's cache folder."""
        from flashloom.kernel import apart

        apart.ours(self.target.name)
        with _importing:  # Triton cannot be imported by several threads at a time
            import triton.compiler  # noqa: F401
        from triton._C.libtriton import ir
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        function = self.function.load()
        names = list(function.arg_names)
        types = {name: self.signature.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = self._source(function, types, attributes)
        target = GPUTarget("cuda", int(self.target.name.removeprefix("sm")), 32)
        backend = make_backend(target)
        # fused multiply-adds are what the kernels count on; Triton 3.10 no longer assumes them
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        options = backend.parse_options(chosen)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = source.make_ir(
            target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        )
        metadata: dict[str, Any] = {"target": target, **options.__dict__}
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        results: dict[str, Any] = {}
        with _no_line_info:
            for stage, step in stages.items():
                module = step(module, metadata)
                results[stage] = module
        return results, metadata

    def _source(self, function: Any, types: dict[str, Any], attributes: dict[Any, Any]) -> Any:
        from triton.compiler.compiler import ASTSource

        return ASTSource(function, types, self.loaded_constants(), attributes)

    def loaded_constants(self) -> dict[str, Any]:
        """The constants as Triton takes them."""
        return {name: value.load() if hasattr(value, "identity") else value for name, value in self.constants.items()}

    def binary(self) -> tuple[bytes, dict[str, Any]]:
        """The machine code, and what is kept of the metadata, as JSON has it."""
        results, metadata = self.compile()
        kept = {
            key: metadata.get(key, 0)
            for key in ("name", "shared", "num_warps", "global_scratch_size", "profile_scratch_size")
        }
        return results["cubin"], json.loads(json.dumps(kept))

    def _build(self, folder: Path) -> dict[str, Any]:
        from flashloom.kernel import apart  # what is stored does without

        code, kept = self.binary() if apart.ours(self.target.name) else apart.compiled(self)
        (folder / "kernel.cubin").write_bytes(code)
        return kept


class _NoLineInfo:
    """Line tables off as long as a kernel of ours compiles: they hold this machine's paths, so that the same kernel
    would be other bytes elsewhere, and are most of its size."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        from triton import knobs

        with self._lock:
            if self._users == 0:
                self._before, knobs.compilation.disable_line_info = knobs.compilation.disable_line_info, True
            self._users += 1

    def __exit__(self, *error: object) -> None:
        from triton import knobs

        with self._lock:
            self._users -= 1
            if self._users == 0:
                knobs.compilation.disable_line_info = self._before


_no_line_info = _NoLineInfo()


def _plain(kind: Any) -> Any:
    return [_plain(k) for k in kind] if isinstance(kind, tuple) else kind


def _constant(value: Any) -> Any:
    """A constant as JSON."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "identity"):  # a `Named`
        return value.identity
    raise TypeError(f"the constant {value!r} of a kernel has no identity: give a number, a text, or a Named")
