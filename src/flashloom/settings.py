"""Every environment variable that flashloom reads, taken once at first use into a frozen dataclass.

``get()`` answers the settings in force, ``configure(**fields)`` replaces fields for the rest of the process. The
names are
``FLASHLOOM_`` and the field in capitals: ``FLASHLOOM_CACHE_DIR`` sets ``cache_dir``. ``kernel_cache_size`` is another
name of ``cache_size``. Where ``FLASHLOOM_LOG`` is not set, ``FLASHINFER_LOG_LEVEL`` gives the level, and without that
``FLASHINFER_DEBUG=1`` means debug.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flashloom.dataclass import dataclass
from flashloom.errors import warn

__all__ = [
    "Origin",
    "Settings",
    "check_name",
    "check_world",
    "configure",
    "from_environment",
    "get",
    "origins",
    "parse_bytes",
]

PREFIX = "FLASHLOOM_"
ALIASES = {"kernel_cache_size": "cache_size"}
LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """What a user can set from outside. Every field has a ``FLASHLOOM_<FIELD>`` variable of the same meaning."""

    cache_dir: Path | None = None
    """Folder of the kernel store. None: ``flashloom`` in the user's cache folder."""
    cache_size: int = 8 << 30
    """Bytes the store may hold; the least recently used entries go first. Text such as ``500M`` or ``8G`` is
    understood.
    """
    resident: int = 1024
    """GPU modules that stay loaded at a time; the least recently used are unloaded first."""
    trusted: tuple[Path, ...] = ()
    """Stores and packs that are used although others own them or can write to them, separated by ``:``."""
    target: str | None = None
    """CPU target to compile for instead of the one found, such as ``x86-avx2``."""
    cxx: str | None = None
    """C++ compiler, a name or a path. None: ``CXX``, then g++, clang++ and c++ from PATH."""
    jobs: int | None = None
    """Compilers that run at a time on this host. None: as many as CPUs and memory allow."""
    sealed: bool = False
    """True: nothing is compiled, a missing kernel is a SealedError (``flashloom.seal()`` does the same later)."""
    check: bool = False
    """True: the contents of device tensors (lengths, page indices, scales) are validated too, which waits for the
    device. Without it, a length that is negative or more than a request's own entries of the page table (or its row of
    dense keys) hold is not followed: nothing of that batch is computed, and a later call reports it. Page numbers, and
    lengths of ragged keys, are taken as they are.
    """
    log: str = "warning"
    """Log level, followed by ``:path`` to write to a file instead of stderr. error: nothing but errors; warning: also
    what costs speed or was set aside; info: also each miss, build and wait of the store; debug: also each hit and each
    plan, with the backend that serves it.
    """
    wait: float = 60.0
    """Seconds to wait for another process that is building the same kernel before it is built here as well."""
    store_timeout: float = 10.0
    """Seconds a store may take for one read or write before this process goes on without it."""
    memory_pool_size: int | None = None
    """Bytes that the workspaces of all live plans may take together, on each device. A plan that needs more is a
    MemoryError. None: no bound.
    """
    enable_cudagraph: bool = False
    """True: plans never move their buffers, so that any plan can be captured in a CUDA graph and be updated afterwards:
    what a plan's `Reserve` leaves open is the size of its first batch, and a larger batch is a ValueError.
    """
    fp16_reduction: bool = False
    """True: kernels may sum the products of float16 queries and keys in float16. `plan.explain()` says whether the
    plan's kernel makes use of it.
    """
    tensor_parallel_size: int = 1
    """Ranks that share the heads of one model. It must divide the world size of torch.distributed (before that is
    initialised: of the launcher's ``WORLD_SIZE``), is the default of `serving.attentions`, and part of tuning keys.
    """
    threads: int | None = None
    """Threads of CPU kernels. None: as many as torch uses (``torch.get_num_threads()``)."""
    commit: str | None = None
    """Commit that benchmarks record where flashloom is a copy without git."""
    debug: bool = False
    """True: the ``flashloom`` command shows the traceback of an error, as its option ``--debug`` does."""


@dataclass(frozen=True)
class Origin:
    """A setting in force: its value, and "default", "environment: " with the variable, or "configure"."""

    value: Any
    origin: str


def _boolean(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError("give 1 or 0")
    return words[text.lower()]


def parse_bytes(text: str) -> int:
    """Bytes from a number with or without K, M, G or T, powers of 1024. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not found:
        raise ValueError("give bytes, or a number with K, M, G or T")
    return int(float(found[1]) * (1 << (10 * " KMGT".index(found[2].upper() or " "))))


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            if kind is parse_bytes:
                raise
            raise ValueError(f"give a {'whole ' if kind is int else ''}number above 0") from None
        if not value > 0:
            raise ValueError("give a number above 0")
        return value

    return parse


def _level(text: str) -> str:
    if text.partition(":")[0].lower() not in LEVELS:
        raise ValueError("give debug, info, warning or error, then :path for a file")
    return text


def _target(text: str) -> str:
    from flashloom.target import CPU_TARGETS

    if text not in CPU_TARGETS:
        raise ValueError(f"give a CPU target: {', '.join(CPU_TARGETS)}")
    return text


_PARSERS: dict[str, Callable[[str], Any]] = {
    "cache_dir": lambda text: Path(text).expanduser().absolute(),
    "cache_size": parse_bytes,
    "resident": _positive(int),
    "trusted": lambda text: tuple(Path(part).expanduser() for part in text.split(":") if part),
    "target": _target,
    "cxx": str,
    "jobs": _positive(int),
    "sealed": _boolean,
    "check": _boolean,
    "log": _level,
    "wait": _positive(float),
    "store_timeout": _positive(float),
    "memory_pool_size": _positive(parse_bytes),
    "enable_cudagraph": _boolean,
    "fp16_reduction": _boolean,
    "tensor_parallel_size": _positive(int),
    "threads": _positive(int),
    "commit": str,
    "debug": _boolean,
}


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from FLASHLOOM_* variables; an empty value counts as unset. Raises ValueError for a value that cannot
    be read.
    """
    fields: dict[str, Any] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX):
            continue
        written, text = name[len(PREFIX) :].lower(), environ[name].strip()
        field = ALIASES.get(written, written)
        if field not in _PARSERS:
            near = difflib.get_close_matches(field, _PARSERS, 1)
            hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
            warn(f"{name} is not a setting of flashloom and has no effect{hint}", UserWarning)
        elif text:
            try:
                value = _PARSERS[field](text)
            except ValueError as error:
                raise ValueError(f"{name}={text!r} cannot be read: {error}") from None
            if fields.setdefault(field, value) != value:
                raise ValueError(f"{name}={text!r} is another name of {PREFIX}{field.upper()}, which differs: give one")
    if "log" not in fields and (level := _foreign_level(environ)):
        fields["log"] = level
    return Settings(**fields)


def _foreign_level(environ: Mapping[str, str]) -> str | None:
    """The level that FlashInfer's variables ask for, a name or a number of Python's logging; FLASHINFER_LOG_LEVEL
    before FLASHINFER_DEBUG."""
    text = environ.get("FLASHINFER_LOG_LEVEL", "").strip().lower()
    level = {"warn": "warning", "critical": "error", "fatal": "error"}.get(text, text)
    if text.isdigit() and int(text) >= 10:
        level = LEVELS[min(int(text) // 10, 4) - 1]
    if level in LEVELS:
        return level
    if text:
        warn(
            f"FLASHINFER_LOG_LEVEL={text!r} has no effect: give {', '.join(LEVELS)}, or a number of logging's from 10",
            UserWarning,
        )
    debug = environ.get("FLASHINFER_DEBUG", "").strip().lower()
    return "debug" if debug not in ("", "0", "false", "no", "off") else None


def check_world(size: int) -> None:
    """Raise ValueError unless `size` ranks per model fit the number of ranks, as far as it is known: from
    torch.distributed, else from the launcher's WORLD_SIZE. torch is not imported for it."""
    torch = sys.modules.get("torch")
    if size == 1:
        return
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        world, source = torch.distributed.get_world_size(), "torch.distributed has a world size of"
    elif os.environ.get("WORLD_SIZE", "").isdigit():
        world, source = int(os.environ["WORLD_SIZE"]), "WORLD_SIZE is"
    else:
        return
    if size > world or world % size:
        raise ValueError(
            f"tensor_parallel_size={size} but {source} {world}: it must divide the number of ranks; start more ranks "
            "or give a divisor"
        )


_lock = threading.RLock()
_current: Settings | None = None
_origins: dict[str, str] = {}  # of the settings that are not the default
_handler: logging.Handler | None = None


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that held it is not in this process


os.register_at_fork(after_in_child=_after_fork)


def get() -> Settings:
    """The settings in force, read from the environment at the first call."""
    global _current, _origins
    if _current is None:
        with _lock:
            if _current is None:
                settings = from_environment()
                _set_log(settings.log)
                _origins = _variables(settings, os.environ)
                _current = settings
    return _current


def origins() -> dict[str, Origin]:
    """Every setting in force, by name, and where it comes from."""
    settings = get()
    return {name: Origin(getattr(settings, name), _origins.get(name, "default")) for name in _PARSERS}


def _variables(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Setting -> the variable that it was read from, for those that were."""
    found = {}
    for name in [*_PARSERS, *ALIASES]:
        variable = PREFIX + name.upper()
        if environ.get(variable, "").strip():
            found[ALIASES.get(name, name)] = f"environment: {variable}"
    if "log" not in found and settings.log != Settings.log:
        foreign = next(name for name in ("FLASHINFER_LOG_LEVEL", "FLASHINFER_DEBUG") if environ.get(name))
        found["log"] = f"environment: {foreign}"
    return found


def check_name(name: str) -> None:
    """Raise TypeError unless `name` is a setting's."""
    known = [*_PARSERS, *ALIASES]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{name!r} is not a setting; the settings are {', '.join(known)}{hint}")


def configure(**fields: Any) -> Settings:
    """Replace settings for the rest of the process and answer the new ones.

    Values may be given as the field's type or as the text its variable would hold, such as
    ``configure(kernel_cache_size="2GB", memory_pool_size="4GB", enable_cudagraph=True, threads=8)``; `Settings` says
    what each one does. They hold for plans made later, `threads` for running ones too. Raises TypeError for a name that
    is not a setting, ValueError for a value that cannot be read or does not fit (tensor_parallel_size and the world).
    """
    global _current
    values: dict[str, Any] = {}
    for name, given in fields.items():
        check_name(name)
        field = ALIASES.get(name, name)
        value = _read(name, field, given)
        if values.setdefault(field, value) != value:
            raise ValueError(f"{name}={given!r} and another value of {field} were given: they are one setting")
    check_world(values.get("tensor_parallel_size", 1))
    with _lock:
        _current = dataclasses.replace(get(), **values)
        _origins.update(dict.fromkeys(values, "configure"))
        if "log" in values:
            _set_log(_current.log)
        return _current


def _read(name: str, field: str, value: Any) -> Any:
    """A value as its field holds it."""
    default = getattr(Settings, field)
    if value is None and default is None:
        return None
    if field == "trusted" and not isinstance(value, str | Path):
        return tuple(map(Path, value))
    if not isinstance(value, str | Path | int | float):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}: give what its variable would hold, or a number")
    try:
        return _PARSERS[field](str(value))
    except ValueError as error:
        raise ValueError(f"{name}={value!r} cannot be read: {error}") from None


def _set_log(spec: str) -> None:
    """Attach one handler to the ``flashloom`` logger; what the host program configured on the root logger stays."""
    global _handler
    logger = logging.getLogger("flashloom")
    if _handler is not None:
        logger.removeHandler(_handler)
        _handler.close()
        _handler = None
    level, _, path = spec.partition(":")
    if level.lower() == "warning" and not path:  # the default: logging's own last resort prints warnings to stderr
        logger.setLevel(logging.NOTSET)
        return
    _handler = logging.FileHandler(path, delay=True) if path else logging.StreamHandler()
    _handler.setFormatter(logging.Formatter(f"%(asctime)s flashloom[{os.getpid()}] %(levelname)s %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(level.upper())
