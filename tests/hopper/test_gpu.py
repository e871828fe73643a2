"""The Hopper backend on a GPU against the definition, and what a plan promises. `make test-gpu`."""

import random

import pytest
import torch
from tests.attention.hidden import Hidden
from tests.hopper.drawn import drawn
from tests.hopper.strided import check_views
from tests.triton.cases import (
    BF16,
    E4M3,
    F16,
    Case,
    H,
    alibi,
    causal,
    check,
    documents,
    gemma,
    holes,
    key_bias,
    prefix,
    sinks,
)

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.reference import attention_reference

HERE = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="needs a GPU of compute capability 9.0")]
G = H(32, 8, 128)
MASKS = ("causal", "window", "band", "heads", "every", "documents", "custom")
HOOKS = ("", "", "softcap", "alibi", "bias", "output")


class Warm(fl.Variant):
    """A query transform that looks at no other element of the row."""

    gain: fl.PerHead

    def query_transform(self, q, at):
        return q * self.gain[at.q_head] * torch.log2(at.q_pos + 2.0)


def warm(case, device):
    return Warm(gain=torch.rand(case.heads.q_heads, device=device) + 0.5) & fl.causal


def low_cap(case, device):
    """Most logits lie beyond the cap."""
    return fl.softcap(0.3) & fl.causal


def steep(case, device):
    return fl.alibi(torch.linspace(-2, 3, case.heads.q_heads, device=device)) & fl.causal


CASES = [
    Case([1, 2, 3, 129, 127, 64, 65, 5], [1, 2, 3, 129, 127, 64, 65, 5], G, BF16, kind="ragged", variant=causal),
    Case([500, 7, 0, 260], [100, 900, 0, 260], G, F16, kind="ragged", variant=causal),
    Case([400, 700, 150], [400, 30000, 20000], H(12, 12, 128), BF16, kind="ragged", variant=causal),  # heads in turns
    Case([600], [20000], H(12, 3, 128), F16, kind="ragged"),
    Case([1500, 700], [1500, 2300], H(16, 16, 128), BF16, kind="dense", variant=causal),
    Case([300, 40, 700], [1300, 2040, 701], G, F16, page_size=8, variant=causal),
    Case([300, 1000], [300, 1500], G, BF16, page_size=48, layout="HND", variant=gemma),
    Case([30, 50, 100], [333, 1500, 5000], G, BF16, page_size=16, variant=alibi, on_device=True),
    Case([90, 50], [333, 1500], H(24, 4, 128), BF16, page_size=256),
    Case([300, 500], [300, 1000], H(8, 2, 64), BF16, page_size=16, variant=sinks),
    Case([300, 500], [300, 1000], H(8, 2, 256), F16, kind="ragged", variant=causal),
    Case([300, 500], [300, 1000], H(8, 8, 192, 128), BF16, kind="ragged", variant=causal),
    Case([300], [900], H(8, 4, 80), BF16, kind="ragged", variant=holes),
    Case([900], [900], G, BF16, kind="ragged", variant=causal, sm_scale=-0.1),
    Case([300, 600], [300, 1500], G, BF16, kind="ragged", variant=sinks, partial=True),
    Case([300], [300], H(5, 1, 128), BF16, page_size=16, odd_strides=True, variant=causal),
    Case([300, 500], [300, 1000], H(8, 2, 256), BF16, page_size=16, variant=causal),
    Case([300, 500], [300, 1000], H(8, 4, 192, 128), F16, page_size=32, variant=causal),
    Case([300, 500], [300, 1000], H(8, 2, 128, 64), BF16, page_size=16, layout="HND"),
    Case([300, 500], [300, 1000], G, BF16, page_size=128, layout="HND", variant=causal),
    Case([300, 40, 1], [300, 1300, 77], G, BF16, page_size=1, variant=causal),
    Case([300, 700], [1300, 701], G, F16, page_size=3, variant=causal),
    Case([300, 260], [1300, 701], H(8, 4, 80), BF16, page_size=4, layout="HND", variant=gemma),
    Case([300, 260], [1300, 701], H(8, 2, 256), BF16, page_size=20, variant=causal),
    Case([300, 500], [300, 1000], H(8, 2, 64), BF16, page_size=12),
    Case([300, 500], [300, 1000], H(8, 2, 64), BF16, kind="ragged"),
    Case([1, 2, 191, 193, 64], [1, 200, 191, 500, 64], H(8, 8, 64), F16, kind="ragged"),
    Case([700, 300], [700, 2000], G, BF16, kind="ragged", variant=documents),
    Case([90, 50], [700, 2000], G, BF16, page_size=16, variant=documents),
    Case([300, 500], [300, 1000], G, F16, kind="ragged", variant=prefix),
    Case([300, 500], [300, 1000], G, BF16, kind="ragged", variant=key_bias),
    Case([300, 500], [300, 1000], G, BF16, page_size=16, variant=warm),
    Case([40, 60], [300, 1000], H(16, 4, 64), F16, kind="ragged", variant=warm),
    Case([300, 500], [300, 1000], G, F16, kind="ragged", variant=low_cap),
    Case([40, 60], [300, 1000], H(16, 4, 64), BF16, page_size=16, variant=low_cap, sm_scale=-0.2),
    Case([300, 500], [300, 1000], H(16, 16, 128), F16, kind="ragged", variant=steep),
    Case([40, 60], [300, 1000], G, BF16, page_size=16, variant=steep, sm_scale=-0.2),
    Case([600, 1, 1, 1, 2], [600, 4000, 300, 1, 5000], G, BF16, page_size=16, variant=causal),
    Case([600, 1, 1], [600, 4000, 300], G, BF16, page_size=16, variant=causal, on_device=True),
    Case([300] * 3, [300, 1000, 301], G, BF16, kind="dense", layout="HND", variant=causal, by_request=True),
    Case([40] * 5, [300, 40, 1000, 0, 77], G, F16, page_size=16, variant=sinks, by_request=True),
    Case([129] * 2, [200, 129], H(8, 2, 256), BF16, kind="ragged", by_request=True, partial=True),
]
BYTES = [
    Case([300, 1000], [300, 1000], G, E4M3, kind="ragged", variant=causal),
    Case([1, 2, 3, 129, 127, 64, 65, 5], [1, 2, 3, 129, 127, 64, 65, 5], G, E4M3, kind="ragged", variant=causal),
    Case([700] * 3, [2000] * 3, G, E4M3, kind="dense", scales="head"),
    Case([300, 5, 0, 80], [300, 0, 7, 200], G, E4M3, kind="ragged", variant=causal, scales="one"),
    Case([300, 1000], [300, 1500], G, E4M3, page_size=16, variant=causal, scales="head"),
    Case([300, 100], [333, 1500], G, E4M3, page_size=48, layout="HND", variant=gemma),
    Case([300, 40, 1], [300, 1300, 77], H(8, 4, 80), E4M3, page_size=4, variant=causal, scales="head"),
    Case([300, 600], [300, 1500], H(8, 2, 64), E4M3, kind="ragged", variant=alibi),
    Case([60, 40], [300, 1500], G, E4M3, page_size=64, variant=sinks, on_device=True),
    Case([300, 60], [300, 1500], H(8, 8, 128, 64), E4M3, kind="ragged", variant=sinks, partial=True),
    Case([600, 1, 1, 1, 2], [600, 4000, 300, 1, 5000], G, E4M3, page_size=16, variant=causal),
    Case([129] * 2, [200, 129], G, E4M3, kind="ragged", variant=causal, by_request=True),
]


@pytest.mark.parametrize("case", CASES + BYTES, ids=str)
def test_against_reference(case):
    print(check(case, "cuda", "hopper"))


def _error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, F16])
def test_out_of_another_dtype(dtype):
    batch = fl.Batch([300, 77], kv=fl.RaggedKV([300, 500]))
    q, k, v = (torch.randn(n, h, 128, device="cuda", dtype=BF16) for n, h in ((377, 32), (800, 8), (800, 8)))
    plan = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda").plan(batch)
    assert plan.executor == "hopper"
    out = torch.full((377, 32, 128), float("nan"), device="cuda", dtype=dtype)
    plan.run(q, (k, v), out=out)
    want, _ = attention_reference(q, k, v, batch, fl.causal)
    assert _error(out, want) < 5e-3


def test_update_and_replay():
    """A captured run follows updates within the reserve, also from device tensors in the graph."""
    cache = torch.randn(2, 400, 16, 8, 128, device="cuda", dtype=BF16)
    q = torch.randn(1024, 32, 128, device="cuda", dtype=BF16)
    out = torch.empty_like(q)

    def batch(q_lens, kv_lens):
        table = torch.randperm(400)[: sum(-(-n // 16) for n in kv_lens)].int()
        needs = torch.tensor([0, *[-(-n // 16) for n in kv_lens]]).cumsum(0)
        last = [n - (-(-n // 16) - 1) * 16 for n in kv_lens]
        return fl.Batch(q_lens, kv=fl.PageTable.from_csr(needs, table, last, page_size=16))

    first, second = batch([900, 100], [900, 2000]), batch([3, 500, 200], [1000, 500, 777])
    attn = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda")
    plan = attn.plan(first, reserve=fl.Reserve(requests=8, tokens=1024, pages=400))
    assert plan.executor == "hopper"
    plan.run(q, tuple(cache), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, tuple(cache), out=out)
    for now in (second, first, second):
        plan.update(now)
        out.fill_(float("nan"))
        graph.replay()
        tokens = now.tokens
        want, _ = attention_reference(q[:tokens], cache[0], cache[1], now, fl.causal)
        assert _error(out[:tokens], want) < 5e-3
        assert out[tokens:].isnan().all()


@pytest.mark.parametrize("seed", range(5))
def test_split_keys_against_reference(seed):
    check(drawn(seed, 20000), "cuda", "hopper")


@pytest.mark.parametrize("seed", range(2))
def test_split_keys_in_a_graph(seed):
    """A captured run follows updates with which the cut changes; out and lse, twice."""
    rng, page, requests, tokens = random.Random(seed), (1, 16)[seed], 3, 120
    variant, longest = (fl.causal, fl.causal & fl.sliding_window(3000))[seed], 30000
    pages = requests * -(-longest // page)
    k, v = torch.randn(2, pages, page, 8, 128, device="cuda", dtype=BF16)
    q = torch.randn(tokens, 32, 128, device="cuda", dtype=BF16)
    out, lse = torch.empty_like(q), torch.empty(tokens, 32, device="cuda")
    table = torch.randperm(pages).int().view(requests, -1)

    def batch():
        q_lens = [rng.randint(1, 40) for _ in range(requests)]
        kv_lens = [int(200 * 150 ** rng.random()) for _ in range(requests)]
        return fl.Batch(q_lens, kv=fl.PageTable.from_block_table(table, kv_lens, page_size=page))

    first = fl.Batch([40], kv=fl.PageTable.from_block_table(table[:1], [longest], page_size=page))
    attn = fl.Attention(G, variant=variant, dtype=BF16, device="cuda")
    plan = attn.plan(first, reserve=fl.Reserve(requests=requests, tokens=tokens, pages=pages))
    assert plan.executor == "hopper"
    assert "long keys split" in plan.explain()
    plan.run(q, (k, v), out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(q, (k, v), out=out, lse=lse)
    for now in (first, *(batch() for _ in range(5))):
        plan.update(now)
        results = []
        for _ in range(2):
            out.fill_(float("nan"))
            graph.replay()
            results.append((out[: now.tokens].clone(), lse[: now.tokens].clone()))
        want, want_lse = attention_reference(q[: now.tokens], k, v, now, variant)
        for got, got_lse in results:
            assert _error(got, want) < 8e-3
            assert float((got_lse.double() - want_lse).abs().max()) < 1e-4
        assert torch.equal(results[0][0], results[1][0])
        assert not plan._executor._buffers.views["arrivals"].any()


def test_batch_invariant_rows_do_not_depend_on_the_batch():
    """Also where the batch's other requests would have changed the kernel."""
    k, v = torch.randn(2, 60000, 8, 128, device="cuda", dtype=BF16)
    q = torch.randn(2500, 32, 128, device="cuda", dtype=BF16)
    attn = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda", batch_invariant=True)
    outs = []
    for others in ([], [(1, 5000)] * 3, [(2000, 30000)]):
        q_lens, kv_lens = [100, *(n for n, _ in others)], [20000, *(n for _, n in others)]
        plan = attn.plan(fl.Batch(q_lens, kv=fl.RaggedKV(kv_lens)))
        outs.append(plan.run(q[: sum(q_lens)], (k[: sum(kv_lens)], v[: sum(kv_lens)]))[:100])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_dispatch_says_why():
    attn = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda")
    decode = attn.plan(fl.Batch.decode(fl.RaggedKV([500] * 4)))
    assert decode.executor == "triton"
    assert "not hopper: queries are few" in decode.explain()
    assert "gluon sm90" in attn.plan(fl.Batch([2000], kv=fl.RaggedKV([2000]))).explain()
    batch = fl.Batch([2000], kv=fl.RaggedKV([2000]))
    narrow = fl.Attention(G, variant=fl.causal, dtype=E4M3, device="cuda").plan(batch)
    assert narrow.executor == "hopper"
    assert "weights are rounded to it" in narrow.explain()
    mixed = fl.Attention(G, variant=fl.causal, dtype=BF16, kv_dtype=E4M3, device="cuda")
    mixed = mixed.plan(batch)
    assert mixed.executor == "triton"
    assert "all bfloat16 or all float8_e4m3fn" in mixed.explain()
    rope = fl.rope(128, inv_freq=fl.rope_frequencies(128).cuda())
    turned = fl.Attention(G, variant=rope, dtype=BF16, device="cuda").plan(fl.Batch([99], kv=fl.RaggedKV([99])))
    assert "not hopper: key transforms" in turned.explain()


def test_kernel_that_cannot_be_built(monkeypatch):
    from flashloom.attention.kernels.hopper import asked

    def fail(*_):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(asked, "attend_kernel", fail)
    monkeypatch.setattr(dispatch, "_warned", set())
    attn = fl.Attention(G, variant=fl.causal, dtype=BF16, device="cuda")
    with pytest.warns(RuntimeWarning, match="passes over its hopper backend"):
        plan = attn.plan(fl.Batch([2000], kv=fl.RaggedKV([2000])))
    assert plan.executor == "triton"
    assert "PassManager" in plan.explain()


def test_pages_that_are_views():
    check_views("cuda")


@pytest.mark.parametrize("seed", range(24))
def test_hidden_keys(seed):
    """NaN and infinities that a mask hides; also where keys are cut into ranges."""
    types = [(E4M3, E4M3)] if seed % 4 == 3 else [(F16, F16), (BF16, BF16)]
    Hidden(
        seed + 7000, types, masks=MASKS, hooks=HOOKS, phases=("append", "prefill"), widths=(64, 80, 128), rows=200,
        longest=3000, device="cuda",
    ).check("hopper")  # fmt: skip
