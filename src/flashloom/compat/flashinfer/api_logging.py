"""flashinfer.api_logging: the decorator of FlashInfer's own functions, for programs that put it on theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashloom.compat.flashinfer import _later

__all__ = ["flashinfer_api"]

__getattr__ = _later.names(__name__)


def flashinfer_api(func: Callable | None = None, *, trace: Any = None) -> Callable:
    """The function as it is: nothing is logged; `flashloom.monitor()` watches runs."""
    return (lambda decorated: decorated) if func is None else func
