"""FlashInfer's names inside torch.compile(fullgraph=True), none of them called before."""

import pytest
import torch
from tests.compat.reference import attend, rotate
from tests.compat.test_batch import HK, HQ, PAGE, Case, D, close, decode, int32, offsets, prefill, workspace
from tests.compat.test_refusals import block_table, mixed, ragged, rows_of

from flashloom.compat import flashinfer


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def whole(call):
    return torch.compile(call, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("one", [True, False])
def test_append(layout, one):
    shape = (4, 2, 5, 3, 8) if layout == "NHD" else (4, 2, 3, 5, 8)
    traced, eager = torch.zeros(shape), torch.zeros(shape)
    key, value = torch.randn(2, 4, 3, 8)
    arguments = int32([0, -1, 1, 0]), int32([6, 0, 2, 1]), int32([2, 0, 3]), int32([0, 2, 3]), int32([2, 3])

    def call(cache, key, value, requests, places, indices, indptr, last):
        given = cache if one else tuple(cache.unbind(1))
        flashinfer.append_paged_kv_cache(key, value, requests, places, given, indices, indptr, last, layout)
        return cache.sum() + key.sum()

    whole(call)(traced, key, value, *arguments)
    call(eager, key, value, *arguments)
    torch.testing.assert_close(traced, eager)
    first = traced[0, 0] if layout == "NHD" else traced[0, 0].transpose(0, 1)
    torch.testing.assert_close(first[1], key[0])
    with pytest.raises(ValueError, match="position 10"):
        whole(call)(traced, key, value, arguments[0], int32([10, 0, 2, 1]), *arguments[2:])


def wrappers():
    one = [1] * 4
    yield "prefill", Case(), lambda c: prefill(c, causal=True), lambda c: (c.kv,)
    yield "decode", Case([9, 4, 1, 13], one), lambda c: decode(c), lambda c: (c.kv,)
    yield "ragged", Case(), ragged, rows_of
    yield "mixed", Case(), mixed, lambda c: (c.kv,)


@pytest.mark.parametrize("number", range(4))
def test_a_first_run(number):
    name, case, make, cache_of = list(wrappers())[number]
    wrapper, want = make(case), case.want(causal=name != "decode")
    options = {} if name == "mixed" else {"return_lse": True, "k_scale": 1.0}
    call = whole(lambda q, *cache: wrapper.run(q, *cache, **options))
    out, lse = call(case.q, *cache_of(case))
    close(out, want[0])
    close(lse, want[1])
    other = Case([5, 7, 3, 2] if name != "decode" else [2, 7, 3, 5], case.q_lens)
    make(other) if name == "mixed" else None
    if name == "prefill":
        prefill(other, wrapper, causal=False)  # a later plan is what the same function computes
        close(call(other.q, other.kv)[0], other.want()[0])


def test_scales_outputs_and_sinks():
    case = Case([9, 4, 1, 13], [1] * 4)
    wrapper, sinks, out = decode(case, sm_scale=0.4), torch.randn(HQ), torch.empty_like(case.q)
    scale = torch.tensor([2.0])

    def call(q, cache, out, sinks, scale):
        wrapper.run(q, tuple(cache.unbind(1)), out=out, sinks=sinks, v_scale=scale, q_scale=0.5)
        return out * 2

    got = whole(call)(case.q, case.kv, out, sinks, scale)
    want = case.want(scale=0.2, sink=sinks)[0] * 2
    close(out, want)
    close(got, want * 2)
    paged = prefill(case)
    heads_first = whole(lambda q, c: paged.run(q, c, return_lse=True, lse_base="ln", lse_layout="HN")[1])
    close(heads_first(case.q, case.kv).t() / torch.tensor(2.0).log(), case.want()[1])
    sunk = prefill(case, flashinfer.BatchAttentionWithAttentionSinkWrapper(workspace()))
    close(whole(lambda q, c, s: sunk.run(q, c, s, 0.3))(case.q, case.kv, sinks), case.want(scale=0.3, sink=sinks)[0])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_singles_with_rules_of_their_own(layout):
    q, k, v = torch.randn(3, HQ, D), *torch.randn(2, 9, HK, D)
    keys = (k, v) if layout == "NHD" else (k.transpose(0, 1), v.transpose(0, 1))
    mask = torch.rand(3, 9) > 0.3
    for options, words in (
        ({"causal": True, "logits_soft_cap": 4.0, "window_left": 2, "sm_scale": 0.3},
         {"causal": True, "cap": 4.0, "window": 2, "scale": 0.3}),
        ({"custom_mask": mask, "v_scale": 2.0}, {"mask": mask}),
    ):  # fmt: skip
        call = lambda *x, o=options: flashinfer.single_prefill_with_kv_cache(*x, kv_layout=layout, **o)  # noqa: E731
        close(whole(call)(q, *keys), attend(q, k, v, **words)[0] * options.get("v_scale", 1.0))
    rope = {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 1e3}
    call = lambda *x: flashinfer.single_decode_with_kv_cache(*x, layout, return_lse=True, **rope)  # noqa: E731
    out, lse = whole(call)(q[0], *keys)
    want = attend(rotate(q[:1], 8, 1e3), rotate(k, 0, 1e3), v)
    close(out, want[0][0], 1e-4)
    close(lse, want[1][0], 1e-4)


def test_what_forward_says():
    """Rules of forward() reach a traced call, though plan() said others."""
    case = Case()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    wrapper.begin_forward(case.q_indptr, *case.table, HQ, HK, D, PAGE, q_data_type=torch.float32)
    for options in ({"causal": True, "window_left": 6, "logits_soft_cap": 4.0, "sm_scale": 0.2}, {"causal": False}):
        words = {"window": options.get("window_left", -1), "cap": options.get("logits_soft_cap", 0.0)}
        want = case.want(causal=options["causal"], scale=options.get("sm_scale"), **words)[0]
        close(whole(lambda q, c, o=options: wrapper.forward(q, c, **o))(case.q, case.kv), want)
    one = Case([9, 4, 1, 13], [1] * 4)
    steps = decode(one)
    out, lse = whole(lambda q, c: steps.forward_return_lse(q, c, window_left=4))(one.q, one.kv)
    close(out, one.want(window=4)[0])
    close(lse, one.want(window=4)[1])


def test_block_tables():
    case = Case([9, 4, 1, 13], [1] * 4)
    table, lens, sinks = block_table(case), int32(case.kv_lens), torch.randn(HQ)

    def xqa(q, kv, table, lens, sinks):
        return flashinfer.xqa_batch_decode_with_kv_cache(q, kv, workspace(), table, lens, 13, 0.3, 2.0, sinks=sinks)

    def trtllm(q, kv, table, lens):
        return flashinfer.trtllm_batch_decode_with_kv_cache(
            q, kv, workspace(), table, lens, 13, 0.3, kv_layout="NHD", return_lse=True
        )

    close(whole(xqa)(case.q, case.kv, table, lens, sinks), case.want(scale=0.3, sink=sinks)[0] * 2)
    out, lse = whole(trtllm)(case.q, case.kv, table, lens)
    close(out, case.want(scale=0.3)[0])
    close(lse, case.want(scale=0.3)[1])


def test_cascades_and_mixed_calls():
    case = Case([9, 4], [3, 4])
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace())
    shared = (int32([0, 7]), int32([0, 1]), int32([0]), int32([4]))
    levels = map(list, zip(shared, (case.q_indptr, *case.table)))
    wrapper.plan(*levels, HQ, HK, D, PAGE, causal=True, q_data_type=torch.float32)
    got = whole(lambda q, c: wrapper.run(q, c))(case.q, case.kv)
    torch.testing.assert_close(got, wrapper.run(case.q, case.kv))
    steps = Case([9, 4, 1, 13], [1] * 4)
    pod = decode(steps, flashinfer.PODWithPagedKVCacheWrapper(workspace()))
    q, k, v = torch.randn(5, HQ, D), *torch.randn(2, 9, HK, D)
    first, second = whole(lambda *x: pod.run(*x, causal_p=True))(q, k, v, steps.q, steps.kv)
    close(first, attend(q, k, v, causal=True)[0])
    close(second, steps.want()[0])


def test_prefills_and_decodes_of_two_batches_after_one_call_outside():
    chunks, case = Case(), Case([9, 4, 1, 13], [1] * 4)
    both = flashinfer.BatchPODWithPagedKVCacheWrapper(workspace())
    arrays = (chunks.q_indptr, *chunks.table, offsets([1] * 4), *case.table)
    both.plan(*arrays, HQ, HK, D, PAGE, q_data_type=torch.float32)
    both.run(chunks.q, chunks.kv, case.q, case.kv, causal_p=True)
    first, second = whole(lambda *x: both.run(*x, causal_p=True))(chunks.q, chunks.kv, case.q, case.kv)
    close(first, chunks.want(causal=True)[0])
    close(second, case.want()[0])


def test_helpers():
    lens = int32([5, 7])
    got = whole(lambda a, b: flashinfer.get_batch_indices_positions(a, b, 4))(offsets([1, 3]), lens)
    assert [x.tolist() for x in got] == [[0, 1, 1, 1], [4, 4, 5, 6]]
    seq = whole(lambda a, b: flashinfer.get_seq_lens(a, b, 4))(int32([0, 2, 3]), int32([1, 3]))
    assert seq.tolist() == [5, 3]


def test_a_wrapper_without_a_plan_says_so():
    case = Case([9, 4, 1, 13], [1] * 4)
    wrapper = decode(case)
    call = whole(lambda q, c: wrapper.run(q, c))
    call(case.q, case.kv)
    with pytest.raises(ValueError):
        decode(case, wrapper, q_data_type="float33")
    with pytest.raises(RuntimeError, match=r"call plan\(\)"):
        call(case.q, case.kv)
