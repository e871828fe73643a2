"""The kernels in Triton's interpreter against the definition; `test_interpreted.py` runs this file with
TRITON_INTERPRET=1."""

import heapq

import pytest
import torch
from tests.triton.bounds import checked
from tests.triton.cases import BF16, CASES, E4M3, E5M2, F32, I8, check

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.reference import attention_reference
from flashloom.attention.triton_append import append as triton_append
from flashloom.kv_cache.append import append_reference


@pytest.fixture(autouse=True)
def addresses():
    """Every address is checked."""
    with checked():
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_reference(case, monkeypatch):
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    check(case)


@pytest.mark.parametrize("cache_dtype", [F32, BF16, E4M3, E5M2, I8])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_against_reference(cache_dtype, layout):
    heads = fl.HeadShape(4, 2, 24)
    scales = {} if cache_dtype.itemsize > 1 else {"k_scale": 0.25, "v_scale": torch.tensor([0.5, 0.125])}
    caches = [
        fl.PagedKVCache(layers=1, pages=5, page_size=4, heads=heads, dtype=cache_dtype, layout=layout, **scales)
        for _ in range(2)
    ]
    if cache_dtype in (F32, I8):
        k, v = torch.randn(7, 2, 24) * 20, torch.randn(7, 2, 24) * 20
    else:  # exact, since the interpreter rounds in its own way
        k, v = torch.randint(-8, 9, (7, 2, 24)) / 2, torch.randint(-8, 9, (7, 2, 24)) / 8
    k[0, 0, :3] = torch.tensor([1e9, -1e9, 0.0]) if cache_dtype.itemsize == 1 else 0.0
    slots = torch.tensor([3, -1, 19, 0, 7, 8, 12])
    for cache, write in zip(caches, (triton_append, append_reference)):
        for x in (cache[0].k, cache[0].v):
            x.view(torch.uint8).zero_()
        write(cache[0], k, v, slots)
    for a, b in ((caches[0][0].k, caches[1][0].k), (caches[0][0].v, caches[1][0].v)):
        assert torch.equal(a.float(), b.float())


SKEWED = {
    "one long": ([1] * 16, [65536] + [1024] * 15),
    "some long": ([1] * 64, [16384] * 4 + [1024] * 60),
    "random": ([1] * 40, torch.randint(1, 20000, (40,), generator=torch.Generator().manual_seed(3)).tolist()),
}


@pytest.mark.parametrize("name", SKEWED)
def test_skewed_batches_are_cut_within_ten_percent_of_even(name, monkeypatch):
    """The planner's items, taken in their order by the programs of 132 multiprocessors as each becomes free. Programs
    of one multiprocessor share its bandwidth, so what counts is its work."""
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    q_lens, kv_lens = SKEWED[name]
    heads, page = fl.HeadShape(32, 8, 128), 1024
    used = [-(-n // page) for n in kv_lens]
    indptr = torch.tensor([0, *used]).cumsum(0)
    kv = fl.PageTable.from_csr(
        indptr, list(range(int(indptr[-1]))), [(n - 1) % page + 1 for n in kv_lens], page_size=page
    )
    plan = fl.Attention(heads, variant=fl.causal, dtype=BF16, device="cpu").plan(fl.Batch(q_lens=q_lens, kv=kv))
    executor = plan._executor
    executor._programs = 132 * executor.config.resident
    executor._grow(plan.batch)
    executor.update(plan.batch)
    items = executor._buffers.views["items"].view(-1, 16)
    live = items[items[:, 0] >= 0]
    assert int((live[:, 7] - live[:, 6]).sum()) == sum(kv_lens), "keys are missing or walked twice"
    tiles = [-(-int(hi - lo) // executor.config.block_n) for lo, hi in live[:, 6:8]]
    free, work = [(0, program) for program in range(executor._programs)], [0] * 132
    for size in tiles:
        for _ in range(heads.kv_heads):
            start, program = free[0]
            heapq.heapreplace(free, (start + size, program))
            work[program % 132] += size
    even = sum(tiles) * heads.kv_heads / 132
    assert max(work) <= 1.1 * even + 1, f"{max(work)} tiles where {even:.1f} would be even"  # no cut within a tile


@pytest.mark.parametrize("variant", [fl.full, fl.causal & fl.softcap(5.0)], ids=str)
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_block_patterns(kind, variant, monkeypatch):
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    heads = fl.HeadShape(4, 2, 32)
    plan = None
    for q_lens, kv_lens in (([9, 1, 20], [40, 17, 20]), ([5, 3, 8], [70, 5, 9])):
        rows, keys = [-(-n // 4) for n in q_lens], [-(-n // 8) for n in kv_lens]
        lists = [
            torch.randperm(keys[b])[: int(torch.randint(0, keys[b] + 1, ()))].tolist()
            for b in range(3)
            for _ in range(rows[b])
        ]
        indptr = torch.tensor([0, *map(len, lists)]).cumsum(0).tolist()
        if kind == "paged":
            used = [-(-n // 4) for n in kv_lens]
            starts = torch.tensor([0, *used]).cumsum(0)
            order = torch.randperm(int(starts[-1])).tolist()
            kv = fl.PageTable.from_csr(starts, order, [(n - 1) % 4 + 1 for n in kv_lens], page_size=4)
            k, v = torch.randn(2, len(order), 4, 2, 32)
        else:
            kv = fl.RaggedKV(kv_lens)
            k, v = torch.randn(2, sum(kv_lens), 2, 32)
        batch = fl.Batch(
            q_lens=q_lens, kv=fl.BlockSparseKV(kv, indptr, [i for one in lists for i in one], block_q=4, block_kv=8)
        )
        if plan is None:
            plan = fl.Attention(heads, variant=variant, dtype=F32, device="cpu").plan(batch)
            assert plan.executor == "triton"
        else:
            plan.update(batch)
        q = torch.randn(sum(q_lens), 4, 32)
        want, want_lse = attention_reference(q, k, v, batch, variant)
        out, lse = plan.run(q, (k, v), return_lse=True)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse.double(), want_lse.double(), atol=2e-5, rtol=2e-5)
    other = fl.Batch(q_lens=q_lens, kv=fl.BlockSparseKV(kv, [0] * 4, [], block_q=8, block_kv=8))
    with pytest.raises(ValueError, match="made for blocks of 4 queries and 8 keys"):
        plan.update(other)


@pytest.mark.parametrize("invariant", [False, True])
def test_block_patterns_visit_no_other_tiles(invariant, monkeypatch):
    """Keys and values of tiles that a block of rows does not see are NaN, which any visit would carry into the
    result."""
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    heads, page = fl.HeadShape(2, 1, 16), 16
    tiles = 40
    order = torch.randperm(2 * tiles)
    kv = fl.PageTable.from_block_table(order.view(2, tiles).int(), [tiles * page - 3, 9 * page], page_size=page)
    k, v = torch.randn(2, 2 * tiles, page, 1, 16)
    lists = [[3, 11, 39], [3, 25], [0], []]  # of the blocks of 8 rows of two requests
    indptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
    blocks = fl.BlockSparseKV(kv, indptr, [i for one in lists for i in one], block_q=8, block_kv=page)
    batch = fl.Batch([16, 16], kv=blocks)
    variant = fl.causal & fl.softcap(7.0)
    attn = fl.Attention(heads, variant=variant, dtype=F32, device="cpu", batch_invariant=invariant)
    plan = attn.plan(batch)
    config = plan._executor.config
    per_tile = max(config.block_n // page, 1)
    assert config.block_m <= 32, "one block of rows would see what both blocks of queries see"
    seen = {
        request: {
            i // per_tile * per_tile + j
            for one in lists[2 * request : 2 * request + 2]
            for i in one
            for j in range(per_tile)
        }
        for request in (0, 1)
    }
    unseen = [int(order[request * tiles + i]) for request in (0, 1) for i in range(tiles) if i not in seen[request]]
    assert len(unseen) > tiles
    clean_k, clean_v = k.clone(), v.clone()
    k[unseen], v[unseen] = float("nan"), float("nan")
    q = torch.randn(32, 2, 16)
    want, want_lse = attention_reference(q, clean_k, clean_v, batch, variant)
    out, lse = plan.run(q, (k, v), return_lse=True)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=2e-5, rtol=2e-5)
    k[int(order[3])] = float("nan")
    assert plan.run(q, (k, v)).isnan().any(), "a tile in the pattern was not visited"
