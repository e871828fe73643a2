"""On a GPU: streams, torch.compile, modules that come and go, and the check of device contents."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.triton.test_gpu import BF16, G, _decode

import flashloom as fl
from flashloom import settings, store
from flashloom.attention import (
    function,
    library,  # noqa: F401 - defines the operators
)
from flashloom.attention.reference import attention_reference
from flashloom.kernel import cuda
from flashloom.kernel.resident import Resident
from flashloom.kv_cache.append import append_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _error(out, q, cache, kv):
    want, _ = attention_reference(q, cache[0], cache[1], fl.Batch.decode(kv).to_host(), fl.causal)
    return float((out.double() - want).norm() / want.norm())


@pytest.fixture
def resident(monkeypatch):
    """At most two modules of their own; answers the list of what was unloaded."""
    unloaded, remove = [], cuda.Function.__del__

    def note(self):
        unloaded.append(self.entry.label)
        remove(self)

    monkeypatch.setattr(cuda.Function, "__del__", note)
    monkeypatch.setattr(cuda, "_functions", Resident(lambda: 2))
    yield unloaded
    gc.collect()


def test_modules_are_unloaded_and_loaded_again_but_not_under_a_graph(resident):
    plan, q, cache, _ = _decode([700, 64])
    out = torch.empty_like(q)
    plan.run(q, (cache[0], cache[1]), out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, (cache[0], cache[1]), out=out)
    first = out.clone()
    store.finish()
    before = store.counters()
    for heads in (fl.HeadShape(4, 1, 64), fl.HeadShape(8, 1, 64), fl.HeadShape(4, 1, 96), fl.HeadShape(4, 1, 64)):
        other, q2, cache2, kv2 = _decode([300, 40], heads=heads)
        assert _error(other.run(q2, (cache2[0], cache2[1])), q2, cache2, kv2) < 8e-3
        del other
        gc.collect()
    store.finish()
    assert len(resident) >= 4, "modules that nobody held stayed"
    assert len(cuda._functions) <= 2 + 3, "more are loaded than the limit and what the plan holds"
    out.zero_()
    graph.replay()
    assert torch.equal(out, first)
    assert store.counters().builds - before.builds <= 9  # those of three shapes; what came again was found
    launches = (plan._executor._planner, *plan._executor._kernels.values())
    held = {id(launch._function) for launch in launches}
    assert held <= {id(value) for value in cuda._functions._alive.values()}


def test_contents_on_the_device_are_checked_when_asked(monkeypatch):
    monkeypatch.setattr(settings, "_current", settings.Settings(check=True))
    plan, q, cache, kv = _decode([64, 200])
    plan.run(q, (cache[0], cache[1]))
    kv.pages[3] = 10_000
    plan.update(fl.Batch.decode(kv))
    with pytest.raises(ValueError, match=r"request 0's page table entry 3 is page 10000: the cache has \d+ pages"):
        plan.run(q, (cache[0], cache[1]))
    kv.pages[3] = 0
    kv.kv_lens[1] = -5
    with pytest.raises(ValueError, match=r"-5"):
        plan.update(fl.Batch.decode(kv))
    kv.kv_lens[1] = 9000
    with pytest.raises(ValueError, match=r"request 1 has 9000 tokens but"):
        plan.update(fl.Batch.decode(kv))
    kv.kv_lens[1] = 200
    plan.update(fl.Batch.decode(kv))
    assert _error(plan.run(q, (cache[0], cache[1])), q, cache, kv) < 8e-3


def test_runs_on_several_streams_are_ordered():
    plan, q, cache, kv = _decode([5000, 300])
    want = plan.run(q, (cache[0], cache[1]))
    streams = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(2))]
    results = []
    torch.cuda.synchronize()
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            if i % 2:
                plan.update(fl.Batch.decode(kv))
            results.append(plan.run(q, (cache[0], cache[1])))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


def test_updates_from_the_host_never_overtake_each_other():
    """Many updates without waiting: each run sees the lengths of the update before it."""
    lens = [[1 + 37 * i % 900, 16, 1 + 91 * i % 700] for i in range(40)]
    _, q, cache, kv = _decode([900, 16, 700])
    table = kv.pages.view(3, -1).cpu()
    want = []
    for one in lens:
        batch = fl.Batch.decode(fl.PageTable.from_block_table(table, one, page_size=16))
        host = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(batch)
        want.append(host.run(q, (cache[0], cache[1])))
    follow = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(batch)
    got = []
    for one in lens:
        follow.update(fl.Batch.decode(fl.PageTable.from_block_table(table, one, page_size=16)))
        got.append(follow.run(q, (cache[0], cache[1])))
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 8e-3  # another cut of the keys


def test_compiled_without_a_break():
    torch._dynamo.reset()
    plan, q, cache, _ = _decode([700, 64])
    layer = (cache[0], cache[1])

    def step(q):
        return plan.run(q * 2, layer).float().sum(-1)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(q), step(q))

    def dense(q, k, v):
        return fl.attention(q, k, v, variant=fl.causal)

    x = torch.randn(2, 8, 200, 64, device="cuda", dtype=BF16)
    torch.testing.assert_close(torch.compile(dense, fullgraph=True)(x, x, x), dense(x, x, x))


def test_the_operator_keeps_torchs_rules():
    plan, q, cache, _ = _decode([700, 64])
    out = torch.empty_like(q)
    arguments = (q, cache[0], cache[1], None, None, out, None, plan.handle, 0, False, False, None)
    found = torch.library.opcheck(torch.ops.flashloom.attention_run.default, arguments)
    assert set(found.values()) == {"SUCCESS"}
    x = torch.randn(1, 4, 64, 64, device="cuda", dtype=BF16)
    found = torch.library.opcheck(torch.ops.flashloom.attention.default, (x, x, x, fl.causal._handle, None, True))
    assert set(found.values()) == {"SUCCESS"}


def test_block_patterns_on_a_gpu():
    q_lens, kv_lens = [200, 70], [1000, 300]
    rows, keys = [-(-n // 32) for n in q_lens], [-(-n // 64) for n in kv_lens]
    lists = [torch.randperm(keys[b])[: 1 + keys[b] // 3].tolist() for b in (0, 1) for _ in range(rows[b])]
    indptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
    kv = fl.BlockSparseKV(fl.RaggedKV(kv_lens), indptr, [i for one in lists for i in one], block_q=32, block_kv=64)
    batch = fl.Batch(q_lens=q_lens, kv=kv)
    plan = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(batch)
    assert plan.executor == "triton"
    q = torch.randn(270, 32, 128, device="cuda", dtype=BF16)
    k, v = torch.randn(2, 1300, 8, 128, device="cuda", dtype=BF16)
    want, _ = attention_reference(q, k, v, batch, fl.causal)
    for _ in range(2):
        out = plan.run(q, (k, v))
        assert float((out.double() - want).norm() / want.norm()) < 8e-3


def test_block_patterns_visit_no_other_tiles():
    """Keys far from all blocks of a batch are NaN."""
    kept = [0, 7, 8, 20, 31]  # blocks of 128 keys
    kv = fl.BlockSparseKV(
        fl.RaggedKV([4096]), [0, *[5 * (i + 1) for i in range(8)]], kept * 8, block_q=64, block_kv=128
    )
    batch = fl.Batch([512], kv=kv)
    q, k, v = (torch.randn(n, h, 128, device="cuda", dtype=BF16) for n, h in ((512, 32), (4096, 8), (4096, 8)))
    want, _ = attention_reference(q, k, v, batch, fl.causal)
    for x in (k, v):
        blocks = x.view(32, 128, 8, 128)
        blocks[[i for i in range(32) if i not in kept]] = float("nan")
    out = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(batch).run(q, (k, v))
    assert float((out.double() - want).norm() / want.norm()) < 8e-3


def test_a_captured_run_follows_block_patterns():
    def batch(q_lens, kv_lens, share):
        rows, keys = [-(-n // 64) for n in q_lens], [-(-n // 64) for n in kv_lens]
        lists = [torch.randperm(keys[b])[: 1 + keys[b] // share].tolist() for b in (0, 1) for _ in range(rows[b])]
        indptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
        blocks = [i for one in lists for i in one]
        return fl.Batch(q_lens, kv=fl.BlockSparseKV(fl.RaggedKV(kv_lens), indptr, blocks, block_q=64, block_kv=64))

    batches = batch([300, 200], [2000, 700], 3), batch([100, 400], [500, 1800], 7), batch([1, 9], [64, 900], 1)
    q = torch.randn(500, 32, 128, device="cuda", dtype=BF16)
    k, v = torch.randn(2, 2700, 8, 128, device="cuda", dtype=BF16)
    plan = fl.Attention(G, dtype=BF16, device="cuda").plan(batches[0])
    out = plan.run(q, (k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, (k, v), out=out)
    for now in (*batches[1:], batches[0]):
        plan.update(now)
        out.fill_(float("nan"))
        graph.replay()
        want, _ = attention_reference(q[: now.tokens], k, v, now, fl.full)
        assert float((out[: now.tokens].double() - want).norm() / want.norm()) < 8e-3
        assert out[now.tokens :].isnan().all()


def test_a_first_run_waits_for_planning_on_another_stream():
    _, q, cache, kv = _decode([5000, 300])
    torch.cuda.synchronize()
    for device in ("cpu", "cuda"):
        table = fl.PageTable(*(x.to(device) for x in (kv.kv_lens, kv.page_indptr, kv.pages)), 16)
        slow = torch.cuda.Stream()
        with torch.cuda.stream(slow):
            torch.cuda._sleep(100_000_000)
            plan = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(fl.Batch.decode(table))
        assert _error(plan.run(q, (cache[0], cache[1])), q, cache, kv) < 8e-3


def test_memory_of_a_dropped_plan_waits_for_the_streams_it_served():
    _, q, cache, kv = _decode([5000, 300])
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    plan = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(fl.Batch.decode(kv))
    size = plan.workspace_size
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)
        out = plan.run(q, (cache[0], cache[1]))
    del plan
    gc.collect()
    taken = [torch.full((size // 4,), -7, dtype=torch.int32, device="cuda") for _ in range(4)]
    taken += [torch.full((1,), -7, dtype=torch.int32, device="cuda") for _ in range(100)]
    torch.cuda.synchronize()
    assert _error(out, q, cache, kv) < 8e-3
    assert all((x == -7).all() for x in taken)


def _dense(requests, tokens, keys):
    return (
        torch.randn(requests, h, n, 128, device="cuda", dtype=BF16) for h, n in ((32, tokens), (8, keys), (8, keys))
    )


def _far(out, q, k, v):
    k, v = (x.repeat_interleave(4, 1).double() for x in (k, v))
    keep = torch.ones(q.shape[2], k.shape[2], device="cuda", dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k, v, attn_mask=keep)
    return float((out.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [(3, 300, 300), (3, 300, 700), (4, 1, 900), (1, 700, 700)], ids=str)
def test_dense_calls_copy_nothing_and_repeat(shape):
    for _ in range(4):
        q, k, v = _dense(*shape)
        for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            fl.attention(x, k, v, variant=fl.causal)  # makes what is kept
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out, _lse = fl.attention(x, k, v, variant=fl.causal, return_lse=True)
            assert torch.cuda.max_memory_allocated() - before < 1.5 * out.nbytes
            assert _far(out, q, k, v) < 8e-3
            assert torch.equal(fl.attention(x, k, v, variant=fl.causal), out)
            assert torch.equal(fl.attention(x, k, v, variant=fl.causal), out)
            with torch.cuda.stream(torch.cuda.Stream()):
                assert _far(fl.attention(x, k, v, variant=fl.causal), q, k, v) < 8e-3
    executors = [plan._executor for plan in function._recent.plans.values()]
    assert not any(getattr(one, "_other", None) for one in executors), "the driver made no tensor map of these strides"


def test_captured_dense_calls_stay_as_they_were():
    q, k, v = _dense(2, 200, 300)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = fl.attention(q, k, v, variant=fl.causal)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = fl.attention(q, k, v, variant=fl.causal)
    with torch.cuda.stream(stream):
        for tokens in (200, 150, 199, 200):  # of the same class
            few = q[:, :, -tokens:]
            assert _far(fl.attention(few, k, v, variant=fl.causal), few, k, v) < 8e-3
        out.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_shapes_of_one_class_are_captured_after_a_warm_up_on_another_stream():
    shapes = [tuple(_dense(2, tokens, 300)) for tokens in (200, 150)]
    want = [fl.attention(*x, variant=fl.causal) for x in shapes]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [fl.attention(*x, variant=fl.causal) for x in shapes]
    for x, out in zip(shapes, want, strict=True):
        assert torch.equal(fl.attention(*x, variant=fl.causal), out)
    for tokens in (199, 160, 170, 180, 190):
        x = tuple(_dense(2, tokens, 300))
        assert _far(fl.attention(*x, variant=fl.causal), *x) < 8e-3
    for out in outs:
        out.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))
    other = tuple(_dense(3, 77, 300))
    with pytest.raises(RuntimeError, match="call it once with such tensors"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fl.attention(*other, variant=fl.causal)


def test_an_update_refused_within_a_capture_changes_nothing():
    plan, q, cache, kv = _decode([700, 64], device="cpu")
    other = fl.Batch.decode(fl.PageTable(kv.kv_lens // 2, kv.page_indptr, kv.pages, 16))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        plan.update(other)
    assert plan.batch is not other
    assert _error(plan.run(q, (cache[0], cache[1])), q, cache, kv) < 8e-3


def test_threads_that_have_not_used_the_gpu_before():
    plan, q, cache, kv = _decode([700, 64], device="cpu")
    want, x = plan.run(q, (cache[0], cache[1])), torch.randn(2, 4, 300, 128, device="cuda", dtype=BF16)
    same = fl.attention(x, x, x, variant=fl.causal)
    torch.cuda.synchronize()
    for calls in (
        lambda: plan.run(q, (cache[0], cache[1])),
        lambda: plan.update(fl.Batch.decode(kv)) or plan.run(q, (cache[0], cache[1])),
        lambda: fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(plan.batch).run(q, tuple(cache)),
    ):
        with ThreadPoolExecutor(1) as fresh:
            assert torch.equal(fresh.submit(calls).result(), want)
    with ThreadPoolExecutor(1) as fresh:
        assert torch.equal(fresh.submit(lambda: fl.attention(x, x, x, variant=fl.causal)).result(), same)


def test_append_from_several_threads():
    caches = [fl.PagedKVCache(4, 64, 16, fl.HeadShape(8, 2, 64), BF16, "cuda") for _ in range(2)]
    slots = torch.randperm(64 * 16, device="cuda").view(16, 64)
    k, v = torch.randn(2, 4, 16, 64, 2, 64, device="cuda", dtype=BF16)
    torch.cuda.synchronize()

    def fill(layer):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(16):
                fl.append(caches[0][layer], k[layer, i], v[layer, i], slots[i])

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(fill, layer) for layer in range(4)]:
            done.result()
    torch.cuda.synchronize()
    for layer in range(4):
        append_reference(caches[1][layer], k[layer].flatten(0, 1), v[layer].flatten(0, 1), slots.flatten())
        assert torch.equal(caches[0][layer].k, caches[1][layer].k)
        assert torch.equal(caches[0][layer].v, caches[1][layer].v)


def test_merging_is_captured():
    sinks = fl.sink(torch.randn(32, device="cuda"))
    outs = torch.randn(2, 40, 32, 128, device="cuda", dtype=BF16)
    lses = torch.randn(2, 40, 32, device="cuda")
    want = fl.merge(outs[0], lses[0], outs[1], lses[1], variant=sinks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fl.merge(outs[0], lses[0], outs[1], lses[1], variant=sinks)
    for x in got:
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_whole_step_waits_for_nothing_and_is_captured():
    """Batch, slots, append, update and run of a decode step whose lengths only the device knows."""
    lens = torch.tensor([700, 64, 1], dtype=torch.int32, device="cuda")
    table = torch.randperm(3 * 50, device="cuda").view(3, 50).int()
    cache = fl.PagedKVCache(1, 150, 16, G, BF16, "cuda")
    for x in (cache[0].k, cache[0].v):
        x.normal_()
    q, k, v = (torch.randn(3, h, 128, device="cuda", dtype=BF16) for h in (32, 8, 8))
    out = torch.empty_like(q)
    plan = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(
        fl.Batch.decode(fl.PageTable.from_block_table(table, lens, page_size=16))
    )

    def step():
        batch = fl.Batch.decode(fl.PageTable.from_block_table(table, lens, page_size=16))
        fl.append(cache[0], k, v, batch.slots())
        plan.update(batch)
        plan.run(q, cache[0], out=out)
        return batch

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = step()
    for new in ([700, 64, 1], [3, 799, 100]):
        lens.copy_(torch.tensor(new))
        k.normal_()
        graph.replay()
        want, _ = attention_reference(q, cache[0].k, cache[0].v, batch.to_host(), fl.causal)
        assert float((out.double() - want).norm() / want.norm()) < 8e-3
        for b, n in enumerate(new):
            assert torch.equal(cache[0].k[table[b, (n - 1) // 16], (n - 1) % 16], k[b])


def test_a_captured_plan_refuses_a_batch_that_would_move_its_buffers():
    plan, q, cache, _ = _decode([700, 64], device="cpu")
    out = torch.empty_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plan.run(q, (cache[0], cache[1]), out=out)
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        plan.run(q, (cache[0], cache[1]), out=out)
    more = fl.PageTable.from_block_table(torch.zeros(40, 4).int(), [64] * 40, page_size=16)
    with pytest.raises(ValueError, match="plan with a Reserve for the largest batch"):
        plan.update(fl.Batch.decode(more))
    out.zero_()
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
