"""Merging, cascades, pages, bits, and texts of variants."""

import math

import numpy as np
import pytest
import torch
from tests.compat.reference import attend
from tests.compat.test_batch import HK, HQ, PAGE, Case, D, close, int32, offsets, workspace

from flashloom.compat import flashinfer
from flashloom.compat.flashinfer import _jit
from flashloom.compat.flashinfer.triton.cascade import variable_length_merge_states


def test_merging():
    torch.manual_seed(0)
    q, k, v = torch.randn(5, HQ, D), *torch.randn(2, 12, HK, D)
    parts = [attend(q, k[i : i + 4], v[i : i + 4]) for i in (0, 4, 8)]
    vs, ss = (torch.stack([p[j].float() for p in parts], 1) for j in (0, 1))
    want = attend(q, k, v)
    a, b, c = ((vs[:, i], ss[:, i]) for i in range(3))
    got = flashinfer.merge_state(*flashinfer.merge_state(*a, *b), *c)
    for out, lse in (got, flashinfer.merge_states(vs, ss)):
        close(out, want[0])
        close(lse, want[1])
    v_mine, s_mine = a[0].clone(), a[1].clone()
    flashinfer.merge_state_in_place(v_mine, s_mine, *b, mask=torch.tensor([True, False, True, False, False]))
    both = flashinfer.merge_state(*a, *b)
    for mine, old, new in ((v_mine, a[0], both[0]), (s_mine, a[1], both[1])):
        close(mine[[0, 2]], new[[0, 2]])
        assert mine[[1, 3, 4]].equal(old[[1, 3, 4]])


def test_merging_what_saw_no_keys():
    v, s = torch.randn(3, 2, HQ, D), torch.full((3, 2, HQ), -torch.inf)
    s[1] = 0.0
    out, lse = flashinfer.merge_states(v, s)
    assert (out[[0, 2]] == 0).all()
    assert torch.isneginf(lse[[0, 2]]).all()
    close(out[1], v[1].mean(0))
    close(lse[1], torch.ones(HQ))
    out, lse = variable_length_merge_states(v.reshape(6, HQ, D), s.reshape(6, HQ), int32([0, 0, 2, 3, 6]))
    assert (out[:2] == 0).all()
    assert torch.isneginf(lse[:2]).all()
    close(out[2], v[1, 0])
    close(out[3], v[1, 1])


def test_merging_ragged_numbers_of_states():
    torch.manual_seed(0)
    lens = [1, 4, 2, 7]
    v, s, starts = torch.randn(14, HQ, D), torch.randn(14, HQ) * 5, offsets(lens)
    out, lse = variable_length_merge_states(v, s, starts)
    for i in range(4):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        want = flashinfer.merge_states(v[rows].unsqueeze(0), s[rows].unsqueeze(0))
        close(out[i], want[0][0])
        close(lse[i], want[1][0])


def test_cascades():
    """A prefix of two pages that all requests share, and pages of their own."""
    torch.manual_seed(0)
    own_lens, q_lens = [3, 6, 1], [2, 3, 1]
    cache = torch.randn(8, 2, PAGE, HK, D)
    shared, own = [5, 2], [[0], [1, 3], [4]]
    q = torch.randn(6, HQ, D)
    last = int32([(n - 1) % PAGE + 1 for n in own_lens])
    tables = int32([p for pages in own for p in pages]), offsets([1, 2, 1])
    want = []
    for i in range(3):
        pages = [*shared, *own[i]]
        k, v = cache[pages].transpose(0, 1).reshape(2, -1, HK, D)[:, : 2 * PAGE + own_lens[i]]
        rows = q[sum(q_lens[:i]) : sum(q_lens[: i + 1])]
        want.append(attend(rows, k, v, causal=True)[0])
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace())
    wrapper.plan(
        [int32([0, 6]), offsets(q_lens)], [int32([0, 2]), tables[1]], [int32(shared), tables[0]], [int32([PAGE]), last],
        HQ, HK, D, PAGE, causal=True, q_data_type=torch.float32,
    )  # fmt: skip
    close(wrapper.run(q, cache), torch.cat(want))
    k_shared, v_shared = cache[shared].transpose(0, 1).reshape(2, -1, HK, D)
    prefill = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace())
    prefill.begin_forward(offsets(q_lens), tables[1], tables[0], last, HQ, HK, D, PAGE, q_data_type=torch.float32)
    close(prefill.forward(q, k_shared, v_shared, cache, causal=True), torch.cat(want))
    decode = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace())
    decode.begin_forward(tables[1], tables[0], last, HQ, HK, D, PAGE, data_type=torch.float32)
    one = q[offsets(q_lens)[1:].long() - 1]
    close(decode.forward(one, k_shared, v_shared, cache), torch.stack([w[-1] for w in want]))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_appending(layout):
    case, lens = Case(layout=layout), [3, 4, 0, 5]
    k, v = torch.randn(2, 14, HK, D)  # two rows too many
    requests, positions = flashinfer.get_batch_indices_positions(offsets(lens), int32(case.kv_lens), 14)
    assert requests.tolist() == [0] * 3 + [1] * 4 + [3] * 5 + [-1] * 2
    assert positions.tolist() == [6, 7, 8, 0, 1, 2, 3, 8, 9, 10, 11, 12, 0, 0]
    assert requests.dtype == positions.dtype == torch.int32
    mine = torch.empty(14, dtype=torch.int32), torch.empty(14, dtype=torch.int32)
    again = flashinfer.get_batch_indices_positions(offsets(lens), int32(case.kv_lens), 14, *mine)
    assert again[0] is mine[0]
    assert mine[1].equal(positions)
    got = case.kv.clone()
    flashinfer.append_paged_kv_cache(k, v, requests, positions, got, case.indices, case.indptr, case.last, layout)
    want = case.cache.clone()
    for row in range(12):
        page = case.indices[case.indptr[requests[row]] + positions[row] // PAGE]
        want[page, 0, positions[row] % PAGE], want[page, 1, positions[row] % PAGE] = k[row], v[row]
    assert got.equal(want if layout == "NHD" else want.transpose(2, 3))
    lens = flashinfer.get_seq_lens(case.indptr, case.last, PAGE)
    assert lens.tolist() == case.kv_lens
    with pytest.raises(ValueError, match="Invalid shape of positions"):
        flashinfer.get_batch_indices_positions(offsets([1]), int32([1]), 3, None, mine[0])


@pytest.mark.parametrize("order", ["big", "little"])
def test_bits(order):
    torch.manual_seed(0)
    for n in (0, 1, 7, 8, 9, 999):
        x = torch.rand(n) > 0.5
        assert flashinfer.packbits(x, order).tolist() == np.packbits(x.numpy(), bitorder=order).tolist()
    lens = [9, 0, 8, 1, 30]
    x = torch.rand(sum(lens)) > 0.5
    got, starts = flashinfer.segment_packbits(x, offsets(lens), order)
    parts = [np.packbits(part.numpy(), bitorder=order) for part in x.split(lens)]
    assert got.tolist() == np.concatenate(parts).tolist()
    assert starts.tolist() == np.cumsum([0, *map(len, parts)]).tolist()
    assert starts.dtype == torch.int32
    with pytest.raises(ValueError, match="bitorder"):
        flashinfer.packbits(x, "middle")


def jit_args(name, text, tensors=(), scalars=()):
    dtypes = [torch.float32] * 3
    return [
        "uri",
        *dtypes,
        torch.int32,
        D,
        D,
        tensors,
        ["float"] * len(tensors),
        scalars,
        ["double"] * len(scalars),
        name,
        text,
    ]


def test_texts_of_variants_are_known_by_content():
    case = Case()
    text = flashinfer.jit.attention.variants.attention_sink_decl["fa2"]
    assert _jit.digest(" a\n b") == _jit.digest("ab")
    asked = jit_args("Mine", f"  {text}\n", ["sink"], ["sm_scale"])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), jit_args=asked)
    wrapper.plan(case.q_indptr, *case.table, HQ, HK, D, PAGE, causal=True, q_data_type=torch.float32)
    sinks = torch.rand(HQ) * 4
    close(wrapper.run(case.q, case.kv, sinks, 0.2), case.want(causal=True, sink=sinks, scale=0.2)[0])
    for wrong in (jit_args("AttentionSink", "struct AttentionSink {};", ["sink"], ["sm_scale"]), jit_args("X", text)):
        with pytest.raises(NotImplementedError, match=r"flashloom\.Variant"):
            flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), jit_args=wrong)
    with pytest.raises(ValueError, match="jit_args has 2 entries"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), jit_args=["uri", "half"])


def test_sigmoid_attention_known_as_a_text(monkeypatch):
    case = Case()
    monkeypatch.setitem(_jit._KNOWN, _jit.digest("sigmoid"), _jit._SIGMOID)
    asked = jit_args("FlashSigmoid", "sigmoid", [], ["logits_scale", "sigmoid_bias"])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), jit_args=asked)
    wrapper.plan(case.q_indptr, *case.table, HQ, HK, D, PAGE, q_data_type=torch.float32)
    out = wrapper.run(case.q, case.kv, 0.3, -0.5)
    q, k, v = case.rows(0)
    weight = torch.sigmoid(torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.3 - 0.5)
    close(out[: len(q)], torch.einsum("hqk,khd->qhd", weight, v.repeat_interleave(2, 1)))
    assert math.isfinite(float(out.sum()))
