"""The public API's meaning, rule by rule (1 to 13): running, variants, merging. Expected values come from loops or
from torch, never from flashloom."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import HEADS, block_table, causal, close, expected, make, oracle, paged, ragged

import flashloom as fl

# --- 1. run ---


def test_run_returns_fresh_tensors():
    plan, q, k, v = make()
    first = plan.run(q, (k, v))
    kept = first.clone()
    second = plan.run(-q, (k, v))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    close(first, expected(q, k, v, (3, 1, 5), (7, 4, 5), keep=causal)[0])


def test_run_writes_out_and_lse():
    plan, q, k, v = make()
    out, lse = torch.empty_like(q), torch.empty(9, 4)
    got = plan.run(q, (k, v), out=out, lse=lse, return_lse=True)
    assert got[0] is out
    assert got[1] is lse
    want = expected(q, k, v, (3, 1, 5), (7, 4, 5), keep=causal)
    close(out, want[0])
    close(lse, want[1])
    assert plan.run(q, (k, v), out=out) is out


def test_run_takes_strided_out_and_lse():
    plan, q, k, v = make()
    out, lse = torch.zeros(9, 8, 48)[:, ::2, :16], torch.zeros(4, 9).T
    plan.run(q, (k, v), out=out, lse=lse)
    want = expected(q, k, v, (3, 1, 5), (7, 4, 5), keep=causal)
    close(out, want[0])
    close(lse, want[1])


# --- 2. Attention ---


def test_attention_signature_and_defaults():
    layer = fl.Attention(fl.HeadShape(8, 2, 64), dtype=torch.bfloat16, device="cpu")
    assert layer.kv_dtype == torch.bfloat16
    assert layer.sm_scale == 64**-0.5
    assert layer.layout == "NHD"
    shape = fl.HeadShape(q_heads=8, kv_heads=2, dim=64)
    assert (shape.value_dim, shape.group) == (64, 4)
    mla = fl.HeadShape.mla(q_heads=16, latent=32, rope=8)
    assert (mla.q_heads, mla.kv_heads, mla.dim, mla.value_dim) == (16, 1, 40, 32)


@pytest.mark.parametrize(
    ("dtype", "q_heads", "kv_heads", "dim", "value_dim"),
    [
        (torch.float32, 4, 4, 64, 64),
        (torch.float32, 6, 2, 24, 40),
        (torch.float32, 5, 1, 256, 256),
        (torch.float16, 6, 2, 64, 64),
        (torch.float16, 5, 1, 128, 64),
        (torch.bfloat16, 4, 4, 80, 80),
        (torch.bfloat16, 6, 2, 128, 128),
        (torch.bfloat16, 5, 1, 256, 256),
        (torch.bfloat16, 4, 2, 24, 40),
    ],
)
def test_head_shapes_and_dtypes(dtype, q_heads, kv_heads, dim, value_dim):
    heads = fl.HeadShape(q_heads, kv_heads, dim, value_dim)
    q, k, v = ragged([3], [9], heads, dtype=dtype)
    plan = fl.Attention(heads, variant=fl.causal, dtype=dtype, device="cpu").plan(
        fl.Batch(q_lens=[3], kv=fl.RaggedKV([9]))
    )
    out, lse = plan.run(q, (k, v), return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    want = oracle(q, k, v, causal)
    close(out, want[0], dtype)
    close(lse, want[1], torch.float32 if dtype == torch.float32 else torch.float16)


def test_strides_are_run_time_arguments():
    plan, q, k, v = make()
    want = plan.run(q, (k, v))
    wide = torch.zeros(9, 4, 33)[:, :, 1:17]  # rows that are not 16-byte aligned
    wide.copy_(q)
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    both = torch.cat([k, v], -1)
    close(plan.run(wide, (k, v)), want)
    close(plan.run(heads_first, (k, v)), want)
    close(plan.run(q, (both[..., :16], both[..., 16:])), want)


# --- 3. KV ---


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_paged_cache_views_and_tuples(layout, page_size):
    heads = fl.HeadShape(4, 2, 16, 24)
    lens = [5, 0, 33, 16]
    cache, k, v, pages = paged(lens, page_size, heads, layout=layout)
    total = sum(map(len, pages)) + 3
    assert cache[0].k.shape == (total, page_size, 2, 16)
    assert cache[0].v.shape == (total, page_size, 2, 24)
    table = fl.PageTable.from_block_table(block_table(pages), lens, page_size=page_size)
    layer = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, layout=layout, device="cpu")
    plan = layer.plan(fl.Batch.decode(table))
    q = torch.randn(4, 4, 16)
    want, want_lse = expected(q, k, v, [1] * 4, lens)
    out, lse = plan.run(q, cache[0], return_lse=True)
    close(out, want)
    close(lse, want_lse)
    native = tuple(x.transpose(1, 2) if layout == "HND" else x for x in (cache[0].k, cache[0].v))
    assert native[0].is_contiguous()
    assert torch.equal(plan.run(q, native), out)
    ones = torch.ones(1)
    assert torch.equal(plan.run(q, (*native, ones, ones)), out)


def test_ragged_kv_is_tokens_heads_dim_in_either_layout():
    for layout in ("NHD", "HND"):
        plan, q, k, v = make(layout=layout)
        close(plan.run(q, (k, v)), expected(q, k, v, (3, 1, 5), (7, 4, 5), keep=causal)[0])


def test_k_and_v_have_independent_strides():
    heads = fl.HeadShape(4, 2, 16)
    cache, _, _, pages = paged([20, 9], 4, heads)
    table = fl.PageTable.from_block_table(block_table(pages), [20, 9], page_size=4)
    plan = fl.Attention(heads, dtype=torch.float32, device="cpu").plan(fl.Batch.decode(table))
    q = torch.randn(2, 4, 16)
    want = plan.run(q, cache[0])
    k = cache[0].k.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.zeros(cache.pages, 4, 5, 20)[:, :, 1:3, 2:18]
    v.copy_(cache[0].v)
    assert k.stride() != v.stride()
    close(plan.run(q, (k, v)), want)


# --- 4. positions ---


def test_positions_count_from_the_end_of_the_keys():
    class SeesExactly(fl.Variant):
        def logits_mask(self, at):
            return at.kv_pos == at.q_pos

    q_lens, kv_lens = [2, 3], [6, 3]
    plan, q, k, v = make(q_lens, kv_lens, variant=SeesExactly())
    out = plan.run(q, (k, v))
    tokens = [4, 5, 6, 7, 8]  # the last q_len keys of each request
    close(out, v[tokens].repeat_interleave(2, 1))


def test_rows_before_the_first_key_are_zero_and_minus_infinity():
    plan, q, k, v = make([5, 2], [3, 0])
    out, lse = plan.run(q, (k, v), return_lse=True)
    want, want_lse = expected(q, k, v, [5, 2], [3, 0], keep=causal)
    close(out, want)
    close(lse, want_lse)
    assert (out[:2] == 0).all()
    assert (lse[:2] == -math.inf).all()
    assert (out[5:] == 0).all()
    assert (lse[5:] == -math.inf).all()


def test_rows_with_nothing_to_attend_to_ignore_the_output_transform():
    class PlusOne(fl.Variant):
        def output_transform(self, out, lse, at):
            return out + 1.0

    plan, q, k, v = make([5, 2], [3, 0], variant=fl.causal & PlusOne())
    out = plan.run(q, (k, v))
    assert (out[:2] == 0).all()
    assert (out[5:] == 0).all()
    close(out[2:5], expected(q, k, v, [5, 2], [3, 0], keep=causal)[0][2:5] + 1)


def test_empty_batches():
    layer = fl.Attention(HEADS, dtype=torch.float32, device="cpu")
    for lens in ([], [0, 0]):
        plan = layer.plan(fl.Batch(q_lens=lens, kv=fl.RaggedKV([3] * len(lens))))
        k = torch.randn(3 * len(lens), 2, 16)
        out, lse = plan.run(torch.empty(0, 4, 16), (k, k), return_lse=True)
        assert out.shape == (0, 4, 16)
        assert lse.shape == (0, 4)
    plan, q, k, v = make([0, 2, 0], [4, 2, 0])
    close(plan.run(q, (k, v)), expected(q, k, v, [0, 2, 0], [4, 2, 0], keep=causal)[0])


# --- 5. flex ---


def test_flex_index_is_local_or_absolute():
    def mask(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    q_lens, kv_lens = [3], [7]
    plan, q, k, v = make(q_lens, kv_lens, variant=fl.from_flex(mask_mod=mask))
    close(plan.run(q, (k, v)), oracle(q, k, v, lambda h, q_pos, j: q_pos - 4 >= j)[0])
    plan, q, k, v = make(q_lens, kv_lens, variant=fl.from_flex(mask_mod=mask, q_index="absolute"))
    close(plan.run(q, (k, v)), oracle(q, k, v, causal)[0])


def test_flex_score_mod_with_a_captured_tensor():
    bias = torch.tensor([0.5, -1.0, 2.0, 0.0])

    def score(score, b, h, q_idx, kv_idx):
        return score + bias[h] * (q_idx - kv_idx)

    plan, q, k, v = make([3], [7], variant=fl.from_flex(score, q_index="absolute"))
    close(plan.run(q, (k, v)), oracle(q, k, v, logits=lambda x, h, i, j: x + float(bias[h]) * (i - j))[0])


# --- 6. window ---


@pytest.mark.parametrize(("left", "right"), [(0, None), (3, None), (2, 1), (1, 0)])
def test_sliding_window_bounds(left, right):
    plan, q, k, v = make([6], [9], variant=fl.sliding_window(left, right))
    keep = lambda h, i, j: j >= i - left and (right is None or j <= i + right)  # noqa: E731
    close(plan.run(q, (k, v)), oracle(q, k, v, keep)[0])


def test_causal_is_bottom_right():
    plan, q, k, v = make([2], [5])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    qh, kh, vh = (x.transpose(0, 1)[None] for x in (q, k, v))
    close(
        plan.run(q, (k, v)),
        F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1),
    )


# --- 7. order ---


def test_order_of_transforms():
    class Double(fl.Variant):
        def logits_transform(self, logits, at):
            return logits * 2.0

    class Plus(fl.Variant):
        def logits_transform(self, logits, at):
            return logits + at.kv_pos

    for variant, f in (
        (Double() & Plus(), lambda x, h, i, j: x * 2 + j),
        (Plus() & Double(), lambda x, h, i, j: (x + j) * 2),
    ):
        plan, q, k, v = make([2], [5], variant=variant, sm_scale=0.5)
        close(plan.run(q, (k, v)), oracle(q, k, v, logits=f, scale=0.5)[0])


def test_masks_are_anded_and_fields_are_scoped():
    class Even(fl.Variant):
        value: fl.Scalar

        def logits_mask(self, at):
            return at.kv_pos % 2 == self.value

    class Above(fl.Variant):
        value: fl.Scalar

        def logits_mask(self, at):
            return at.kv_pos > self.value

    plan, q, k, v = make([2], [9], variant=Even(value=0) & Above(value=3))
    close(plan.run(q, (k, v)), oracle(q, k, v, lambda h, i, j: j % 2 == 0 and j > 3)[0])


def test_output_transforms_apply_left_to_right():
    class Plus(fl.Variant):
        def output_transform(self, out, lse, at):
            return out + 1.0

    class Double(fl.Variant):
        def output_transform(self, out, lse, at):
            return out * 2.0

    plan, q, k, v = make([2], [5], variant=Plus() & Double())
    close(plan.run(q, (k, v)), (oracle(q, k, v)[0] + 1) * 2)


# --- 8. lse ---


def test_lse_is_natural_before_output_and_without_the_sink():
    sinks = torch.tensor([0.0, 1.0, -2.0, 3.0])
    plan, q, k, v = make([3], [7], variant=fl.softcap(2.0) & fl.causal & fl.sink(sinks))
    out, lse = plan.run(q, (k, v), return_lse=True)
    want, want_lse = oracle(q, k, v, causal, lambda x, h, i, j: 2 * math.tanh(x / 2))
    close(lse, want_lse)
    weight = 1 / (1 + torch.exp(sinks.double() - want_lse))
    close(out, want * weight.unsqueeze(-1))


def test_lse_of_batched_input():
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8)
    out, lse = fl.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 4, 3, 8)
    assert lse.shape == (2, 4, 3)
    close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4
    close(lse, scores.logsumexp(-1))


# --- 9. merging ---


def test_partial_and_merge():
    sinks = torch.tensor([0.0, 1.0, -2.0, 3.0])
    heads = HEADS
    q, k, v = ragged([3], [9], heads)
    variant = fl.sink(sinks)
    layer = fl.Attention(heads, variant=variant, dtype=torch.float32, device="cpu")
    parts = []
    for part in (slice(0, 4), slice(4, 9)):
        plan = layer.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([part.stop - part.start])))
        parts += plan.run(q, (k[part], v[part]), partial=True, return_lse=True)
    close(parts[0], oracle(q, k[:4], v[:4])[0])
    want, want_lse = oracle(q, k, v)
    out, lse = fl.merge(*parts)
    close(out, want)
    close(lse, want_lse)
    out, _ = fl.merge(*parts, variant=variant)
    close(out, want * torch.sigmoid(want_lse - sinks).unsqueeze(-1))
    whole = layer.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([9]))).run(q, (k, v))
    close(out, whole)


def test_merge_with_nothing():
    out, lse = torch.randn(2, 4, 16), torch.randn(2, 4)
    nothing, never = torch.full((2, 4, 16), math.nan), torch.full((2, 4), -math.inf)
    merged = fl.merge(out, lse, nothing, never)
    close(merged[0], out)
    close(merged[1], lse)
    both = fl.merge(nothing, never, nothing, never)
    assert (both[0] == 0).all()
    assert (both[1] == -math.inf).all()


# --- 10. no softmax ---


def test_without_softmax_logits_are_weights():
    plan, q, k, v = make([3], [7], variant=fl.causal & fl.sigmoid(0.5))
    logits = torch.einsum("nhd,lhd->hnl", q, k.repeat_interleave(2, 1)) / 4
    mask = torch.ones(3, 7).tril(4).bool()
    weights = torch.where(mask, torch.sigmoid(logits + 0.5), 0)
    want = torch.einsum("hnl,lhd->nhd", weights, v.repeat_interleave(2, 1))
    close(plan.run(q, (k, v)), want)
    for options in ({"return_lse": True}, {"lse": torch.empty(3, 4)}):
        with pytest.raises(ValueError, match="softmax"):
            plan.run(q, (k, v), **options)


def test_without_softmax_partial_results_add():
    q, k, v = ragged([3], [9], HEADS)
    layer = fl.Attention(HEADS, variant=fl.sigmoid(), dtype=torch.float32, device="cpu")
    run = lambda k, v: layer.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([len(k)]))).run(q, (k, v), partial=True)  # noqa: E731
    close(fl.merge(run(k[:4], v[:4]), None, run(k[4:], v[4:]), None, variant=fl.sigmoid())[0], run(k, v))


def test_without_softmax_a_sink_raises():
    with pytest.raises(ValueError, match="lse"):
        _ = (fl.sigmoid() & fl.sink(torch.zeros(4))).program


# --- 11. vector hooks ---


def test_query_and_key_transforms():
    class Rotate(fl.Variant):
        def query_transform(self, q, at):
            half = at.head_dim // 2
            return (
                torch.where(at.dim < half, -q[(at.dim + half) % at.head_dim], q[(at.dim + half) % at.head_dim])
                * at.q_pos
            )

        def key_transform(self, k, at):
            return k * 0.5 + k[0] + at.kv_pos

    plan, q, k, v = make([2], [5], variant=Rotate())
    q2 = torch.cat([-q[..., 8:], q[..., :8]], -1) * torch.tensor([3.0, 4.0]).view(2, 1, 1)
    k2 = k * 0.5 + k[..., :1] + torch.arange(5.0).view(5, 1, 1)
    close(plan.run(q, (k, v)), oracle(q2, k2, v)[0])


def test_illegal_element_index_is_refused():
    class Bad(fl.Variant):
        def query_transform(self, q, at):
            return q[at.dim // 2]

    with pytest.raises(ValueError, match="permutation"):
        fl.Attention(HEADS, variant=Bad(), dtype=torch.float32, device="cpu")


# --- 12. numbers ---


def test_fields_are_arguments_and_literals_are_constants():
    assert fl.softcap(3.0).program.digest == fl.softcap(4.0).program.digest
    assert fl.sliding_window(3).program.digest == fl.sliding_window(99).program.digest

    def scaled(number):
        class Scaled(fl.Variant):
            def logits_transform(self, logits, at):
                return logits * number

        return Scaled()

    assert scaled(2.0).program.digest != scaled(3.0).program.digest
    assert scaled(2.0).program.digest == scaled(2.0).program.digest


# --- 13. per layer ---


def test_another_instance_of_the_variant():
    sinks = [torch.randn(4) for _ in range(3)]
    plan, q, k, v = make([3], [7], variant=fl.sink(sinks[0]))
    want, lse = oracle(q, k, v)
    for s in sinks:
        close(plan.run(q, (k, v), variant=fl.sink(s)), want * torch.sigmoid(lse - s).unsqueeze(-1))
    close(plan.run(q, (k, v)), want * torch.sigmoid(lse - sinks[0]).unsqueeze(-1))
    for other in (fl.causal, fl.sink(sinks[0]) & fl.causal):
        with pytest.raises(ValueError, match="expression"):
            plan.run(q, (k, v), variant=other)
    with pytest.raises(ValueError, match="q_heads = 4"):
        plan.run(q, (k, v), variant=fl.sink(torch.zeros(5)))
