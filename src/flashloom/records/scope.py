"""Which records are asked, and where new ones go: a stack of scopes, one for each context that was entered.

A scope asks its own layers and then those of the scope around it. It is found through a context variable: threads and
tasks have their own, an exception restores the outer one, and nothing is ever taken from an outer scope. Under all of
them lies the base: the user's own folder and the packs in use, which other threads see too.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flashloom import settings
from flashloom.dataclass import dataclass
from flashloom.records.bundle import Bundle
from flashloom.records.folder import Folder, Layer, Memory
from flashloom.records.question import Question
from flashloom.records.record import Record, Rejected, parse
from flashloom.settings import Settings
from flashloom.store import pack as packs
from flashloom.store.pack import PackFile
from flashloom.store.store import default_folder

__all__ = [
    "Counters",
    "Scope",
    "add_layer",
    "base",
    "current",
    "default_root",
    "entered",
    "find",
    "forget",
    "published",
]

log = logging.getLogger("flashloom")
_KEPT = 16384  # answers remembered per scope; shapes reported as missed


@dataclass()
class Counters:
    """What look-ups met. The middle four are misses of one layer; what a layer below has serves then, or the
    default."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    """Files that are damaged or cannot be read."""
    foreign: int = 0
    """Files that are the record of another key."""
    outdated: int = 0
    """Files of another format."""
    invalid: int = 0
    """Records whose config is none that the operator offers now."""
    unpublished: int = 0
    """Records that could not be written; this process keeps them in memory."""


class Scope:
    """Layers to ask, the innermost first, then those of the scope around it (outside of all, the base's).

    writable: where new records go; that of the scope around it unless given. tuner: called with what is about to be
    planned, in a scope that tunes. counters: of look-ups through this scope.
    """

    def __init__(
        self,
        own: tuple[Layer, ...] = (),
        writable: Folder | Memory | None = None,
        outer: Scope | None = None,
        tuner: Callable[..., None] | None = None,
        *,
        is_base: bool = False,
    ) -> None:
        self.own, self.outer, self.tuner, self._is_base = own, outer, tuner, is_base
        self.counters = Counters()
        self.missed: dict[tuple[str, tuple[tuple[str, int], ...]], None] = {}
        self._given = writable
        self._renew()

    @property
    def writable(self) -> Folder | Memory:
        """Where new records go."""
        return self._given or (self.outer or base()).writable

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in the order in which they are asked."""
        return self.own if self._is_base else (*self.own, *(self.outer or base()).layers)

    def find(self, question: Question, bucket: tuple[int, ...]) -> Any:
        """The config that answers, as the operator reads it, or None. No file is read for what was asked before."""
        if self._generation is not _generation:
            self._renew()
        memo = self._memo  # what is looked up before a change must not go into the memo that follows it
        try:
            found = memo[question, bucket]
        except KeyError:
            found = self._look(question, bucket, memo)
        if found is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
        return found

    def record(self, question: Question, bucket: tuple[int, ...]) -> Record | None:
        """The record that answers, with all that is known about it."""
        return next(self._answers(question, bucket), None)

    def has(self, operator: str) -> bool:
        """Whether a look-up is worth preparing: within a context it is, for what is missed is listed; outside of all it
        is where any layer has a record of this operator."""
        if not self._is_base:
            return True
        if self._generation is not _generation:
            self._renew()
        known = self._any
        found = known.get(operator)
        if found is None:
            found = known[operator] = any(_has(layer, operator) for layer in self.layers)
        return found

    def publish(self, record: Record) -> bool:
        """Keep a record where new ones go. Answers whether it was written, or is kept by this process alone."""
        written = self.writable.publish(record)
        self.counters.unpublished += not written
        published()
        return written

    def refresh(self) -> None:
        """See what other processes wrote since."""
        for layer in self.layers:
            layer.refresh()
        published()

    def _renew(self) -> None:
        now = _generation
        self._memo: dict[tuple[Question, tuple[int, ...]], Any] = {}
        self._any: dict[str, bool] = {}
        self._generation = now  # last: a thread that sees it sees the new memo

    def _look(self, question: Question, bucket: tuple[int, ...], memo: dict[Any, Any]) -> Any:
        record = self.record(question, bucket)
        found = None if record is None else question.read(record.config)
        if len(memo) >= _KEPT:
            memo.clear()
        memo[question, bucket] = found
        if found is None and len(self.missed) < _KEPT:
            self.missed[f"{question.operator} {question.label}".strip(), tuple(zip(question.sizes, bucket))] = None
        return found

    def _answers(self, question: Question, bucket: tuple[int, ...]) -> Iterator[Record]:
        """Records that answer, the innermost layer's first; what is wrong with others is counted."""
        for layer in self.layers:
            try:
                record = layer.find(question, bucket)
                if record is not None:
                    question.read(record.config)
                    yield record
            except Rejected as error:
                self._reject(error.kind, layer, error)
            except OSError as error:
                self._reject("corrupt", layer, error)
            except (ValueError, TypeError, KeyError) as error:
                self._reject("invalid", layer, error)

    def _reject(self, kind: str, layer: Layer, error: Exception) -> None:
        setattr(self.counters, kind, getattr(self.counters, kind) + 1)
        log.warning("a tuning record in %s is not used (%s): %s", layer.name, kind, error)


_generation = object()  # another one for each change: threads that change at once cannot undo a count
_added: dict[str, Layer] = {}
_base: tuple[Settings, Scope] | None = None
_changing = threading.RLock()  # held where the base is made or its layers change
_current: ContextVar[Scope | None] = ContextVar("flashloom_records", default=None)


def published() -> None:
    """Make every scope ask its layers again."""
    global _generation
    _generation = object()


def default_root() -> Path | None:
    """Where records go without a context: `tuning` in the store's folder, None where there is none."""
    try:
        return default_folder().root / "tuning"
    except RuntimeError:
        return None


def base() -> Scope:
    """The scope outside of every context: packs in use, then the user's folder."""
    global _base
    now, made = settings.get(), _base
    if made is None or made[0] is not now:
        with _changing:
            made = _base
            if made is None or made[0] is not now:
                root = default_root()
                own: Folder | Memory = Memory() if root is None else Folder.at(root)
                made = _base = (now, Scope((*reversed(_added.values()), own), own, is_base=True))
                published()
    return made[1]


def current() -> Scope:
    """The scope in force for this thread or task."""
    return _current.get() or base()


def find(question: Question, bucket: tuple[int, ...]) -> Any:
    """The config that the scope in force has for a key, as the operator reads it, or None."""
    return (_current.get() or base()).find(question, bucket)


@contextmanager
def entered(scope: Scope) -> Iterator[Scope]:
    """Put a scope in force for this thread or task."""
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def add_layer(layer: Layer) -> None:
    """Ask this layer before the user's folder, in every thread: the records of a pack in use."""
    with _changing:
        _added.pop(layer.name, None)
        _added[layer.name] = layer
        forget()


def take_pack(pack: PackFile) -> None:
    """Ask the records of a pack in use. Those that are damaged are left out, with a warning."""
    whole = []
    for listed in pack.records:
        try:
            whole.append(parse(json.dumps(listed).encode(), origin=str(pack.path)))
        except Rejected as error:
            log.warning("a tuning record in the pack %s is not used: %s", pack.path, error)
    if whole:
        add_layer(Bundle(whole, str(pack.path)))


def forget() -> None:
    """Make the base anew and ask all layers again."""
    global _base
    with _changing:
        _base = None
        published()


def _has(layer: Layer, operator: str) -> bool:
    try:
        return layer.has(operator)
    except OSError:
        return False


def _after_fork() -> None:
    global _changing
    _changing = threading.RLock()  # a thread that held it is not in this process


os.register_at_fork(after_in_child=_after_fork)
packs.on_use.append(take_pack)
for _pack in packs.USED:
    take_pack(_pack)
