"""flashinfer.autotune_cache: what is served through FlashInfer's names has nothing to tune, so nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashloom.compat.flashinfer import _later

__all__ = ["MeasurementPolicy", "autotune_v2", "autotune_v2_reload"]

__getattr__ = _later.names(__name__)


@dataclass(frozen=True)
class MeasurementPolicy:
    """How FlashInfer would measure; nothing is measured."""

    execution_mode: str = "auto"
    cold_l2: bool | None = None


@contextmanager
def autotune_v2(
    mode: str = "tune", persistent_cache: bool = True, cache_root: Any = None, *args: Any, **options: Any
) -> Iterator[None]:
    """A context without effect. Raises ValueError for a mode that is none."""
    if mode not in ("tune", "replay"):
        raise ValueError(f'mode={mode!r}: must be "tune" or "replay"')
    yield


def autotune_v2_reload() -> None:
    """Nothing to reload."""
