"""Normalisation to paged CSR, slots, reserves, and what planning costs."""

from __future__ import annotations

import time

import pytest
import torch

import flashloom as fl


def test_block_tables_become_paged_csr():
    table = fl.PageTable.from_block_table([[4, 1, -1], [2, -1, -1]], [7, 3], page_size=4)
    assert table.kv_lens.tolist() == [7, 3]
    assert table.page_indptr.tolist() == [0, 3, 6]
    assert table.pages.tolist() == [4, 1, -1, 2, -1, -1]
    for x in (table.kv_lens, table.page_indptr, table.pages):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    assert table.used_pages == 3


def test_csr_tables():
    table = fl.PageTable.from_csr([0, 2, 2, 3], [4, 1, 2, 99], [3, 0, 4], page_size=4)
    assert table.kv_lens.tolist() == [7, 0, 4]
    assert table.page_indptr.tolist() == [0, 2, 2, 3]


def test_ragged_and_dense():
    ragged = fl.RaggedKV(indptr=[0, 3, 3, 8])
    assert ragged.kv_lens.tolist() == [3, 0, 5]
    assert ragged.pages.tolist() == [0, 3, 3]
    assert ragged.page_indptr.tolist() == [0, 1, 2, 3]
    assert ragged.page_size == 2**30
    dense = fl.DenseKV(2, 9)
    assert dense.kv_lens.tolist() == [9, 9]
    assert dense.pages.tolist() == [0, 1]
    assert dense.page_size == 9


def test_a_page_table_of_its_parts_is_checked():
    table = fl.PageTable([5, 2], torch.tensor([0, 2, 3]), [4, 1, 7], 4)
    assert all(x.dtype == torch.int32 for x in (table.kv_lens, table.page_indptr, table.pages))
    assert fl.Batch([2, 1], kv=table).slots().tolist() == [19, 4, 29]
    wrong = {
        "page_indptr has 2 entries and kv_lens 2": ([5, 2], [0, 2], [4, 1, 7], 4),
        "page_indptr ends at 9 but there are 3 pages": ([5, 2], [0, 2, 9], [4, 1, 7], 4),
        r"page_indptr\[0\] = 1": ([5, 2], [1, 2, 3], [4, 1, 7], 4),
        "request 0 has 9 tokens but 2 pages of 4": ([9, 2], [0, 2, 3], [4, 1, 7], 4),
        r"kv_lens\[1\] = -2": ([5, -2], [0, 2, 3], [4, 1, 7], 4),
        "page_size=0": ([5, 2], [0, 2, 3], [4, 1, 7], 0),
        "page -7": ([5, 2], [0, 2, 3], [4, 1, -7], 4),
        "pages holds 4294967296": ([5, 2], [0, 2, 3], [4, 1, 2**32], 4),
    }
    for message, parts in wrong.items():
        with pytest.raises(ValueError, match=message):
            fl.PageTable(*parts)


def test_strided_host_tensors():
    table = torch.arange(24, dtype=torch.int64).view(4, 6)[:, ::2]
    got = fl.PageTable.from_block_table(table[::2], torch.tensor([3, 1, 2, 1])[::2], page_size=1)
    assert got.pages.tolist() == [0, 2, 4, 12, 14, 16]
    assert got.kv_lens.tolist() == [3, 2]


def test_batches():
    batch = fl.Batch([3, 0, 2], kv=fl.RaggedKV([5, 1, 2]))
    assert batch.q_indptr.tolist() == [0, 3, 3, 5]
    assert batch.kv_indptr.tolist() == [0, 5, 6, 8]
    assert (batch.requests, batch.tokens, batch.max_q_len, batch.kv_tokens) == (3, 5, 3, 8)
    assert fl.Batch(q_indptr=[0, 3, 3, 5], kv=fl.RaggedKV([5, 1, 2]), max_q_len=9).max_q_len == 9
    assert batch.slots().tolist() == [2, 3, 4, 6, 7]
    decode = fl.Batch.decode(fl.RaggedKV([5, 1, 2]))
    assert decode.q_indptr.tolist() == [0, 1, 2, 3]
    assert decode.slots().tolist() == [4, 5, 7]


def test_slots_agree_with_a_loop():
    g = torch.Generator().manual_seed(0)
    for page_size in (1, 3, 16):
        lens = torch.randint(0, 50, (9,), generator=g)
        q_lens = [int(torch.randint(0, int(n) + 1, (1,), generator=g)) for n in lens]
        width = -(-int(lens.max()) // page_size)
        table = torch.randint(0, 10**6, (9, width), generator=g)
        batch = fl.Batch(q_lens, kv=fl.PageTable.from_block_table(table, lens, page_size=page_size))
        want = []
        for b, (n, length) in enumerate(zip(q_lens, lens.tolist(), strict=True)):
            for t in range(length - n, length):
                want.append(int(table[b, t // page_size]) * page_size + t % page_size)
        assert batch.slots().tolist() == want


def test_slots_refuse_lengths_without_this_steps_tokens():
    table = fl.PageTable.from_block_table([[3, 8], [0, 1], [5, 2]], [20, 30, 4], page_size=16)
    with pytest.raises(ValueError, match="request 2 has 10 new tokens but a length of 4: lengths include this step's"):
        fl.Batch([1, 1, 10], kv=table).slots()
    with pytest.raises(ValueError, match="request 0 has 5 new tokens but a length of 0"):
        fl.Batch([5, 5, 5], kv=fl.RaggedKV([0, 0, 0])).slots()
    with pytest.raises(ValueError, match="request 1 has 1 new tokens but a length of 0"):
        fl.Batch.decode(fl.DenseKV(2, 8, [3, 0])).slots()
    assert fl.Batch([20, 0, 4], kv=table).slots().tolist()[:2] == [48, 49]


def test_slots_are_64_bit():
    table = fl.PageTable.from_block_table([[2**30]], [16], page_size=16)
    assert fl.Batch.decode(table).slots().tolist() == [2**30 * 16 + 15]


def test_slots_on_a_device_agree_with_the_host():
    """The device's code path, on CPU tensors."""
    for kv, late in (
        (fl.PageTable.from_block_table([[4, 1], [2, 0], [3, 3]], [7, 3, 0], page_size=4), [4, 5, 6, -1, 8, 9, 10, -1]),
        (fl.RaggedKV([7, 3, 0]), [4, 5, 6, -1, 7, 8, 9, -1]),
    ):
        batch = fl.Batch([3, 2, 0], kv=kv)
        want = batch.slots()
        batch.host = False
        assert batch.slots().tolist() == want.tolist()
        batch = fl.Batch([3, 4, 1], kv=kv)  # lengths without this step's tokens: not read on a device, and skipped
        batch.host = False
        assert batch.slots().tolist() == late


def test_reserves_leave_open_what_is_none():
    batch = fl.Batch.decode(fl.RaggedKV([5, 1]))
    fl.Reserve().check(batch)
    fl.Reserve(requests=2, tokens=2).check(batch)
    with pytest.raises(ValueError, match=r"Reserve\(tokens=2\)"):
        fl.Reserve(tokens=1).check(batch)


def test_ragged_masks_of_no_requests():
    none = torch.tensor([0])
    for mask in (
        fl.custom_mask(torch.zeros(0, dtype=torch.bool), none),
        fl.packed_mask(torch.zeros(0, dtype=torch.uint8), none),
    ):
        attn = fl.Attention(fl.HeadShape(4, 2, 64), variant=mask, dtype=torch.float32)
        plan = attn.plan(fl.Batch(q_lens=[], kv=fl.RaggedKV([])))
        kv = torch.zeros(0, 2, 64)
        assert plan.run(torch.zeros(0, 4, 64), (kv, kv)).shape == (0, 4, 64)


def test_reprs_say_what_matters():
    batch = fl.Batch.decode(fl.RaggedKV([5, 1]))
    assert repr(batch) == "Batch(2 requests, 2 query tokens, RaggedKV on cpu)"
    layer = fl.Attention(fl.HeadShape(4, 2, 16), dtype=torch.float32, device="cpu")
    assert "kv_dtype=float32" in repr(layer)
    cache = fl.PagedKVCache(2, 3, 4, layer.heads, torch.int8, "cpu", layout="HND")
    assert "2 layers, 3 pages of 4" in repr(cache)


@pytest.mark.slow
def test_planning_64_requests_costs_little():
    """Batch, plan and update together; the bound is loose because machines are shared (typical: a tenth of it)."""
    table = torch.randint(0, 4096, (64, 80), dtype=torch.int32)
    lens = torch.full((64,), 1040, dtype=torch.int32)
    layer = fl.Attention(fl.HeadShape(8, 2, 64), variant=fl.causal, dtype=torch.float32, device="cpu")
    batch = lambda: fl.Batch.decode(fl.PageTable.from_block_table(table, lens, page_size=16))  # noqa: E731
    plan = layer.plan(batch())
    times = []
    for _ in range(50):
        start = time.thread_time()  # what other processes take of the machine is not its cost
        plan.update(batch())
        times.append(time.thread_time() - start)
    assert sorted(times)[10] < 1e-3
