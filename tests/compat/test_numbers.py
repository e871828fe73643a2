"""Where FlashInfer's names write, and the numbers that say so: appends outside a request, numbers of 64 bits."""

import pytest
import torch
from tests.compat.test_batch import HK, HQ, PAGE, Case, D, close, decode, int32, offsets, prefill, workspace

from flashloom.compat import flashinfer

WIDE = 2**32  # added to a number, it is lost in 32 bits


# --- appends ---


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_append_writes_its_own_pages_alone(layout, dtype):
    """Random tokens, right and wrong ones: each right one lies where its request's pages say, a wrong one is named."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    for _ in range(60):
        counts = [draw(0, 4) for _ in range(draw(1, 4))]
        total, page = sum(counts), draw(1, 6)
        indices = torch.randperm(total + 2, generator=generator)[: total + 1].to(dtype)
        indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=dtype)
        request, position = draw(-1, len(counts) + 1), draw(-3, 4 * page)
        if draw(0, 8) == 0:
            indices[draw(0, total + 1)] = (-1, total + 2, 7 * WIDE if dtype == torch.int64 else 99)[draw(0, 3)]
        shape = (total + 2, page, 2, 8) if layout == "NHD" else (total + 2, 2, page, 8)
        k, v = torch.zeros(shape), torch.zeros(shape)
        own = 0 <= request < len(counts) and 0 <= position < counts[request] * page
        where = int(indices[indptr[request] + position // page]) if own else -1
        own = own and 0 <= where < total + 2
        arguments = (
            torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([request], dtype=dtype),
            torch.tensor([position], dtype=dtype), (k, v), indices, indptr, int32([1] * len(counts)), layout,
        )  # fmt: skip
        if own or request == -1:
            flashinfer.append_paged_kv_cache(*arguments)
        else:
            with pytest.raises(ValueError, match=r"position|batch_indices|page"):
                flashinfer.append_paged_kv_cache(*arguments)
        want = torch.zeros(total + 2, page)
        if own:
            want[where, position % page] = 16
        for x in (k, v):
            assert x.sum(-1).sum(2 if layout == "NHD" else 1).equal(want)


def test_slots_on_a_device_skip_what_is_outside():
    """The same rule where nothing can be raised: -1, which append skips."""
    from flashloom.compat.flashinfer.page import _slots

    requests, places = torch.tensor([0, 0, 1, 1, 1, 2, -1, -7, 0]), torch.tensor([0, 9, 9, -1, 3, 0, 2, 0, 2**62])
    got = _slots(requests, places, int32([0, 2, 4]), int32([0, 1, 2, 9]), 4, 4)
    assert got.tolist() == [0, -1, -1, -1, 11, -1, -1, -1, -1]
    for indptr, indices in ((int32([0]), int32([1])), (int32([0, 0]), int32([]))):
        assert _slots(requests, places, indptr, indices, 4, 4).tolist() == [-1] * 9


def test_append_takes_one_request_and_position_per_token():
    k = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"positions has shape \[1\]: must be \[tokens\] = \[2\]"):
        flashinfer.append_paged_kv_cache(
            torch.ones(2, 2, 8), torch.ones(2, 2, 8), int32([0, 0]), int32([1]), (k, k.clone()), int32([0]),
            int32([0, 1]), int32([1]),
        )  # fmt: skip


# --- numbers of 64 bits ---


def wide(x, at=0):
    y = x.to(torch.int64)
    y[at] += WIDE
    return y


def test_numbers_beyond_32_bits_are_refused_everywhere():
    case = Case([9, 4, 1, 13], [1] * 4)
    kv, rows, table = case.kv, offsets(case.kv_lens), torch.zeros(4, 4, dtype=torch.int64)
    p, d = flashinfer.BatchPrefillWithPagedKVCacheWrapper, flashinfer.BatchDecodeWithPagedKVCacheWrapper
    r = flashinfer.BatchPrefillWithRaggedKVCacheWrapper
    sizes, q_offsets = (HQ, HK, D, PAGE), case.q_indptr
    a, b, c = case.table
    mixed_plan = flashinfer.BatchAttention("NHD", device="cpu").plan
    tables = (case.q, kv, workspace())
    calls = [
        *(lambda t=t: p(workspace()).plan(q_offsets, *t, *sizes) for t in ((wide(a, -1), b, c), (a, wide(b), c))),
        lambda: p(workspace()).plan(q_offsets, a, b, wide(c), *sizes),
        lambda: p(workspace()).plan(wide(q_offsets, -1), a, b, c, *sizes),
        lambda: p(workspace()).workspace_size(q_offsets, a, wide(b), c, *sizes),
        *(lambda t=t: d(workspace()).plan(*t, *sizes) for t in ((wide(a, -1), b, c), (a, wide(b), c), (a, b, wide(c)))),
        lambda: d(workspace()).workspace_size(a, wide(b), c, *sizes),
        lambda: flashinfer.fast_decode_plan(decode(case), a, wide(b), c, *sizes),
        lambda: r(workspace()).plan(q_offsets, wide(rows, -1), HQ, HK, D),
        lambda: r(workspace()).plan(wide(q_offsets, -1), rows, HQ, HK, D),
        lambda: mixed_plan(q_offsets, a, wide(b), int32(case.kv_lens), HQ, HK, D, D, PAGE),
        lambda: mixed_plan(q_offsets, a, b, wide(int32(case.kv_lens)), HQ, HK, D, D, PAGE),
        lambda: flashinfer.xqa_batch_decode_with_kv_cache(*tables, wide(table), int32([1] * 4), 4),
        lambda: flashinfer.xqa_batch_decode_with_kv_cache(*tables, table, wide(int32([1] * 4)), 4),
        lambda: flashinfer.trtllm_batch_decode_with_kv_cache(
            *tables, table, torch.tensor([1, 1, 1, 2**31 + 5], dtype=torch.uint32), 4, kv_layout="NHD"
        ),
        lambda: prefill(case)._cached_module.plan(
            None, None, None, q_offsets, a, wide(int32(case.kv_lens)), 4, 4, HQ, HK, PAGE, False, D, D, True
        ),
    ]  # fmt: skip
    for number, call in enumerate(calls):
        with pytest.raises(ValueError):
            print("call", number, call())
    with pytest.raises(TypeError, match=r"page numbers has dtype torch\.float32"):
        d(workspace()).plan(a, b.float(), c, *sizes)
    with pytest.raises(ValueError, match="one length per request"):
        d(workspace()).plan(int32([0, 2, 4]), int32([0, 1, 2, 3]), int32([4]), *sizes)


def test_wide_pages_are_those_in_use():
    from flashloom.compat.flashinfer._plans import wide_pages

    pages = torch.tensor([3, -1, WIDE, 2**31 - 1, -WIDE])
    for used, wide in (([1, 1, 0, 1, 0], False), ([0, 0, 1, 0, 0], True), ([0, 0, 0, 0, 1], True), ([0] * 5, False)):
        assert wide_pages(pages, torch.tensor(used, dtype=torch.bool)).item() is wide


def test_positions_beyond_32_bits_stay_outside():
    indptr, lens = torch.tensor([0, 2, 3]), torch.tensor([5, 2**32 + 4])
    requests, places = flashinfer.get_batch_indices_positions(indptr, lens, 4)
    assert requests.tolist() == [0, 0, 1, -1]
    assert places.tolist() == [3, 4, 2**31 - 1, 0]
    k = torch.zeros(4, 4, 2, 8)
    with pytest.raises(ValueError, match="request 1 has position 2147483647"):
        flashinfer.append_paged_kv_cache(
            torch.ones(4, 2, 8), torch.ones(4, 2, 8), requests, places, (k, k.clone()), int32([0, 1, 2, 3]),
            int32([0, 2, 4]), int32([1, 1]),
        )  # fmt: skip
    case = Case([14], [9])
    with pytest.raises(ValueError, match="prefix_len_ptr holds"):
        prefill(
            case, causal=True, prefix_len_ptr=torch.tensor([WIDE + 5]), token_pos_in_items_ptr=torch.arange(9),
            token_pos_in_items_len=12, max_item_len_ptr=torch.tensor([3]),
        )  # fmt: skip


def test_narrow_and_wide_integers_mean_the_same():
    case, want = Case(), Case().want(causal=True)[0]
    for dtype in (torch.int64, torch.int16, torch.uint32, torch.uint8):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
        wrapper.plan(
            case.q_indptr.to(dtype), *(x.to(dtype) for x in case.table), HQ, HK, D, PAGE, causal=True,
            q_data_type=torch.float32,
        )  # fmt: skip
        close(wrapper.run(case.q, case.kv), want)


def test_index_buffers_of_graphs_are_int32():
    buffers = [torch.zeros(n, dtype=torch.int32) for n in (5, 40, 4)]
    for at in range(3):
        wrong = [x.long() if i == at else x for i, x in enumerate(buffers)]
        with pytest.raises(ValueError, match=r"must be torch\.int32"):
            flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *wrong)
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers)
    case = Case([9, 4, 1, 13], [1] * 4)
    with pytest.raises(ValueError, match="32 bits"):
        wrapper.plan(case.indptr, wide(case.indices), case.last, HQ, HK, D, PAGE)
