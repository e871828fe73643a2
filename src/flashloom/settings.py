"""Every environment variable that flashloom reads, taken once at first use into a frozen dataclass.

``get()`` answers the settings in force, ``configure(**fields)`` replaces fields for the rest of the process. The
names are
``FLASHLOOM_`` and the field in capitals: ``FLASHLOOM_CACHE_DIR`` sets ``cache_dir``.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Settings", "configure", "from_environment", "get"]

PREFIX = "FLASHLOOM_"


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
    device.
    """
    log: str = "warning"
    """Log level (debug, info, warning, error), followed by ``:path`` to write to a file instead of stderr."""
    wait: float = 60.0
    """Seconds to wait for another process that is building the same kernel before it is built here as well."""
    store_timeout: float = 10.0
    """Seconds a store may take for one read or write before this process goes on without it."""


def _boolean(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError("give 1 or 0")
    return words[text.lower()]


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not found:
        raise ValueError("give bytes, or a number with K, M, G or T")
    return int(float(found[1]) * (1 << (10 * " KMGT".index(found[2].upper() or " "))))


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError("give a number above 0")
        return value

    return parse


def _level(text: str) -> str:
    if text.partition(":")[0].lower() not in ("debug", "info", "warning", "error"):
        raise ValueError("give debug, info, warning or error, then :path for a file")
    return text


_PARSERS: dict[str, Callable[[str], Any]] = {
    "cache_dir": lambda text: Path(text).expanduser().absolute(),
    "cache_size": _bytes,
    "resident": _positive(int),
    "trusted": lambda text: tuple(Path(part).expanduser() for part in text.split(":") if part),
    "target": str,
    "cxx": str,
    "jobs": _positive(int),
    "sealed": _boolean,
    "check": _boolean,
    "log": _level,
    "wait": _positive(float),
    "store_timeout": _positive(float),
}


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from FLASHLOOM_* variables; an empty value counts as unset. Raises ValueError for a value that cannot
    be read.
    """
    fields: dict[str, Any] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX):
            continue
        field, text = name[len(PREFIX) :].lower(), environ[name].strip()
        if field not in _PARSERS:
            near = difflib.get_close_matches(field, _PARSERS, 1)
            hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
            warnings.warn(f"{name} is not a setting of flashloom and has no effect{hint}", stacklevel=2)
        elif text:
            try:
                fields[field] = _PARSERS[field](text)
            except ValueError as error:
                raise ValueError(f"{name}={text!r} cannot be read: {error}") from None
    return Settings(**fields)


_lock = threading.RLock()
_current: Settings | None = None
_handler: logging.Handler | None = None


def get() -> Settings:
    """The settings in force, read from the environment at the first call."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                settings = from_environment()
                _set_log(settings.log)
                _current = settings
    return _current


def configure(**fields: Any) -> Settings:
    """Replace settings for the rest of the process and answer the new ones.

    Values may be given as the field's type or as the text its variable would hold. Raises TypeError for a name that is
    not a setting, ValueError for a value that cannot be read.
    """
    global _current
    values = {}
    for field, value in fields.items():
        if field not in _PARSERS:
            raise TypeError(f"{field!r} is not a setting; the settings are {', '.join(_PARSERS)}")
        try:
            values[field] = _PARSERS[field](str(value)) if isinstance(value, str | Path) else value
        except ValueError as error:
            raise ValueError(f"{field}={value!r} cannot be read: {error}") from None
    with _lock:
        _current = dataclasses.replace(get(), **values)
        if "log" in values:
            _set_log(_current.log)
        return _current


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
