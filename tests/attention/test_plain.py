"""Tensors whose elements do not lie in memory as they are: torch's own result, or a sentence; never what lies there."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import flashloom as fl

HEADS = fl.HeadShape(4, 2, 32)


def inputs(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, 20, 32, generator=draw) for h in (4, 2, 2)]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.fixture(params=["first", "repeated"])
def called(request) -> None:
    """Whether such calls were made before, so that this one could be taken for a repeat."""
    if request.param == "repeated":
        for _ in range(3):
            fl.attention(*inputs(), variant=fl.causal)


@pytest.mark.usefixtures("called")
def test_fake_tensors_have_fake_results() -> None:
    with FakeTensorMode() as mode:
        out, lse = fl.attention(*inputs(), variant=fl.causal, return_lse=True)
        assert out.shape == (2, 4, 20, 32)
        assert lse.shape == (2, 4, 20)
        assert lse.dtype is torch.float32
        fakes = inputs()
        assert fl.attention(*(x.bfloat16() for x in fakes), variant=fl.alibi(4)).dtype is torch.bfloat16
    assert type(fl.attention(*fakes, variant=fl.causal)) is type(fakes[0])
    real = inputs()
    with pytest.raises(Exception, match=r"(?i)fake"), mode:
        fl.attention(*real, variant=fl.causal)


@pytest.mark.usefixtures("called")
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operator(mode) -> None:
    graph = make_fx(lambda q, k, v: fl.attention(q, k, v, variant=fl.causal) * 2, tracing_mode=mode)(*inputs())
    assert any("flashloom" in str(node.target) for node in graph.graph.nodes)
    other = inputs(1)
    torch.testing.assert_close(graph(*other), sdpa(*other) * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("called")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_computes_each() -> None:
    q, k, v = (torch.stack([a, b]) for a, b in zip(inputs(), inputs(1)))
    out = torch.vmap(lambda *x: fl.attention(*x, variant=fl.causal))(q, k, v)
    torch.testing.assert_close(out, torch.stack([sdpa(*x) for x in zip(q, k, v)]), rtol=1e-4, atol=1e-5)
    out = torch.vmap(lambda x: fl.attention(x, k[0], v[0], variant=fl.causal))(q)
    torch.testing.assert_close(out, torch.stack([sdpa(x, k[0], v[0]) for x in q]), rtol=1e-4, atol=1e-5)
    bias = torch.randn(2, 4)
    given = inputs()
    with pytest.raises(TypeError, match=r"bias.*vmap"):
        torch.vmap(lambda bias: fl.attention(*given, variant=fl.from_flex(lambda s, b, h, i, j: s + bias[h])))(bias)


@pytest.mark.usefixtures("called")
def test_functionalize_and_counters() -> None:
    out = torch.func.functionalize(lambda *x: fl.attention(*x, variant=fl.causal))(*inputs())
    torch.testing.assert_close(out, sdpa(*inputs()), rtol=1e-4, atol=1e-5)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(fl.attention(*inputs(), variant=fl.causal), sdpa(*inputs()), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="no gradients"):
        torch.func.grad(lambda x: fl.attention(x, *inputs()[1:], variant=fl.causal).sum())(inputs()[0])


@pytest.mark.usefixtures("called")
def test_transforms_around_tensors_that_they_do_not_wrap() -> None:
    """What is made within functionalize has no memory, whatever it is made like."""
    given = inputs()
    attend = lambda _: fl.attention(*given, variant=fl.causal)  # noqa: E731
    torch.testing.assert_close(torch.func.functionalize(attend)(given[0]), sdpa(*given), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(attend)(given[0])[0], sdpa(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_plan_within_a_transform_says_so(repeated) -> None:
    attn = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    plan = attn.plan(fl.Batch(q_lens=[20], kv=fl.RaggedKV([20])))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in inputs())
    if repeated:
        for _ in range(3):
            plan.run(q, (k, v))
    for transform in (torch.func.functionalize, torch.vmap, torch.func.grad):
        for run in (lambda x: plan.run(x, (k, v)), lambda x: plan.run(q, (k, v)), lambda x: plan.run(q, (x, v))):
            with pytest.raises((RuntimeError, TypeError), match=r"torch\.vmap|no gradients"):
                transform(run)(q if transform is not torch.vmap else q[None])
    torch.testing.assert_close(make_fx(lambda x: plan.run(x, (k, v)))(q)(q), plan.run(q, (k, v)))


def negative(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view that negates, with an inner stride of 1."""
    found = torch._neg_view(-x)
    assert found.is_neg()
    assert torch.equal(found, x)
    return found


def odd(x: torch.Tensor) -> dict[str, torch.Tensor]:
    with FakeTensorMode():
        fake = torch.empty(x.shape, dtype=x.dtype)
    return {
        "resolve_neg": negative(x), "FakeTensor": fake, "meta": x.to("meta"), "sparse": x.to_sparse(),
        "zero tensor": torch._efficientzerotensor(x.shape),
    }  # fmt: skip


@pytest.mark.usefixtures("called")
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", ["resolve_neg", "sparse", "zero tensor", "meta"])
def test_attention_names_the_tensor(place, kind) -> None:
    given = inputs()
    given[place] = odd(given[place])[kind]
    words = "meta" if kind == "meta" else f"{'qkv'[place]} .*{kind}"
    with pytest.raises((TypeError, ValueError), match=words):
        fl.attention(*given, variant=fl.causal)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("kind", ["resolve_neg", "FakeTensor", "meta"])
@pytest.mark.parametrize("place", ["q", "k", "v", "out", "lse"])
def test_a_plan_names_the_tensor(place, kind, repeated) -> None:
    attn = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    plan = attn.plan(fl.Batch(q_lens=[20], kv=fl.RaggedKV([20])))
    given = {n: x[0].transpose(0, 1).contiguous() for n, x in zip("qkv", inputs())}
    given |= {"out": torch.zeros(20, 4, 32), "lse": torch.zeros(20, 4)}

    def run(q, k, v, out, lse):
        plan.run(q, (k, v), out=out, lse=lse)
        return out

    if repeated:
        for _ in range(3):
            run(**given)
            plan.run(given["q"], (given["k"], given["v"]), out=given["out"])
    given[place] = odd(given[place])[kind]
    with pytest.raises((TypeError, ValueError), match=f"{place} .*{kind}"):
        run(**given)
    if place != "lse":
        with pytest.raises((TypeError, ValueError), match=f"{place} .*{kind}"):
            plan.run(given["q"], (given["k"], given["v"]), out=given["out"])


@pytest.mark.parametrize("kind", ["resolve_neg", "FakeTensor", "zero tensor"])
def test_fields_and_captured_tensors_are_named(kind) -> None:
    slopes = odd(torch.ones(4))[kind]
    for name, variant in (("slopes", fl.alibi(slopes)), ("slopes", fl.from_flex(lambda s, b, h, i, j: s + slopes[h]))):
        with pytest.raises(TypeError, match=f"{name}.*{kind}"):
            fl.attention(*inputs(), variant=variant)


def test_append_names_the_tensor() -> None:
    cache = fl.PagedKVCache(layers=1, pages=4, page_size=16, heads=HEADS, dtype=torch.float32, device="cpu")
    given = [torch.randn(3, 2, 32) for _ in range(2)]
    for place in range(2):
        for kind in ("resolve_neg", "FakeTensor"):
            wrong = list(given)
            wrong[place] = odd(given[place])[kind]
            with pytest.raises(TypeError, match=f"{'kv'[place]} .*{kind}"):
                fl.append(cache[0], *wrong, torch.arange(3))
