"""The common base of flashloom's own exceptions, and warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

__all__ = ["FlashloomError", "warn"]

_HERE = str(Path(__file__).parent)


class FlashloomError(Exception):
    """Base of the exceptions that flashloom defines, such as SealedError and TraceError. A wrong argument is a plain
    ValueError or TypeError, as anywhere in Python."""


def warn(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the line outside of flashloom that led here."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
