"""`tune`: for each key that a batch falls under, try the candidates, time those whose results are right, keep the
winner. A key that is done is published at once, so a tuning that ends early goes on where it was."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from flashloom import records, store
from flashloom.attention import Attention, Batch, Reserve
from flashloom.bench.machine import cpu_name
from flashloom.records import Folder, Question, Record, Scope, Tried
from flashloom.tune.attention import AttentionOperator, NothingToTune, batch_of
from flashloom.tune.measure import BUSY, FINALISTS, SESSIONS, Policy, Session, Timer, agree, decide, race, rerun
from flashloom.tune.operator import Config, Operator
from flashloom.tune.progress import Progress
from flashloom.tune.report import Outcome, Report
from flashloom.tune.trial import Children, Markers, spoil, try_here

__all__ = ["Job", "Options", "forbidden", "jobs_of", "seconds_of", "tune", "tune_key"]

CASES = 3  # batches that are timed for one key
FINAL = ("wrong", "failed", "memory", "killed")  # a candidate that ended so is not tried again
log = logging.getLogger("flashloom")


@dataclass(frozen=True)
class Options:
    """isolate: try every candidate in a child process first (True), none (False), or those that its operator calls
    dangerous and those that a process died of (None). again: also what is known. policy: how to time, None for as
    deployed."""

    isolate: bool | None = None
    again: bool = False
    policy: Policy | None = None


@dataclass
class Job:
    """One key to tune, with the cases that fall under it."""

    operator: Operator
    question: Question
    bucket: tuple[int, ...]
    cases: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Which key it is, on every rank and in every process."""
        return self.question.key(self.bucket).key

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(self.operator.describe(case) for case in self.cases)

    def left(self, note: str) -> Outcome:
        return Outcome(self.question.label, self.shapes, "left", None, note)


def seconds_of(budget: float | str | None) -> float:
    """A budget in seconds: a number, or text such as "30s", "2m", "1.5h", "500ms"; None for no limit. Raises ValueError
    for another text or what is not above 0."""
    if budget is None:
        return math.inf
    if type(budget) in (int, float) and float(budget) > 0:
        return float(budget)
    units = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h|)\s*", str(budget))
    if not found or not float(found[1]) > 0:
        raise ValueError(f'budget={budget!r}: give seconds above 0, or text such as "30s", "2m" or "500ms"')
    return float(found[1]) * units[found[2]]


def forbidden(device: torch.device) -> str | None:
    """Why nothing may be tuned now, or None."""
    if store.is_sealed():
        return "sealed: fl.seal() or FLASHLOOM_SEALED says that this process serves"
    if torch.compiler.is_compiling():
        return "inside torch.compile"
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def tune(
    target: Attention | Operator | Sequence[Attention | Operator],
    batches: Iterable[Any],
    budget: float | str | None = None,
    *,
    reserve: Reserve | None = None,
    again: bool = False,
    isolate: bool | None = None,
    policy: Policy | None = None,
    progress: bool | None = None,
    group: Any = None,
) -> Report:
    """Find the fastest config for each of these batches, and keep it for all who look there later.

    target: an Attention, any `tune.Operator`, or several. batches: fl.Batch objects or workloads; those that share a
    bucket of shapes are one key. budget: seconds in all, or "30s", "2m"; what is done then is kept, and the next call
    goes on. reserve: that of the plans to come. again: measure also what is known. isolate: see below. progress: a bar
    on stderr, by default on a terminal. group: a torch.distributed process group, or True for the default one: its
    ranks share the work and take one result each (`tune/ranks.py`).

    Records go to the folder of the innermost `fl.autotune(cache=)`, or to the user's own. A candidate wins only if its
    result agrees with the reference, and if it beats the default by more than the noise; what fails, or is out of
    memory, is left out and remembered. Candidates on a GPU, and those that a former process died of, are tried in a
    child process first; isolate=True does so with all, False with none.

    Raises RuntimeError when sealed, inside torch.compile and while a graph is captured; ValueError for batches that
    only one kernel serves.
    """
    seconds = seconds_of(budget)
    start = time.monotonic()
    jobs = jobs_of(target, batches, reserve)
    for job in jobs:
        why = forbidden(job.operator.device)
        if why:
            raise RuntimeError(f"tuning is not possible now: {why}; tune before, or in a process of its own")
    scope, options = records.current(), Options(isolate, again, policy)
    report = Report()
    with Progress(progress, len(jobs)) as bar:
        if group is not None:
            from flashloom.tune.ranks import tune_together

            tune_together(jobs, scope, start + seconds, options, bar, group, report)
        else:
            report.outcomes += tune_keys(jobs, scope, start + seconds, options, bar)
    report.seconds = time.monotonic() - start
    return report


def jobs_of(target: Any, batches: Iterable[Any], reserve: Reserve | None = None) -> list[Job]:
    """Keys in the order of their first case."""
    targets = list(target) if isinstance(target, (list, tuple)) else [target]
    if isinstance(batches, (Batch, str)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is one {type(batches).__name__}: give a list of them, as in fl.tune(attn, [batch])")
    cases = list(batches)
    jobs: dict[tuple[Question, tuple[int, ...]], Job] = {}
    for one in targets:
        if isinstance(one, Attention):
            operator: Any = AttentionOperator(one, reserve)
            mine: list[Any] = [batch_of(case, one) for case in cases]
        elif isinstance(one, Operator):
            operator, mine = one, cases
        else:
            raise TypeError(f"{type(one).__name__} cannot be tuned: give an fl.Attention or a flashloom.tune.Operator")
        for case in mine:
            question, bucket = operator.question(case)
            job = jobs.setdefault((question, bucket), Job(operator, question, bucket))
            if len(job.cases) < CASES:
                job.cases.append(case)
    return list(jobs.values())


def known(job: Job, scope: Scope, options: Options) -> Record | None:
    """The record that makes tuning a key needless."""
    found = None if options.again else scope.record(job.question, job.bucket)
    return found if found is not None and found.complete else None


def tune_key(job: Job, scope: Scope, deadline: float, options: Options, bar: Progress) -> Outcome:
    """Tune one key, unless it is known, and publish what was found."""
    return tune_keys([job], scope, deadline, options, bar)[0]


def tune_keys(jobs: Sequence[Job], scope: Scope, deadline: float, options: Options, bar: Progress) -> list[Outcome]:
    """Tune those keys that are not known, and publish each as soon as it is done. What is dangerous is tried first, for
    all keys together; then each key has an even share of the time that is left."""
    outcomes: dict[int, Outcome] = {}
    searches: dict[int, _Search] = {}
    open_ = [job for job in jobs if known(job, scope, options) is None and time.monotonic() < deadline]
    with ThreadPoolExecutor(8, "flashloom-tune") as pool:  # defaults are compiled side by side
        begun = {job.name: pool.submit(_Search, job, scope, options) for job in open_}
    for i, job in enumerate(jobs):
        found = known(job, scope, options)
        if found is not None:
            outcomes[i] = Outcome(job.question.label, job.shapes, "known", found)
        elif job.name not in begun:
            outcomes[i] = job.left("no time left")
        else:
            try:
                searches[i] = begun[job.name].result()
                continue
            except NothingToTune as error:
                outcomes[i] = job.left(str(error))
        bar.done(job, outcomes[i].status)
    _try_apart(list(searches.values()), bar, deadline)
    for place, (i, search) in enumerate(searches.items()):
        now = time.monotonic()
        try:
            outcomes[i] = search.run(now + (deadline - now) / (len(searches) - place), bar)
        except (MemoryError, torch.OutOfMemoryError) as error:
            outcomes[i] = jobs[i].left(f"no memory for inputs: {str(error).splitlines()[0]}")
        bar.done(jobs[i], outcomes[i].status)
        if outcomes[i].record is not None:
            scope.publish(outcomes[i].record)  # type: ignore[arg-type]
    return [outcomes[i] for i in range(len(jobs))]


class _Search:
    """The search for one key's config. Raises NothingToTune."""

    def __init__(self, job: Job, scope: Scope, options: Options) -> None:
        operator, case = job.operator, job.cases[0]
        self.job, self.options = job, options
        self.default = operator.default(case)
        offered = [
            c for c in operator.candidates(case, self.default) if all(operator.valid(c, one) for one in job.cases)
        ]
        self.tried = _settled(scope.record(job.question, job.bucket), offered, options)
        self.waiting = [c for c in offered if c not in self.tried]
        folder = scope.writable if isinstance(scope.writable, Folder) else None
        self.markers = Markers(folder, job.question.key(job.bucket).request, job.question.operator)
        suspects = self.markers.suspects(self.waiting)
        self.apart = [c for c in self.waiting if options.isolate or c in suspects]
        if options.isolate is None:
            self.apart = [c for c in self.waiting if c in suspects or operator.dangerous(c)]
        self.here = [c for c in self.waiting if c not in self.apart]

    def came_back(self, config: Config, status: str, note: str) -> None:
        """What became of a candidate in a child process."""
        if status == "slower":
            self.here.append(config)
        else:
            self.tried[config] = Tried(config.to_json(), status, note=note)

    def run(self, deadline: float, bar: Progress) -> Outcome:
        """Try what is left to try, time what is right, and answer the record."""
        job, operator, default, tried = self.job, self.job.operator, self.default, self.tried
        together = [(each, operator.inputs(each)) for each in job.cases]
        status, note, default_calls = try_here(operator, default, together)
        if status != "slower":
            return job.left(f"the default's own result is not right ({status}: {note})")
        trial_deadline = time.monotonic() + 0.7 * (deadline - time.monotonic())  # the rest is for the race
        calls = {default: default_calls} | self._calls(together, trial_deadline, bar)
        untried = [c for c in self.waiting if c not in calls and c not in tried]

        policy = self.options.policy or Policy.of(operator.device)
        timer = Timer(operator.device, policy)
        ready: dict[Config, list[Callable[[], object]]] = {}
        for config, made in calls.items():
            try:
                ready[config] = [timer.ready(call) for call in made]
            except Exception as error:
                if config == default:
                    raise
                tried[config] = Tried(config.to_json(), "failed", note=f"when it was made ready: {error}"[:200])
        bar.say(job, f"timing {len(ready)} candidates")
        sessions = [race(timer, ready, default, bar.tick, deadline)]
        left = self._repeat(timer, sessions, deadline)
        winner = default if left else self._winner(sessions, calls, together)
        noise = max(noise for _, noise in sessions)
        if winner == default and noise > BUSY:
            left = f"the machine is too busy to tell: the default differed from itself by {noise:.0%}"
        gains = agree(sessions, default)
        for config, figure in sessions[0][0].items():
            if config not in tried and (config == winner or not left):  # who was not told apart is tried again
                won = "won" if config == winner else "slower"
                tried[config] = Tried(config.to_json(), won, round(figure.median * 1e6, 3), round(figure.spread, 4))
        record = Record(
            job.question.operator, job.question.fields, job.question.toolchain, job.question.sizes, job.bucket,
            winner.to_json(), default.to_json(),
            speedup=1.0 if winner == default else round(1 / gains[winner].ratio, 4), noise=round(noise, 4),
            tried=tuple(tried.values()), complete=not (untried or left), shapes=job.shapes, policy=str(policy),
            label=job.question.label, machine=_machine(operator.device),
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )  # fmt: skip
        self.markers.clear(list(tried))
        notes = [f"{len(untried)} candidates untried"] if untried else []
        return Outcome(job.question.label, job.shapes, "tuned", record, "; ".join([*notes, left] if left else notes))

    def _repeat(self, timer: Timer, sessions: list[Session[Config]], deadline: float) -> str:
        """Time those that won the first session in further ones, added to `sessions`, with inputs and plans made anew;
        answers what is left to be done where time ends."""
        operator, default = self.job.operator, self.default
        while len(sessions) < SESSIONS:
            won = agree(sessions, default)
            if not won:
                return ""
            if time.monotonic() >= deadline:
                return "no time left to repeat what won"
            best = sorted(won, key=lambda config: won[config].ratio)[:FINALISTS]
            together = [(case, operator.inputs(case)) for case in self.job.cases]
            ready = {}
            for config in [default, *(config for config in won if config in best)]:
                status, note, made = try_here(operator, config, together)
                if made:
                    ready[config] = [timer.ready(call) for call in made]
                elif config == default:
                    raise RuntimeError(f"the default's result was right and is not any more ({status}: {note})")
                else:
                    self.tried[config] = Tried(config.to_json(), status, note=note)
            sessions.append(rerun(timer, ready, default, deadline))
        return ""

    def _winner(
        self, sessions: list[Session[Config]], calls: dict[Config, list[Callable[[], object]]],
        together: Sequence[tuple[Any, Any]],
    ) -> Config:  # fmt: skip
        """Who won, its result checked once more: after all those runs it must still be right."""
        while True:
            winner = decide(sessions, self.default)
            if winner == self.default:
                return winner
            wrong = None
            for call, (case, inputs) in zip(calls[winner], together):
                spoil(inputs)
                call()
                wrong = wrong or self.job.operator.check(case, inputs)
            if wrong is None:
                return winner
            self.tried[winner] = Tried(winner.to_json(), "wrong", note=f"after many runs {wrong}")
            del sessions[0][0][winner]

    def _calls(
        self, together: Sequence[tuple[Any, Any]], deadline: float, bar: Progress
    ) -> dict[Config, list[Callable[[], object]]]:
        """Calls of the candidates whose results are right; what became of the others is added to `tried`."""
        operator = self.job.operator
        calls: dict[Config, list[Callable[[], object]]] = {}
        bar.say(self.job, f"trying {len(self.here)} candidates")
        fresh = [config for config in self.here if config not in self.apart]
        if fresh and math.isinf(deadline):
            operator.prepare(fresh, together[0][0])
        for i, config in enumerate(self.here):
            if time.monotonic() >= deadline and i:
                break
            with self.markers.trying(config):
                status, note, made = try_here(operator, config, together)
            if made:
                calls[config] = made
            else:
                self.tried[config] = Tried(config.to_json(), status, note=note)
            bar.tick()
        return calls


def _try_apart(searches: Sequence[_Search], bar: Progress, deadline: float) -> None:
    """Try in child processes what must not be tried here first; at most for two thirds of the time."""
    searches = [search for search in searches if search.apart]
    if not searches:
        return
    tasks = [(i, config) for i, search in enumerate(searches) for config in search.apart]
    bar.say(searches[0].job, f"trying {len(tasks)} candidates in child processes")
    now = time.monotonic()
    try:
        children = Children([(search.job.operator, search.job.cases) for search in searches])
        found = children.try_all(tasks, bar.tick, now + (deadline - now) * 2 / 3)
    except TypeError as error:
        log.warning("flashloom: candidates that may end the process are left out: %s", error)
        found = {task: ("skipped", str(error)) for task in tasks}
    for (i, config), (status, note) in found.items():
        searches[i].came_back(config, status, note)


def _settled(former: Record | None, offered: Sequence[Config], options: Options) -> dict[Config, Tried]:
    """Candidates that need not be tried again: what failed before, and where a former tuning ended early, what lost."""
    settled: dict[Config, Tried] = {}
    if former is None:
        return settled
    before = {store.digest(dict(t.config)): t for t in former.tried}
    lost = () if former.complete else ("slower",)
    for config in offered:
        one = before.get(store.digest(config.to_json()))
        if one is not None and (one.status == "killed" or (not options.again and one.status in (*FINAL, *lost))):
            settled[config] = one
    return settled


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()}"
