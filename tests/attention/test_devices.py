"""Where an Attention computes: device=, else where its batch's tensors are, else where those of its first run are.

Without a GPU another device is meta, for which the tests bring an executor that notes what it is asked."""

from __future__ import annotations

import sys

import pytest
import torch

import flashloom as fl
from flashloom import dispatch, records, store
from flashloom.attention import check
from flashloom.attention.recorded import Fixed
from flashloom.attention.reference import ReferenceExecutor

HEADS = fl.HeadShape(4, 2, 16)
META = torch.device("meta")


class Elsewhere(ReferenceExecutor):
    """An executor for another device."""

    name = "elsewhere"
    made: list[torch.device] = []  # noqa: RUF012
    ran = 0
    broken = False

    def __init__(self, spec, device):
        if Elsewhere.broken:
            raise RuntimeError("no kernel today")
        Elsewhere.made.append(device)

    def run(self, *args, **options):
        Elsewhere.ran += 1


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, request):
    if "gpu" in request.keywords:
        yield
        return
    monkeypatch.setitem(sys.modules, "elsewhere_executors", sys.modules[__name__])
    monkeypatch.setitem(dispatch.ATTENTION, "meta", ["elsewhere_executors:Elsewhere"])
    monkeypatch.setattr(check, "plain", lambda name, x: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Elsewhere.made, Elsewhere.ran, Elsewhere.broken = [], 0, False
    with records.entered(Fixed(None)):  # not those of whoever runs the tests, which are for real devices
        yield


def attention(**options):
    return fl.Attention(HEADS, **{"variant": fl.causal, "dtype": torch.float32, **options})


def on_host():
    return fl.Batch.decode(fl.PageTable.from_block_table([[1], [0]], [5, 3], page_size=8))


def tensors(device):
    q, k, v = torch.randn(2, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    return q.to(device), (k.to(device), v.to(device))


def want(q, kv):
    """float64, by rows."""
    out = torch.zeros(2, 4, 16, dtype=torch.float64)
    for row, (page, length) in enumerate(((1, 5), (0, 3))):
        k, v = (x[page, :length].double().repeat_interleave(2, 1) for x in kv)
        out[row] = torch.einsum("hm,mhd->hd", torch.einsum("hd,mhd->hm", q[row].double(), k).div(4).softmax(-1), v)
    return out


def test_the_first_run_says_where_and_later_plans_are_made_there():
    attn = attention()
    plan = attn.plan(on_host())
    assert (plan.executor, str(plan.device)) == ("cpu", "cpu")
    q, kv = tensors(META)
    assert plan.run(q, kv).device == META
    assert (plan.executor, Elsewhere.made, Elsewhere.ran) == ("elsewhere", [META], 1)
    assert attn.device == plan.device == META
    plan.run(q, kv)
    plan.update(on_host())
    plan.run(q, kv)
    assert (len(Elsewhere.made), Elsewhere.ran) == (1, 3), "it was planned once more, not each time"
    assert attn.plan(on_host()).executor == "elsewhere"
    with pytest.raises(ValueError, match="q is on cpu but the plan is for meta"):
        plan.run(*tensors("cpu"))


def test_on_the_cpu_nothing_is_planned_twice():
    attn = attention()
    plan = attn.plan(on_host())
    chosen = plan._executor
    q, kv = tensors("cpu")
    torch.testing.assert_close(plan.run(q, kv).double(), want(q, kv), rtol=1e-4, atol=1e-5)
    assert plan._executor is chosen
    assert "cpu" in repr(attn)
    with pytest.raises(ValueError, match="q is on meta but the plan is for cpu"):
        plan.run(*tensors(META))


def test_tensors_of_the_batch_say_where():
    lens = torch.tensor([5, 3], dtype=torch.int32, device=META)
    batch = fl.Batch.decode(fl.PageTable.from_block_table(torch.zeros(2, 1).int().to(META), lens, page_size=8))
    attn = attention()
    plan = attn.plan(batch)
    assert (plan.executor, attn.device) == ("elsewhere", META)
    assert attn.plan(on_host()).executor == "elsewhere"
    with pytest.raises(ValueError, match="q is on cpu but the plan is for meta"):
        plan.run(*tensors("cpu"))
    for other in (attention(device="cpu"), ran_on_the_cpu()):
        with pytest.raises(ValueError, match="the batch is on meta but the attention on cpu"):
            other.plan(batch)


def ran_on_the_cpu():
    attn = attention()
    attn.plan(on_host()).run(*tensors("cpu"))
    return attn


def test_a_given_device_is_the_device():
    attn = attention(device="meta")
    plan = attn.plan(on_host())
    assert plan.executor == "elsewhere"
    with pytest.raises(ValueError, match="q is on cpu but the plan is for meta"):
        plan.run(*tensors("cpu"))
    with pytest.raises(ValueError, match="q is on meta but the plan is for cpu"):
        attention(device="cpu").plan(on_host()).run(*tensors(META))


def test_plans_made_before_the_first_run_compute_where_it_was():
    attn = attention()
    one, other = attn.plan(on_host()), attn.plan(on_host())
    one.run(*tensors(META))
    with pytest.raises(ValueError, match=r"q is on cpu but this Attention computes on meta, where its first.*was"):
        other.run(*tensors("cpu"))
    other.run(*tensors(META))
    assert other.executor == "elsewhere"


def test_a_sealed_process_plans_nothing_anew(monkeypatch):
    attn = attention()
    plan = attn.plan(on_host())
    monkeypatch.setattr(store, "is_sealed", lambda: True)
    with pytest.raises(fl.SealedError, match=r"q is on meta but the plan was made for cpu.*Attention\(device='meta'\)"):
        plan.run(*tensors(META))
    q, kv = tensors("cpu")
    torch.testing.assert_close(plan.run(q, kv).double(), want(q, kv), rtol=1e-4, atol=1e-5)


def test_a_plan_that_cannot_be_made_there_stays_what_it_was():
    attn = attention()
    plan = attn.plan(on_host())
    Elsewhere.broken = True
    with pytest.raises(RuntimeError, match="no kernel today"):
        plan.run(*tensors(META))
    with pytest.raises(TypeError, match="q has dtype"):
        plan.run(tensors("cpu")[0].double(), tensors("cpu")[1])
    q, kv = tensors("cpu")
    torch.testing.assert_close(plan.run(q, kv).double(), want(q, kv), rtol=1e-4, atol=1e-5)
    assert attn.device == torch.device("cpu")


def test_tensors_of_the_variant_are_where_it_can_compute():
    slopes = torch.rand(4, device=META)
    attn = attention(variant=fl.alibi(slopes))
    plan = attn.plan(on_host())
    assert plan.executor == "elsewhere"
    with pytest.raises(ValueError, match=r"slopes is on meta but the plan is for cpu"):
        plan.run(*tensors("cpu"))
    plan.run(*tensors(META))
    with pytest.raises(ValueError, match=r"slopes is on cpu but the plan is for meta"):
        attention(variant=fl.alibi(4)).plan(on_host()).run(*tensors(META))


def test_where_there_is_a_gpu_nothing_is_compiled_before_the_first_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    attn = attention()
    plan = attn.plan(on_host())
    assert plan._executor is None
    assert "not chosen before the first run" in repr(plan)
    plan.update(on_host())
    q, kv = tensors("cpu")
    torch.testing.assert_close(plan.run(q, kv).double(), want(q, kv), rtol=1e-4, atol=1e-5)
    assert plan.executor == "cpu"
    looked_at = attention().plan(on_host())
    assert looked_at.executor == "cpu"
    looked_at.run(*tensors(META))
    assert looked_at.executor == "elsewhere"
    for ahead in (lambda: fl.prepare(attention(), [on_host()]), lambda: fl.tune(attention(), [on_host()], budget=1)):
        with pytest.raises(ValueError, match=r'give Attention\(device="cuda"\), or device="cpu"'):
            ahead()
    fl.prepare(attention(device="cpu"), [on_host()])


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="device='cuda:99' is not to be had here"):
        attention(device="cuda:99")
    with pytest.raises(ValueError, match="device='cuda:99' is not to be had here"):
        fl.PagedKVCache(1, 1, 1, HEADS, torch.float32, "cuda:99")
    with pytest.raises(ValueError, match="device='nonsense'"):
        attention(device="nonsense")


# --- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lists_on_the_host_serve_a_cache_anywhere(device):
    """Where the cache is decides, also for the plans after it."""
    attn = attention()
    for _ in range(2):
        plan = attn.plan(on_host())
        q, kv = tensors("cpu")
        got = plan.run(q.to(device), tuple(x.to(device) for x in kv))
        assert got.device.type == device
        torch.testing.assert_close(got.cpu().double(), want(q, kv), rtol=1e-4, atol=1e-5)
        assert attn.device.type == device
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    with pytest.raises(ValueError, match=rf"q is on {other}.* but the plan is for {device}"):
        plan.run(*tensors(other))


@pytest.mark.gpu
@needs_gpu
def test_a_graph_that_is_captured_plans_nothing_anew():
    attn = attention()
    plan = attn.plan(on_host())
    q, kv = tensors("cuda")
    torch.cuda.synchronize()
    refused = pytest.raises(RuntimeError, match=r"on cuda:0 but the plan was made for cpu.*captured.*device='cuda:0'")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        plan.run(q, kv)
    torch.cuda.synchronize()
    plan.run(q, kv)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        plan.run(q, kv)


@pytest.mark.gpu
@needs_gpu
def test_tensors_of_the_batch_on_the_gpu_say_where():
    lens = torch.tensor([5, 3], dtype=torch.int32, device="cuda")
    table = torch.tensor([[1], [0]], dtype=torch.int32, device="cuda")
    attn = attention()
    plan = attn.plan(fl.Batch.decode(fl.PageTable.from_block_table(table, lens, page_size=8)))
    assert attn.device.type == plan.device.type == "cuda"
    q, kv = tensors("cpu")
    got = plan.run(q.cuda(), tuple(x.cuda() for x in kv))
    torch.testing.assert_close(got.cpu().double(), want(q, kv), rtol=1e-4, atol=1e-5)
