"""The cache's memory, scales, and quantised appends."""

from __future__ import annotations

import math

import pytest
import torch

import flashloom as fl
from flashloom.kv_cache.append import quantise

HEADS = fl.HeadShape(4, 2, 16, 8)


def test_memory_order_follows_the_layout():
    nhd = fl.PagedKVCache(2, 3, 4, HEADS, torch.float16, "cpu")
    hnd = fl.PagedKVCache(2, 3, 4, HEADS, torch.float16, "cpu", layout="HND")
    for cache in (nhd, hnd):
        assert len(cache) == 2
        assert cache[1].k.shape == (3, 4, 2, 16)
        assert cache[1].v.shape == (3, 4, 2, 8)
        assert cache.nbytes == 2 * 3 * 4 * 2 * 24 * 2
        assert (cache[0].k == 0).all()
    assert nhd[0].k.is_contiguous()
    assert hnd[0].k.transpose(1, 2).is_contiguous()
    with pytest.raises(IndexError):
        nhd[2]


def test_scales_are_normalised():
    def scale(value, name="k_scale"):
        return fl.PagedKVCache(1, 5, 4, HEADS, torch.int8, "cpu", **{name: value})[0].k_scale

    assert scale(None) is None
    assert scale(2).tolist() == [2.0]
    assert scale(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert scale(torch.ones(2, 5).T).is_contiguous()
    with pytest.raises(TypeError, match="float32"):
        scale(torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_round_and_saturate(dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 1.06, 1.0625, 1.07, top, 1e30, -1e30, math.inf, -math.inf, 1e-9])
    got = quantise(x, dtype, None)
    assert torch.equal(got.float(), x.clamp(-top, top).to(dtype).float())
    assert got.float()[5:10].tolist() == [top, top, -top, top, -top]
    assert math.isnan(quantise(torch.tensor([math.nan]), dtype, None).float())


def test_int8_rounds_to_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 200.0, -127.6, -300.0, math.nan])
    assert quantise(x, torch.int8, None).tolist() == [0, 2, 2, 0, -2, 127, 127, -128, -128, 0]
    assert quantise(x, torch.int8, torch.tensor([2.0])).tolist() == [0, 1, 1, 0, -1, 63, 100, -64, -128, 0]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_append_with_scales_per_page(dtype, source, layout):
    g = torch.Generator().manual_seed(0)
    k_scale = torch.rand(5, 2, generator=g) + 0.01 if dtype.itemsize == 1 else None
    cache = fl.PagedKVCache(1, 5, 4, HEADS, dtype, "cpu", layout=layout, k_scale=k_scale)
    k, v = torch.randn(7, 2, 16, generator=g).to(source), torch.randn(7, 2, 8, generator=g).to(source)
    slots = torch.tensor([3, -1, 19, 0, 8, -1, 13])
    fl.append(cache[0], k, v, slots)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, 4)
            want = k[i].float() if k_scale is None else k[i].float() / k_scale[page].unsqueeze(-1)
            assert torch.equal(cache[0].k[page, offset].float(), quantise(want, dtype, None).float())
            assert torch.equal(cache[0].v[page, offset].float(), quantise(v[i], dtype, None).float())
    assert int((cache[0].k.float() != 0).any(-1).any(-1).sum()) == 5


def test_values_of_the_caches_own_dtype_are_stored_as_they_are():
    cache = fl.PagedKVCache(1, 1, 4, HEADS, torch.int8, "cpu", k_scale=0.5)
    k, v = torch.randint(-128, 128, (4, 2, 16)).to(torch.int8), torch.zeros(4, 2, 8)
    fl.append(cache[0], k, v, torch.arange(4))
    assert torch.equal(cache[0].k[0], k)


def test_append_of_nothing_and_of_strided_tokens():
    cache = fl.PagedKVCache(1, 2, 4, HEADS, torch.float32, "cpu")
    fl.append(cache[0], torch.empty(0, 2, 16), torch.empty(0, 2, 8), torch.empty(0, dtype=torch.int64))
    wide = torch.randn(2, 5, 40)
    k, v = wide[..., :16].transpose(0, 1), wide[..., 20:36:2].transpose(0, 1)
    fl.append(cache[0], k, v, torch.tensor([7, 1, 2, 6, 0]))
    assert torch.equal(cache[0].k[1, 3], k[0])
    assert torch.equal(cache[0].v[0, 0], v[4])


def test_append_beyond_32_bits():
    heads = fl.HeadShape(1, 1, 64)
    cache = fl.PagedKVCache(1, 2, 4, heads, torch.float32, "cpu")
    far = 2**31 + 64
    storage = torch.empty(0).set_(torch.UntypedStorage(4 * (far + 1024)))  # address space, not memory
    view = storage.as_strided((2, 4, 1, 64), (far, 64, 64, 1))
    layer = type(cache[0])(view, cache[0].v)
    k = torch.randn(2, 1, 64)
    fl.append(layer, k, k, torch.tensor([1, 7]))
    assert torch.equal(storage[far + 3 * 64 :][:64], k[1, 0])
