"""FlashInfer's names on a GPU: what is on the device is skipped or bounded there, and nothing waits for it."""

import pytest
import torch
from tests.compat.test_batch import HK, HQ, PAGE, Case, D, close, int32, offsets
from tests.compat.test_refusals import E4M3, block_table, rows_of

from flashloom.compat import flashinfer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def workspace():
    return torch.empty(1024, dtype=torch.uint8, device="cuda")


def on_gpu(case):
    moved = Case.__new__(Case)
    moved.__dict__ = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.__dict__.items()}
    return moved


class Unwaited:
    """Within it, waiting for the GPU is an error."""

    def __enter__(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *failure):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_append_keeps_to_its_requests_pages(layout, dtype):
    """Many tokens at once, a third of them wrong: the cache is what a loop over the right ones writes."""
    generator = torch.Generator().manual_seed(3)
    counts, page, tokens = [3, 0, 2, 4], 5, 40
    indices = torch.randperm(12, generator=generator)[:9]
    indices[4] = 12 if dtype == torch.int32 else 2**32 + 1  # no page of the cache
    indptr = offsets(counts)
    everywhere = [(r, p) for r in range(-2, 6) for p in range(-3, 25)]
    pick = torch.randperm(len(everywhere), generator=generator)[:tokens].tolist()
    requests, places = (torch.tensor([everywhere[i][j] for i in pick]) for j in (0, 1))
    key, value = torch.randn(2, tokens, 2, 16)
    shape = (12, 2, page, 2, 16) if layout == "NHD" else (12, 2, 2, page, 16)
    want = torch.zeros(12, 2, page, 2, 16)
    for i, (r, p) in enumerate(zip(requests.tolist(), places.tolist())):
        if 0 <= r < 4 and 0 <= p < counts[r] * page:
            number = int(indices[int(indptr[r]) + p // page])
            if number < 12:
                want[number, 0, p % page], want[number, 1, p % page] = key[i], value[i]
    cache = torch.zeros(shape, device="cuda")
    arguments = [x.to(dtype).cuda() for x in (requests, places)]
    table = [x.to(dtype).cuda() for x in (indices, indptr, torch.ones(4))]
    given = key.cuda(), value.cuda()
    with Unwaited():
        flashinfer.append_paged_kv_cache(*given, *arguments, cache, *table, layout)
    got = cache.cpu()
    assert got.equal(want if layout == "NHD" else want.transpose(2, 3))


def test_a_captured_append_follows_its_arrays():
    cache, key = torch.zeros(4, 2, 4, 2, 16, device="cuda"), torch.ones(2, 2, 16, device="cuda")
    requests, places = int32([0, 1]).cuda(), int32([1, 2]).cuda()
    table = [x.cuda() for x in (int32([2, 0, 3]), int32([0, 2, 3]), int32([1, 1]))]
    call = lambda: flashinfer.append_paged_kv_cache(key, key, requests, places, cache, *table)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cache.zero_()
    requests.copy_(int32([1, 0]).cuda())
    places.copy_(int32([4, 5]).cuda())  # outside, and the second page
    graph.replay()
    want = torch.zeros(4, 2, 4, 2, 16)
    want[0, :, 1] = 1
    assert cache.cpu().equal(want)


def test_wide_numbers_on_a_device_stay_out_of_range():
    from flashloom.compat.flashinfer import _plans

    x = torch.tensor([0, 5, 2**32 + 3, -(2**40)], device="cuda")
    assert _plans.int32(x, x.device).tolist() == [0, 5, 2**31 - 1, -(2**31) + 1]


def test_wide_page_numbers_on_a_device_are_reported_by_a_later_call():
    """Nothing waits, no other page is read, and numbers behind the table's end do not matter."""
    case = Case([9, 4, 1, 13], [1] * 4, dtype=torch.float16)
    gpu, want = on_gpu(case), case.want()[0]
    wide = torch.cat([case.indices.long(), torch.tensor([2**40])]).cuda()
    last, sizes = case.last.cuda(), (HQ, HK, D, PAGE)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    plans = (
        lambda pages: decode.plan(gpu.indptr, pages, last, *sizes),
        lambda pages: paged.plan(gpu.q_indptr, gpu.indptr, pages, last, *sizes),
    )
    for wrapper, plan in zip((decode, paged), plans):
        plan(wide)
        close(wrapper.run(gpu.q, gpu.kv).cpu(), want, 5e-3)
        bad = wide.clone()
        bad[1] += 2**32
        plan(bad)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=r"keys, more than its pages"):
            wrapper.run(gpu.q, gpu.kv)
        plan(wide)
        close(wrapper.run(gpu.q, gpu.kv).cpu(), want, 5e-3)
    table, lens = block_table(case).long().cuda(), int32(case.kv_lens).cuda()
    table[2, 5] = 2**40  # behind its one page
    call = lambda table: flashinfer.xqa_batch_decode_with_kv_cache(  # noqa: E731
        gpu.q, gpu.kv, workspace(), table, lens, 13, D**-0.5
    )
    close(call(table).cpu(), want, 5e-3)
    bad = table.clone()
    bad[3, 0] += 2**32
    call(bad)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"keys, more than its pages"):
        call(table)
    close(call(table).cpu(), want, 5e-3)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plans_take_arrays_from_either_side(place, dtype):
    case = Case(dtype=torch.float16)
    gpu, want = on_gpu(case), case.want(causal=True)[0]
    put = lambda x: (x.cuda() if place == "device" else x).to(dtype)  # noqa: E731
    table = tuple(map(put, case.table))
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    paged.plan(put(case.q_indptr), *table, HQ, HK, D, PAGE, causal=True)
    close(paged.run(gpu.q, gpu.kv).cpu(), want, 5e-3)
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    rows = [x.half().cuda() for x in rows_of(case)]
    ragged.plan(put(case.q_indptr), put(offsets(case.kv_lens)), HQ, HK, D, causal=True)
    close(ragged.run(gpu.q, *rows).cpu(), want, 5e-3)
    with pytest.raises(ValueError):
        ragged.plan(put(case.q_indptr), put(offsets(case.kv_lens)), HQ + 1, HK, D, sm_scale=3.0)
    with pytest.raises(RuntimeError, match=r"call plan\(\)"):
        ragged.run(gpu.q, *rows)
    one = Case([9, 4, 1, 13], [1] * 4, dtype=torch.float16)
    gpu = on_gpu(one)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())
    decode.plan(*map(put, one.table), HQ, HK, D, PAGE)
    close(decode.run(gpu.q, gpu.kv).cpu(), one.want()[0], 5e-3)
    out = flashinfer.xqa_batch_decode_with_kv_cache(
        gpu.q, gpu.kv, workspace(), put(block_table(one)), put(int32(one.kv_lens)), 13, D**-0.5
    )
    close(out.cpu(), one.want()[0], 5e-3)


def test_a_plan_with_copies_of_its_offsets_waits_for_nothing():
    case = Case(dtype=torch.float16)
    gpu, keys = on_gpu(case), offsets(case.kv_lens)
    wrapper, rows = (
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace()),
        [x.half().cuda() for x in rows_of(case)],
    )
    arguments = gpu.q_indptr, keys.cuda(), HQ, HK, D
    options = {"causal": True, "qo_indptr_cpu": case.q_indptr, "kv_indptr_cpu": keys}
    wrapper.plan(*arguments, **options)
    wrapper.run(gpu.q, *rows)
    with Unwaited():
        wrapper.plan(*arguments, **options)
        out = wrapper.run(gpu.q, *rows)
    close(out.cpu(), case.want(causal=True)[0], 5e-3)


def test_float8_results_and_sinks():
    case = Case([9, 4, 1, 13], [1] * 4, dtype=torch.float16)
    gpu, sinks = on_gpu(case), torch.randn(HQ)
    table, lens = block_table(case).cuda(), int32(case.kv_lens).cuda()
    for call in (flashinfer.xqa_batch_decode_with_kv_cache, flashinfer.trtllm_batch_decode_with_kv_cache):
        for o_scale in (1.0, 0.25):
            out = torch.empty(4, HQ, D, dtype=E4M3, device="cuda")
            call(
                gpu.q, gpu.kv, workspace(), table, lens, 13, 0.3, 2.0, out=out, kv_layout="NHD", o_scale=o_scale,
                sinks=sinks.view(HK, -1).cuda(),
            )  # fmt: skip
            close(out.float().cpu(), case.want(scale=0.3, sink=sinks)[0] * 2, 0.1)
    wide = Case([40, 17, 3, 29], [5, 4, 3, 6], dtype=E4M3)
    q = wide.q.to(E4M3)
    wide.q = q.float()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    wrapper.plan(wide.q_indptr, *wide.table, HQ, HK, D, PAGE, causal=True, q_data_type=E4M3)
    out = wrapper.run(q.cuda(), wide.kv.cuda())
    assert out.dtype == E4M3
    close(out.float().cpu(), wide.want(causal=True)[0], 0.15)


def test_first_runs_inside_torch_compile():
    torch._dynamo.reset()
    case = Case(dtype=torch.float16)
    gpu = on_gpu(case)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    wrapper.plan(case.q_indptr, *case.table, HQ, HK, D, PAGE, causal=True)
    call = torch.compile(lambda q, kv: wrapper.run(q * 2.0, kv) + 1.0, fullgraph=True)
    close(call(gpu.q, gpu.kv).cpu() - 1, case.want(lambda q, k, v: (q * 2, k, v), causal=True)[0], 8e-3)
    cache, key = torch.zeros(4, 2, 4, 2, 16, device="cuda"), torch.ones(1, 2, 16, device="cuda")
    arrays = [int32(x).cuda() for x in ([0], [5], [2, 0], [0, 2], [2])]

    def append(key, requests, places, cache, *table):
        flashinfer.append_paged_kv_cache(key + 1, key, requests, places, cache, *table)

    torch.compile(append, fullgraph=True)(key, *arrays[:2], cache, *arrays[2:])
    assert cache.sum() == 32 + 64
    assert cache[0, 0, 1].eq(2).all()
