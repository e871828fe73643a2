"""FlexAttention functions trace unchanged; captured tensors are parameters, captured numbers constants."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention.flex_attention import and_masks, or_masks

import flashloom.variant as v
from flashloom.lower.torch import evaluate

TABLE = torch.linspace(0, 1, 6)


def relative(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def with_global(score, b, h, q_idx, kv_idx):
    return score * TABLE[h]


def inputs(q_len=3, kv_len=5):
    scalar = {
        k: torch.tensor(n, dtype=torch.int32)
        for k, n in {"q_len": q_len, "kv_len": kv_len, "batch": 0, "kv_head": 0, "q_start": 0, "kv_start": 0}.items()
    }
    rows = torch.arange(q_len, dtype=torch.int32).view(-1, 1)
    keys = torch.arange(kv_len, dtype=torch.int32).view(1, -1)
    return {
        **scalar,
        "q_head": torch.tensor(2, dtype=torch.int32),
        "q_pos": rows + kv_len - q_len,
        "kv_pos": keys,
        "logits": torch.zeros(q_len, kv_len),
    }


def test_local_and_absolute_query_index() -> None:
    rows, keys = torch.arange(3).view(-1, 1), torch.arange(5).view(1, -1)
    for q_index, first in (("local", 0), ("absolute", 2)):
        variant = v.from_flex(relative, causal, q_index=q_index)
        assert torch.equal(evaluate(variant.program, "logits", inputs(), variant.values), (rows + first - keys).float())
        assert torch.equal(evaluate(variant.program, "mask", inputs(), variant.values), rows + first >= keys)


def test_captured_tensors_are_lifted() -> None:
    def make(bias, scale):
        def score(score, b, h, q_idx, kv_idx):
            return score + bias[h, kv_idx] * scale

        return score

    a, b = torch.randn(4, 5), torch.randn(4, 5)
    one, two, other = (v.from_flex(make(t, s)) for t, s in ((a, 2.0), (b, 2.0), (b, 3.0)))
    assert one.program == two.program != other.program
    assert torch.allclose(evaluate(two.program, "logits", inputs(), two.values), (b[2] * 2).expand(3, 5))


def test_every_way_of_capturing() -> None:
    class Callable:
        def __init__(self, table):
            self.table = table

        def __call__(self, score, b, h, q_idx, kv_idx):
            return score * self.table[h]

    def default(score, b, h, q_idx, kv_idx, table=TABLE):
        return score * table[h]

    def explicit(table, score, b, h, q_idx, kv_idx):
        return score * table[h]

    nested = (lambda table: (lambda pick: lambda score, b, h, q, k: score * pick(h))(lambda i: table[i]))(TABLE)
    programs = [
        v.from_flex(f).program
        for f in (
            with_global,
            Callable(TABLE),
            default,
            functools.partial(explicit, TABLE),
            nested,
            Callable(TABLE).__call__,
        )
    ]
    assert len({p.digest for p in programs}) == 1
    assert all(len(p.params) == 1 for p in programs)


def test_a_zero_dim_tensor_is_a_number() -> None:
    gain = torch.tensor(3.0)
    variant = v.from_flex(lambda score, b, h, q, k: score * gain + 1)
    assert torch.equal(
        evaluate(variant.program, "logits", {**inputs(), "logits": torch.ones(3, 5)}, variant.values),
        torch.full((3, 5), 4.0),
    )


def test_torchs_mask_combinators() -> None:
    documents = torch.tensor([0, 0, 1, 1, 1])

    def same(b, h, q_idx, kv_idx):
        return documents[q_idx] == documents[kv_idx]

    both, either = v.from_flex(mask_mod=and_masks(causal, same)), v.from_flex(mask_mod=or_masks(causal, same))
    rows, keys = torch.arange(3).view(-1, 1), torch.arange(5).view(1, -1)
    same_now = documents[rows] == documents[keys]
    assert torch.equal(evaluate(both.program, "mask", inputs(), both.values), (rows >= keys) & same_now)
    assert torch.equal(evaluate(either.program, "mask", inputs(), either.values), (rows >= keys) | same_now)


def test_the_users_functions_are_left_alone() -> None:
    before = with_global.__globals__["TABLE"]
    v.from_flex(with_global)
    assert with_global.__globals__["TABLE"] is before is TABLE


def test_no_function_is_full_attention() -> None:
    assert v.from_flex().program == v.full.program
