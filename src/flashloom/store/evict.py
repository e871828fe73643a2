"""Keeping the store below ``FLASHLOOM_CACHE_SIZE``: the least recently used entries go first.

Nothing on disk is in use: readers hold an entry's bytes in memory, so an entry may vanish at any time, and anything
here may be
gone before it is looked at.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from flashloom import settings
from flashloom.dataclass import dataclass
from flashloom.store.entry import Corrupt, Key, parse_manifest
from flashloom.store.folder import Folder
from flashloom.store.locks import local_folder

__all__ = ["Usage", "after_publish", "manifests", "prune", "usage"]

_EVERY = 32  # publications of this process between two looks at the size
_publications = itertools.count()
_limit: int | None = None  # at the last look


@dataclass(frozen=True)
class Usage:
    """What one entry takes: bytes, and when it was last used (seconds since the epoch)."""

    key: Key
    bytes: int
    used: float


def usage(folder: Folder) -> list[Usage]:
    """All entries, the least recently used first."""
    found = []
    for key in folder.all_keys():
        path = folder.path(key)
        with suppress(OSError):
            with os.scandir(path) as items:
                size = sum(item.stat(follow_symlinks=False).st_size for item in items)
            found.append(Usage(key, size, path.lstat().st_mtime))
    return sorted(found, key=lambda item: (item.used, item.key.key))


def prune(folder: Folder, limit: int) -> list[Usage]:
    """Remove the least recently used entries until the rest takes at most ``limit`` bytes; returns what was removed."""
    folder.remove_old()
    remove_old_builds()
    entries = usage(folder)
    total = sum(item.bytes for item in entries)
    removed = []
    for item in entries:
        if total <= limit:
            break
        with suppress(OSError):  # somebody else's entry in a shared store: leave it, go on
            folder.remove(item.key)
            removed.append(item)
        total -= item.bytes
    return removed


def remove_old_builds(seconds: float = 24 * 3600.0) -> None:
    """Remove build folders on this host that failed or whose process was killed, and unused locks, once they are this
    old."""
    place = local_folder()
    for path in [*place.glob("build-*"), *place.glob("locks/*")] if place else ():
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > seconds:
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)


def after_publish(folder: Folder) -> None:
    """Prune at a process' first publication, at every 32nd after it, and when the limit has become lower; problems are
    left to the next time."""
    global _limit
    limit = settings.get().cache_size
    if next(_publications) % _EVERY == 0 or (_limit is not None and limit < _limit):
        with suppress(OSError):
            prune(folder, limit)
        _limit = limit


def manifests(folder: Folder, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The manifests of entries, at most ``limit``; what cannot be read is left out."""
    for key in itertools.islice(folder.all_keys(), limit):
        with suppress(OSError, Corrupt, ValueError, KeyError):
            yield parse_manifest((folder.path(key) / "entry.json").read_bytes())
