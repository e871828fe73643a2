"""Which loaded GPU modules stay loaded: the most recently used, and whatever somebody still holds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Resident"]

T = TypeVar("T")


class Resident(Generic[T]):
    """Values by key, made once. Beyond `limit()` the least recently used are let go; one that a plan holds (and a
    graph needs
    its plan) lives on, and is found again, until its last holder is gone."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._recent: dict[Hashable, T] = {}
        self._alive: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made now if it is not alive. Raises what `make` raises."""
        value = self._alive.get(key)
        made = make() if value is None else value  # without the lock: others may make other values meanwhile
        with self._lock:
            value = self._alive.setdefault(key, made)
            self._recent.pop(key, None)
            self._recent[key] = value
            while len(self._recent) > self._limit():
                del self._recent[next(iter(self._recent))]
            return value

    def peek(self, key: Hashable) -> T | None:
        """The value of a key if it is alive."""
        return self._alive.get(key)

    def __len__(self) -> int:
        return len(self._alive)
