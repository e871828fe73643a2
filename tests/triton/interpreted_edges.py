"""Batches at the edges of what a plan holds, in Triton's interpreter with every address checked; `test_interpreted.py`
runs this file with TRITON_INTERPRET=1."""

import itertools

import pytest
import torch
import triton.language as tl
from tests.lower.reaching import KINDS, reaching
from tests.triton.bounds import checked
from tests.triton.cases import BF16, E4M3, E5M2, F16, F32, I8, Case, H, alibi, causal, check, gemma, sinks, window
from triton.runtime.errors import InterpreterError

import flashloom as fl
import triton
from flashloom import dispatch
from flashloom.attention import triton_executor
from flashloom.attention.kernels.triton.config import Config
from flashloom.attention.kernels.triton.tiles import apart, stored
from flashloom.attention.reads import Sizes
from flashloom.attention.reference import attention_reference


@triton.jit
def copy(source, to, n, limit, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(to + lane, tl.load(source + lane, mask=lane < n, other=0), mask=lane < limit)


@triton.jit
def numbers_of_bytes(single, pairs, to, low_to, high_to):
    lane, half = tl.arange(0, 256), tl.arange(0, 128)
    tl.store(to + lane, stored(tl.load(single + lane), tl.float16, True))
    low, high = apart(tl.load(pairs + half), tl.uint8, tl.float16, True, False)
    tl.store(low_to + half, low)
    tl.store(high_to + half, high)


@pytest.fixture(autouse=True)
def addresses(monkeypatch):
    """Every address is checked."""
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    with checked() as counts:
        yield counts


def test_what_lies_beyond_a_tensor_is_found(addresses):
    whole = torch.arange(16, dtype=torch.int32)
    first, to = whole[:6], torch.empty(8, dtype=torch.int32)
    copy[(1,)](first, to, 6, 8, BLOCK=8)  # the lanes beyond are masked
    assert to.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert addresses == [1, 2]
    with pytest.raises(InterpreterError, match=r"load of int32 outside of its tensor: 1 of 7 lanes, .* 24 of 24"):
        copy[(1,)](first, to, 7, 8, BLOCK=8)
    with pytest.raises(InterpreterError, match=r"store of int32 outside of its tensor: 2 of 8 lanes, .* 24 of 24"):
        copy[(1,)](first, to[:6], 6, 8, BLOCK=8)
    with pytest.raises(InterpreterError, match="load"):  # what follows is another argument's
        copy[(1,)](first, whole[6:], 7, 8, BLOCK=8)


def test_every_byte_as_the_float8_number_it_is():
    """As on targets without that type: zeros with their sign, subnormals and NaN too."""
    every = torch.arange(256, dtype=torch.uint8)
    to, low, high = torch.empty(256, dtype=F16), torch.empty(128, dtype=F16), torch.empty(128, dtype=F16)
    numbers_of_bytes[(1,)](every, every.view(torch.int16), to, low, high)
    want = every.view(E4M3).half()
    for got, expected in ((to, want), (low, want[::2]), (high, want[1::2])):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit() & ~got.isnan(), expected.signbit() & ~expected.isnan())


G = H(8, 2, 32)
EDGES = [
    Case([1] * 5, [5, 300, 128, 129, 1], G, BF16, E4M3, page_size=16, on_device=True, variant=causal, scales="head"),
    Case([1] * 3, [257, 0, 31], G, BF16, E4M3, page_size=16, layout="HND"),
    Case([1], [200], G, BF16, E4M3, page_size=16),
    Case([1, 2], [130, 40], H(2, 1, 32, 112), BF16, E4M3, page_size=16, scales="head"),
    Case([2, 1], [70, 33], H(2, 1, 64), F16, E5M2, kind="ragged", scales="one", variant=causal),
    Case([1, 1], [140, 5], H(2, 1, 32, 64), BF16, I8, page_size=16, scales="page"),
    Case([1], [1], G, BF16, page_size=1, variant=causal),
    Case([1, 2, 1], [0, 0, 0], G, page_size=256, variant=causal),
    Case([1, 1], [130, 0], G, page_size=128),
    Case([2, 1, 1], [0, 200, 0], G, page_size=128, on_device=True, variant=causal),
    Case([1, 1], [190, 63], G, page_size=24, variant=window),
    Case([1] * 5, [70, 3, 0, 3, 90], H(2, 2, 16), page_size=7, variant=sinks),
    Case([3, 1], [130, 129], H(3, 1, 40, 24), kind="ragged", variant=alibi),
    Case([1, 2], [65, 0], H(2, 1, 24), kind="dense", variant=gemma),
]


# with tiles of 64 keys those whose pages are as large as a tile or larger, and 8-bit ones
@pytest.mark.parametrize(
    ("case", "block_n"),
    [(case, n) for n in (64, 128) for case in EDGES if n == 128 or case.kv_dtype or case.page_size >= 64],
    ids=str,
)
def test_tiles_of_decode(case, block_n, monkeypatch):
    config = Config(16, block_n, 4, 4, 1)
    monkeypatch.setattr(triton_executor, "choose", lambda need: config)
    check(case)


@pytest.mark.parametrize(("requests", "paged"), [(140, True), (520, False)])
def test_more_requests_than_the_planner_takes_at_once(requests, paged):
    """128 items per program of the planner; above 512 requests it does not order them."""
    lens = [i % 3 for i in range(requests)]
    used = torch.tensor([0, *lens]).cumsum(0)
    kv = fl.RaggedKV(lens)
    if paged:
        kv = fl.PageTable.from_csr(used, list(range(int(used[-1]))), [min(n, 1) for n in lens], page_size=1)
    plan = fl.Attention(H(1, 1, 16), dtype=F32, device="cpu").plan(fl.Batch(q_lens=[1] * requests, kv=kv))
    items = plan._executor._buffers.views["items"].view(-1, 16)
    live = items[items[:, 0] >= 0]
    assert live[:, 0].sort().values.tolist() == list(range(requests))
    assert live[:, 3].tolist() == live[:, 7].tolist() == [lens[i] for i in live[:, 0]]


@pytest.mark.parametrize("page_size", [3, 128])
def test_a_plan_follows_shorter_and_longer_batches(page_size):
    attn = fl.Attention(H(4, 2, 16), variant=fl.causal, dtype=F32, device="cpu")
    plan = None
    for q_lens, kv_lens in (
        ([2, 1, 5], [140, 7, 33]),
        ([1], [1]),
        ([], []),
        ([1, 4], [0, 9]),
        ([3, 1, 4], [20, 144, 16]),
    ):
        used = [-(-n // page_size) for n in kv_lens]
        indptr = torch.tensor([0, *used]).cumsum(0)
        order = torch.randperm(int(indptr[-1])).tolist()
        last = [(n - 1) % page_size + 1 if n else 0 for n in kv_lens]
        batch = fl.Batch(q_lens=q_lens, kv=fl.PageTable.from_csr(indptr, order, last, page_size=page_size))
        if plan is None:
            reserve = fl.Reserve(requests=3, tokens=8, pages=sum(-(-n // page_size) for n in (20, 144, 16)) + 3)
            plan = attn.plan(batch, reserve=reserve)
        else:
            plan.update(batch)
        q = torch.randn(sum(q_lens), 4, 16)
        k, v = torch.randn(2, max(len(order), 1), page_size, 2, 16)
        want, _ = attention_reference(q, k, v, batch, fl.causal)
        torch.testing.assert_close(plan.run(q, (k, v)).double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kv_lens", [[128, 0], [0], [64, 256]])
def test_tables_without_a_spare_page(kv_lens, monkeypatch):
    """A last request without keys begins where the table ends, and the pages of the tile after the last are asked for
    too."""
    config = Config(16, 64, 4, 4, 1)
    monkeypatch.setattr(triton_executor, "choose", lambda need: config)
    for page_size in (64, 16):
        indptr = torch.tensor([0, *(n // page_size for n in kv_lens)]).cumsum(0)
        order = torch.randperm(int(indptr[-1])).tolist()
        kv = fl.PageTable.from_csr(indptr, order, [page_size if n else 0 for n in kv_lens], page_size=page_size)
        batch = fl.Batch(q_lens=[1] * len(kv_lens), kv=kv)
        plan = fl.Attention(H(4, 2, 16), dtype=F32, device="cpu").plan(batch)
        q = torch.randn(len(kv_lens), 4, 16)
        k, v = torch.randn(2, len(order), page_size, 2, 16)
        want, _ = attention_reference(q, k, v, batch, fl.full)
        torch.testing.assert_close(plan.run(q, (k, v)).double(), want, atol=2e-5, rtol=2e-5)


def _items(plan):
    items = plan._executor._buffers.views["items"].view(-1, 16)
    return items[items[:, 0] >= 0]


@pytest.mark.parametrize("page_size", [16, 7])
@pytest.mark.parametrize("wrong", [(10_000, 3), (9, 2**31 - 1)])
@pytest.mark.parametrize("q_lens", [[1, 1], [2, 40]], ids=str)
def test_lengths_beyond_their_rows_of_the_table_are_reported(q_lens, wrong, page_size):
    """As a device tensor may hold them, where nobody looks before the planner does."""
    table = torch.arange(6, dtype=torch.int32).flip(0).view(2, 3)
    batch = fl.Batch(q_lens, kv=fl.PageTable.from_block_table(table, [9, 3], page_size=page_size))
    attn = fl.Attention(H(4, 2, 16), variant=fl.causal, dtype=F32, device="cpu")
    plan = attn.plan(batch, reserve=fl.Reserve(requests=3, tokens=50, pages=2000))
    batch.kv_lens[:] = torch.tensor(wrong, dtype=torch.int64)
    plan._executor.update(batch)
    assert not len(_items(plan))
    request = wrong.index(max(wrong))
    q, (k, v) = torch.randn(sum(q_lens), 4, 16), torch.randn(2, 6, page_size, 2, 16)
    with pytest.raises(ValueError, match=f"request {request} has {wrong[request]} keys"):
        plan.run(q, (k, v))
    batch.kv_lens[:] = 3 * page_size  # all that a row holds
    plan.update(batch)
    want, _ = attention_reference(q, k, v, batch, fl.causal)
    torch.testing.assert_close(plan.run(q, (k, v)).double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kv_len", [4, 4000])
@pytest.mark.parametrize("indptr", [[0, 3, 900], [5, 900, 7], [-40, 900, -3], [900, -900, 5]], ids=str)
def test_offsets_outside_of_the_table_read_nothing_there(indptr, kv_len):
    kv = fl.PageTable.from_csr([0, 2, 5], [4, 3, 2, 1, 0], [4, 4], page_size=4)
    batch = fl.Batch.decode(kv)
    plan = fl.Attention(H(2, 2, 16), dtype=F32, device="cpu").plan(batch, reserve=fl.Reserve(pages=2001))
    batch.page_indptr[:] = torch.tensor(indptr)
    batch.kv_lens[:] = kv_len
    plan._executor.update(batch)
    held = [max(min(b, 5), 0) - max(min(a, 5), 0) for a, b in itertools.pairwise(indptr)]
    k, v = torch.randn(2, 5, 4, 2, 16)
    if min(held) * 4 >= kv_len:
        assert plan.run(torch.randn(2, 2, 16), (k, v)).isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"has {kv_len} keys"):
            plan.run(torch.randn(2, 2, 16), (k, v))


@pytest.mark.parametrize("kv", [fl.DenseKV(2, 20, [20, 3]), fl.RaggedKV([20, 3])], ids=str)
def test_lengths_beyond_dense_rows(kv):
    """Of ragged keys the planner does not know how many there will be."""
    batch = fl.Batch([1, 1], kv=kv)
    plan = fl.Attention(H(2, 2, 16), dtype=F32, device="cpu").plan(batch)
    for lens, request in (([7, 2**31 - 1], 1), ([21, 3], None if kv.ragged else 0)):
        batch.kv_lens[:] = torch.tensor(lens)
        plan._executor.update(batch)
        if request is None:
            assert {(int(x[0]), int(x[3])) for x in _items(plan)} == {(0, 21), (1, 3)}
        else:
            assert not len(_items(plan))
            with pytest.raises(ValueError, match=f"request {request} has {lens[request]} keys"):
                plan.update(batch)


@pytest.mark.parametrize("lens", [[-100_000, 60], [5, -1], [-(2**31), -(2**31)]], ids=str)
@pytest.mark.parametrize("paged", [True, False])
def test_negative_lengths_write_nothing_and_are_reported(lens, paged):
    kv = fl.PageTable.from_block_table([[0, 1, 2], [3, 4, 5]], [9, 60], page_size=20)
    batch = fl.Batch([1, 1], kv=kv if paged else fl.RaggedKV([9, 60]))
    plan = fl.Attention(H(2, 2, 16), dtype=F32, device="cpu").plan(batch)
    batch.kv_lens[:] = torch.tensor(lens)
    plan.update(batch)
    assert not len(_items(plan))
    with pytest.raises(ValueError, match=r"negative length \(request [01]\)"):
        plan.update(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_no_index_reaches_outside_of_a_field(kind, addresses, monkeypatch):
    monkeypatch.setattr(Sizes, "_check", lambda *_: None)  # as with lengths that only the device knows
    check(Case([1, 1], [30, 70], H(4, 2, 32), F32, kind="ragged", variant=reaching(kind)))
    check(Case([20, 5], [20, 40], H(4, 2, 32), F32, kind="ragged", variant=reaching(kind)))
    assert addresses[1] > 0
