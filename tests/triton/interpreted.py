"""The kernels in Triton's interpreter against the definition; `test_interpreted.py` runs this file with
TRITON_INTERPRET=1."""

import pytest
import torch
from cases import (  # fmt: skip
    BF16,
    E4M3,
    E5M2,
    F16,
    F32,
    I8,
    Case,
    alibi,
    causal,
    check,
    documents,
    gemma,
    holes,
    key_bias,
    prefix,
    rope,
    scaled,
    sigmoid,
    sinks,
    window,
)

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.triton_append import append as triton_append
from flashloom.kv_cache.append import append_reference

H = fl.HeadShape
CASES = [
    Case([1, 1, 1], [5, 33, 1]),
    Case([1, 1], [300, 7], H(4, 1, 16), variant=causal, page_size=16),
    Case([3, 1, 9], [3, 40, 20], variant=causal, kind="ragged"),
    Case([70], [70], H(2, 2, 16), variant=window, kind="dense"),
    Case([1, 5], [0, 3], variant=causal),
    Case([6], [4], variant=sinks),
    Case([2, 1], [9, 50], H(6, 2, 24), variant=gemma, page_size=1, layout="HND"),
    Case([1, 2], [90, 6], H(5, 1, 72, 40), variant=alibi, page_size=3),
    Case([4], [18], H(2, 1, 32), variant=rope, page_size=64),
    Case([4, 1], [18, 80], variant=sigmoid),
    Case([8], [24], variant=documents, kind="ragged"),
    Case([5, 2], [12, 13], variant=prefix),
    Case([5, 2], [12, 13], variant=scaled),
    Case([5, 2], [12, 13], variant=scaled, partial=True),
    Case([5, 1], [12, 130], variant=key_bias),
    Case([40], [100], variant=holes),
    Case([1, 1], [20, 60], dtype=F16, variant=causal, odd_strides=True),
    Case([1, 3], [20, 60], dtype=BF16, variant=causal),
    Case([1, 1], [20, 60], dtype=BF16, kv_dtype=E4M3, scales="one"),
    Case([2, 1], [20, 30], dtype=F16, kv_dtype=E5M2, scales="head"),
    Case([1, 2], [20, 30], dtype=BF16, kv_dtype=I8, scales="page"),
    Case([1, 2], [20, 30], dtype=F32, kv_dtype=I8, scales="head", variant=rope),
    Case([1, 2], [40, 30], H.mla(4, 32, 16), dtype=BF16),
    Case([1, 1, 4], [20, 60, 5], variant=causal, sm_scale=-0.3),
    Case([1, 1], [2100, 60], H(1, 1, 16), invariant=True, page_size=512),
]


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
