"""`fl.attention` as people type it: layouts, causal=, out=, other libraries' arguments, and nothing to do."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flashloom as fl
from flashloom.attention import function

SDPA = torch.nn.functional.scaled_dot_product_attention


def witness(q, k, v, kept=None):
    """float64 over [batch, heads, tokens, dim]; rows that keep nothing are 0."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if kept is not None:
        s = s.masked_fill(~kept, -torch.inf)
    return s.softmax(-1).nan_to_num(0.0) @ v, s.logsumexp(-1)


def bottom_right(n, m):
    return torch.arange(m) <= torch.arange(n)[:, None] + m - n


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attentions_order_by_its_name(causal):
    rng = random.Random(causal)
    for _ in range(6):
        b, n, m, kv_heads, group = (rng.randint(1, x) for x in (3, 9, 9, 2, 3))
        m = max(n, m) if causal else m
        q, k = torch.randn(b, n, kv_heads * group, 16), torch.randn(b, m, kv_heads, 16)
        v = torch.randn(b, m, kv_heads, 24)
        swapped = [x.transpose(1, 2) for x in (q, k, v)]
        want, want_lse = witness(*swapped, bottom_right(n, m) if causal else None)
        want, want_lse = want.transpose(1, 2), want_lse.transpose(1, 2)
        out = torch.full((b, n, kv_heads * group, 24), torch.nan)
        for options in ({}, {"out": out}, {"return_lse": True}, {"return_lse": True, "out": out}, {}):
            got = fl.attention(q, k, v, causal=causal, layout="BTHD", **options)
            got, lse = got if options.get("return_lse") else (got, None)
            assert ("out" not in options) or got.data_ptr() == out.data_ptr()
            assert got.is_contiguous()
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
            if lse is not None:
                torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-5)


class Backwards(fl.Variant):
    """Causal, in other words."""

    def logits_mask(self, at):
        return ~(at.kv_pos > at.q_pos)


CAUSAL = {
    "causal": fl.causal,
    "a window too": fl.causal & fl.sliding_window(3),
    "within": fl.softcap(9.0) & fl.causal,
    "of one's own": Backwards(),
    "flex": fl.from_flex(mask_mod=lambda b, h, i, j: i >= j, q_index="absolute"),
}


@pytest.mark.parametrize("variant", CAUSAL.values(), ids=CAUSAL)
def test_more_queries_than_keys_under_a_causal_mask_need_a_name(variant):
    q, k = torch.randn(2, 9, 6, 16), torch.randn(2, 9, 2, 16)  # flash-attn's form of 9 tokens, 6 heads over 2
    for call in (variant, variant):
        with pytest.raises(ValueError, match=r'6 queries over 2 keys.*first 4 rows.*layout="BTHD".*layout="BHTD"'):
            fl.attention(q, k, k, variant=call)
    if variant is fl.causal:
        want = witness(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), bottom_right(9, 9))[0].transpose(1, 2)
        got = fl.attention(q, k, k, variant=variant, layout="BTHD")
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        got = fl.attention(q, k, k, variant=variant, layout="BHTD")  # this is meant: four rows without a key
        torch.testing.assert_close(got.double(), witness(q, k, k, bottom_right(6, 2))[0], rtol=1e-4, atol=1e-5)
        assert (got[:, :, :4] == 0).all()
        assert (fl.attention(q, k, k, variant=variant, layout="BHTD", return_lse=True)[1][..., :4] == -torch.inf).all()


def test_other_forms_keep_the_reading_of_torch():
    q, k = torch.randn(2, 9, 6, 16), torch.randn(2, 9, 2, 16)
    forms = {
        "no mask": fl.full,
        "no rows without keys": fl.sliding_window(2),
        "torch's own causal": fl.from_flex(mask_mod=lambda b, h, i, j: i >= j),
        "by values": fl.custom_mask(torch.arange(6)[:, None].expand(6, 2) > 3),  # whose first rows see nothing
    }
    kept = {
        "no rows without keys": torch.arange(2) >= torch.arange(6)[:, None] - 4 - 2,
        "torch's own causal": torch.ones(6, 2, dtype=torch.bool).tril(),
        "by values": torch.arange(6)[:, None].expand(6, 2) > 3,
    }
    for name, variant in forms.items():
        got = fl.attention(q, k, k, variant=variant)
        torch.testing.assert_close(got.double(), witness(q, k, k, kept.get(name))[0], rtol=1e-4, atol=1e-5)
    for n, m in ((2, 6), (6, 6)):
        q, k = torch.randn(2, 4, n, 16), torch.randn(2, 2, m, 16)
        torch.testing.assert_close(
            fl.attention(q, k, k, causal=True).double(), witness(q, k, k, bottom_right(n, m))[0], rtol=1e-4, atol=1e-5
        )
    q, k = torch.randn(6, 4, 16), torch.randn(2, 2, 16)  # 3-D is [tokens, heads, dim] and nothing else
    assert (fl.attention(q, k, k, causal=True)[:4] == 0).all()


def test_causal_is_one_more_part_and_repeats():
    q, k, v = torch.randn(7, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    cap = fl.softcap(3.0)
    assert torch.equal(fl.attention(q, k, v, causal=True), fl.attention(q, k, v, variant=fl.causal))
    assert torch.equal(fl.attention(q, k, v, causal=False), fl.attention(q, k, v))
    both = fl.attention(q, k, v, variant=cap, causal=True)
    assert torch.equal(both, fl.attention(q, k, v, variant=cap & fl.causal))
    function._recent.clear()
    already = fl.causal & cap
    for _ in range(3):
        assert torch.equal(fl.attention(q, k, v, variant=cap, causal=True), both)
        assert torch.equal(fl.attention(q, k, v, variant=already, causal=True), both)
    assert len({call[0] for call in function._recent.calls}) == 2


@pytest.mark.parametrize("value", ["yes", 1, torch.tensor(True)])
def test_causal_is_true_or_false(value):
    q = torch.randn(3, 2, 8)
    with pytest.raises(TypeError, match=r"causal=.*give True or False"):
        fl.attention(q, q, q, causal=value)


@pytest.mark.parametrize("dims", [3, 4])
def test_out_is_where_the_result_goes(dims):
    shape = (2,) if dims == 4 else ()
    for n, m in ((5, 9), (5, 9), (4, 9)):
        q, k, v = (torch.randn(*shape, *x) for x in ((4, n, 16), (2, m, 16), (2, m, 24)))
        if dims == 3:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        want = fl.attention(q, k, v, return_lse=True)
        for lse in (False, True, False):
            out = torch.full(want[0].shape, torch.nan)
            got = fl.attention(q, k, v, out=out, return_lse=lse)
            assert (got[0] if lse else got) is out
            assert torch.equal(out, want[0])
            assert not lse or torch.equal(got[1], want[1])
    with pytest.raises(ValueError, match=r"out has shape \(1, 2\): must be .*24\), q's form"):
        fl.attention(q, k, v, out=torch.empty(1, 2))
    with pytest.raises(TypeError, match="out is str"):
        fl.attention(q, k, v, out="x")
    with pytest.raises(ValueError, match="shares memory"):
        fl.attention(q, k, k, out=q)


FOREIGN = {
    "is_causal": (True, "causal=True"),
    "scale": (1.0, "sm_scale="),
    "softmax_scale": (1.0, "sm_scale="),
    "attn_mask": (None, "custom_mask"),
    "dropout_p": (0.0, "inference"),
    "enable_gqa": (True, "groups of query heads"),
    "window_size": ((3, 0), "sliding_window"),
    "softcap": (3.0, r"fl\.softcap"),
    "block_mask": (None, "from_flex"),
    "varian": (fl.causal, "variant="),
    "nonsense": (1, "one of variant, causal"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_arguments_of_other_libraries_are_answered(name):
    value, hint = FOREIGN[name]
    q = torch.randn(3, 2, 8)
    with pytest.raises(TypeError, match=f"no argument '{name}'.*{hint}"):
        fl.attention(q, q, q, **{name: value})


def test_a_fourth_argument_by_place():
    q = torch.randn(3, 2, 8)
    with pytest.raises(TypeError, match=r"Tensor was given as a fourth.*variant=fl.custom_mask\(mask\)"):
        fl.attention(q, q, q, torch.ones(3, 3, dtype=torch.bool))


def test_layouts_have_two_names():
    q = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"layout='NHD'.*BHTD.*BTHD"):
        fl.attention(q, q, q, layout="NHD")
    with pytest.raises(ValueError, match="layout='BTHD' is for 4-D"):
        fl.attention(q[0], q[0], q[0], layout="BTHD")


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_do_is_done_as_sdpa_does(causal):
    sizes = itertools.product((0, 2), (0, 1, 5), (0, 3, 7))
    for requests, n, m in sizes:
        q, k, v = torch.randn(requests, 4, n, 16), torch.randn(requests, 2, m, 16), torch.randn(requests, 2, m, 24)
        if causal and n > m > 0 and requests:
            continue  # the form that needs a name
        want = SDPA(q, *(x.repeat_interleave(2, 1) for x in (k, v)), attn_mask=bottom_right(n, m) if causal else None)
        for _ in range(2):
            got, lse = fl.attention(q, k, v, causal=causal, return_lse=True)
            torch.testing.assert_close(got, want.nan_to_num(0.0), rtol=1e-4, atol=1e-5)
            assert lse.shape == got.shape[:-1]
            assert m or (lse == -torch.inf).all()
            again = fl.attention(q, k, v, causal=causal)
            assert torch.equal(again, got)
            out = torch.full_like(got, torch.nan)
            assert torch.equal(fl.attention(q, k, v, causal=causal, out=out), got)
        if requests:
            flat = fl.attention(*(x[0].transpose(0, 1) for x in (q, k, v)), causal=causal)
            torch.testing.assert_close(flat, got[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_plans_of_nothing():
    heads = fl.HeadShape(4, 2, 16)
    for variant in (fl.causal, fl.sink(torch.randn(4)), fl.sigmoid()):
        attn = fl.Attention(heads, variant=variant, dtype=torch.float32, device="cpu", layout="NHD")
        plan = attn.plan(fl.Batch([2, 2], kv=fl.DenseKV(2, 0)))
        kv = torch.randn(2, 0, 2, 16), torch.randn(2, 0, 2, 16)
        out = torch.full((6, 4, 16), 7.0)
        plan.run(torch.randn(6, 4, 16), kv, out=out)
        assert (out[:4] == 0).all()
        assert (out[4:] == 7).all()
        plan.update(fl.Batch([2, 2], kv=fl.DenseKV(2, 3)))
        kv = torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
        assert plan.run(torch.randn(4, 4, 16), kv).abs().sum() > 0
        plan.update(fl.Batch([], kv=fl.DenseKV(0, 3)))
        assert plan.run(torch.randn(0, 2, 4, 16), (kv[0][:0], kv[1][:0])).shape == (0, 2, 4, 16)
        with pytest.raises(ValueError, match="0 requests"):
            plan.run(torch.randn(1, 2, 4, 16), (kv[0][:0], kv[1][:0]))


# --- tensors without memory of their own ------------------------------------------------------------------------------


def inputs(dims):
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    return (q, k, k) if dims == 4 else (q[0].transpose(0, 1), k[0].transpose(0, 1), k[0].transpose(0, 1))


@pytest.mark.parametrize("dims", [3, 4])
def test_fake_tensors_give_fake_results(dims):
    q, k, v = inputs(dims)
    for _ in range(2):
        real = fl.attention(q, k, v, causal=True, return_lse=True)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        for _ in range(2):
            out, lse = fl.attention(*fakes, causal=True, return_lse=True)
            assert (out.shape, out.stride(), out.dtype) == (real[0].shape, real[0].stride(), real[0].dtype)
            assert (lse.shape, lse.dtype) == (real[1].shape, real[1].dtype)
            assert fl.attention(*fakes, causal=True).shape == real[0].shape
    assert fl.attention(*fakes, causal=True).shape == real[0].shape  # outside of the mode, too


def test_fake_tensors_of_a_plan():
    q, k, v = inputs(3)
    attn = fl.Attention(fl.HeadShape(4, 2, 16), dtype=torch.float32, device="cpu")
    plan = attn.plan(fl.Batch([6], kv=fl.RaggedKV([6])))
    plan.run(q, (k, v))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert plan.run(fakes[0], (fakes[1], fakes[2])).shape == q.shape
        out, lse = plan.run(fakes[0], (fakes[1], fakes[2]), return_lse=True)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:2])


@pytest.mark.parametrize("tracing", ["real", "fake"])
@pytest.mark.parametrize("dims", [3, 4])
def test_a_graph_of_make_fx_computes_anew(dims, tracing):
    first, second = inputs(dims), inputs(dims)
    fl.attention(*first, causal=True)
    graph = make_fx(lambda q, k, v: fl.attention(q, k, v, causal=True) * 2, tracing_mode=tracing)(*first)
    for q, k, v in (first, second):
        torch.testing.assert_close(graph(q, k, v), fl.attention(q, k, v, causal=True) * 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_cannot_be_read_are_refused_in_words():
    q = torch.randn(2, 4, 6, 16)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.randn(3, 4, 16), torch.randn(5, 4, 16)], layout=layout)
        for _ in range(2):
            with pytest.raises(TypeError, match=r"q is a nested tensor.*RaggedKV"):
                fl.attention(nested, nested, nested)
            with pytest.raises(TypeError, match="k is a nested tensor"):
                fl.attention(q, nested, nested)
    with pytest.raises(ValueError, match="device meta: flashloom computes on cpu and cuda"):
        fl.attention(*(x.to("meta") for x in inputs(3)))
    negative = torch.complex(q, q).conj().imag
    assert negative.is_neg()
    fl.attention(q, q, q)
    for i in range(3):
        given = [negative if j == i else q for j in range(3)]
        with pytest.raises(TypeError, match=rf"{'qkv'[i]} is a view that negates.*resolve_neg"):
            fl.attention(*given)
        fl.attention(*(x.resolve_neg() for x in given))


def test_under_autocast_dtypes_are_those_of_the_tensors():
    q, k, v = inputs(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert fl.attention(q, k, v).dtype == torch.float32


COMPILED = {
    "causal": (False, {"causal": True}),
    "both": (False, {"causal": True, "variant": fl.softcap(3.0)}),
    "layout": (True, {"layout": "BTHD"}),
    "all": (True, {"layout": "BTHD", "causal": True, "variant": fl.softcap(3.0), "return_lse": True}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole(name):
    tokens_first, options = COMPILED[name]
    torch._dynamo.reset()
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16)
    if tokens_first:
        q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()

    def call(q, k):
        return fl.attention(q, k, k, **options)

    def into(q, k):
        out = torch.empty_like(q)
        fl.attention(q, k, k, out=out, **options)
        return out

    for one in (call, into):
        compiled = torch.compile(one, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(q, k), one(q, k))
            q, k = torch.randn_like(q), torch.randn_like(k)
    torch._dynamo.reset()
    graph = torch.compile(lambda q, k: fl.attention(q, k, k, causal=True), fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match='layout="BTHD"'):
        graph(torch.randn(1, 4, 9, 16), torch.randn(1, 2, 3, 16))
