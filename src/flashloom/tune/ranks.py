"""Many ranks tune as one: who knows a key offers its record, who does not claims the work, and all take one answer.

Ranks talk through the key-value store of their process group and never enter a collective, so whoever dies, comes late,
has other shapes or another cache keeps nobody waiting: each rank says that it is alive and getting on, and work of one
that no longer does is claimed by another. The first answer to a key stands, for all.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from flashloom import store
from flashloom.errors import FlashloomError
from flashloom.records import Record, Rejected, Scope, parse
from flashloom.tune.progress import Progress
from flashloom.tune.report import Outcome, Report
from flashloom.tune.tuner import Job, Options, known, tune_key

__all__ = ["Ranks", "tune_together"]

NONE = b"-"  # the answer of a rank that tuned a key and found nothing: the default serves everywhere
_BEAT_S, _POLL_S = 0.25, 0.02
log = logging.getLogger("flashloom")
_counts: dict[tuple[str, int], int] = {}


@dataclass(frozen=True)
class Ranks:
    """Who tunes together. group: a process group, None for the default one; or, without torch.distributed, a `store`
    (any torch.distributed.Store) with this process' `rank` and the `size`.

    patience: seconds until a rank that was never heard of counts as gone; dead_after: the same for one that fell
    silent; stuck_after: for one that says it lives and does not get on.
    """

    group: Any = None
    store: Any = None
    rank: int | None = None
    size: int | None = None
    patience: float = 60.0
    dead_after: float = 15.0
    stuck_after: float = 600.0

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """From what `group=` takes: Ranks, a process group, or True for the default one."""
        return group if isinstance(group, Ranks) else cls(None if group is True else group)


class Gone(FlashloomError, RuntimeError):
    """The store does not answer: the process that held it is gone."""


class _Board:
    """One round of tuning on the store."""

    def __init__(self, who: Ranks) -> None:
        if who.store is not None:
            if who.rank is None or who.size is None:
                raise ValueError("Ranks(store=) needs rank= and size= too")
            self.rank, self.ranks, base = who.rank, list(range(who.size)), who.store
        else:
            if not (dist.is_available() and dist.is_initialized()):
                raise RuntimeError(
                    "group= needs torch.distributed: call init_process_group first, or give Ranks(store=)"
                )
            self.rank = dist.get_rank()
            self.ranks = dist.get_process_group_ranks(who.group or dist.group.WORLD)
            base = dist.distributed_c10d._get_default_store()
        if self.rank not in self.ranks:
            raise ValueError(f"rank {self.rank} is none of the group's ranks {self.ranks}")
        self.who = who
        team = store.digest(self.ranks)[:12]
        number = _counts[team, self.rank] = _counts.get((team, self.rank), -1) + 1  # ranks may be threads
        self._store = dist.PrefixStore(f"flashloom/{team}/{number}", base)
        self._heard: dict[int, tuple[int, float]] = {}
        self._begun = self._looked = self._now = self._moved = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="flashloom-ranks", daemon=True)

    def __enter__(self) -> _Board:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def moved(self) -> None:
        """This rank is getting on."""
        self._moved = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_S):
            if time.monotonic() - self._moved < self.who.stuck_after:
                with suppress(Gone):
                    self._do("add", f"beat/{self.rank}", 1)

    def _do(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, name)(*arguments)
        except RuntimeError as error:  # torch's DistError among them
            raise Gone(str(error).splitlines()[0]) from error

    def put(self, name: str, value: Mapping[str, Any]) -> None:
        self._do("set", name, json.dumps(value))

    def get(self, name: str) -> bytes | None:
        """A value, or None. Never waits for one, since that would keep the beat from the store."""
        return self._do("get", name) if self._do("check", [name]) else None

    def alive(self, rank: int) -> bool:
        """Whether a rank was heard of lately."""
        now = self.clock()
        count = int(self._do("add", f"beat/{rank}", 0))
        before, since = self._heard.get(rank, (-1, self._begun))
        if count != before:
            self._heard[rank] = (count, now)
            if count or before >= 0:
                return True
            self._heard[rank] = (count, self._begun)
        limit = self.who.dead_after if count else self.who.patience
        return now - (since if count == before else self._begun) < limit

    def clock(self) -> float:
        """A clock that goes while this process does: a machine that stood still is no rank's silence."""
        now = time.monotonic()
        self._now += min(now - self._looked, _BEAT_S)
        self._looked = now
        return self._now

    def tables(self, name: str) -> dict[int, dict[str, Any]]:
        """What each rank put under `name/rank`; those that are gone are left out."""
        found: dict[int, dict[str, Any]] = {}
        waiting = list(self.ranks)
        while waiting:
            for rank in list(waiting):
                text = self.get(f"{name}/{rank}")
                if text is not None:
                    found[rank] = json.loads(text)
                if text is not None or not self.alive(rank):
                    waiting.remove(rank)
            if waiting:
                self.moved()
                time.sleep(_POLL_S)
        return found

    def answer(self, key: str) -> bytes | None:
        return self.get(f"answer/{key}")

    def offer(self, key: str, text: bytes) -> None:
        """Answer a key, unless it is answered."""
        self._do("compare_set", f"answer/{key}", "", text.decode())

    def claim(self, key: str, turn: int) -> bool:
        """Whether the work on a key is this rank's, in this turn."""
        if int(self._do("add", f"claim/{key}/{turn}", 1)) != 1:
            return False
        self._do("set", f"owner/{key}/{turn}", str(self.rank))
        return True

    def owner(self, key: str, turn: int) -> int | None:
        text = self.get(f"owner/{key}/{turn}")
        return None if text is None else int(text)


class _Watched(Progress):
    """A bar that also says to the others that work goes on."""

    def __init__(self, bar: Progress, board: _Board) -> None:
        super().__init__(False, 0)
        self._inner, self._board = bar, board

    def say(self, job: Any, what: str) -> None:
        self._board.moved()
        self._inner.say(job, what)

    def tick(self) -> None:
        self._board.moved()
        self._inner.tick()

    def done(self, job: Any, status: str) -> None:
        self._board.moved()
        self._inner.done(job, status)


def tune_together(
    jobs: Sequence[Job], scope: Scope, deadline: float, options: Options, bar: Progress, group: Any, report: Report
) -> None:
    """`tune` for this rank's jobs, together with the other ranks of the group; see `fl.tune`."""
    board = _Board(Ranks.of(group))
    outcomes: dict[str, Outcome] = {}
    with board:
        try:
            _work(board, jobs, scope, deadline, options, _Watched(bar, board), outcomes, report)
        except Gone as error:
            report.errors.append(f"rank {board.rank}: the store of the process group is gone ({error})")
            log.warning("flashloom: %s", report.errors[-1])
    scope.refresh()
    for job in jobs:
        if job.name not in outcomes:
            found = known(job, scope, Options())
            outcomes[job.name] = (
                Outcome(job.question.label, job.shapes, "known", found)
                if found is not None
                else job.left(f"rank {board.rank} could not agree on it with the others: the default serves")
            )
    report.outcomes += [outcomes[job.name] for job in jobs]


def _work(
    board: _Board, jobs: Sequence[Job], scope: Scope, deadline: float, options: Options, bar: Progress,
    outcomes: dict[str, Outcome], report: Report,
) -> None:  # fmt: skip
    mine = {job.name: job for job in jobs}
    hits = {name: found for name, job in mine.items() if (found := known(job, scope, options)) is not None}
    for name, record in hits.items():
        board.offer(name, record.to_bytes())
    board.put(f"keys/{board.rank}", {name: name in hits for name in mine})
    tables = board.tables("keys")
    gone = sorted(set(board.ranks) - set(tables))
    if gone:
        report.errors.append(f"rank {board.rank}: nothing was heard of ranks {gone}; going on without them")
        log.warning("flashloom: %s", report.errors[-1])

    # who knows a key has answered it before its table was put; the rest is shared out, each rank beginning elsewhere
    names = list(mine)
    first = board.ranks.index(board.rank) * len(names) // len(board.ranks)
    turns = dict.fromkeys(names, 0)
    waited: dict[tuple[str, int], float] = {}
    tuned: dict[str, Outcome] = {}
    left = names[first:] + names[:first]
    while left:
        for name in list(left):
            text = board.answer(name)
            if text is not None:
                outcomes[name] = _take(mine[name], text, scope, hits.get(name), tuned.get(name))
                left.remove(name)
            elif board.claim(name, turns[name]):
                outcome = tuned[name] = tune_key(mine[name], scope, _share(deadline, len(left)), options, bar)
                board.offer(name, NONE if outcome.record is None else outcome.record.to_bytes())
            else:
                owner = board.owner(name, turns[name])
                since = waited.setdefault((name, turns[name]), board.clock())
                silent = board.clock() - since > board.who.dead_after if owner is None else not board.alive(owner)
                if silent:
                    log.warning("flashloom: rank %s is gone, its work on %s is taken over", owner, mine[name].shapes[0])
                    turns[name] += 1
        board.moved()
        if left:
            time.sleep(_POLL_S)

    board.put(f"done/{board.rank}", {name: _config_digest(outcome) for name, outcome in outcomes.items()})
    for rank, theirs in board.tables("done").items():
        differ = [
            mine[name].shapes[0] for name in theirs if name in mine and theirs[name] != _config_digest(outcomes[name])
        ]
        if differ:
            report.errors.append(f"rank {board.rank}: rank {rank} has other configs for {', '.join(differ)}")


def _share(deadline: float, keys: int) -> float:
    """Until when one of so many keys may be tuned."""
    now = time.monotonic()
    return deadline if math.isinf(deadline) else now + (deadline - now) / keys


def _take(job: Job, text: bytes, scope: Scope, own: Record | None, tuned: Outcome | None) -> Outcome:
    """The group's answer, which becomes this rank's record too."""
    if tuned is not None and tuned.record is not None and tuned.record.to_bytes() == text:
        return tuned
    if text == NONE:
        return job.left("no rank found an answer: the default serves")
    try:
        record = parse(text, job.question.key(job.bucket))
        job.question.read(record.config)
    except (Rejected, ValueError, TypeError, KeyError) as error:
        return job.left(f"the answer of another rank cannot be used: {error}")
    present = scope.record(job.question, job.bucket)
    if present is None or dict(present.config) != dict(record.config) or present.complete < record.complete:
        scope.publish(record)
    status = "known" if own is not None and dict(own.config) == dict(record.config) else "taken"
    return Outcome(job.question.label, job.shapes, status, record)


def _config_digest(outcome: Outcome) -> str:
    return "default" if outcome.record is None else store.digest(dict(outcome.record.config))
