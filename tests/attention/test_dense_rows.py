"""Dense keys whose rows serve any request, and plans that follow them as they grow."""

import weakref

import pytest
import torch

import flashloom as fl

HEADS = fl.HeadShape(4, 2, 16)


def keys(rows, tokens):
    return torch.randn(rows, 2, tokens, 16), torch.randn(rows, 2, tokens, 16)


def expected(q, kv, row, length):
    k, v = (x[row, :, :length].transpose(0, 1) for x in kv)
    return fl.attention(q, k, v, variant=fl.causal)


def test_rows_and_growing_keys():
    layer = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, layout="HND", device="cpu")
    q, kv = torch.randn(5, 4, 16), keys(3, 9)
    plan = layer.plan(fl.Batch(q_lens=[2, 3], kv=fl.DenseKV(2, 9, [5, 9], rows=[2, 0])))
    wanted = [expected(q[:2], kv, 2, 5), expected(q[2:], kv, 0, 9)]
    torch.testing.assert_close(plan.run(q, kv), torch.cat(wanted))
    longer = keys(3, 12)
    plan.update(fl.Batch(q_lens=[2, 3], kv=fl.DenseKV(2, 12, [12, 9], rows=[1, 1])))
    wanted = [expected(q[:2], longer, 1, 12), expected(q[2:], longer, 1, 9)]
    torch.testing.assert_close(plan.run(q, longer), torch.cat(wanted))
    with pytest.raises(ValueError, match=r"must be \[requests, 12, 2, 16\]"):
        plan.run(q, kv)
    plan.update(fl.Batch(q_lens=[5], kv=fl.DenseKV(1, 12, rows=[3])))
    with pytest.raises(ValueError, match="3"):
        plan.run(q, longer)
    with pytest.raises(ValueError, match="KV dense and the batch has ragged"):
        plan.update(fl.Batch(q_lens=[5], kv=fl.RaggedKV([5])))


def test_rows_are_checked():
    with pytest.raises(ValueError, match="rows has 1 entries"):
        fl.DenseKV(2, 4, rows=[0])
    with pytest.raises(ValueError, match="-1"):
        fl.DenseKV(2, 4, rows=[0, -1])


def test_a_plan_holds_no_keys_between_runs():
    layer = fl.Attention(HEADS, dtype=torch.float32, layout="HND", device="cpu")
    plan = layer.plan(fl.Batch(q_lens=[2], kv=fl.DenseKV(1, 9)))
    k, v = keys(1, 9)
    held = weakref.ref(k)
    plan.run(torch.randn(2, 4, 16), (k, v))
    del k, v
    assert held() is None
