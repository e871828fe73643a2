"""A child that was forked after attention: the right result, or at once an error that says what to do instead."""

import os
import signal
import threading
import time
import traceback

import pytest
import torch

import flashloom as fl

HEADS = fl.HeadShape(q_heads=8, kv_heads=2, dim=64)


def in_child(work, patience=120.0):
    """What `work` answers, a text, in a forked child, and the seconds it took there; the child is killed when patience
    ends."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            start = time.monotonic()
            said = work()
            os.write(writer, f"{time.monotonic() - start} {said}".encode())
        except BaseException:
            os.write(writer, b"0 " + traceback.format_exc().encode()[-3000:])
        finally:
            os._exit(0)
    os.close(writer)
    killer = threading.Timer(patience, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with open(reader, encoding="utf-8") as answers:
        text = answers.read()
    os.waitpid(pid, 0)
    killer.cancel()
    assert text, "the child hung"
    seconds, _, said = text.partition(" ")
    return said, float(seconds)


def dense(tokens):
    return torch.randn(tokens, 8, 64), torch.randn(tokens, 2, 64), torch.randn(tokens, 2, 64)


def witness(q, k, v):
    k, v = (x.double().repeat_interleave(4, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / 8.0
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def same(out, want):
    return "right" if torch.allclose(out.double(), want, atol=1e-4) else "wrong"


@pytest.fixture
def busy():
    """A process whose pool of threads exists: torch and our kernels have computed on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    a = torch.randn(1000, 1000)
    a @ a
    (a.exp() + a).sum()
    q, k, v = dense(500)
    fl.attention(q, k, v)
    yield q, k, v
    torch.set_num_threads(before)


def test_a_forked_child_computes_with_a_call_of_its_own(busy):
    q, k, v = busy
    want = witness(q, k, v)
    assert in_child(lambda: same(fl.attention(q, k, v), want))[0] == "right"


def test_a_forked_child_computes_what_the_parent_never_compiled(busy):
    q, k, v = dense(300)
    want = 2.0 * witness(q, k, v)

    class Twice(fl.Variant):
        def output_transform(self, out, lse, at):
            return out * 2.0

    assert in_child(lambda: same(fl.attention(q, k, v, variant=Twice()), want))[0] == "right"


def test_a_forked_child_goes_on_with_the_parents_plan(busy):
    q, k, v = busy
    plan = fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(fl.Batch(q_lens=[500], kv=fl.RaggedKV([500])))
    out = torch.empty_like(q)
    plan.run(q, (k, v), out=out)
    want = witness(q, k, v)

    def work():
        out.fill_(torch.nan)
        plan.run(q, (k, v), out=out)
        first = same(out, want)
        plan.update(fl.Batch(q_lens=[100], kv=fl.RaggedKV([500])))
        return first, same(plan.run(q[:100], (k, v)), want[:100])

    assert in_child(work)[0] == "('right', 'right')"
    assert same(plan.run(q, (k, v)), want) == "right"  # and the parent as before


def test_the_settings_threads_do_not_bring_the_hang_back(busy, monkeypatch):
    q, k, v = busy
    want = witness(q, k, v)
    threads = fl.configure().threads
    try:
        fl.configure(threads=2)
        fl.attention(q, k, v)
        assert in_child(lambda: same(fl.attention(q, k, v), want))[0] == "right"
    finally:
        fl.configure(threads=threads or torch.get_num_threads())


def test_locks_that_other_threads_hold_are_renewed(busy):
    """A thread of the parent stands within the store, the pool of workspaces and the settings at the fork."""
    from flashloom import settings
    from flashloom.attention import cpu, pool
    from flashloom.store import store

    q, k, v = busy
    want = witness(q, k, v)
    held, done = threading.Event(), threading.Event()

    def stand():
        with settings._lock, pool._lock, cpu.SPARE._lock, store._state.lock:
            held.set()
            done.wait(300)

    thread = threading.Thread(target=stand)
    thread.start()
    held.wait(60)

    def work():
        fl.configure(log="warning")
        return same(fl.attention(q[:77], k, v), want[:77])

    try:
        said, _ = in_child(work)
    finally:
        done.set()
        thread.join()
    assert said == "right"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_child_of_a_process_that_used_a_gpu_is_told_so_at_once():
    q, k, v = (x.cuda().half() for x in dense(64))
    heads = fl.HeadShape(q_heads=8, kv_heads=2, dim=64)
    cache = fl.PagedKVCache(layers=1, pages=8, page_size=16, heads=heads, dtype=torch.float16, device="cuda")
    pages = fl.PageTable.from_block_table(torch.arange(8).view(2, 4), [64, 33], page_size=16)
    batch = fl.Batch(q_lens=[1, 1], kv=pages)
    plan = fl.Attention(heads, dtype=torch.float16, device="cuda").plan(batch)
    slots = batch.slots().cuda()
    fl.append(cache[0], k[:2], v[:2], slots)
    out = torch.empty(2, 8, 64, dtype=torch.float16, device="cuda")
    plan.run(q[:2], cache[0], out=out)
    fl.attention(q, k, v)
    torch.cuda.synchronize()
    few, few_k, few_v = q[:2], k[:2], v[:2]  # a view is an operation, which torch refuses in its own words
    calls = {
        "run(out=)": lambda: plan.run(few, cache[0], out=out),
        "run()": lambda: plan.run(few, cache[0]),
        "update": lambda: plan.update(batch),
        "append": lambda: fl.append(cache[0], few_k, few_v, slots),
        "attention": lambda: fl.attention(q, k, v),
        "plan": lambda: fl.Attention(heads, dtype=torch.float16, device="cuda").plan(batch),
    }
    for name, call in calls.items():

        def work(call=call):
            try:
                call()
            except RuntimeError as error:
                return str(error) if "spawn" in str(error) else traceback.format_exc()
            return "nothing was said"

        said, seconds = in_child(work, patience=20.0)
        assert "spawn" in said, (name, said)
        assert seconds < 1.0, (name, seconds)
    x, y, z = dense(64)
    want = witness(x, y, z)
    assert in_child(lambda: same(fl.attention(x, y, z), want))[0] == "right"  # the CPU serves there
