"""Block patterns on the CPU kernels: what they compute is the reference's, and tiles that nobody sees are not read."""

import numpy as np
import pytest
import torch

import flashloom as fl
from flashloom.attention.reference import attention_reference
from flashloom.attention.triton_blocks import Pattern

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def pattern_of(kv, q_lens, kv_lens, block_q, block_kv, seed=0):
    """Random blocks: some query blocks see nothing."""
    draw = torch.Generator().manual_seed(seed)
    lists = []
    for n, length in zip(q_lens, kv_lens, strict=True):
        keys = -(-length // block_kv)
        for _ in range(-(-n // block_q)):
            count = int(torch.randint(0, keys + 1, (), generator=draw))
            lists.append(torch.randperm(keys, generator=draw)[:count].tolist())
    indptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return fl.BlockSparseKV(kv, indptr, [i for one in lists for i in one], block_q=block_q, block_kv=block_kv)


def paged(kv_lens, page_size):
    """A page table in random order, and the number of pages."""
    used = torch.tensor([0, *(-(-n // page_size) for n in kv_lens)])
    starts = used.cumsum(0)
    last = [(n - 1) % page_size + 1 for n in kv_lens]
    return fl.PageTable.from_csr(starts, torch.randperm(int(starts[-1])), last, page_size=page_size), int(starts[-1])


@pytest.mark.parametrize("variant", [fl.full, fl.causal & fl.softcap(5.0)], ids=["full", "capped"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16"])
def test_against_the_reference(dtype, variant):
    heads, plan = fl.HeadShape(4, 2, 32), None
    cases = (([90, 1, 33, 0], [400, 170, 33, 7]), ([1, 1, 1, 1], [70, 500, 9, 64]), ([200], [1300]))
    for seed, (q_lens, kv_lens) in enumerate(cases):
        table, pages = paged(kv_lens, 16)
        k, v = torch.randn(2, pages, 16, 2, 32).to(dtype)
        batch = fl.Batch(q_lens, kv=pattern_of(table, q_lens, kv_lens, 16, 32, seed))
        if plan is None:
            plan = fl.Attention(heads, variant=variant, dtype=dtype, device="cpu").plan(batch)
            assert plan.executor == "cpu"
        else:
            plan.update(batch)
        q = torch.randn(sum(q_lens), 4, 32).to(dtype)
        want, want_lse = attention_reference(q, k, v, batch, variant)
        out, lse = plan.run(q, (k, v), return_lse=True)
        close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(out.double(), want, **close)
        torch.testing.assert_close(lse.double(), want_lse.double(), **close)
        torch.testing.assert_close(plan.run(q, (k, v)).double(), want, **close)  # once more, without lse


def test_another_pattern_of_the_same_form_is_seen():
    """A repeated run rewrites addresses alone, but not across update()."""
    heads, q_lens, kv_lens = fl.HeadShape(2, 1, 16), [40], [120]
    q, k, v = torch.randn(40, 2, 16), torch.randn(120, 1, 16), torch.randn(120, 1, 16)
    out, plan = torch.empty_like(q), None
    for seed in range(4):
        batch = fl.Batch(q_lens, kv=pattern_of(fl.RaggedKV(kv_lens), q_lens, kv_lens, 8, 8, seed))
        if plan is None:
            plan = fl.Attention(heads, dtype=torch.float32, device="cpu").plan(batch)
        else:
            plan.update(batch)
        want, _ = attention_reference(q, k, v, batch, fl.full)
        for _ in range(2):
            plan.run(q, (k, v), out=out)
            torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 512])
def test_unseen_tiles_are_not_read(tokens, dtype):
    """Keys and values of blocks that no query sees are NaN, which any visit would carry into the result. The blocks
    are whole numbers of the runs of keys that the kernels take at once (32, 60 or 64)."""
    heads, size, count = fl.HeadShape(2, 1, 32), 960, 6
    seen = [1, 4]
    k, v = torch.randn(2, count * size, 1, 32).to(dtype)
    kv = fl.RaggedKV([count * size])
    rows = -(-tokens // size)
    batch = fl.Batch(
        [tokens], kv=fl.BlockSparseKV(kv, list(range(0, 2 * rows + 1, 2)), seen * rows, block_q=size, block_kv=size)
    )
    q = torch.randn(tokens, 2, 32).to(dtype)
    want, _ = attention_reference(q, k, v, batch, fl.full)
    for i in set(range(count)) - set(seen):
        k[i * size : (i + 1) * size] = v[i * size : (i + 1) * size] = float("nan")
    plan = fl.Attention(heads, dtype=dtype, device="cpu").plan(batch)
    torch.testing.assert_close(plan.run(q, (k, v)).double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_blocks_of_other_sizes_need_another_plan():
    kv, heads = fl.RaggedKV([32]), fl.HeadShape(2, 1, 16)
    plan = fl.Attention(heads, dtype=torch.float32, device="cpu").plan(
        fl.Batch([4], kv=fl.BlockSparseKV(kv, [0, 1], [0], block_q=4, block_kv=8))
    )
    with pytest.raises(ValueError, match="made for blocks of 4 queries and 8 keys"):
        plan.update(fl.Batch([4], kv=fl.BlockSparseKV(kv, [0, 1], [0], block_q=8, block_kv=8)))
    q, k, v = torch.randn(4, 2, 16), torch.randn(32, 1, 16), torch.randn(32, 1, 16)
    want, _ = attention_reference(q, k, v, plan.batch, fl.full)
    torch.testing.assert_close(plan.run(q, (k, v)).double(), want, atol=2e-5, rtol=2e-5)


def test_what_gpu_kernels_read_keeps_its_memory():
    """A captured run reads the lists of a later batch where those of the first one were."""
    places, cpu = [], torch.device("cpu")
    cases = (([90, 33], [400, 170]), ([17], [900]), ([40, 1], [300, 8]), ([90, 33], [400, 170]), ([60, 60], [890, 5]))
    for seed, (q_lens, kv_lens) in enumerate(cases):
        batch = fl.Batch(q_lens, kv=pattern_of(fl.RaggedKV(kv_lens), q_lens, kv_lens, 16, 32, seed))
        if not places:
            pattern = Pattern(batch, cpu)
        found = pattern.read(batch, 2, 64, 32)
        pattern.write(found, 2, 123, 2 * 123 // 64 + 2)
        places.append([x.data_ptr() for x in pattern.values])
        _, first, before, visited = (x.numpy() for x in _by_name(pattern))
        blocks, keys = batch.blocks, -(-max(kv_lens) // 32)
        starts, indices = blocks.block_indptr.tolist(), blocks.block_indices.tolist()
        row = 0
        for b, n in enumerate(q_lens):
            assert first[b] == blocks.first_block(np.array(q_lens))[b]
            for at in range(0, 2 * n, 64):
                of = range(at // 2 // 16, (min(at + 64, 2 * n) - 1) // 2 // 16 + 1)
                want = {i for q in of for i in indices[starts[first[b] + q] : starts[first[b] + q + 1]]}
                assert set(visited[row, : before[row, keys]].tolist()) == want
                assert [int(before[row, t + 1] - before[row, t]) for t in range(keys)] == [
                    t in want for t in range(keys)
                ]
                row += 1
    assert places[1] != places[0], "room for longer keys was not made"
    assert all(place == places[1] for place in places[1:])


def _by_name(pattern):
    found = dict(zip([p.name for p in pattern.program(fl.full.program).params], pattern.values, strict=True))
    return [
        next(x for name, x in found.items() if name.endswith(end)) for end in ("kept", "first", "before", "visited")
    ]
