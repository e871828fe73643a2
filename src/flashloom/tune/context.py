"""`with fl.autotune(...)`: whose records plans read, where new ones go, and whether a plan tunes what it lacks."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from flashloom import records
from flashloom.attention import Attention, Batch, Reserve
from flashloom.records import Counters, Folder, Layer, Scope
from flashloom.records import scope as scopes
from flashloom.tune.attention import AttentionOperator, NothingToTune
from flashloom.tune.report import Report
from flashloom.tune.tuner import forbidden, seconds_of, tune

__all__ = ["autotune"]

log = logging.getLogger("flashloom")
_tuning = threading.Lock()  # measurements beside each other measure each other


class autotune:
    """A context for this thread or task: plans made in it take their configs from `cache`, then from `layers`, then
    from the contexts around it, and last from packs in use and the user's own records.

    tune: a plan of a shape that has no record tunes it first, never while sealed, capturing or compiling. cache: the
    folder for new records; without one they go to that of the context around it. layers: folders that are only read.
    budget: seconds ("30s") for all tuning in this context. isolate, group: as for `fl.tune`.

    Contexts nest in any way, the same folder included; leaving one, also by an exception, restores what was before, and
    nothing is ever taken from an outer one. A plan keeps the records of the context it was made in.

        with fl.autotune(tune=False, cache="/image/tuned"):
            with fl.autotune(cache="/var/cache/mine") as session:
                plan = attn.plan(batch)
        session.counters, session.missed, session.report
    """

    def __init__(
        self,
        tune: bool = True,
        cache: str | os.PathLike[str] | None = None,
        *,
        layers: Iterable[str | os.PathLike[str] | Layer] = (),
        budget: float | str | None = None,
        isolate: bool | None = None,
        group: Any = None,
    ) -> None:
        self._tune = bool(tune)
        self._cache = cache
        self._layers = [Folder.at(one) if isinstance(one, (str, os.PathLike)) else one for one in layers]
        self._seconds = seconds_of(budget)
        self._isolate, self._group = isolate, group
        self._scopes: list[Scope] = []
        self._seen: set[Any] = set()
        self.report = Report()
        self.refused: str | None = None
        """Why a shape was not tuned when it could have been, such as "sealed"."""

    def __enter__(self) -> autotune:
        writable = None if self._cache is None else Folder.at(self._cache)
        own = (*([writable] if writable is not None else []), *self._layers)
        scope = Scope(own, writable, scopes._current.get(), self._before_plan if self._tune else None)
        self._scopes.append(scope)
        scopes._current.set(scope)
        return self

    def __exit__(self, *error: object) -> None:
        left = scopes._current.get()
        assert left is not None
        scopes._current.set(left.outer)  # each thread's own: several may be in one context

    @property
    def scope(self) -> Scope:
        """What it put in force last."""
        return self._scopes[-1]

    @property
    def counters(self) -> Counters:
        """Of look-ups in this context."""
        return self.scope.counters

    @property
    def missed(self) -> list[tuple[str, dict[str, int]]]:
        """Shapes that were planned and have no record: operator with what it computes, and bucket."""
        return [(name, dict(bucket)) for name, bucket in tuple(self.scope.missed)]

    def refresh(self) -> None:
        """See what other processes wrote since this context, or an outer one, first looked."""
        self.scope.refresh()

    def _before_plan(self, attention: Attention, batch: Batch, reserve: Reserve | None) -> None:
        try:
            operator = AttentionOperator(attention, reserve)
            key = operator.question(batch)
        except NothingToTune:
            return
        if self._is_settled(key, attention):
            return
        with _tuning:
            if self._is_settled(key, attention):  # by another thread, or it has used up the budget
                return
            start = time.monotonic()
            seconds = None if self._seconds == float("inf") else self._seconds
            done = tune(
                attention, [batch], seconds, reserve=reserve, isolate=self._isolate, group=self._group, progress=False
            )
            self._seconds -= time.monotonic() - start
            self._seen.add(key)
            self.report.outcomes += done.outcomes
            self.report.errors += done.errors
            self.report.seconds += done.seconds
        records.published()

    def _is_settled(self, key: tuple[Any, ...], attention: Attention) -> bool:
        """Whether there is nothing to tune: it is known, or may not be tuned now."""
        if key in self._seen:
            return True
        found = None if self._group is not None else self.scope.record(*key)  # a group is told even of what is known
        if found is not None and found.complete:
            self._seen.add(key)
            return True
        why = forbidden(attention.device)
        if why is None and self._seconds <= 0:
            why = "the budget is used up"
        if why is not None:
            if self.refused is None:
                log.warning("flashloom: shapes without a record are not tuned: %s", why)
            self.refused = why
        return why is not None
