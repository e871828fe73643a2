"""Rows of q beyond the batch, and objects that do not change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import flashloom as fl
from flashloom import dispatch

HEADS = fl.HeadShape(4, 2, 8)


def prepared(q_lens=(1, 1, 4), kv_lens=(20, 30, 4), **options):
    attn = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu", **options)
    plan = attn.plan(fl.Batch(list(q_lens), kv=fl.RaggedKV(list(kv_lens))))
    return plan, tuple(torch.randn(2, sum(kv_lens), 2, 8))


@pytest.mark.parametrize("executor", ["cpu", "reference"])
def test_without_out_q_has_just_the_rows_of_the_batch(executor):
    with dispatch.only(executor):
        plan, kv = prepared()
    q = torch.randn(40, 4, 8)
    want, want_lse = plan.run(q[:6], kv, return_lse=True)
    out, lse = torch.full((40, 4, 8), 7.0), torch.full((40, 4), 7.0)
    for _ in range(3):  # also when the call was accepted before, or can be repeated
        with pytest.raises(ValueError, match=r"q has 40 tokens but the batch has 6.*out="):
            plan.run(q, kv)
        with pytest.raises(ValueError, match=r"40 tokens but the batch has 6.*out="):
            plan.run(q, kv, lse=lse)
        with pytest.raises(ValueError, match=r"40 tokens but the batch has 6.*lse="):
            plan.run(q, kv, out=out, return_lse=True)
        plan.run(q, kv, out=out)
        plan.run(q, kv, out=out, lse=lse)
        torch.testing.assert_close(out[:6], want)
        torch.testing.assert_close(lse[:6], want_lse)
        assert (out[6:] == 7).all()
        assert (lse[6:] == 7).all()
    assert torch.equal(plan.run(q[:6], kv), want)


def test_a_plan_that_follows_makes_just_the_rows_of_its_batch():
    plan, kv = prepared()
    q, out = torch.randn(6, 4, 8), torch.empty(6, 4, 8)
    plan.run(q, kv, out=out)
    plan.run(q, kv)
    plan.update(fl.Batch([1, 1, 1], kv=fl.RaggedKV([20, 30, 4])))
    with pytest.raises(ValueError, match=r"q has 6 tokens but the batch has 3"):
        plan.run(q, kv)
    plan.run(q, kv, out=out)
    assert plan.run(q[:3], kv).shape[0] == 3
    plan.update(fl.Batch([1, 1, 4], kv=fl.RaggedKV([20, 30, 4])))
    with pytest.raises(ValueError, match="q has 3 tokens but the batch has 6"):
        plan.run(q[:3], kv)
    plan.run(q, kv)


def test_compiled_functions_make_just_the_rows_of_the_batch():
    torch._dynamo.reset()
    plan, kv = prepared()
    compiled = torch.compile(lambda q, kv: plan.run(q, kv), fullgraph=True, backend="eager")
    q = torch.randn(6, 4, 8)
    torch.testing.assert_close(compiled(q, kv), plan.run(q, kv))
    with pytest.raises(ValueError, match="q has 9 tokens but the batch has 6"):
        compiled(torch.randn(9, 4, 8), kv)


def test_where_a_device_alone_knows_the_tokens_further_rows_are_zero():
    """The way of a device, on CPU tensors."""
    plan, kv = prepared()
    want, want_lse = plan.run(q := torch.randn(6, 4, 8), kv, return_lse=True)
    more = torch.cat([q, torch.randn(5, 4, 8)])
    plan.batch.tokens, plan._q_shape = None, None
    for _ in range(2):
        out, lse = plan.run(more, kv, return_lse=True)
        torch.testing.assert_close(out, torch.cat([want, torch.zeros(5, 4, 8)]))
        torch.testing.assert_close(lse, torch.cat([want_lse, torch.full((5, 4), -torch.inf)]))


@pytest.mark.parametrize("name", ["variant", "sm_scale", "heads", "device", "varaint", "values"])
def test_an_attention_does_not_change(name):
    attn = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    with pytest.raises(AttributeError, match=f"does not change.*{name}"):
        setattr(attn, name, fl.full)
    assert attn.variant is fl.causal
    assert not hasattr(attn, "varaint")


def test_what_a_plan_has_accepted_does_not_change_under_it():
    cache = fl.PagedKVCache(1, 6, 4, HEADS, torch.float32, "cpu", k_scale=0.5)
    for name in ("k", "v", "k_scale", "v_scale", "layout", "anything"):
        with pytest.raises(AttributeError, match=f"layer of a cache does not change.*{name}"):
            setattr(cache[0], name, torch.ones(1))
        with pytest.raises(AttributeError, match=f"a cache does not change: make another one with {name}="):
            setattr(cache, name, torch.ones(1))
    plan, _ = prepared()
    assert plan.variant is fl.causal
    for name in ("variant", "batch", "device", "executor"):
        with pytest.raises(AttributeError, match=name):
            setattr(plan, name, fl.full)


def test_an_attention_is_planned_not_called():
    attn = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    with pytest.raises(AttributeError, match=r"no 'run': plan = attention.plan\(batch\), then plan.run"):
        attn.run  # noqa: B018
    with pytest.raises(TypeError, match=r"plan = attention.plan\(batch\)"):
        attn(torch.randn(1, 4, 8))
    with pytest.raises(TypeError, match=r"give a list"):
        fl.prepare(attn, fl.Batch([1], kv=fl.RaggedKV([1])))
    with pytest.raises(TypeError, match=r"batches is one Batch: give a list"):
        fl.tune(attn, fl.Batch([1], kv=fl.RaggedKV([1])), budget="1s")
    with pytest.raises(TypeError, match=r"batches holds int: give fl.Batch"):
        fl.prepare(attn, [1])
    with pytest.raises(TypeError, match=r"Plan cannot be prepared: give an fl.Attention"):
        fl.prepare(prepared()[0], [])
    same = copy.copy(attn)
    assert (same.heads, same.variant, same.device) == (attn.heads, attn.variant, attn.device)


def test_what_people_print():
    plan, _ = prepared()
    cache = fl.PagedKVCache(2, 6, 4, HEADS, torch.float32, "cpu", k_scale=0.5)
    table = fl.PageTable.from_block_table([[1, 2], [3, 0]], [5, 2], page_size=4)
    blocks = fl.BlockSparseKV(table, [0, 1, 2], [0, 0], block_q=4, block_kv=4)
    shown = {
        repr(plan): "Plan(Batch(3 requests, 6 query tokens, RaggedKV on cpu), cpu, Attention(",
        repr(table): "PageTable(2 requests, 7 tokens, 4 entries, page_size=4, on cpu)",
        repr(blocks): "BlockSparseKV(2 requests, 7 tokens, 4 entries, page_size=4, on cpu)",
        repr(fl.RaggedKV([3, 4])): "RaggedKV(2 requests, 7 tokens, on cpu)",
        repr(fl.DenseKV(2, 9, [3, 4])): "DenseKV(2 requests, 7 tokens of rows of 9, on cpu)",
        repr(cache[1]): "KV(k [6, 4, 2, 8], v [6, 4, 2, 8], float32, NHD, cpu, scaled)",
        repr(fl.Pack(targets=["x86-avx2"])): "Pack([x86-avx2], 0 kernels, not built)",
        repr(fl.monitor()): "Monitor(not entered, 0 plans, 0 updates, 0 runs, 0 compiles)",
        repr(fl.Attention(HEADS, dtype=torch.float32)): "on the device of its first batch or run)",
    }
    for text, want in shown.items():
        assert want in text
    for name in fl.__all__:  # no object of a public class shows an address
        assert " object at 0x" not in repr(getattr(fl, name)), name


def test_a_layer_of_a_cache_is_neither_indexed_nor_beyond_the_last():
    cache = fl.PagedKVCache(1, 6, 4, HEADS, torch.float32, "cpu")
    with pytest.raises(IndexError, match=r"cache\[3\]: the cache has 1 layers"):
        cache[3]
    with pytest.raises(TypeError, match=r"\.k and \.v"):
        cache[0][0]
    with pytest.raises(TypeError):
        _k, _v = cache[0]
    assert len(list(cache)) == 1
    with pytest.raises(MemoryError, match=r"80 layers of 1000000000 pages of 16 tokens take .* GiB.*fewer pages"):
        fl.PagedKVCache(80, 10**9, 16, HEADS, torch.float32, "cpu")


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    heads = fl.HeadShape(np.int64(4), np.int32(2), np.int64(8))
    assert heads == HEADS
    assert all(type(x) is int for x in (heads.q_heads, heads.kv_heads, heads.dim, heads.value_dim))
    assert fl.HeadShape.mla(np.int64(4), np.int64(8), rope=np.int64(4)) == fl.HeadShape.mla(4, 8, 4)
    assert fl.Reserve(requests=np.int64(3)) == fl.Reserve(requests=3)
    batch = fl.Batch([1], kv=fl.RaggedKV([2]), max_q_len=np.int64(5))
    assert batch.max_q_len == 5
    assert pickle.loads(pickle.dumps(heads)) == HEADS
    with pytest.raises(TypeError, match="q_heads=True"):
        fl.HeadShape(True, 1, 8)
    with pytest.raises(TypeError, match=r"dim=8\.0"):
        fl.HeadShape(4, 2, 8.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_out_whose_rows_are_one_is_refused(axis):
    q, k = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    whole = torch.zeros(6, 4, 8)
    out = whole.narrow(axis, 0, 1).expand(6, 4, 8)
    with pytest.raises(ValueError, match=r"out has strides .*stride 0.*give out memory for each"):
        fl.attention(q, k, k, out=out)
    plan = fl.Attention(fl.HeadShape(4, 2, 8), dtype=torch.float32).plan(fl.Batch([6], kv=fl.RaggedKV([6])))
    lse = torch.zeros(1, 4).expand(6, 4) if axis == 0 else torch.zeros(6, 1).expand(6, 4)
    for given, name in (({"out": out}, "out"), ({"lse": lse}, "lse")):
        with pytest.raises(ValueError, match=f"{name} has strides"):
            plan.run(q, (k, k), return_lse=True, **given)
    assert not whole.any()
    assert not lse.any()
    one = torch.zeros(1, 1, 8).expand(1, 1, 8).as_strided((1, 1, 8), (0, 0, 1))  # a stride of one row is no matter
    assert torch.equal(fl.attention(q[:1, :1], k[:1, :1], k[:1, :1], out=one), k[:1, :1])


@pytest.mark.parametrize(
    ("layer", "error", "said"),
    [
        (2, IndexError, "the cache has 2 layers"),
        ("k", TypeError, "give a layer's number, 0 to 1"),
        (0.0, TypeError, "0.0"),
    ],
)
def test_a_layer_that_is_none(layer, error, said):
    with pytest.raises(error, match=rf"cache\[.*\]: .*{said}|cache\[{said}\]"):
        fl.PagedKVCache(2, 6, 4, HEADS, torch.float32, "cpu")[layer]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a device")
def test_a_device_that_is_none_is_said_in_a_line():
    with pytest.raises(ValueError, match=r"device='mps' is not to be had here") as refusal:
        fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="mps")
    assert len(str(refusal.value)) < 250
