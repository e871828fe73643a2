"""What a command says when something goes wrong: one sentence for each exception. Standard library alone, since it must
work where nothing else does."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["in_file", "sentence"]

_SAID = (ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError)  # raised with a sentence of their own


def sentence(error: BaseException) -> str:
    """An exception in words, for those who see no traceback."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(places)}: {error.strerror}" if places else error.strerror
    if isinstance(error, ImportError):
        return f"{text or type(error).__name__}: `flashloom doctor` says what is missing and how to mend it"
    own = type(error).__module__.partition(".")[0] == "flashloom"
    if text and (own or type(error) in _SAID):
        return text
    more = "" if own else "\n`flashloom --debug ...` shows where that was raised"
    return f"{type(error).__name__}{': ' if text else ''}{text}{more}"


def in_file(error: BaseException, path: Path) -> str:
    """An exception that a user's file raised, with the file's line."""
    if isinstance(error, SyntaxError):
        at = f", line {error.lineno}" if error.lineno else ""
        return f"{error.filename or path}{at}: {error.msg}"
    own = path.resolve()
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == own]
    at = f", line {lines[-1]}" if lines else ""
    text = str(error).strip()
    return f"{path}{at}: {type(error).__name__}{': ' if text else ''}{text}"
