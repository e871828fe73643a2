"""Batch wrappers on the CPU: every wrapper against the reference, state, overrides, CUDA-graph form, errors."""

import functools
import math

import numpy as np
import pytest
import torch
from tests.compat.reference import attend, rotate

import flashloom as fl
from flashloom.compat import flashinfer

HQ, HK, D, PAGE = 4, 2, 32, 4
KV_LENS, Q_LENS = [9, 4, 0, 13], [3, 4, 2, 1]


def int32(x):
    return torch.tensor(x, dtype=torch.int32)


def offsets(lens):
    return int32([0, *np.cumsum(lens).tolist()])


class Case:
    """Requests over shuffled pages, with the rows of each request beside them."""

    def __init__(self, kv_lens=KV_LENS, q_lens=Q_LENS, layout="NHD", page=PAGE, dtype=torch.float32, heads=(HQ, HK)):
        torch.manual_seed(0)
        self.kv_lens, self.q_lens, self.page, self.layout = kv_lens, q_lens, page, layout
        pages = [-(-n // page) for n in kv_lens]
        self.indptr, self.q_indptr = offsets(pages), offsets(q_lens)
        self.indices = torch.randperm(sum(pages) + 3).int()[: sum(pages)]
        self.last = int32([(n - 1) % page + 1 if n else 0 for n in kv_lens])
        self.cache = torch.randn(sum(pages) + 3, 2, page, heads[1], D).to(dtype)
        self.q = torch.randn(sum(q_lens), heads[0], D).to(torch.float32 if dtype.itemsize == 1 else dtype)
        self.kv = self.cache if layout == "NHD" else self.cache.transpose(2, 3).contiguous()

    @property
    def table(self):
        return self.indptr, self.indices, self.last

    def rows(self, i):
        pages = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
        both = self.cache[pages].transpose(0, 1).reshape(2, -1, *self.cache.shape[3:])[:, : self.kv_lens[i]]
        return self.q[self.q_indptr[i] : self.q_indptr[i + 1]], both[0].float(), both[1].float()

    def want(self, change=lambda q, k, v: (q, k, v), **options):
        per_request = options.pop("masks", [None] * len(self.q_lens))
        parts = [attend(*change(*self.rows(i)), mask=per_request[i], **options) for i in range(len(self.q_lens))]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def workspace():
    return torch.empty(1024, dtype=torch.uint8)


def close(got, want, tolerance=3e-5):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)


def prefill(case, wrapper=None, **options):
    wrapper = wrapper or flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), case.layout)
    options.setdefault("q_data_type", case.q.dtype)
    wrapper.plan(case.q_indptr, *case.table, HQ, HK, D, case.page, **options)
    return wrapper


def decode(case, wrapper=None, **options):
    wrapper = wrapper or flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), case.layout)
    options.setdefault("q_data_type", case.q.dtype)
    wrapper.plan(*case.table, HQ, HK, D, case.page, **options)
    return wrapper


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": False, "logits_soft_cap": 6.0}, {"causal": True, "window_left": 2}]
)
def test_paged_prefill(layout, options):
    case = Case(layout=layout)
    wrapper = prefill(case, **options)
    words = {"cap": options.get("logits_soft_cap", 0.0), "window": options.get("window_left", -1)}
    want = case.want(causal=options["causal"], **words)
    out, lse = wrapper.run(case.q, case.kv, return_lse=True)
    close(out, want[0])
    close(lse, want[1])
    pair = case.kv.unbind(1)
    mine, heads_first = torch.empty_like(out), torch.empty(HQ, out.shape[0])
    wrapper.run(case.q, pair, out=mine, lse=heads_first, return_lse=True, lse_base="ln", lse_layout="HN")
    close(mine, want[0])
    close(heads_first, want[1].t() * math.log(2))
    assert wrapper.run_return_lse(case.q, pair)[0].equal(mine)


def test_plans_follow_batches_without_compiling_or_planning_anew(monkeypatch):
    wrapper = prefill(Case(), causal=True)
    made = []
    real = fl.Attention.plan
    monkeypatch.setattr(fl.Attention, "plan", lambda *a, **k: made.append(a) or real(*a, **k))
    for kv_lens in ([9, 4, 0, 13], [12, 4, 1, 10], [13, 7, 2, 9]):
        case = Case(kv_lens)
        prefill(case, wrapper, causal=True)
        close(wrapper.run(case.q, case.kv), case.want(causal=True)[0])
        close(wrapper.run(case.q, case.kv), case.want(causal=True)[0])
    assert not made


@pytest.mark.parametrize("packed", [False, True])
def test_prefill_with_masks_of_one_s_own(packed):
    case, wrapper = Case(), None
    for _ in range(2):
        masks = [torch.rand(a, b) > 0.3 for a, b in zip(case.q_lens, case.kv_lens)]
        flat = torch.cat([m.reshape(-1) for m in masks])
        if packed:
            bits = [torch.from_numpy(np.packbits(m.numpy().reshape(-1), bitorder="little")) for m in masks]
            given = {"packed_custom_mask": torch.cat(bits)}
        else:
            given = {"custom_mask": flat}
        wrapper = prefill(case, wrapper, causal=True, window_left=3, **given)
        out, lse = wrapper.run(case.q, case.kv, return_lse=True)
        want = case.want(masks=masks, window=3)
        close(out, want[0])
        close(lse, want[1])
    prefill(case, wrapper, causal=True)
    close(wrapper.run(case.q, case.kv), case.want(causal=True)[0])


def test_encodings():
    case = Case()
    rope = prefill(case, causal=True, pos_encoding_mode="ROPE_LLAMA", rope_theta=1e3)
    turned = lambda q, k, v: (rotate(q, len(k) - len(q), 1e3), rotate(k, 0, 1e3), v)  # noqa: E731
    close(rope.run(case.q, case.kv), case.want(turned, causal=True)[0], 1e-4)
    single = Case([9], [3])
    alibi = prefill(single, causal=True, pos_encoding_mode="ALIBI", logits_soft_cap=9.0)
    bias = fl.alibi_slopes(HQ)[:, None, None] * (torch.arange(9) - torch.arange(6, 9).unsqueeze(1))
    close(alibi.run(single.q, single.kv), single.want(causal=True, bias=bias, cap=9.0)[0])


def test_item_scoring():
    """Behind a prefix of 5, items opened by delimiters (position 0): an item sees the prefix and itself."""
    kv_len, q_len, prefix = 14, 9, 5
    positions = [0, 1, 2, 3, 0, 1, 2, 3, 0]
    case = Case([kv_len], [q_len])
    wrapper = prefill(
        case, causal=True, prefix_len_ptr=torch.tensor([prefix], dtype=torch.uint32),
        token_pos_in_items_ptr=torch.tensor(positions, dtype=torch.uint16), token_pos_in_items_len=12,
        max_item_len_ptr=torch.tensor([3], dtype=torch.uint16),
    )  # fmt: skip
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for row in range(q_len):
        at = row + kv_len - q_len
        item = positions[at - prefix]
        for key in range(at + 1):
            mask[row, key] = key < prefix or key > at - item
    close(wrapper.run(case.q, case.kv), case.want(masks=[mask])[0])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ragged_prefill(layout):
    case = Case()
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), layout)
    k, v = (torch.cat([case.rows(i)[j] for i in range(4)]) for j in (1, 2))
    keys = (k, v) if layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1))
    wrapper.plan(case.q_indptr, offsets(case.kv_lens), HQ, HK, D, causal=True, q_data_type="float32")
    out, lse = wrapper.run(case.q, *keys, return_lse=True, v_scale=2.0)
    want = case.want(causal=True)
    close(out, want[0] * 2)
    close(lse, want[1])
    masks = [torch.rand(a, b) > 0.3 for a, b in zip(case.q_lens, case.kv_lens)]
    wrapper.plan(
        case.q_indptr, offsets(case.kv_lens), HQ, HK, D, q_data_type=torch.float32,
        custom_mask=torch.cat([m.reshape(-1) for m in masks]),
    )  # fmt: skip
    close(wrapper.run(case.q, *keys), case.want(masks=masks)[0])
    narrow = v[..., :16] if layout == "NHD" else v[..., :16].transpose(0, 1)
    wrapper.plan(case.q_indptr, offsets(case.kv_lens), HQ, HK, D, 16, causal=True, q_data_type=torch.float32)
    close(wrapper.run(case.q, keys[0], narrow), want[0][..., :16])
    wrapper.begin_forward(case.q_indptr, offsets(case.kv_lens), HQ, HK, D, q_data_type=torch.float32)
    out, lse = wrapper.forward_return_lse(case.q, *keys, causal=True, sm_scale=0.4, logits_soft_cap=3.0)
    want = case.want(causal=True, scale=0.4, cap=3.0)
    close(out, want[0])
    close(lse, want[1])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode(layout):
    case = Case([9, 4, 1, 13], [1] * 4, layout)
    wrapper = decode(case, window_left=5, logits_soft_cap=7.0, sm_scale=0.4)
    want = case.want(window=5, cap=7.0, scale=0.4)
    out, lse = wrapper.run(case.q, case.kv, return_lse=True)
    close(out, want[0])
    close(lse, want[1])
    close(wrapper.run(case.q, case.kv, q_scale=2.0, k_scale=0.5, v_scale=3.0), want[0] * 3)
    assert wrapper._window_left == 5
    assert wrapper._logits_soft_cap == 7.0
    assert wrapper._sm_scale == 0.4
    sinks = torch.randn(HQ)
    close(wrapper.run(case.q, case.kv, sinks=sinks), case.want(window=5, cap=7.0, scale=0.4, sink=sinks)[0])


def test_decode_by_the_names_of_earlier_versions():
    case = Case([9, 4, 1, 13], [1] * 4)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())
    with pytest.warns(DeprecationWarning, match="positionally"):
        wrapper.begin_forward(*case.table, HQ, HK, D, PAGE, "NONE", -1, 0.0, "float32")
    out = wrapper.forward(case.q, case.kv, sm_scale=0.3, window_left=4)
    close(out, case.want(scale=0.3, window=4)[0])
    close(wrapper.forward_return_lse(case.q, case.kv)[1], case.want()[1])
    wrapper.end_forward()
    with pytest.raises(TypeError, match="multiple values"), pytest.warns(DeprecationWarning, match="positionally"):
        wrapper.plan(*case.table, HQ, HK, D, PAGE, "NONE", pos_encoding_mode="NONE")


def test_forward_overrides_what_plan_said_for_every_later_step():
    """Engines plan without causal and soft cap and give them to forward()."""
    case = Case()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    for kv_lens in (KV_LENS, [12, 4, 2, 11]):
        case = Case(kv_lens)
        wrapper.begin_forward(case.q_indptr, *case.table, HQ, HK, D, PAGE, q_data_type=torch.float32)
        out = wrapper.forward(case.q, case.kv, causal=True, logits_soft_cap=4.0, sm_scale=0.2, window_left=6)
        close(out, case.want(causal=True, cap=4.0, scale=0.2, window=6)[0])
        assert (wrapper._causal, wrapper._window_left, wrapper._sm_scale) == (True, 6, 0.2)
        close(wrapper.forward(case.q, case.kv, causal=False), case.want()[0])


def test_plan_may_be_made_for_more_heads_than_run_has():
    case = Case(heads=(2, 1))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    wrapper.plan(case.q_indptr, *case.table, 8, 2, D, PAGE, causal=True, q_data_type=torch.float32)
    close(wrapper.run(case.q, case.kv), case.want(causal=True)[0])


def test_keys_and_values_may_have_strides_of_their_own():
    case = Case()
    k, v = case.cache.unbind(1)
    packed = torch.cat([k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)  # as vLLM keeps them
    wide = torch.zeros(*v.shape[:2], HK + 3, D)
    wide[:, :, :HK] = v
    wrapper, want = prefill(case, causal=True), case.want(causal=True)[0]
    for pair in ((packed[..., :D], packed[..., D:]), (packed[..., :D], wide[:, :, :HK]), (k, wide[:, :, :HK])):
        close(wrapper.run(case.q, pair), want)


def test_pages_of_one_token_may_come_without_their_dimension():
    case = Case(page=1)
    wrapper = prefill(case, causal=True)
    want = case.want(causal=True)[0]
    close(wrapper.run(case.q, case.cache.squeeze(2)), want)
    close(wrapper.run(case.q, tuple(x.squeeze(1) for x in case.cache.unbind(1))), want)


def test_eight_bit_cache():
    case = Case([9, 4, 1, 13], [1] * 4, dtype=torch.float8_e4m3fn)
    wrapper = decode(case, q_data_type=torch.float32, kv_data_type="float8_e4m3fn")
    out = wrapper.run(case.q, case.kv, k_scale=0.5, v_scale=4.0)
    close(out, case.want(scale=0.5 * D**-0.5)[0] * 4, 1e-4)
    wrapper = prefill(case, q_data_type=torch.float32, kv_data_type=torch.float8_e4m3fn, causal=True)
    out = wrapper.run(case.q, case.kv, k_scale=torch.tensor([0.5]), v_scale=torch.tensor(4.0))
    close(out, case.want(scale=0.5 * D**-0.5)[0] * 4, 1e-4)


def test_graph_form_keeps_the_caller_s_buffers():
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        workspace(), *(torch.zeros(n, dtype=torch.int32) for n in (5, 40, 4)), "NHD"
    )
    assert wrapper.is_cuda_graph_enabled
    for kv_lens in ([9, 4, 1, 13], [2, 4, 16, 3]):
        case = Case(kv_lens, [1] * 4)
        decode(case, wrapper)
        close(wrapper.run(case.q, case.kv), case.want()[0])
        assert wrapper._paged_kv_indices_buf[: len(case.indices)].equal(case.indices)
    case = Case([7, 8, 9, 10], [1] * 4)  # an engine writes the buffers and plans fast
    wrapper._paged_kv_indptr_buf.copy_(case.indptr)
    wrapper._paged_kv_indices_buf[: len(case.indices)] = case.indices
    wrapper._paged_kv_last_page_len_buf.copy_(case.last)
    wrapper.begin_forward = functools.partial(flashinfer.fast_decode_plan, wrapper)
    assert wrapper.begin_forward.func == flashinfer.decode.fast_decode_plan
    wrapper.begin_forward(
        wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf, HQ, HK, D,
        PAGE, q_data_type=torch.float32, global_override_indptr_cpu=case.indptr,
    )  # fmt: skip
    close(wrapper.run(case.q, case.kv), case.want()[0])
    with pytest.raises(ValueError, match="batch size should be fixed"):
        decode(Case([1], [1]), wrapper)
    with pytest.raises(ValueError, match="allocated buffer"):
        decode(Case([99, 99, 99, 99], [1] * 4), wrapper)


def test_prefill_in_graph_form():
    buffers = {
        "qo_indptr_buf": 5, "paged_kv_indptr_buf": 5, "paged_kv_indices_buf": 40, "paged_kv_last_page_len_buf": 4,
        "custom_mask_buf": 64, "mask_indptr_buf": 5,
    }  # fmt: skip
    made = {n: torch.zeros(size, dtype=torch.uint8 if "custom" in n else torch.int32) for n, size in buffers.items()}
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True, **made)
    for kv_lens in (KV_LENS, [3, 9, 4, 4]):
        case = Case(kv_lens)
        masks = [torch.rand(a, b) > 0.3 for a, b in zip(case.q_lens, case.kv_lens)]
        prefill(case, wrapper, custom_mask=torch.cat([m.reshape(-1) for m in masks]))
        close(wrapper.run(case.q, case.kv), case.want(masks=masks)[0])
        assert wrapper._custom_mask_buf is made["custom_mask_buf"]
    with pytest.raises(ValueError, match="cannot exceed"):
        prefill(Case(KV_LENS, [9, 9, 9, 9]), wrapper)
    with pytest.raises(ValueError, match="qo_indptr_buf should be"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), use_cuda_graph=True)


def test_tokens_that_are_verified_together():
    case = Case([9, 4, 2, 13], [2] * 4)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), use_tensor_cores=True)
    decode(case, wrapper, q_len_per_req=2)
    close(wrapper.run(case.q, case.kv), case.want(causal=True)[0])
    with pytest.raises(ValueError, match="q_len_per_req"):
        wrapper.run(case.q[:4], case.kv)
    with pytest.raises(ValueError, match="empty KV range"):
        decode(Case([9, 4, 1, 13], [2] * 4), wrapper, q_len_per_req=2)
    with pytest.raises(ValueError, match="use_tensor_cores"):
        decode(case, q_len_per_req=2)
    with pytest.raises(ValueError, match="prior plan"):
        flashinfer.fast_decode_plan(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace()), *case.table, HQ, HK, D, PAGE
        )


def test_what_engines_do_through_the_cached_module():
    case = Case()
    wrapper = prefill(case, causal=True)
    case = Case([12, 5, 3, 2])
    wrapper._paged_kv_indices_buf = case.indices
    info = wrapper._cached_module.plan(
        wrapper._float_workspace_buffer, wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer,
        case.q_indptr, case.indptr, int32(case.kv_lens), 10, 4, HQ, HK, PAGE, False, D, D, True, -1, -1, False, 0, 0,
    )  # fmt: skip
    assert info == wrapper._plan_info
    close(wrapper.run(case.q, case.kv), case.want(causal=True)[0])


def test_mixed_batches_and_sinks():
    case = Case()
    mixed = flashinfer.BatchAttention("NHD", device="cpu")
    mixed.plan(
        case.q_indptr, case.indptr, case.indices, int32(case.kv_lens), HQ, HK, D, D, PAGE, causal=True,
        q_data_type=torch.float32, kv_data_type=torch.float32,
    )  # fmt: skip
    out, lse = mixed.run(case.q, case.kv, v_scale=2.0)
    want = case.want(causal=True)
    close(out, want[0] * 2)
    close(lse, want[1])
    sinks = torch.rand(HQ) * 3
    wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(
        workspace(), q_data_type=torch.float32, kv_data_type=torch.float32, head_dim_qk=D, head_dim_vo=D, window_left=3
    )
    assert isinstance(wrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper)
    prefill(case, wrapper, causal=True, window_left=3)
    close(wrapper.run(case.q, case.kv, sinks, 0.3), case.want(causal=True, window=3, scale=0.3, sink=sinks)[0])
    with pytest.raises(ValueError, match="sink, sm_scale"):
        wrapper.run(case.q, case.kv)


def test_pod():
    case = Case([9, 4, 1, 13], [1] * 4)
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(workspace())
    decode(case, wrapper)
    q, k, v = torch.randn(5, HQ, D), *torch.randn(2, 9, HK, D)
    first, second = wrapper.run(q, k, v, case.q, case.kv, causal_p=True)
    close(first, attend(q, k, v, causal=True)[0])
    close(second, case.want()[0])
    chunks = Case()
    both = flashinfer.BatchPODWithPagedKVCacheWrapper(workspace())
    both.plan(
        chunks.q_indptr, *chunks.table, offsets([1] * 4), *case.table, HQ, HK, D, PAGE, q_data_type=torch.float32
    )  # fmt: skip
    for causal in (True, False):
        first, second = both.run(chunks.q, chunks.kv, case.q, case.kv, causal_p=causal)
        close(first, chunks.want(causal=causal)[0])
        close(second, case.want()[0])


def test_block_tables():
    for lens, q_len in (([9, 4, 1, 13], 1), ([9, 4, 3, 13], 2)):
        case = Case(lens, [q_len] * 4)
        table = torch.zeros(4, 6, dtype=torch.int32)
        for i in range(4):
            pages = case.indices[case.indptr[i] : case.indptr[i + 1]]
            table[i, : len(pages)] = pages
        sinks, out = torch.rand(HQ), torch.empty_like(case.q)
        arguments = (case.q, case.kv, workspace(), table, int32(lens), 16)
        want = case.want(causal=True, scale=0.3, window=5, sink=sinks)[0] * 2
        got = flashinfer.xqa_batch_decode_with_kv_cache(
            *arguments, 0.3, 2.0, window_left=5, out=out, sinks=sinks, q_len_per_req=q_len
        )
        assert got is out
        close(out, want)
        out, lse = flashinfer.trtllm_batch_decode_with_kv_cache(
            *arguments, bmm1_scale=torch.tensor([0.3]), kv_layout="NHD", q_len_per_req=q_len, return_lse=True,
            cum_seq_lens_q=offsets([q_len] * 4), max_q_len=q_len,
        )  # fmt: skip
        close(out, case.want(causal=True, scale=0.3)[0])
        close(lse, case.want(causal=True, scale=0.3)[1])
    with pytest.raises(NotImplementedError, match="draft"):
        flashinfer.xqa_batch_decode_with_kv_cache(*arguments, mask=torch.zeros(8, 2, dtype=torch.uint16))


def test_errors_and_small_print():
    case = Case()
    wrapper = prefill(case, causal=True)
    with pytest.raises(ValueError, match=r"qo_indptr\[-1\]"):
        wrapper.run(case.q[:-1], case.kv)
    with pytest.raises(ValueError, match="dtype of query"):
        wrapper.run(case.q.half(), case.kv)
    with pytest.raises(ValueError, match="dtype of key"):
        wrapper.run(case.q, case.kv.half())
    with pytest.raises(ValueError, match="o_data_type"):
        wrapper.run(case.q, case.kv, out=case.q.half())
    with pytest.raises(ValueError, match="Invalid shape of out"):
        wrapper.run(case.q, case.kv, out=case.q[:2])
    with pytest.raises(KeyError, match="Unrecognized"):
        wrapper.run(case.q, list(case.kv.unbind(1)))
    with pytest.raises(AssertionError):
        wrapper.run(case.q, case.kv, window_left=7)
    with pytest.raises(RuntimeError, match="call plan"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace()).run(case.q, case.kv)
    with pytest.raises(KeyError, match="kv_layout"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "DNH")
    with pytest.raises(NotImplementedError, match="cudnn"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend="cudnn")
    sizes = wrapper.workspace_size(case.q_indptr, *case.table, HQ, HK, D, PAGE, q_data_type=torch.float32)
    assert min(sizes) > 0
    wrapper.reset_workspace_buffer(workspace(), workspace())
    with pytest.raises(ValueError, match="int_workspace_buffer must be 16-byte aligned"):
        wrapper.reset_workspace_buffer(workspace(), workspace()[1:])
    out = torch.empty(case.q.shape, dtype=torch.float16)
    prefill(case, wrapper, causal=True, o_data_type=torch.float16)
    close(wrapper.run(case.q, case.kv, out=out), case.want(causal=True)[0], 2e-3)
    prefill(case, wrapper, causal=True, o_data_type=torch.float8_e4m3fn)
    close(wrapper.run(case.q, case.kv).float(), case.want(causal=True)[0], 0.1)


def test_masks_in_wrappers_of_their_own():
    """Other numbers of requests with a mask: nothing of a former wrapper's mask is left."""
    for kv_lens, q_lens in (([9, 4], [3, 4]), (KV_LENS, Q_LENS)):
        case = Case(kv_lens, q_lens)
        masks = [torch.rand(a, b) > 0.3 for a, b in zip(q_lens, kv_lens)]
        wrapper = prefill(case, custom_mask=torch.cat([m.reshape(-1) for m in masks]))
        close(wrapper.run(case.q, case.kv), case.want(masks=masks)[0])


def test_what_a_wrapper_knows_of_a_cache_goes_with_it():
    """The same tensors are looked at once; others, and others at the same place, anew; none is kept alive."""
    import gc
    import weakref

    case = Case()
    wrapper, want = prefill(case, causal=True), case.want(causal=True)[0]
    first = case.kv.clone()
    for cache in (first, first, tuple(first.unbind(1)), first.view(first.shape), case.kv):
        close(wrapper.run(case.q, cache), want)
    assert wrapper._pages(first) is wrapper._pages(first)
    first.set_(case.kv.flip(0).contiguous())  # the same object over other memory
    assert not torch.allclose(wrapper.run(case.q, first).double(), want)
    gone = weakref.ref(first)
    before = len(wrapper._seen)
    del first, cache
    gc.collect()
    assert gone() is None
    assert len(wrapper._seen) < before


def test_repeated_runs_follow_what_changed():
    """run() keeps what the last call came to, not past a change of the wrapper, scales, queries or the cache."""
    case, other = Case(q_lens=[1, 1, 1, 1]), Case(q_lens=[1, 1, 1, 1])
    other.cache = other.cache.flip(0).contiguous()
    other.kv = other.cache
    wrapper = decode(case)
    for _ in range(2):
        for each in (case, other):
            close(wrapper.run(each.q, each.kv), each.want()[0])
    close(wrapper.run(case.q, case.kv, k_scale=0.5), case.want(change=lambda q, k, v: (q, k * 0.5, v))[0])
    close(wrapper.run(case.q, case.kv, v_scale=0.5), case.want(change=lambda q, k, v: (q, k, v * 0.5))[0])
    close(wrapper.run(case.q, case.kv, q_scale=3), case.want(change=lambda q, k, v: (q * 3, k, v))[0])
    wrapper._sm_scale = 0.3  # as engines write it
    close(wrapper.run(case.q, case.kv), case.want(scale=0.3)[0])
    decode(case, wrapper, window_left=2)
    close(wrapper.run(case.q, case.kv), case.want(window=2)[0])
    decode(case, wrapper)
    close(wrapper.run(case.q, case.kv), case.want()[0])
    with pytest.raises(ValueError, match="dtype of query"):
        wrapper.run(case.q.half(), case.kv)
    with pytest.raises(ValueError, match="shape of out"):
        wrapper.run(case.q, case.kv, out=torch.empty(4, HQ, D + 1))
    close(wrapper.run(case.q, case.kv), case.want()[0])


def test_scales_of_narrow_caches_are_kept_for_each_cache():
    fp8 = torch.float8_e4m3fn
    case, other = (Case(q_lens=[1, 1, 1, 1], dtype=fp8) for _ in range(2))
    other.cache = case.cache.float().flip(0).to(fp8)
    other.kv = other.cache
    wrapper = decode(case, kv_data_type=fp8)
    for scale in (0.5, 2.0, 1.0):
        for _ in range(2):
            for each in (case, other):
                got = wrapper.run(each.q, each.kv, k_scale=0.5, v_scale=scale)
                close(got, each.want(change=lambda q, k, v, by=scale: (q, k * 0.5, v * by))[0], 2e-2)
