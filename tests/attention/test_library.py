"""What torch.compile and torch.export see."""

from __future__ import annotations

import pytest
import torch

import flashloom as fl
from flashloom.attention import library  # noqa: F401 - defines the operators

HEADS = fl.HeadShape(4, 2, 16)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def paged():
    cache = fl.PagedKVCache(2, 6, 4, HEADS, torch.float32, "cpu", k_scale=0.5, v_scale=2.0)
    for layer in cache:
        layer.k.normal_()
        layer.v.normal_()
    table = fl.PageTable.from_block_table([[3, 1], [5, 0]], [6, 3], page_size=4)
    return cache, fl.Batch.decode(table)


def test_a_decode_step_over_the_cache():
    cache, batch = paged()
    plan = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu").plan(batch)

    def step(q):
        x = plan.run(q, cache[0])
        return plan.run(x, cache[1], return_lse=True)

    q = torch.randn(2, 4, 16)
    for got, want in zip(compiled(step)(q), step(q), strict=True):
        torch.testing.assert_close(got, want)


def test_out_and_lse_are_mutated():
    cache, batch = paged()
    plan = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu").plan(batch)
    out, lse = torch.zeros(2, 4, 16), torch.zeros(2, 4)

    def step(q, out, lse):
        plan.run(q, cache[0], out=out, lse=lse)
        return out.sum()

    q = torch.randn(2, 4, 16)
    total = compiled(step)(q, out, lse)
    want, want_lse = plan.run(q, cache[0], return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    torch.testing.assert_close(total, want.sum())


def test_updates_are_followed_without_tracing_again():
    cache, batch = paged()
    plan = fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(batch)
    step = compiled(lambda q: plan.run(q, cache[0]))
    q = torch.randn(2, 4, 16)
    for lens in ([6, 3], [2, 7]):
        plan.update(fl.Batch.decode(fl.PageTable.from_block_table([[3, 1], [5, 0]], lens, page_size=4)))
        torch.testing.assert_close(step(q), plan.run(q, cache[0]))


def test_another_instance_of_the_variant():
    cache, batch = paged()
    layers = [fl.sink(torch.randn(4)) for _ in range(2)]
    plan = fl.Attention(HEADS, variant=layers[0], dtype=torch.float32, device="cpu").plan(batch)
    step = compiled(lambda q, variant: plan.run(q, cache[0], variant=variant))
    q = torch.randn(2, 4, 16)
    for variant in layers * 2:
        torch.testing.assert_close(step(q, variant), plan.run(q, cache[0], variant=variant))


@pytest.mark.parametrize("rank", [3, 4])
def test_dense_attention(rank):
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 8)
    if rank == 3:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    variant = fl.causal & fl.sink(torch.randn(4))

    def step(q, k, v, variant):
        out, lse = fl.attention(q * 2, k, v, variant=variant, return_lse=True, sm_scale=0.3)
        return out.transpose(0, 1) + 1, lse

    for got, want in zip(compiled(step)(q, k, v, variant), step(q, k, v, variant), strict=True):
        torch.testing.assert_close(got, want)
    other = fl.causal & fl.sink(torch.randn(4))
    torch.testing.assert_close(compiled(step)(q, k, v, other)[0], step(q, k, v, other)[0])
    without = compiled(lambda q, k, v: fl.attention(q, k, v))
    torch.testing.assert_close(without(q, k, v), fl.attention(q, k, v))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return fl.attention(q, k, v, variant=fl.causal)

    q = torch.randn(1, 4, 5, 16)
    program = torch.export.export(Model(), (q, q, q))
    torch.testing.assert_close(program.module()(q, q, q), Model()(q, q, q))


def test_operators_pass_opcheck():
    cache, batch = paged()
    plan = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu").plan(batch)
    q, out, lse = torch.randn(2, 4, 16), torch.empty(2, 4, 16), torch.empty(2, 4)
    kv = cache[0]
    args = (q, kv.k, kv.v, kv.k_scale, kv.v_scale, out, lse, plan.handle, 0, True, False)
    torch.library.opcheck(torch.ops.flashloom.attention_run.default, args)
    for x in (torch.randn(2, 4, 5, 16), torch.randn(5, 4, 16)):
        for return_lse in (False, True):
            torch.library.opcheck(torch.ops.flashloom.attention.default, (x, x, x, fl.causal._handle, None, return_lse))


def test_a_dead_plan_is_named():
    x = torch.zeros(1, 4, 16)
    with pytest.raises(RuntimeError, match="keep it alive"):
        torch.ops.flashloom.attention_run(x, x, x, None, None, x.clone(), None, 10**9, 0, False, False)


def test_run_takes_another_scale():
    cache, batch = paged()
    q = torch.randn(2, 4, 16)
    plan = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu").plan(batch)
    other = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, sm_scale=0.7, device="cpu").plan(batch)
    torch.testing.assert_close(plan.run(q, cache[0], sm_scale=0.7), other.run(q, cache[0]))
    compiled = torch.compile(lambda x: plan.run(x, cache[0], sm_scale=0.7), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), other.run(q, cache[0]))
    with pytest.raises(TypeError, match="sm_scale='x'"):
        plan.run(q, cache[0], sm_scale="x")


def test_update_takes_the_new_batch_s_instance():
    heads = fl.HeadShape(2, 1, 16)
    kv = torch.randn(12, 1, 16)
    plan = None
    for q_lens, kv_lens in (([2], [5]), ([1, 3, 2], [4, 5, 3]), ([4], [4])):
        masks = [torch.rand(a, b) > 0.3 for a, b in zip(q_lens, kv_lens)]
        indptr = torch.tensor([0, *(m.numel() for m in masks)]).cumsum(0)
        variant = fl.custom_mask(torch.cat([m.flatten() for m in masks]), indptr)
        batch = fl.Batch(q_lens=q_lens, kv=fl.RaggedKV(kv_lens))
        if plan is None:
            plan = fl.Attention(heads, variant=variant, dtype=torch.float32, device="cpu").plan(batch)
        else:
            with pytest.raises(ValueError, match="another expression"):
                plan.update(batch, variant=fl.causal)
            plan.update(batch, variant=variant)
        q = torch.randn(sum(q_lens), 2, 16)
        want = fl.Attention(heads, variant=variant, dtype=torch.float32, device="cpu").plan(batch).run(q, (kv, kv))
        torch.testing.assert_close(plan.run(q, (kv, kv)), want)
