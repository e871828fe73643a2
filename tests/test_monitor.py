"""One object tells what flashloom did; watching changes nothing, and not watching leaves nothing behind."""

import contextlib
import gc
import importlib
import json
import math
import threading
from types import SimpleNamespace

import pytest
import torch

import flashloom as fl
from flashloom import store
from flashloom.attention.attention import Plan

watching = importlib.import_module("flashloom.monitor")
HEADS = fl.HeadShape(4, 2, 16)
ORIGINALS = (Plan.__init__, Plan.run, Plan.update)


def plan_for(*lens, device="cpu"):
    layer = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device=device)
    return layer.plan(fl.Batch(q_lens=[*lens], kv=fl.RaggedKV([*lens])))


def run(plan):
    n = plan.batch.tokens
    return plan.run(torch.randn(n, 4, 16), (torch.randn(n, 2, 16), torch.randn(n, 2, 16)))


def test_calls_are_seen_while_watching():
    with fl.monitor() as seen:
        plan = plan_for(3, 4)
        run(plan)
        plan.update(fl.Batch(q_lens=[5], kv=fl.RaggedKV([5])))
        run(plan)
    run(plan)
    assert (len(seen.plans), len(seen.updates), len(seen.runs)) == (1, 1, 2)
    first, second = seen.runs
    assert (first.executor, first.requests, first.tokens) == (plan.executor, 2, 7)
    assert (second.requests, second.tokens) == (1, 5)
    assert all(0 < call.seconds == call.host_seconds < 60 for call in [*seen.runs, *seen.plans])
    assert first.thread == "MainThread"


def test_not_watching_leaves_nothing_behind():
    assert (Plan.__init__, Plan.run, Plan.update) == ORIGINALS
    with contextlib.suppress(KeyError), fl.monitor(), fl.monitor():
        assert Plan.run is not ORIGINALS[1]
        raise KeyError
    assert (Plan.__init__, Plan.run, Plan.update) == ORIGINALS
    assert not store.store.listeners


def test_monitors_nest_and_overlap():
    plan = plan_for(3)
    a, b = fl.monitor(), fl.monitor()
    a.__enter__()
    run(plan)
    b.__enter__()
    run(plan)
    a.__exit__(None, None, None)
    run(plan)
    b.__exit__(None, None, None)
    run(plan)
    assert (len(a.runs), len(b.runs)) == (2, 2)
    with pytest.raises(RuntimeError, match="entered before"):
        a.__enter__()


def test_every_thread_is_seen():
    def work():
        plan = plan_for(3)
        for _ in range(20):
            run(plan)

    with fl.monitor() as seen:
        threads = [threading.Thread(target=work, name=f"worker {i}") for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    names = [call.thread for call in seen.runs]
    assert sorted(names) == sorted(f"worker {i}" for i in range(4) for _ in range(20))


def test_a_call_that_fails_is_not_counted():
    plan = plan_for(3)
    with fl.monitor() as seen, pytest.raises(TypeError):
        plan.run(None, None)
    assert not seen.runs


def test_keep_bounds_the_calls_but_not_the_counts():
    plan = plan_for(3)
    with fl.monitor(keep=2) as seen:
        for _ in range(5):
            run(plan)
    assert len(seen.runs) == 2
    assert seen.report()["run"]["calls"] == 5


def test_compiles_and_the_store(tmp_path, monkeypatch):
    fl.configure(cache_dir=tmp_path)
    try:
        with fl.monitor() as seen:
            for build in (lambda folder: (folder / "kernel.so").write_bytes(b"x" * 5000) and None,) * 2:
                store.get_or_build({"kind": "test", "of": "monitor"}, build, label="tested")
        store.get_or_build({"kind": "test", "of": "later"}, build, label="later")
        assert [one.label for one in seen.compiles] == ["tested"]
        assert (seen.counters.builds, seen.counters.hits) == (1, 1)
        assert seen.counters.build_seconds == pytest.approx(seen.compiles[0].seconds)
        assert seen.store_bytes >= 10_000
    finally:
        fl.configure(cache_dir=None)


def test_workspaces():
    gc.collect()  # plans of former tests, which would give up their memory meanwhile
    with fl.monitor() as seen:
        before = seen.workspace_bytes.get("cpu", 0)
        plan = plan_for(300)
        assert seen.workspace_bytes["cpu"] - before == plan.workspace_size
        size = plan.workspace_size
        del plan
    assert seen.workspace_peak_bytes["cpu"] == before + size


def test_a_report_is_plain_numbers():
    with fl.monitor() as seen:
        run(plan_for(3))
    report = json.loads(json.dumps(seen.report()))
    assert report["run"]["calls"] == 1
    assert report["run"]["total_s"] == report["run"]["median_s"] == seen.runs[0].seconds
    assert report["seconds"] >= report["plan"]["total_s"] > 0
    assert "run  " in str(seen)


class Event:
    """A CUDA event that counts who waits for it."""

    waited = 0
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        Event.now += 1.5
        self.at = Event.now

    def synchronize(self):
        Event.waited += 1

    def elapsed_time(self, end):
        return end.at - self.at


def gpu_like(monkeypatch, capturing=False):
    """A plan that claims to be on a GPU, and the calls that torch.cuda gets."""
    calls = []
    monkeypatch.setattr(Plan, "run", Plan.run)  # restored when the test is over, whatever a monitor puts back
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    nvtx = SimpleNamespace(range_push=lambda text: calls.append(text), range_pop=lambda: calls.append("pop"))
    profiler = SimpleNamespace(
        cudaProfilerStart=lambda: calls.append("start") or 0, cudaProfilerStop=lambda: calls.append("stop") or 0
    )
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: profiler)
    plan = SimpleNamespace(
        executor="hopper",
        batch=SimpleNamespace(requests=2, tokens=9),
        attention=SimpleNamespace(device=torch.device("cuda", 0)),
    )
    return plan, calls


def test_gpu_times_are_events_read_later(monkeypatch):
    plan, _ = gpu_like(monkeypatch)
    monkeypatch.setitem(watching._ORIGINALS, "run", lambda plan: "result")
    with fl.monitor(nvtx=False) as seen:
        assert Plan.run(plan) == "result"
    assert Event.waited == 0
    assert seen.runs[0].seconds == pytest.approx(1.5e-3)
    assert Event.waited == 1
    assert seen.runs[0].host_seconds < 30


def test_captured_calls_have_no_time(monkeypatch):
    plan, _ = gpu_like(monkeypatch, capturing=True)
    monkeypatch.setitem(watching._ORIGINALS, "run", lambda plan: None)
    with fl.monitor(nvtx=False) as seen:
        Plan.run(plan)
    assert seen.runs[0].captured
    assert math.isnan(seen.runs[0].seconds)
    assert seen.report()["run"] | {"host": None} == {
        "calls": 1, "captured": 1, "total_s": 0.0, "median_s": 0.0, "largest_s": 0.0, "host": None,
    }  # fmt: skip


def test_nvtx_ranges_and_the_profiler(monkeypatch):
    plan, calls = gpu_like(monkeypatch)

    def fail(plan):
        calls.append("work")
        raise KeyError

    monkeypatch.setitem(watching._ORIGINALS, "run", fail)
    with contextlib.suppress(KeyError), fl.monitor(capture=True):
        Plan.run(plan)
    assert calls == ["start", "flashloom run hopper 2 requests, 9 tokens", "work", "pop", "stop"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", ["nvtx", "capture"])
def test_marks_need_a_gpu(option):
    with pytest.raises(RuntimeError, match=f"{option}=True"):
        fl.monitor(**{option: True})


def test_keep_is_checked():
    with pytest.raises(ValueError, match="keep=0"):
        fl.monitor(keep=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    layer = fl.Attention(fl.HeadShape(8, 2, 128), variant=fl.causal, dtype=torch.bfloat16, device="cuda")
    q, k = torch.randn(2048, 8, 128).cuda().bfloat16(), torch.randn(2048, 2, 128).cuda().bfloat16()
    with fl.monitor() as seen:
        plan = layer.plan(fl.Batch(q_lens=[2048], kv=fl.RaggedKV([2048])))
        for _ in range(10):
            plan.run(q, (k, k))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.run(q, (k, k))
    assert all(1e-6 < call.seconds < 1 for call in seen.runs[:10])
    assert seen.runs[10].captured
    assert seen.workspace_bytes["cuda:0"] >= plan.workspace_size
