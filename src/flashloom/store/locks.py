"""Locks that spare work and never decide what is right: every one may be missing, lie, or be held by a dead process.

They are flocks on small files in a folder of this host and user, so that no network file system is involved; the
kernel drops
them with their holder. A file holds who took it, for those who wait. ``take`` waits for nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
import time
from enum import Enum
from pathlib import Path

from flashloom.dataclass import dataclass

__all__ = ["Busy", "Lock", "Taken", "local_folder", "take"]

_held: set[int] = set()  # descriptors to close in a forked child, which would otherwise keep the parent's locks


def _close_inherited() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


def local_folder() -> Path | None:
    """A folder on this host that only this user can write, or None where there is none."""
    path = Path(tempfile.gettempdir()) / f"flashloom-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return path if private else None


@dataclass(frozen=True)
class Busy:
    """Somebody else holds the lock: who, and for how many seconds."""

    holder: str
    age: float


class Taken(Enum):
    """NOT_AVAILABLE: there are no locks here, or they lie; go on without."""

    NOT_AVAILABLE = "not available"


@dataclass()
class Lock:
    """A lock that this process holds until ``release``."""

    descriptor: int

    def release(self) -> None:
        if self.descriptor in _held:  # not in a child forked meanwhile
            _held.discard(self.descriptor)
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # also where a child just forked still shares the descriptor
            os.close(self.descriptor)


def take(path: Path | None) -> Lock | Busy | Taken:
    """Try to take the lock at this path, without waiting."""
    if path is None:
        return Taken.NOT_AVAILABLE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return Taken.NOT_AVAILABLE
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        answer = _busy(descriptor) if busy else Taken.NOT_AVAILABLE
        os.close(descriptor)
        return answer
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        os.utime(descriptor)
    except OSError:  # a full disk: the lock holds all the same
        pass
    _held.add(descriptor)
    return Lock(descriptor)


def _busy(descriptor: int) -> Busy | Taken:
    for patience in (0.05, 0.0):
        age = max(0.0, time.time() - os.fstat(descriptor).st_mtime)
        holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        if holder or age <= 1.0:
            return Busy(holder or "another process", age)
        time.sleep(patience)  # the machine may have stood still just before the holder signed
    return Taken.NOT_AVAILABLE  # a real holder signs at once; nobody did, so the lock lies
