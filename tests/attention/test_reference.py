"""What the reference path proves before kernels follow: latent heads, block-sparse keys, chunked rows; against torch
alone."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import flashloom as fl
from flashloom import dispatch
from flashloom.attention import reference
from flashloom.attention.reference import attention_reference


def dense(q, k, v, mask=None, scale=None):
    """SDPA in float64 of q [n, heads, dim] over k, v [l, kv_heads, *]."""
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def test_reference_in_double_is_exact():
    q, k, v = torch.randn(4, 6, 32), torch.randn(9, 2, 32), torch.randn(9, 2, 24)
    batch = fl.Batch([4], kv=fl.RaggedKV([9]))
    out, lse = attention_reference(q, k, v, batch, fl.causal)
    mask = torch.ones(4, 9).tril(5).bool()
    assert out.dtype == torch.float64
    close(out, dense(q, k, v, mask), 1e-12)
    scores = torch.einsum("nhd,lhd->nhl", q.double(), k.double().repeat_interleave(3, 1)) / math.sqrt(32)
    close(lse, scores.masked_fill(~mask[:, None], -math.inf).logsumexp(-1), 1e-12)


def test_long_rows_are_cut_without_a_trace(monkeypatch):
    q, k, v = torch.randn(7, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
    batch = fl.Batch([7], kv=fl.RaggedKV([11]))
    want = attention_reference(q, k, v, batch, fl.causal)
    monkeypatch.setattr(reference, "_CHUNK", 4 * 11 * 2)
    got = attention_reference(q, k, v, batch, fl.causal)
    close(got[0], want[0], 1e-12)
    close(got[1], want[1], 1e-12)


# --- multi-head latent attention ---


def test_latent_heads_equal_attention_before_absorption():
    """DeepSeek's weights absorbed into query and output give what the unabsorbed heads give."""
    heads, latent, rope, nope, value = 4, 32, 8, 16, 12
    down = torch.randn(9, latent)  # the compressed keys and values
    k_rope, q_nope, q_rope = torch.randn(9, rope), torch.randn(3, heads, nope), torch.randn(3, heads, rope)
    up_k, up_v = torch.randn(heads, nope, latent) / 6, torch.randn(heads, value, latent) / 6
    scale = (nope + rope) ** -0.5

    k = torch.cat([torch.einsum("lc,hnc->lhn", down, up_k), k_rope[:, None].expand(9, heads, rope)], -1)
    v = torch.einsum("lc,hvc->lhv", down, up_v)
    mask = torch.ones(3, 9).tril(6).bool()
    want = dense(torch.cat([q_nope, q_rope], -1), k, v, mask, scale)

    shape = fl.HeadShape.mla(q_heads=heads, latent=latent, rope=rope)
    cache = fl.PagedKVCache(1, 4, 4, shape, torch.float32, "cpu")
    assert cache[0].v.data_ptr() == cache[0].k.data_ptr()
    assert cache.nbytes == 4 * 4 * (latent + rope) * 4
    batch = fl.Batch([3], kv=fl.PageTable.from_block_table([[2, 0, 3]], [9], page_size=4))
    everything = fl.Batch([9], kv=fl.PageTable.from_block_table([[2, 0, 3]], [9], page_size=4))
    fl.append(cache[0], torch.cat([down, k_rope], -1)[:, None], None, everything.slots())
    q = torch.cat([torch.einsum("nhd,hdc->nhc", q_nope, up_k), q_rope], -1)
    layer = fl.Attention(shape, variant=fl.causal, dtype=torch.float32, sm_scale=scale, device="cpu")
    out = layer.plan(batch).run(q, cache[0])
    assert out.shape == (3, heads, latent)
    close(torch.einsum("nhc,hvc->nhv", out, up_v), want)
    close(layer.plan(batch).run(q, cache[0].k), out, 1e-6)  # keys alone will do


def test_a_latent_cache_refuses_other_values():
    cache = fl.PagedKVCache(1, 1, 4, fl.HeadShape.mla(4, 16, 4), torch.float32, "cpu")
    k, slots = torch.randn(2, 1, 20), torch.arange(2)
    fl.append(cache[0], k, k[..., :16], slots)
    assert torch.equal(cache[0].v[0, :2], k[..., :16])
    with pytest.raises(ValueError, match="v=None"):
        fl.append(cache[0], k, torch.randn(2, 1, 16), slots)


# --- block-sparse keys ---


@pytest.mark.parametrize("variant", [fl.full, fl.causal], ids=["full", "causal"])
def test_block_sparse(variant):
    q_lens, kv_lens, block_q, block_kv = [5, 0, 6], [10, 3, 6], 2, 3
    blocks = [[0, 3], [2], [], [0], [1, 0], [1]]  # 3 query blocks of the first request, 3 of the last
    indptr = torch.tensor([0, *(len(b) for b in blocks)]).cumsum(0)
    pattern = fl.BlockSparseKV(
        fl.RaggedKV(kv_lens), indptr, [j for b in blocks for j in b], block_q=block_q, block_kv=block_kv
    )
    layer = fl.Attention(fl.HeadShape(4, 2, 16), variant=variant, dtype=torch.float32, device="cpu")
    plan = layer.plan(fl.Batch(q_lens, kv=pattern))
    q, k, v = torch.randn(11, 4, 16), torch.randn(19, 2, 16), torch.randn(19, 2, 16)
    out, lse = plan.run(q, (k, v), return_lse=True)
    first_q, first_k, first_block = 0, 0, 0
    for n, length in zip(q_lens, kv_lens, strict=True):
        mask = torch.zeros(n, length, dtype=torch.bool)
        for i in range(n):
            for j in blocks[first_block + i // block_q]:
                mask[i, j * block_kv : (j + 1) * block_kv] = True
        if variant is fl.causal:
            mask &= torch.ones(n, length).tril(length - n).bool()
        rows, keys = slice(first_q, first_q + n), slice(first_k, first_k + length)
        close(out[rows], dense(q[rows], k[keys], v[keys], mask).nan_to_num(0.0))
        assert torch.equal(lse[rows] == -math.inf, ~mask.any(1, keepdim=True).expand(n, 4))
        first_q, first_k, first_block = first_q + n, first_k + length, first_block + -(-n // block_q)


def test_block_sparse_pages():
    table = fl.PageTable.from_block_table([[2, 0]], [7], page_size=4)
    pattern = fl.BlockSparseKV(table, [0, 1], [1], block_q=1, block_kv=2)
    cache = fl.PagedKVCache(1, 3, 4, fl.HeadShape(2, 1, 16), torch.float32, "cpu")
    cache[0].k.normal_()
    cache[0].v.normal_()
    q = torch.randn(1, 2, 16)
    plan = fl.Attention(fl.HeadShape(2, 1, 16), dtype=torch.float32, device="cpu").plan(fl.Batch.decode(pattern))
    close(plan.run(q, cache[0]), dense(q, cache[0].k[2, 2:4], cache[0].v[2, 2:4]))


# --- dense ---


def test_dense_kv_with_lengths_and_layouts():
    lens = [5, 0, 8]
    k, v = torch.randn(3, 8, 2, 16), torch.randn(3, 8, 2, 16)
    q = torch.randn(3, 4, 16)
    for layout in ("NHD", "HND"):
        layer = fl.Attention(fl.HeadShape(4, 2, 16), dtype=torch.float32, layout=layout, device="cpu")
        plan = layer.plan(fl.Batch.decode(fl.DenseKV(3, 8, lens)))
        kv = (k, v) if layout == "NHD" else (k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
        out = plan.run(q, kv)
        for b, n in enumerate(lens):
            close(out[b : b + 1], dense(q[b : b + 1], k[b, :n], v[b, :n]) if n else torch.zeros(1, 4, 16))


def test_plans_of_dense_attention_are_kept_and_bounded():
    from flashloom.attention import function

    function._recent.clear()
    for n in range(1, function._PLANS_KEPT + 10):  # requests
        x = torch.randn(3, 2, 8)
        batch = x.transpose(0, 1).expand(n, 2, 3, 8)
        out = fl.attention(batch, batch, batch, variant=fl.causal)
        close(out[n // 2].transpose(0, 1), dense(x, x, x, torch.ones(3, 3).tril().bool()))
    assert len(function._recent.plans) == len(function._recent.calls) == function._PLANS_KEPT
    before = list(function._recent.plans.values())[-1]
    fl.attention(batch, batch, batch, variant=fl.causal)
    assert list(function._recent.plans.values())[-1] is before


@pytest.mark.parametrize(("sharing", "plans"), [(1, 7), (4, 1 + 1 + 2 + 4 * 4)])
def test_plans_of_one_request_follow_lengths_of_their_size_class(sharing, plans, monkeypatch):
    from flashloom.attention import function

    monkeypatch.setattr(function, "_SHARING", sharing)
    function._recent.clear()
    for n in range(1, 65):
        x = torch.randn(n, 2, 8)
        want = dense(x, x, x, torch.ones(n, n).tril().bool())
        close(fl.attention(x, x, x, variant=fl.causal), want)
        batch = x.transpose(0, 1)[None]
        close(fl.attention(batch, batch, batch, variant=fl.causal)[0].transpose(0, 1), want)
    assert len(function._recent.plans) == 2 * plans  # 1, 2, 4, ... 64 tokens, in each form
    assert sum(map(len, function._recent.classes.values())) == 2 * plans


def test_dense_attention_takes_fields_of_its_variant():
    x = torch.randn(1, 2, 6, 8)
    for documents in ([0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]):
        d = torch.tensor(documents)
        out = fl.attention(x, x, x, variant=fl.document_mask(d))
        mask = d[:, None] == d[None]
        close(out, F.scaled_dot_product_attention(x.double(), x.double(), x.double(), attn_mask=mask))


# --- which executor ---


def test_without_a_compiler_the_reference_serves_after_one_warning(monkeypatch):
    class NoCompiler(RuntimeError):
        pass

    class Compiled(reference.ReferenceExecutor):
        name = "compiled"

        def plan(self, batch, reserve):
            raise NoCompiler("no C++ compiler was found")

    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["test:Compiled", "flashloom.attention.reference:ReferenceExecutor"])
    found = dispatch._find
    monkeypatch.setattr(dispatch, "_find", lambda name: Compiled if name == "test:Compiled" else found(name))
    monkeypatch.setattr(dispatch, "_warned", set())
    layer = fl.Attention(fl.HeadShape(2, 2, 8), dtype=torch.float32, device="cpu")
    batch = fl.Batch([2], kv=fl.RaggedKV([2]))
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler was found.*apt install g\+\+") as caught:
        plan = layer.plan(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.plan(batch)
    assert len(caught) == 1
    assert plan.executor == "reference"
    assert "not compiled: no compiler" in plan.explain()


def test_only_restricts_the_choice():
    layer = fl.Attention(fl.HeadShape(2, 2, 8), dtype=torch.float32, device="cpu")
    batch = fl.Batch([2], kv=fl.RaggedKV([2]))
    with dispatch.only("reference"):
        assert layer.plan(batch).executor == "reference"
    with dispatch.only("nothing"), pytest.raises(RuntimeError, match="no backend serves"):
        layer.plan(batch)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"device meta.*cpu and cuda"):
        fl.Attention(fl.HeadShape(2, 2, 8), dtype=torch.float32, device="meta").plan(fl.Batch([2], kv=fl.RaggedKV([2])))
