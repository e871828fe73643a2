"""The kernels in Triton's interpreter against the definition; `test_interpreted.py` runs this file with
TRITON_INTERPRET=1."""

import pytest
import torch
from tests.triton.cases import BF16, CASES, E4M3, E5M2, F32, I8, check

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.triton_append import append as triton_append
from flashloom.kv_cache.append import append_reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_reference(case, monkeypatch):
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    torch.manual_seed(torch.seed())
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
