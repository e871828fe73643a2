"""The tuner on a toy operator: what wins, what is left out, what is remembered, and when it must not run."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.tune.toy import CostTimer, Sum, Way

import flashloom as fl
from flashloom import records, settings, store
from flashloom.records import Folder
from flashloom.store import store as store_module
from flashloom.tune import Operator, tuner
from flashloom.tune.measure import SESSIONS, Figure, Policy, Timer, decide, race
from flashloom.tune.tuner import seconds_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    monkeypatch.setattr(tuner, "Timer", CostTimer)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def statuses(outcome):
    return {t.config["name"]: t.status for t in outcome.record.tried}


def tuned(cache, operator, cases=(100,), **options):
    with fl.autotune(tune=False, cache=cache):
        return fl.tune(operator, cases, **options)


def test_the_toy_is_an_operator():
    assert isinstance(Sum(), Operator)


def test_the_fastest_right_candidate_wins(cache):
    report = tuned(cache, Sum(("fast", "slow", "faster", "wrong", "raises", "memory")))
    (outcome,) = report.outcomes
    assert outcome.status == "tuned"
    assert dict(outcome.record.config) == {"name": "faster"}
    assert statuses(outcome) == {
        "plain": "slower", "fast": "slower", "slow": "slower", "faster": "won", "wrong": "wrong", "raises": "failed",
        "memory": "memory",
    }  # fmt: skip
    assert outcome.record.speedup == pytest.approx(200 / 60, abs=1e-3)
    assert outcome.regret == pytest.approx(outcome.record.speedup - 1)
    assert outcome.record.policy == "eager, warm cache"
    assert "faster" in report.table()
    assert report.complete


def test_what_is_known_is_not_measured_again(cache, tmp_path):
    log = str(tmp_path / "log")
    tuned(cache, Sum(log=log))
    before = Path(log).read_text()
    report = tuned(cache, Sum(log=log))
    assert report.count("known") == 1
    assert Path(log).read_text() == before
    assert tuned(cache, Sum(log=log), again=True).count("tuned") == 1
    assert Path(log).read_text() != before


def test_cases_of_one_bucket_are_one_key(cache):
    report = tuned(cache, Sum(), (100, 120, 65, 128, 129))
    assert [outcome.shapes for outcome in report.outcomes] == [
        ("100 numbers", "120 numbers", "65 numbers"),
        ("129 numbers",),
    ]


def test_a_candidate_must_be_valid_for_all_cases_of_its_key(cache):
    (outcome,) = tuned(cache, Sum(("slow",)), (1000, 1024)).outcomes
    assert statuses(outcome) == {"plain": "won"}


def test_the_default_stays_unless_beaten_by_more_than_the_noise(cache):
    (outcome,) = tuned(cache, Sum(("fast", "slow"), cost={"fast": 199, "slow": 205})).outcomes
    assert dict(outcome.record.config) == {"name": "plain"}
    assert outcome.record.speedup == 1.0
    assert not outcome.record.tuned


def test_a_result_that_goes_wrong_later_does_not_win(cache):
    (outcome,) = tuned(cache, Sum(("flaky", "fast"))).outcomes
    assert statuses(outcome)["flaky"] == "wrong"
    assert dict(outcome.record.config) == {"name": "fast"}


def test_a_wrong_default_leaves_the_key(cache):
    class Broken(Sum):
        def default(self, n):
            return Way("wrong")

    (outcome,) = tuned(cache, Broken()).outcomes
    assert outcome.status == "left"
    assert "not right" in outcome.note
    assert not list(Folder(cache).files())


def test_a_candidate_that_kills_its_process_is_tried_apart_and_remembered(cache, tmp_path):
    ways = ("fast", "kills")
    (outcome,) = tuned(cache, Sum(ways)).outcomes
    assert statuses(outcome) == {"plain": "slower", "fast": "won", "kills": "killed"}
    killed = next(t for t in outcome.record.tried if t.status == "killed")
    assert "SIGSEGV" in killed.note
    log = tmp_path / "log"
    (outcome,) = tuned(cache, Sum(ways, log=str(log)), again=True).outcomes
    assert statuses(outcome)["kills"] == "killed"
    assert "kills" not in log.read_text(), "it is not even tried again"


KILLED = """
import sys
import flashloom as fl
from tests.tune.toy import Sum
with fl.autotune(tune=False, cache=sys.argv[1]):
    fl.tune(Sum(("kills", "fast")), [100], isolate=False)
"""


def test_what_killed_a_former_process_is_tried_in_a_child(cache):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache)], env=environment)
    assert done.returncode == -signal.SIGSEGV
    assert not list(Folder(cache).files())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sum, "dangerous", lambda self, config: False)
        (outcome,) = tuned(cache, Sum(("kills", "fast"))).outcomes
    assert statuses(outcome) == {"plain": "slower", "fast": "won", "kills": "killed"}
    assert not list(cache.glob("v1/*/.trying-*"))


def test_everything_in_a_child(cache):
    ways = ("fast", "raises", "kills", "wrong", "faster")
    (outcome,) = tuned(cache, Sum(ways), isolate=True).outcomes
    expected = {"fast": "slower", "raises": "failed", "kills": "killed", "wrong": "wrong", "faster": "won"}
    assert statuses(outcome) == {"plain": "slower", **expected}


def test_what_cannot_be_sent_to_a_child_is_left_out(cache):
    class Local(Sum):  # no other process can import it
        def __reduce__(self):
            return Local, (self.ways,)

    (outcome,) = tuned(cache, Local(("fast", "kills"))).outcomes
    assert statuses(outcome) == {"plain": "slower", "fast": "won", "kills": "skipped"}


def test_a_budget_ends_and_the_next_call_goes_on(cache, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: clock[0])
    trial = tuner.try_here

    compiled = set()

    def slow_trial(operator, config, cases):
        clock[0] += config not in compiled  # a second long, the first time
        compiled.add(config)
        return trial(operator, config, cases)

    monkeypatch.setattr(tuner, "try_here", slow_trial)
    operator = Sum(("fast", "slow", "raises", "faster"))
    (first,) = tuned(cache, operator, budget=3.5).outcomes
    assert not first.record.complete
    assert dict(first.record.config) == {"name": "fast"}
    assert "untried" in first.note
    (second,) = tuned(cache, operator).outcomes
    assert second.record.complete
    assert dict(second.record.config) == {"name": "faster"}
    assert set(statuses(second)) == {"plain", "fast", "slow", "raises", "faster"}


def test_without_time_what_is_known_is_answered_and_the_rest_left(cache):
    tuned(cache, Sum())
    known, left = tuned(cache, Sum(), (100, 300), budget=1e-9).outcomes
    assert (known.status, left.status, left.note) == ("known", "left", "no time left")


def test_a_kernels_change_asks_anew(cache):
    tuned(cache, Sum())
    assert tuned(cache, Sum(kernel="2")).count("tuned") == 1
    assert tuned(cache, Sum()).count("known") == 1


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("2m", 120), ("1.5h", 5400), ("500ms", 0.5), (3, 3)])
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", 0, "0s", "3 days", True])
def test_budgets_that_are_none(text):
    with pytest.raises(ValueError, match="budget="):
        seconds_of(text)


def test_it_is_never_done_while_sealed(cache, monkeypatch):
    monkeypatch.setattr(store_module, "_state", store_module._State())
    store.seal()
    with pytest.raises(RuntimeError, match="sealed"):
        tuned(cache, Sum())


def test_it_is_never_done_while_sealed_by_the_environment(cache, monkeypatch):
    monkeypatch.setattr(settings, "_current", settings.Settings(sealed=True))
    with pytest.raises(RuntimeError, match="SEALED"):
        tuned(cache, Sum())


def test_it_is_never_done_inside_compile(cache, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        tuned(cache, Sum())


def test_it_is_never_done_while_capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in tuner.forbidden(torch.device("cuda"))
    assert tuner.forbidden(torch.device("cpu")) is None


def test_other_things_cannot_be_tuned(cache):
    with pytest.raises(TypeError, match="str cannot be tuned"):
        tuned(cache, "attention")


# --- measuring ---


class Scripted:
    """A timer whose samples are given: name -> function of the round."""

    def __init__(self, times):
        self.times, self.counts = times, {}

    def repeats(self, call):
        return 1

    def sample(self, call, repeats):
        i = self.counts[call] = self.counts.get(call, -1) + 1
        return self.times[call](i)


def raced(**times):
    figures, noise = race(Scripted(times), {name: [name] for name in times}, "default")
    return decide([(figures, noise)], "default"), figures, noise


def test_drift_of_the_machine_cancels():
    drift = [1 + 0.5 * (i % 7) for i in range(100)]
    assert raced(default=lambda i: 1.0, a=lambda i: 0.9)[0] == "a"
    winner, figures, _ = raced(default=lambda i: drift[i // 2], a=lambda i: 0.8 * drift[i])
    assert winner == "a"
    assert figures["a"].ratio == pytest.approx(0.8, abs=0.02)


def test_noise_larger_than_the_gain_keeps_the_default():
    noisy = [1.0, 1.3, 0.8, 1.2, 0.9, 1.25, 0.75] * 20
    assert raced(default=lambda i: noisy[i], a=lambda i: 0.97 * noisy[(i * 3) % 90])[0] == "default"


def test_a_single_lucky_sample_does_not_win():
    assert raced(default=lambda i: 1.0, a=lambda i: 0.1 if i in (0, 9) else 1.0)[0] == "default"


def test_of_equals_the_first_wins():
    assert raced(default=lambda i: 1.0, a=lambda i: 0.8, b=lambda i: 0.799)[0] == "a"
    assert decide([({"d": Figure(1, 0, 1, 0, 1), "a": Figure(0.99, 0, 0.99, 0, 0.99)}, 0.0)], "d") == "d"


def test_a_winner_must_win_in_every_session():
    def session(a, b=0.95, noise=0.01):
        figures = {"d": 1.0, "a": a, "b": b}
        return {name: Figure(1e-5 * x, 0.0, x, 0.001, x) for name, x in figures.items()}, noise

    assert decide([session(0.8), session(0.82), session(0.79)], "d") == "a"
    assert decide([session(0.8), session(0.99), session(0.79)], "d") == "b"
    assert decide([session(0.8, 1.0), session(0.99, 1.0), session(0.79, 1.0)], "d") == "d"
    assert decide([session(0.8, 1.0), session(0.8, 1.0, noise=0.3), session(0.8, 1.0)], "d") == "d"


class Lucky(Sum):
    """One candidate is fast where its first inputs lie, and no faster than the default elsewhere; or the machine is
    so busy that the default differs from itself."""

    luck, busy = 1, 0.0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.made, self.draw = 0, random.Random(3)

    def inputs(self, n):
        self.made += 1
        return super().inputs(n)

    def run(self, config, n, inputs):
        call = super().run(config, n, inputs)
        if config.name == "fast" and self.made > self.luck:
            call.seconds = self.cost["plain"] * 1e-6
        return _Jittery(call, self.busy, self.draw)


class _Jittery:
    def __init__(self, call, busy, draw):
        self.call, self.busy, self.draw, self.base = call, busy, draw, call.seconds

    def __call__(self):
        self.call()

    @property
    def seconds(self):
        return self.base * (1 + self.busy * self.draw.random())


def test_luck_in_one_session_changes_nothing(cache):
    (outcome,) = tuned(cache, Lucky(("fast",))).outcomes
    assert not outcome.record.tuned
    assert outcome.record.complete
    assert statuses(outcome) == {"plain": "won", "fast": "slower"}
    operator = Lucky(("fast",))
    operator.luck = 100
    (outcome,) = tuned(cache, operator, again=True).outcomes
    assert dict(outcome.record.config) == {"name": "fast"}
    assert operator.made == SESSIONS, "each session has inputs of its own"


def test_a_machine_too_busy_to_tell_is_said_and_tried_again(cache):
    operator = Lucky(("fast",), cost={"fast": 190})
    operator.luck, operator.busy = 100, 2.0
    report = tuned(cache, operator)
    (outcome,) = report.outcomes
    assert not outcome.record.tuned
    assert not outcome.record.complete
    assert "too busy to tell: the default differed from itself by" in outcome.note
    assert "too busy to tell" in str(report)
    operator.busy = 0.0
    (outcome,) = tuned(cache, operator).outcomes  # not `again`: it was left open
    assert dict(outcome.record.config) == {"name": "fast"}
    assert outcome.record.complete


def test_a_winner_without_time_to_repeat_it_waits_for_the_next_call(cache, monkeypatch):
    def until_late(*arguments):
        found = race(*arguments)
        late = SimpleNamespace(monotonic=lambda: math.inf, strftime=time.strftime, gmtime=time.gmtime)
        monkeypatch.setattr(tuner, "time", late)
        return found

    monkeypatch.setattr(tuner, "race", until_late)
    (outcome,) = tuned(cache, Sum(), budget=1000).outcomes
    assert "no time left to repeat what won" in outcome.note
    assert not outcome.record.tuned
    monkeypatch.setattr(tuner, "time", time)
    monkeypatch.setattr(tuner, "race", race)
    (outcome,) = tuned(cache, Sum()).outcomes
    assert dict(outcome.record.config) == {"name": "fast"}


def test_cold_caches_are_a_policy():
    timer = Timer(torch.device("cpu"), Policy(graph=False, cold=True))
    assert 0 < timer.sample(lambda: None, 3) < 60
    assert str(timer.policy) == "eager, cold cache"


def test_the_user_folder_serves_without_a_context(tmp_path):
    report = fl.tune(Sum(), [100])
    assert report.outcomes[0].record is not None
    assert list(Folder(tmp_path / "default").files())
    question, bucket = Sum().question(100)
    assert records.find(question, bucket) == Way("fast")
