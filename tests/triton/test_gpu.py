"""The Triton backend on a GPU against the definition: dtypes, layouts, hooks, splits, graphs, large caches. `make test-
gpu`."""

import pytest
import torch
from tests.attention.hidden import Hidden
from tests.triton.cases import (
    BF16,
    CASES,
    E4M3,
    E5M2,
    F16,
    F32,
    I8,
    Case,
    H,
    alibi,
    causal,
    check,
    gemma,
    holes,
    rope,
    sigmoid,
    sinks,
    window,
)  # fmt: skip

import flashloom as fl
from flashloom.attention.reference import attention_reference
from flashloom.kv_cache.append import append_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
G = H(32, 8, 128)
LARGE = [
    Case([1] * 9, [1, 17, 64, 1000, 4096, 333, 5000, 31, 128], G, BF16, page_size=16, variant=causal),
    Case([1] * 9, [1, 17, 64, 1000, 4096, 333, 5000, 31, 128], G, BF16, page_size=16, variant=causal, on_device=True),
    Case([1] * 4, [4097, 16, 1, 2000], H(32, 32, 128), F16, page_size=64, layout="HND"),
    Case([1], [30000], H(8, 1, 128), BF16, page_size=1),
    Case([7, 1, 512, 1], [7, 900, 700, 3000], G, BF16, page_size=16, variant=gemma),
    Case([300, 1000], [300, 1000], G, BF16, kind="ragged", variant=causal),
    Case([300, 1000], [300, 1000], G, F16, kind="ragged", variant=window),
    Case([257, 100], [600, 100], H(16, 16, 64), BF16, kind="dense", variant=alibi),
    Case([100], [1500], H(8, 2, 256), BF16, page_size=32, variant=causal),
    Case([130], [600], H(12, 4, 96), F16, page_size=16, variant=sinks),
    Case([65], [600], H(8, 2, 192, 128), BF16, kind="ragged", variant=causal),
    Case([1, 1], [700, 5000], H.mla(128, 512, 64), BF16, page_size=64),
    Case([2, 3], [700, 500], H.mla(16, 512, 64), BF16, page_size=1, variant=causal),
    Case([1, 9], [700, 300], H(8, 1, 576), F32, page_size=16, variant=causal),
    Case([1, 90], [2000, 300], G, F32, page_size=16, variant=causal),
    Case([1, 90], [2000, 300], G, F32, page_size=7, variant=alibi, odd_strides=True),
    Case([1, 1, 5], [2000, 300, 40], G, BF16, kv_dtype=E4M3, page_size=16, scales="head"),
    Case([1, 1, 5], [2000, 300, 40], G, F16, kv_dtype=E5M2, page_size=16, scales="page"),
    Case([1, 100], [2000, 300], G, BF16, kv_dtype=I8, page_size=16, scales="one", variant=causal),
    Case([1, 100], [2000, 300], G, BF16, kv_dtype=E4M3, page_size=16),
    Case([1, 3], [2000, 300], G, E4M3, page_size=16, variant=causal),
    Case([1, 40], [500, 300], G, BF16, page_size=16, variant=rope),
    Case([1, 40], [500, 300], G, BF16, page_size=16, variant=sigmoid),
    Case([1, 40], [500, 300], G, F16, page_size=16, variant=sigmoid),
    Case([100], [1000], G, BF16, page_size=16, variant=holes),
    Case([1, 1, 70], [5000, 300, 900], G, BF16, page_size=16, variant=causal, invariant=True),
    Case([100, 30], [300, 200], H(4, 1, 40), BF16, page_size=16, odd_strides=True, variant=causal),
    Case([100, 30], [300, 200], H(2, 1, 16), F16, page_size=16, variant=causal),
    Case([200, 30], [300, 200], H(4, 1, 80), BF16, page_size=16, variant=causal),
    Case([200, 30], [300, 200], H(4, 1, 192, 80), BF16, kind="ragged", odd_strides=True),
    Case([1, 30], [900, 300], H(5, 1, 80), BF16, page_size=3, odd_strides=True, variant=causal),
    Case([300, 300], [300, 700], G, BF16, kind="dense", layout="HND", variant=causal, by_request=True),
    Case([1, 1], [5000, 700], G, BF16, page_size=16, variant=sinks, by_request=True),
]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_gpu_against_reference(case):
    print(check(case, "cuda"))


def _decode(lens, device="cuda", reserve=None, heads=G, page_size=16, **more):
    pages = sum(-(-n // page_size) for n in lens)
    width = max(-(-n // page_size) for n in lens)
    table = torch.zeros(len(lens), width, dtype=torch.int32)
    order, start = torch.randperm(pages), 0
    for b, n in enumerate(lens):
        need = -(-n // page_size)
        table[b, :need] = order[start : start + need].int()
        start += need
    cache = torch.randn(2, pages, page_size, heads.kv_heads, heads.dim, device="cuda", dtype=BF16)
    lens_t = torch.tensor(lens, dtype=torch.int32)
    kv = fl.PageTable.from_block_table(table.to(device), lens_t.to(device), page_size=page_size)
    plan = fl.Attention(heads, variant=fl.causal, dtype=BF16, device="cuda", **more).plan(
        fl.Batch.decode(kv), reserve=reserve
    )
    q = torch.randn(len(lens), heads.q_heads, heads.dim, device="cuda", dtype=BF16)
    return plan, q, cache, kv


def test_update_and_run_in_one_graph_follow_new_lengths():
    plan, q, cache, kv = _decode([2000, 64, 700])
    out = torch.empty_like(q)
    plan.run(q, (cache[0], cache[1]), out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    batch = fl.Batch.decode(kv)
    with torch.cuda.graph(graph):
        plan.update(batch)
        plan.run(q, (cache[0], cache[1]), out=out)
    for lens in ([2000, 64, 700], [1, 33, 650], [1999, 0, 16]):
        kv.kv_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        want, _ = attention_reference(q, cache[0], cache[1], batch.to_host(), fl.causal)
        assert float((out.double() - want).norm() / want.norm()) < 8e-3


def test_batch_invariance_is_bitwise():
    heads = fl.HeadShape(8, 2, 64)
    results = []
    cache = torch.randn(2, 400, 16, 2, 64, device="cuda", dtype=BF16)
    q = torch.randn(1, 8, 64, device="cuda", dtype=BF16)
    for others in ([], [16] * 5, [6000, 3000, 8]):
        lens = [5000, *others]
        table = torch.arange(400, dtype=torch.int32)[None].repeat(len(lens), 1)
        kv = fl.PageTable.from_block_table(table, lens, page_size=16)
        attn = fl.Attention(heads, variant=fl.causal, dtype=BF16, device="cuda", batch_invariant=True)
        results.append(attn.plan(fl.Batch.decode(kv)).run(q.repeat(len(lens), 1, 1), (cache[0], cache[1]))[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_cache_beyond_two_to_the_31_elements():
    heads, pages = fl.HeadShape(4, 1, 128), 40000
    base = torch.empty(2**32 + 2**20, device="cuda", dtype=BF16)  # 8.6 GB
    k = base.as_strided((pages, 16, 1, 128), (pages * 2, 128, 128, 1))
    stride = (2**32 // pages) // 128 * 128
    k = base.as_strided((pages, 16, 1, 128), (stride, 128, 128, 1))
    ids = torch.tensor([[pages - 1, pages - 7, 3, pages // 2]], dtype=torch.int32)
    for page in ids[0].tolist():
        k[page].normal_()
    kv = fl.PageTable.from_block_table(ids, [60], page_size=16)
    q = torch.randn(1, 4, 128, device="cuda", dtype=BF16)
    batch = fl.Batch.decode(kv)
    out = fl.Attention(heads, dtype=BF16, device="cuda").plan(batch).run(q, (k, k))
    small = torch.stack([k[page] for page in ids[0].tolist()])
    near = fl.Batch.decode(fl.PageTable.from_block_table([[0, 1, 2, 3]], [60], page_size=16))
    want, _ = attention_reference(q, small, small, near)
    assert float((out.double() - want).norm() / want.norm()) < 8e-3


def test_device_lengths_beyond_their_pages_are_reported_by_the_next_call():
    plan, q, cache, kv = _decode([64, 64, 64], device="cuda", reserve=fl.Reserve(requests=3, tokens=3, pages=12))
    out = plan.run(q, (cache[0], cache[1]))
    assert not out.isnan().any()
    kv.kv_lens.fill_(100)
    plan.update(fl.Batch.decode(kv))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="request 0 has 100 keys"):
        plan.run(q, (cache[0], cache[1]))
    kv.kv_lens.fill_(64)
    plan.update(fl.Batch.decode(kv))
    assert torch.equal(plan.run(q, (cache[0], cache[1])), out)


def test_run_with_out_allocates_nothing():
    plan, q, cache, _ = _decode([2000, 64])
    out, kv = torch.empty_like(q), (cache[0], cache[1])
    plan.run(q, kv, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        plan.run(q, kv, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("cache_dtype", [F32, F16, BF16, E4M3, E5M2, I8])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_on_gpu(dtype, cache_dtype, layout):
    heads = fl.HeadShape(4, 2, 80)
    scale = {"k_scale": 0.03, "v_scale": torch.tensor([0.01, 0.3])} if cache_dtype.itemsize == 1 else {}
    a, b = (
        fl.PagedKVCache(
            layers=1, pages=9, page_size=16, heads=heads, dtype=cache_dtype, layout=layout, device="cuda", **scale
        )
        for _ in range(2)
    )
    k, v = (torch.randn(50, 2, 80, device="cuda", dtype=dtype) * 3 for _ in range(2))
    slots = torch.randperm(9 * 16, device="cuda")[:50]
    slots[7] = -1
    for x in (a[0].k, a[0].v, b[0].k, b[0].v):
        x.view(torch.uint8).zero_()
    fl.append(a[0], k, v, slots)
    append_reference(b[0], k, v, slots)
    for x, y in ((a[0].k, b[0].k), (a[0].v, b[0].v)):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("seed", range(40))
def test_hidden_keys(seed):
    """NaN and infinities that a mask hides."""
    types = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, E4M3), (BF16, E5M2)]
    Hidden(seed + 8000, types, device="cuda").check("triton")
