"""The timing loop: turns, counts and quantiles."""

import pytest

from flashloom.bench import timing
from flashloom.bench.timing import Timing, geomean, interleave


def test_interleave_takes_turns():
    order = []
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4, sample_time=0, warmup=1
    )
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(t.samples) for t in timings.values()] == [4, 4]


def test_interleave_repeats_short_calls(monkeypatch):
    now, count = [0.0], [0]

    def call():
        now[0] += 2.0**-20
        count[0] += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    interleave({"short": call}, rounds=1, sample_time=2.0**-14, warmup=1)
    assert count[0] == 1 + 64


def test_interleave_synchronizes_and_reports_rounds():
    events = []
    interleave(
        {"a": lambda: None},
        rounds=3,
        sample_time=0,
        synchronize=lambda: events.append("s"),
        progress=lambda: events.append("p"),
    )
    assert events.count("p") == 3
    assert events.count("s") == 2 * (3 + 2)


def test_interleave_refuses_no_rounds():
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({"a": lambda: None}, rounds=0)


def test_timing_quantiles():
    t = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (t.median, t.low, t.high) == (3.0, 2.0, 4.0)
    assert t.spread == pytest.approx(2 / 3)
    assert t.to_json() == {"median_s": 3.0, "q1_s": 2.0, "q3_s": 4.0, "rounds": 5}


def test_geomean():
    assert geomean([1.0, 4.0]) == pytest.approx(2.0)
