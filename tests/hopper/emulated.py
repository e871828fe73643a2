"""The Hopper kernel on an emulated GPU against the definition; `test_emulated.py` runs this file with
TRITON_INTERPRET=1."""

import pytest
import torch
from tests.hopper.drawn import drawn
from tests.hopper.emulator.language import gl
from tests.hopper.emulator.launch import PROCESSORS, Emulated, install
from tests.hopper.strided import check_views
from tests.lower.reaching import KINDS, reaching
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
from flashloom.attention import hopper_executor
from flashloom.attention.kernels.hopper import chunks, consume, load, rows, schedule, transpose
from flashloom.attention.reads import Sizes
from flashloom.attention.reference import attention_reference

G = H(4, 1, 128)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    install(monkeypatch)


class Warm(fl.Variant):
    """A query transform that looks at no other element of the row."""

    gain: fl.PerHead

    def query_transform(self, q, at):
        return q * self.gain[at.q_head] * torch.log2(at.q_pos + 2.0)


def warm(case, device):
    return Warm(gain=torch.rand(case.heads.q_heads) + 0.5) & fl.causal


def low_cap(case, device):
    return fl.softcap(0.3) & fl.causal


CASES = [
    Case([1, 2, 3, 129], [1, 2, 3, 129], H(4, 2, 128), BF16, kind="ragged", variant=causal),
    Case([130, 7, 0, 60], [20, 300, 0, 60], H(4, 2, 128), F16, kind="ragged", variant=causal),
    Case([150, 70], [150, 230], H(2, 2, 128), BF16, kind="dense", variant=causal),
    Case([30, 40, 70], [130, 204, 71], G, F16, page_size=8, variant=causal),
    Case([30, 100], [30, 150], H(4, 1, 128), BF16, page_size=48, layout="HND", variant=gemma),
    Case([30, 50], [133, 250], H(4, 1, 128), BF16, page_size=16, variant=alibi, on_device=True),
    Case([30, 50], [30, 100], H(8, 2, 64), BF16, page_size=16, variant=sinks),
    Case([30, 50], [30, 100], H(2, 1, 256), F16, kind="ragged", variant=causal),
    Case([30, 50], [30, 100], H(2, 2, 192, 128), BF16, kind="ragged", variant=causal),
    Case([30], [90], H(8, 4, 80), BF16, kind="ragged", variant=holes),
    Case([90], [90], G, BF16, kind="ragged", variant=causal, sm_scale=-0.1),
    Case([30, 60], [30, 150], G, BF16, kind="ragged", variant=sinks, partial=True),
    Case([30], [30], H(5, 1, 128), BF16, page_size=16, odd_strides=True, variant=causal),
    Case([30, 50], [30, 100], H(4, 2, 256), BF16, page_size=16, variant=causal),
    Case([30, 50], [30, 100], H(4, 2, 192, 128), F16, page_size=32, variant=causal),
    Case([30, 50], [30, 100], H(4, 2, 128, 64), BF16, page_size=16, layout="HND"),
    Case([30, 40, 1], [30, 130, 77], G, BF16, page_size=1, variant=causal),
    Case([30, 26], [130, 71], H(8, 4, 80), BF16, page_size=4, layout="HND", variant=gemma),
    Case([30, 26], [130, 71], H(8, 2, 256), BF16, page_size=20, variant=causal),
    Case([130, 1], [600, 129], H(4, 2, 128), F16, page_size=3, variant=causal),
    Case([60, 0, 3], [700, 0, 3], H(2, 1, 192, 128), BF16, page_size=2, layout="HND", variant=sinks),
    Case([1, 2, 191, 193, 64], [1, 200, 191, 500, 64], H(2, 2, 64), F16, kind="ragged"),
    Case([70, 30], [70, 200], G, BF16, kind="ragged", variant=documents),
    Case([30, 50], [30, 100], G, F16, kind="ragged", variant=prefix),
    Case([30, 50], [30, 100], G, BF16, kind="ragged", variant=key_bias),
    Case([30, 50], [30, 100], G, BF16, page_size=16, variant=warm),
    Case([30, 50], [30, 100], G, F16, kind="ragged", variant=low_cap),
    Case([60, 1, 1, 2], [60, 400, 300, 500], G, BF16, page_size=16, variant=causal),
    Case([30] * 3, [30, 100, 31], H(4, 2, 128), BF16, kind="dense", layout="HND", variant=causal, by_request=True),
    Case([40] * 3, [300, 40, 0], H(4, 2, 128), F16, page_size=16, variant=sinks, by_request=True),
    Case([70] * 2, [200, 129], H(2, 2, 64), BF16, kind="ragged", by_request=True, partial=True),
]
BYTES = [
    Case([130, 7, 0, 60], [140, 300, 0, 60], H(4, 2, 128), E4M3, kind="ragged", variant=causal),
    Case([150, 70], [150, 230], H(2, 2, 128), E4M3, kind="dense", scales="head"),
    Case([30, 40, 70], [130, 204, 71], G, E4M3, page_size=8, variant=causal, scales="one"),
    Case([30, 100], [30, 150], H(4, 1, 128), E4M3, page_size=48, layout="HND", variant=gemma, scales="head"),
    Case([30, 50], [133, 250], H(8, 2, 64), E4M3, page_size=16, variant=alibi, on_device=True),
    Case([30, 60], [30, 150], H(2, 2, 128, 64), E4M3, kind="ragged", variant=sinks, scales="head"),
    Case([30, 40, 1], [30, 130, 77], H(8, 4, 80), E4M3, page_size=4, variant=causal, scales="head"),
    Case([90], [90], G, E4M3, kind="ragged", variant=holes, partial=True),
    Case([60] * 2, [300, 129], G, E4M3, page_size=16, variant=causal, by_request=True),
    Case([200], [500], H(8, 4, 80), E4M3, page_size=4, variant=causal),  # a consumer has no rows of the last tile
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case):
    check(case, "cpu", "hopper")


@pytest.mark.parametrize("case", BYTES, ids=str)
def test_bytes_against_reference(case):
    check(case, "cpu", "hopper")


@pytest.fixture
def split(monkeypatch):
    """Keys are cut wherever two programs can share them."""
    monkeypatch.setattr(hopper_executor.sizes_of, "LEAST", 1)
    monkeypatch.setattr(hopper_executor, "MERGE", 8.0)


@pytest.mark.parametrize("seed", range(20))
def test_split_keys_against_reference(seed, split):
    check(drawn(seed, 700), "cpu", "hopper")


@pytest.mark.parametrize("window", [None, 100, 300])
def test_ranges_are_joined(window, split):
    """Keys are cut, updates change how, and the counters of ranges are zero again; of windows, few tiles are left."""
    heads, generator = H(4, 2, 128), torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(n, h, 128, dtype=BF16, generator=generator) for n, h in ((90, 4), (1400, 2), (1400, 2)))
    variant = fl.causal if window is None else fl.causal & fl.sliding_window(window)
    attn = fl.Attention(heads, variant=variant, dtype=BF16, device="cpu")
    pieces = []
    with dispatch.only("hopper"):
        plan = attn.plan(fl.Batch([60], kv=fl.RaggedKV([1400])), reserve=fl.Reserve(requests=3, tokens=90))
    for q_lens, kv_lens in ([[60], [1400]], [[20, 5, 64], [700, 0, 600]], [[3], [100]], [[9], [1000]]):
        batch = fl.Batch(q_lens, kv=fl.RaggedKV(kv_lens))
        plan.update(batch)
        tokens = sum(q_lens)
        out = torch.full((tokens, 4, 128), float("nan"), dtype=BF16)
        plan.run(q[:tokens], (k[: sum(kv_lens)], v[: sum(kv_lens)]), out=out)
        want, _ = attention_reference(q[:tokens], k, v, batch, variant)
        assert float((out.double() - want).norm() / want.norm()) < 8e-3
        views = plan._executor._buffers.views
        assert not views["arrivals"].any()
        items = views["items"].view(-1, 16)
        pieces.append(int(items[items[:, 0] >= 0][:, 10].max()))
    assert pieces[0] > 1
    assert pieces[2] == 1


def test_batch_invariant_plans_cut_nothing(split):
    """A request's bits are the same whatever else is in the batch."""
    q, k, v = (torch.randn(n, h, 128, dtype=BF16) for n, h in ((90, 4), (1400, 2), (1400, 2)))
    attn = fl.Attention(H(4, 2, 128), variant=fl.causal, dtype=BF16, device="cpu", batch_invariant=True)
    outs = []
    for q_lens, kv_lens in ([[60], [900]], [[60, 30], [900, 500]]):
        with dispatch.only("hopper"):
            plan = attn.plan(fl.Batch(q_lens, kv=fl.RaggedKV(kv_lens)))
        outs.append(plan.run(q[: sum(q_lens)], (k[: sum(kv_lens)], v[: sum(kv_lens)]))[:60])
        items = plan._executor._buffers.views["items"].view(-1, 16)
        assert (items[items[:, 0] >= 0][:, 10] == 1).all()
    assert torch.equal(*outs)


def test_a_plan_says_that_weights_are_rounded():
    batch = fl.Batch([300], kv=fl.RaggedKV([300]))
    for dtype in (BF16, E4M3):
        with dispatch.only("hopper"):
            plan = fl.Attention(H(4, 2, 128), variant=fl.causal, dtype=dtype, device="cpu").plan(batch)
        assert ("weights are rounded to it" in plan.explain()) == (dtype == E4M3)


def test_a_plan_follows_updates():
    """Also where results go to other addresses, and where fewer tokens come than are reserved."""
    q, k, v = (torch.randn(n, h, 128, dtype=BF16) for n, h in ((260, 4), (600, 2), (600, 2)))
    attn = fl.Attention(H(4, 2, 128), variant=fl.causal, dtype=BF16, device="cpu")
    with dispatch.only("hopper"):
        plan = attn.plan(fl.Batch([200, 60], kv=fl.RaggedKV([300, 60])), reserve=fl.Reserve(requests=4, tokens=260))
    for q_lens, kv_lens in ([[200, 60], [300, 60]], [[3, 100], [400, 100]], [[65], [600]]):
        batch = fl.Batch(q_lens, kv=fl.RaggedKV(kv_lens))
        plan.update(batch)
        tokens = sum(q_lens)
        out = torch.full((tokens, 4, 128), float("nan"), dtype=BF16)
        plan.run(q[:tokens], (k[: sum(kv_lens)], v[: sum(kv_lens)]), out=out)
        want, _ = attention_reference(q[:tokens], k, v, batch, fl.causal)
        assert float((out.double() - want).norm() / want.norm()) < 8e-3


@pytest.mark.parametrize("dtype", [torch.float32, F16])
def test_out_of_another_dtype(dtype):
    batch = fl.Batch([70, 30], kv=fl.RaggedKV([70, 100]))
    q, k, v = (torch.randn(n, h, 128, dtype=BF16) for n, h in ((100, 4), (170, 2), (170, 2)))
    with dispatch.only("hopper"):
        plan = fl.Attention(H(4, 2, 128), variant=fl.causal, dtype=BF16, device="cpu").plan(batch)
    out = torch.full((100, 4, 128), float("nan"), dtype=dtype)
    plan.run(q, (k, v), out=out)
    want, _ = attention_reference(q, k, v, batch, fl.causal)
    assert float((out.double() - want).norm() / want.norm()) < 8e-3


def test_pages_that_are_views():
    check_views("cpu")


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("heads", [1, 8, 12])
def test_every_tile_has_one_place(heads, last):
    for items in (1, 2, 7, 30):
        for together in (1, 3, 4, heads):
            places = [schedule.place(tile, items * heads, together, heads, last) for tile in range(items * heads)]
            assert sorted((int(i), int(h)) for i, h in places) == [(i, h) for i in range(items) for h in range(heads)]


def test_counters_are_left_at_zero():
    with dispatch.only("hopper"):
        plan = fl.Attention(H(4, 2, 128), dtype=BF16, device="cpu").plan(fl.Batch([300, 1], kv=fl.RaggedKV([300, 50])))
    plan.run(torch.randn(301, 4, 128, dtype=BF16), torch.randn(2, 350, 2, 128, dtype=BF16).unbind())
    assert not plan._executor._counter.any()
    assert plan._executor._grid == PROCESSORS


# --- that the emulator sees what is wrong ---


def broken(monkeypatch, replaced, **case):
    """Run a case with functions of the kernel replaced; answers what the check says."""
    for name, replacement in replaced.items():
        for module in (chunks, consume, load, rows, transpose):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    given = {"q_lens": [60, 50], "kv_lens": [400, 300], "heads": H(4, 2, 128), "dtype": BF16, "page_size": 16} | case
    with pytest.raises(AssertionError) as caught:
        check(Case(**given), "cpu", "hopper")
    return str(caught.value)


def test_a_copy_that_is_not_waited_for(monkeypatch):
    assert broken(monkeypatch, {"await_copy": lambda *_: None}, kv_lens=[384, 256])  # poison, or phases that run apart


def test_a_missing_fence(monkeypatch):
    assert "without a fence" in broken(monkeypatch, {"fence_async_shared": lambda: None})


@pytest.mark.parametrize("page_size", [1, 4])
def test_rows_that_are_not_made_visible(monkeypatch, page_size):
    monkeypatch.setattr(rows, "fence_async_shared", lambda: None)
    with pytest.raises(AssertionError, match="without a fence"):
        check(Case([60], [400], H(2, 1, 128), BF16, page_size=page_size), "cpu", "hopper")


def test_rows_that_are_announced_too_early(monkeypatch):
    real = rows.copy_rows_wait
    assert broken(monkeypatch, {"copy_rows_wait": lambda left: real(left + 1)}, page_size=3)


def test_rows_of_another_page(monkeypatch):
    real = rows.load_rows
    assert broken(monkeypatch, {"load_rows": lambda *a: real(*a[:3], a[3] * 0, *a[4:])}, page_size=4)


def test_a_transposer_without_a_fence(monkeypatch):
    monkeypatch.setattr(transpose, "fence_async_shared", lambda: None)
    with pytest.raises(AssertionError, match="without a fence"):
        check(Case([60], [400], H(2, 1, 128), E4M3, page_size=16), "cpu", "hopper")


def test_a_consumer_without_rows_that_keeps_its_turns(monkeypatch):
    assert "deadlock" in broken(monkeypatch, {"keep_turns": lambda *_: None}, q_lens=[20, 10])


def test_a_consumer_that_keeps_its_turn(monkeypatch):
    assert "deadlock" in broken(monkeypatch, {"leave": lambda *_: None})


def test_a_range_in_the_place_of_another(monkeypatch, split):
    real = consume.joined
    monkeypatch.setattr(consume, "joined", lambda *a: real(*a[:6], a[6] * 0, *a[7:]))
    assert broken(monkeypatch, {}, q_lens=[5, 5])


def test_ranges_that_overlap(monkeypatch, split):
    real = schedule.own_range

    def longer(item, splits, split, begin, end, *rest):
        splits, low, high = real(item, splits, split, begin, end, *rest)
        return splits, low, gl.minimum(high + 1, end)

    monkeypatch.setattr(schedule, "own_range", longer)
    assert broken(monkeypatch, {}, q_lens=[5, 5])


def test_a_stage_that_is_released_before_it_was_read(monkeypatch):
    real = consume.warpgroup_mma_wait
    said = broken(monkeypatch, {"warpgroup_mma_wait": lambda left, deps: real(left + 1, deps)})
    assert "NaN in out" in said or "before its products" in said


def test_an_arrival_too_many(monkeypatch):
    real = load.tma_load

    def twice(source, where, full, to):
        real(source, where, full, to)
        full.add(1)

    assert "more arrivals" in broken(monkeypatch, {"tma_load": twice})


def test_keys_of_another_page(monkeypatch):
    real = load.tma_load

    def shifted(source, where, full, to):
        real(source, [where[0] + 1, *where[1:]] if len(where) > 3 else where, full, to)

    assert broken(monkeypatch, {"tma_load": shifted})


def test_memory_that_is_no_argument(monkeypatch):
    monkeypatch.setattr(Emulated, "allowed", lambda self, q, k, v, out, lse: (q, k, out, lse))
    assert "no memory of the call" in broken(monkeypatch, {})


@pytest.mark.parametrize("kind", KINDS)
def test_no_index_reaches_outside_of_a_field(kind, monkeypatch):
    """The emulated memory knows its bounds."""
    monkeypatch.setattr(Sizes, "_check", lambda *_: None)  # as with lengths that only the device knows
    check(Case([20, 5], [20, 140], H(2, 1, 64), F16, kind="ragged", variant=reaching(kind)), "cpu", "hopper")
