"""Records on disk: ``<root>/v1/<operator>/<request>.<toolchain>.json``, one file per key.

A record is written aside, synced and renamed onto its name, so a reader sees a whole file or none, writers of different
keys never touch the same file, and of two writers of one key the last one stands. No locks, no file that is read,
changed and written back. A folder is listed once, when it is first asked; after that a miss costs no file access.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from flashloom.records.question import Question
from flashloom.records.record import FORMAT, LARGEST, Record, Rejected, parse
from flashloom.store.entry import Key
from flashloom.store.folder import sync

__all__ = ["Folder", "Layer", "Memory"]

log = logging.getLogger("flashloom")
_ASIDE_KEPT_S = 24 * 3600.0
_PARSED_KEPT = 4096


class Layer(Protocol):
    """Something that holds records."""

    name: str

    def find(self, question: Question, bucket: tuple[int, ...]) -> Record | None:
        """The record of a key, whole and of that key, or None. Raises Rejected or OSError for one that is not."""

    def has(self, operator: str) -> bool:
        """Whether there is any record of this operator."""

    def refresh(self) -> None:
        """Look again at what other processes wrote."""


def step(name: str) -> None:
    """Called before each step of publishing; the fault tests replace it by something that dies."""


class Memory:
    """Records of this process alone."""

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self._kept: dict[tuple[str, str], Record] = {}

    def find(self, question: Question, bucket: tuple[int, ...]) -> Record | None:
        """The record of a key, or None."""
        return self._kept.get((question.operator, question.key(bucket).key)) if self._kept else None

    def has(self, operator: str) -> bool:
        """Whether there is any record of this operator."""
        return any(name == operator for name, _ in tuple(self._kept))  # a thread may add meanwhile

    def publish(self, record: Record) -> bool:
        """Keep a record; False, since it is not written."""
        self._kept[record.operator, record.key.key] = record
        return False

    def refresh(self) -> None:
        """Nobody else writes here."""


class Folder:
    """Records below a folder, which need not exist. One object per path within a process (`Folder.at`), so that what
    is published through one context is seen by all."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.name = str(self.root)
        # Threads list, read and publish at once and take no lock, which a fork could leave held. What one of them began
        # before another's change goes into the dict that it found, or nowhere; it never covers what came later.
        self._listed: dict[str, dict[str, list[str]]] = {}  # operator -> request -> toolchains
        self._parsed: dict[tuple[str, str], Record | Rejected] = {}
        self._changes: dict[tuple[str, str], object] = {}  # another object for each time a file is published here
        self._memory = Memory(self.name)  # what could not be written

    @classmethod
    def at(cls, root: str | os.PathLike[str]) -> Folder:
        """The one of this process for a path. A name that ends in .json, as engines give it to a rank's file, stands
        for the folder without that end."""
        path = os.path.realpath(os.path.expanduser(root))
        if path.endswith(".json") and not os.path.isdir(path):
            path = path.removesuffix(".json")
        with _opening:
            found = _open.get(path)
            if found is None:
                found = _open[path] = cls(path)
            return found

    def _place(self, operator: str) -> Path:
        return self.root / f"v{FORMAT}" / operator

    def _list(self, operator: str) -> dict[str, list[str]]:
        of_operators = self._listed
        listed = of_operators.get(operator)
        if listed is None:
            listed = {}
            with suppress(FileNotFoundError, NotADirectoryError):
                for name in sorted(os.listdir(self._place(operator))):
                    request, _, rest = name.partition(".")
                    toolchain, _, suffix = rest.partition(".")
                    if suffix == "json" and request:
                        listed.setdefault(request, []).append(toolchain)
            listed = of_operators.setdefault(operator, listed)
        return listed

    def has(self, operator: str) -> bool:
        """Whether there is any file of this operator."""
        return self._memory.has(operator) or bool(self._list(operator))

    def refresh(self) -> None:
        """Forget what was listed and read, so that what others wrote since is seen."""
        self._listed, self._parsed = {}, {}

    def find(self, question: Question, bucket: tuple[int, ...]) -> Record | None:
        """The record of a key, or None. On a host without a toolchain any toolchain's record serves. Raises Rejected
        (also when asked again) or OSError."""
        kept = self._memory.find(question, bucket)
        if kept is not None:
            return kept
        key = question.key(bucket)
        request, toolchain = _names(key)
        toolchains = self._list(question.operator).get(request, ())
        if question.toolchain is None:
            for other in toolchains:
                return self._read(question.operator, request, other, None, key.request)
            return None
        return self._read(question.operator, request, toolchain, key, None) if toolchain in toolchains else None

    def _read(self, operator: str, request: str, toolchain: str, key: Key | None, full: str | None) -> Record | None:
        name = f"{request}.{toolchain}.json"
        parsed = self._parsed
        known = parsed.get((operator, name))
        if known is None:
            change = self._changes.get((operator, name))
            try:
                text = _read_file(self._place(operator) / name)
                known = parse(text, key, full, self.name)
            except FileNotFoundError:
                return None  # removed since it was listed
            except Rejected as error:
                known = error
            if len(parsed) >= _PARSED_KEPT:
                parsed.clear()
            parsed[operator, name] = known
            if self._changes.get((operator, name)) is not change:
                parsed.pop((operator, name), None)  # published while it was read
        if isinstance(known, Rejected):
            raise known
        return known

    def publish(self, record: Record) -> bool:
        """Keep a record, over one of the same key, unless that one is complete and this one is not. Answers whether it
        was written; where that fails, it is kept for this process."""
        try:
            if record.complete or not self._is_complete(record):
                self._write(record)
            return True
        except OSError as error:
            log.warning("tuning records cannot be written to %s: %s; kept in memory", self.name, error)
            self._memory.publish(record)
            return False

    def _is_complete(self, record: Record) -> bool:
        try:
            path = self._place(record.operator) / ".".join((*_names(record.key), "json"))
            return parse(_read_file(path), record.key).complete
        except (Rejected, FileNotFoundError):
            return False

    def _write(self, record: Record) -> None:
        request, toolchain = _names(record.key)
        place = self._place(record.operator)
        name = f"{request}.{toolchain}.json"
        step("folder")
        place.mkdir(parents=True, exist_ok=True)
        aside = place / f".{os.getpid()}-{uuid.uuid4().hex[:12]}"
        try:
            step("write")
            with open(aside, "xb") as file:
                file.write(record.to_bytes())
                file.flush()
                step("sync")
                os.fsync(file.fileno())
            step("rename")
            os.replace(aside, place / name)
        finally:
            with suppress(OSError):
                aside.unlink()
        step("sync folder")
        with suppress(OSError):
            sync(place)
        toolchains = self._list(record.operator).setdefault(request, [])
        if toolchain not in toolchains:
            toolchains.append(toolchain)
        self._changes[record.operator, name] = object()
        self._parsed.pop((record.operator, name), None)

    def files(self) -> Iterator[Path]:
        """Files of all records, whole or not."""
        yield from sorted((self.root / f"v{FORMAT}").glob("*/[0-9a-f]*.json"))

    def read_file(self, path: Path) -> Record:
        """The record in one of `files()`. Raises Rejected or OSError; "foreign" when its name is another key's."""
        record = parse(_read_file(path), origin=self.name)
        if path.name != ".".join((*_names(record.key), "json")) or path.parent.name != record.operator:
            raise Rejected("foreign", "it is the record of another key")
        return record

    def records(self) -> Iterator[Record]:
        """All records that can be read."""
        for path in self.files():
            with suppress(Rejected, OSError):
                yield self.read_file(path)

    def set_aside(self, path: Path) -> None:
        """Take a file out of sight; it is kept for a day beside the records."""
        os.replace(path, path.with_name(f".bad-{uuid.uuid4().hex[:12]}"))
        self.refresh()

    def remove_old(self, seconds: float = _ASIDE_KEPT_S) -> int:
        """Delete what dead writers left and what was set aside, once it is this old. Answers how many."""
        removed = 0
        for path in (self.root / f"v{FORMAT}").glob("*/.*"):
            with suppress(OSError):
                if time.time() - path.lstat().st_mtime > seconds:
                    path.unlink()
                    removed += 1
        return removed


_open: weakref.WeakValueDictionary[str, Folder] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()  # a thread that held it is not in this process


os.register_at_fork(after_in_child=_after_fork)


def _names(key: Key) -> tuple[str, str]:
    return key.request[:40], key.key[:16]


def _read_file(path: Path) -> bytes:
    """A plain file's bytes, no more than one above the limit; never waits for a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        parts, size = [], 0
        while size <= LARGEST and (part := os.read(descriptor, LARGEST + 1 - size)):
            parts.append(part)
            size += len(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)
