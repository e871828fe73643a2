"""Pinned buffers of plans that are gone stay until no kernel reads them, whichever threads the plans go in."""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from flashloom.attention import triton_buffers


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
