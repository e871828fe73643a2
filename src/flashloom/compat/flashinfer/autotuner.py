"""flashinfer.autotuner: what is served through FlashInfer's names has nothing to tune, so the context does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flashloom.compat.flashinfer import _later

__all__ = ["autotune"]

__getattr__ = _later.names(__name__)


@contextmanager
def autotune(tune_mode: bool = True, *args: Any, **options: Any) -> Iterator[None]:
    """A context without effect: the operators that FlashInfer tunes (GEMM, MoE) are not served yet."""
    yield
