"""Pinned buffers of plans that are gone stay until no kernel reads them, whichever threads the plans go in."""

import ctypes
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import flashloom as fl
from flashloom.attention import triton_buffers
from flashloom.kernel import cuda


@pytest.fixture
def leaving(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_buffers, "_leaving", found := deque())
    return found


def test_buffers_stay_until_their_event_has_passed(leaving):
    events = [SimpleNamespace(query=lambda done=done: done) for done in (True, False, True)]
    leaving += [(event, []) for event in events] + [(None, [])]
    triton_buffers._sweep()
    assert [event for event, _ in leaving] == [events[1], None], "None: there was no event to be had"


def test_none_is_lost_where_plans_go_in_several_threads(leaving):
    def asked(done):
        time.sleep(0)  # as the driver does, let other threads run
        return done

    events = [SimpleNamespace(query=lambda done=done: asked(done)) for done in (False, True)]

    def work():
        for i in range(100):
            leaving.append((events[i % 4 > 0], []))
            triton_buffers._sweep()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work) for _ in range(4)]:
            done.result()
    assert sum(event is events[0] for event, _ in leaving) == 4 * 25


def test_host_numbers_lie_side_by_side_where_the_planner_reads_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(cuda, "raw_stream", lambda index: 5)
    marks = []
    event = SimpleNamespace(record=lambda stream: marks.append("record"), synchronize=lambda: marks.append("wait"))
    event.query = lambda: True
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, dtype, **more: empty(*sizes, dtype=dtype))
    staging = triton_buffers.Staging(SimpleNamespace(index=0))
    monkeypatch.setattr(triton_buffers.Staging, "__del__", lambda self: None)  # it asks the driver
    kinds = (
        fl.PageTable.from_block_table([[3, 1, 4], [1, 5, 9]], [20, 33], page_size=16),
        fl.PageTable.from_csr([0, 0, 0], [], [0, 0], page_size=16),
        fl.RaggedKV([7, 2]),
        fl.DenseKV(2, 40, [40, 3], rows=[5, 2]),
    )
    for turn in range(20):
        batch = fl.Batch(q_lens=[2, 1], kv=kinds[turn % len(kinds)])
        batch.kv_lens[1] = turn  # what the batch holds now, not what it was made of
        starts = staging.copy(batch, 100)
        for start, x in zip(starts, (batch.q_indptr, batch.kv_lens, batch.page_indptr, batch.pages), strict=True):
            assert list((ctypes.c_int32 * x.numel()).from_address(start)) == x.tolist()
    assert marks == ["record", "wait"] * 3, "every eighth turn, before its first buffer comes again"
