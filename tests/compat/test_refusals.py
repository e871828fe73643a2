"""What FlashInfer's names refuse or read exactly: plans that failed, scales and sinks in their forms, backends, and
what a cascade cannot do."""

import inspect

import pytest
import torch
from tests.compat.reference import attend
from tests.compat.test_batch import HK, HQ, KV_LENS, PAGE, Case, D, close, decode, int32, offsets, prefill, workspace

from flashloom.compat import flashinfer

E4M3 = torch.float8_e4m3fn


def ragged(case, wrapper=None, **options):
    wrapper = wrapper or flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    arguments = {"causal": True, "q_data_type": torch.float32, **options}
    wrapper.plan(case.q_indptr, offsets(case.kv_lens), HQ, HK, D, **arguments)
    return wrapper


def rows_of(case):
    return tuple(torch.cat([case.rows(i)[j] for i in range(len(case.kv_lens))]) for j in (1, 2))


# --- plans that fail ---


def mixed(case, wrapper=None, heads=(HQ, HK), lens=None, **options):
    wrapper = wrapper or flashinfer.BatchAttention("NHD", device="cpu")
    wrapper.plan(
        case.q_indptr, case.indptr, case.indices, int32(lens or case.kv_lens), *heads, D, D, PAGE,
        q_data_type=torch.float32, kv_data_type=torch.float32, **{"causal": True, **options},
    )  # fmt: skip
    return wrapper


def bad_prefill(case, wrapper):
    wrapper.plan(case.q_indptr, *case.table, HQ + 1, HK, D, PAGE, sm_scale=9.0, q_data_type=torch.float32)


def bad_fast_plan(case, wrapper):
    flashinfer.fast_decode_plan(
        wrapper, case.indptr, case.indices[:1], case.last, HQ, HK, D, PAGE, window_left=1, q_data_type=torch.float32
    )


def bad_module(case, wrapper):
    wrapper._cached_module.plan(
        None, None, None, case.q_indptr, case.indptr, int32([99] * 4), 10, 4, HQ, HK, PAGE, False, D, D, True
    )


FAILING = {
    "prefill": (prefill, bad_prefill),
    "prefill, last page": (prefill, lambda c, w: w.plan(c.q_indptr, c.indptr, c.indices, c.last + 40, HQ, HK, D, PAGE)),
    "prefill, encoding": (prefill, lambda c, w: prefill(c, w, pos_encoding_mode="ROPE")),
    "engine's module": (prefill, bad_module),
    "ragged": (ragged, lambda c, w: w.plan(c.q_indptr, offsets(c.kv_lens), HQ + 1, HK, D, sm_scale=9.0)),
    "ragged, offsets": (ragged, lambda c, w: w.plan(c.q_indptr, int32([0, 9, 4, 4, 13]), HQ, HK, D, causal=False)),
    "decode": (decode, lambda c, w: w.plan(*c.table, HQ + 1, HK, D, PAGE, q_data_type=torch.float32)),
    "decode, dtype": (decode, lambda c, w: decode(c, w, window_left=1, q_data_type="float33")),
    "fast decode": (decode, bad_fast_plan),
    "batch attention": (mixed, lambda c, w: mixed(c, w, lens=[99] * 4, sm_scale=9.0)),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_plan_that_fails_leaves_none(name):
    make, fail = FAILING[name]
    case = Case([9, 4, 1, 13], [1] * 4)
    wrapper, cache = make(case), rows_of(case) if make is ragged else (case.kv,)
    first = wrapper.run(case.q, *cache)
    with pytest.raises((ValueError, KeyError)):
        fail(case, wrapper)
    with pytest.raises((RuntimeError, ValueError), match=r"call plan\(\)|does not match qo_indptr"):
        wrapper.run(case.q, *cache)
    make(case, wrapper)
    torch.testing.assert_close(wrapper.run(case.q, *cache), first)


def test_a_failed_level_leaves_a_cascade_without_a_plan():
    case = Case([9, 4], [3, 4])
    shared = (int32([0, 7]), int32([0, 1]), int32([0]), int32([4]))
    own = (case.q_indptr, *case.table)
    for bad in (
        [shared, (case.q_indptr, case.indptr, case.indices[:1], case.last)],
        [(int32([0, 7]), int32([0, 1]), int32([0]), int32([9])), own],
        [shared, own, own],
        [(int32([0, 6]), *shared[1:]), own],
    ):
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace())
        plan = lambda levels, w=wrapper, **o: w.plan(*map(list, zip(*levels)), HQ, HK, D, PAGE, **o)  # noqa: E731
        plan([shared, own], causal=True, q_data_type=torch.float32)
        wrapper.run(case.q, case.kv)
        with pytest.raises(ValueError):
            plan(bad, sm_scale=9.0, q_data_type=torch.float32)
        with pytest.raises(RuntimeError, match=r"call plan\(\)"):
            wrapper.run(case.q, case.kv)


def test_a_failed_plan_of_both_leaves_none():
    chunks, case = Case(), Case([9, 4, 1, 13], [1] * 4)
    both = flashinfer.BatchPODWithPagedKVCacheWrapper(workspace())
    sizes = (offsets([1] * 4), *case.table, HQ, HK, D, PAGE)
    run = lambda **o: both.run(chunks.q, chunks.kv, case.q, case.kv, causal_p=True, **o)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"call plan\(\)"):
        run()
    both.plan(chunks.q_indptr, *chunks.table, *sizes, q_data_type=torch.float32)
    close(run()[0], chunks.want(causal=True)[0])
    with pytest.raises(ValueError):
        both.plan(chunks.q_indptr, *chunks.table, offsets([1] * 4), case.indptr, case.indices[:1], *sizes[3:])
    with pytest.raises((RuntimeError, ValueError)):
        run()
    both.plan(chunks.q_indptr, chunks.indptr, chunks.indices[:1], chunks.last, *sizes, q_data_type=torch.float32)
    with pytest.raises(ValueError, match="page indices"):  # whether they are causal, and so their plan, is run()'s
        run()
    both.plan(chunks.q_indptr, *chunks.table, *sizes, q_data_type=torch.float32)
    first, second = run(
        q_scale=2.0, k_scale=0.25, v_scale=3.0
    )  # of the decodes alone, as FlashInfer's documentation says
    close(first, chunks.want(causal=True)[0])
    close(second, case.want(scale=0.5 * D**-0.5)[0] * 3)


def test_what_pod_is_told_of_decodes_must_be_what_was_planned():
    case = Case([9, 4, 1, 13], [1] * 4)
    wrapper = decode(case, flashinfer.PODWithPagedKVCacheWrapper(workspace()), window_left=3, sm_scale=0.4)
    q, k, v = torch.randn(5, HQ, D), *torch.randn(2, 9, HK, D)
    run = lambda **o: wrapper.run(q, k, v, case.q, case.kv, causal_p=True, **o)[1]  # noqa: E731
    for options in ({}, {"window_left_d": 3, "sm_scale_d": 0.4, "kv_layout_d": "NHD"}):
        close(run(**options), case.want(window=3, scale=0.4)[0])
    for options in (
        {"window_left_d": 4},
        {"sm_scale_d": 0.5},
        {"kv_layout_d": "HND"},
        {"pos_encoding_mode_d": "ALIBI"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*say it to plan"):
            run(**options)


# --- scales, sinks and dtypes ---


def block_table(case):
    table = torch.zeros(len(case.kv_lens), 6, dtype=torch.int32)
    for i in range(len(case.kv_lens)):
        pages = case.indices[case.indptr[i] : case.indptr[i + 1]]
        table[i, : len(pages)] = pages
    return table


@pytest.mark.parametrize("entry", ["xqa_batch_decode_with_kv_cache", "trtllm_batch_decode_with_kv_cache"])
@pytest.mark.parametrize("cache", [torch.float32, E4M3])
def test_o_scale_does_not_change_a_result(entry, cache):
    case = Case([9, 4, 1, 13], [1] * 4, dtype=cache)
    for out_dtype, tolerance in ((E4M3, 0.1), (torch.float8_e5m2, 0.2), (torch.float32, 1e-4)):
        for o_scale in (None, 1.0, 0.25, 3.0):
            for factor in (2.0, torch.tensor([2.0])):
                out = torch.empty(case.q.shape, dtype=out_dtype)
                getattr(flashinfer, entry)(
                    case.q, case.kv, workspace(), block_table(case), int32(case.kv_lens), 13, 0.3, factor, out=out,
                    kv_layout="NHD", o_scale=o_scale,
                )  # fmt: skip
                close(out.float(), case.want(scale=0.3)[0] * 2, tolerance)


def test_xqa_scales_float8_results_by_the_reciprocal():
    case = Case([9, 4, 1, 13], [1] * 4)
    for out_dtype, reciprocal, want in ((E4M3, 4.0, 2.0), (E4M3, 1.0, 0.5), (torch.float32, 4.0, 0.5)):
        out = torch.empty(4, 1, HQ, D, dtype=out_dtype)
        flashinfer.xqa(
            case.q.unsqueeze(1), *case.kv.unbind(1), block_table(case), int32(case.kv_lens).unsqueeze(1), out,
            workspace(), workspace(), HK, PAGE, q_scale=3.0, kv_scale=0.5, rcp_out_scale=reciprocal,
        )  # fmt: skip
        close(out.float().squeeze(1), case.want(scale=1.5 * D**-0.5)[0] * want, 0.1 if out_dtype == E4M3 else 1e-4)
    for heads, page in ((HK + 1, PAGE), (HK, PAGE * 2)):
        with pytest.raises(ValueError, match="num_kv_heads="):
            flashinfer.xqa(
                case.q.unsqueeze(1), *case.kv.unbind(1), block_table(case), int32(case.kv_lens), out, workspace(),
                workspace(), heads, page,
            )  # fmt: skip


def test_scales_of_one_element_have_any_rank():
    case = Case([9, 4, 1, 13], [1] * 4)
    want = case.want(scale=0.5 * D**-0.5)[0] * 3
    for shape in ((), (1,), (1, 1), (1, 1, 1, 1)):
        k_scale, v_scale = torch.full(shape, 0.5), torch.full(shape, 3.0)
        close(decode(case).run(case.q, case.kv, k_scale=k_scale, v_scale=v_scale), want)
        close(prefill(case).run(case.q, case.kv, q_scale=k_scale, v_scale=v_scale), want)
        close(ragged(case, causal=False).run(case.q, *rows_of(case), k_scale=k_scale, v_scale=v_scale), want)
        got = flashinfer.xqa_batch_decode_with_kv_cache(
            case.q, case.kv, workspace(), block_table(case), int32(case.kv_lens), 13, k_scale * D**-0.5, v_scale
        )
        close(got, want)
    with pytest.raises(NotImplementedError, match=r"o_scale=2\.0.*v_scale="):
        ragged(case).run(case.q, *rows_of(case), o_scale=2.0)
    close(ragged(case, causal=False).run(case.q, *rows_of(case), o_scale=1.0), case.want()[0])


def sink_calls(case, sinks):
    table, lens = block_table(case), int32(case.kv_lens)
    out = torch.empty(4, 1, HQ, D)
    flashinfer.xqa(case.q.unsqueeze(1), *case.kv.unbind(1), table, lens, out, workspace(), workspace(), HK, PAGE, sinks)
    yield out.squeeze(1)
    yield flashinfer.xqa_batch_decode_with_kv_cache(
        case.q, case.kv, workspace(), table, lens, 13, D**-0.5, sinks=sinks
    )  # fmt: skip
    yield flashinfer.trtllm_batch_decode_with_kv_cache(
        case.q, case.kv, workspace(), table, lens, 13, D**-0.5, sinks=[sinks], kv_layout="NHD"
    )
    yield decode(case).run(case.q, case.kv, sinks=sinks)
    yield prefill(case).run(case.q, case.kv, sinks=sinks)
    wrapper = flashinfer.BatchAttentionWithAttentionSinkWrapper(workspace())
    yield prefill(case, wrapper).run(case.q, case.kv, sinks, D**-0.5)


def test_sinks_in_every_form():
    case, sinks = Case([9, 4, 1, 13], [1] * 4), torch.randn(HQ)
    want = case.want(sink=sinks)[0]
    for form in (sinks, sinks.view(HK, HQ // HK), sinks.view(1, HQ), sinks.view(HK, HQ // HK, 1)):
        for got in sink_calls(case, form):
            close(got, want)
    for wrong in (torch.randn(HQ + 1), torch.randn(HK), torch.randn(HQ, HQ)):
        calls = sink_calls(case, wrong)
        with pytest.raises(ValueError, match=r"sinks has shape .*\[q_heads\] = \[4\]"):
            next(calls)


def test_sinks_of_heads_by_groups_are_not_read_across():
    from flashloom.compat.flashinfer.utils import sinks_of

    sinks = torch.randn(2, 8)
    assert sinks_of(sinks, 16, 2).equal(sinks.flatten())
    with pytest.raises(ValueError, match=r"\[kv_heads, query heads of each\] = \[2, 8\]"):
        sinks_of(torch.randn(8, 2), 16, 2)


def test_float8_queries_give_results_of_their_own_dtype():
    """As FlashInfer: o_data_type is the queries' unless it is given."""
    case = Case([9, 4, 1, 13], [1] * 4, dtype=E4M3)
    q = case.q.to(E4M3)
    case.q = q.float()
    want = case.want()[0]
    options = {"q_data_type": E4M3, "kv_data_type": E4M3}
    k, v = (x.to(E4M3) for x in rows_of(case))
    lens, table = int32(case.kv_lens), block_table(case)
    runs = {
        "prefill": lambda **o: prefill(case, **options, **o).run(q, case.kv),
        "decode": lambda **o: decode(case, **options, **o).run(q, case.kv),
        "ragged": lambda **o: ragged(case, **{**options, "causal": False, **o}).run(q, k, v),
    }
    for run in runs.values():
        for given, dtype in (({}, E4M3), ({"o_data_type": "bfloat16"}, torch.bfloat16)):
            out = run(**given)
            assert out.dtype == dtype
            close(out.float(), want, 0.1)
    for name in ("xqa_batch_decode_with_kv_cache", "trtllm_batch_decode_with_kv_cache"):
        out = getattr(flashinfer, name)(q, case.kv, workspace(), table, lens, 13, D**-0.5, kv_layout="NHD")
        assert out.dtype == E4M3
        close(out.float(), want, 0.1)
    out = flashinfer.single_prefill_with_kv_cache(q, k, v)
    assert out.dtype == E4M3
    close(out.float(), attend(q.float(), k.float(), v.float())[0], 0.1)
    out = flashinfer.single_decode_with_kv_cache(q[0], k, v, v_scale=1e6)  # saturates, no NaN
    assert out.dtype == E4M3
    assert out.float().abs().max() == torch.finfo(E4M3).max


def test_scales_of_8_bit_queries_stand_alone():
    q, k, v = torch.randn(3, 4, D).to(E4M3), torch.randn(5, 2, D).to(E4M3), torch.randn(5, 2, D).to(E4M3)
    scale_k, scale_v = torch.rand(2) + 0.5, torch.rand(2) + 0.5
    want = attend(q.float(), k.float() * scale_k[:, None], v.float() * scale_v[:, None])[0] * 2
    out = flashinfer.single_prefill_with_kv_cache(
        q, k, v, scale_k=scale_k, scale_v=scale_v, v_scale=2.0, o_dtype=torch.float16
    )
    close(out, want, 3e-2)
    dense = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    out = flashinfer.single_prefill_with_kv_cache(
        *dense, scale_k=scale_k, scale_v=scale_v, v_scale=2.0, o_dtype=torch.float16
    )
    close(out[0].transpose(0, 1), want, 3e-2)
    with pytest.raises(ValueError, match="scale_v has shape"):
        flashinfer.single_prefill_with_kv_cache(q, k, v, scale_v=torch.ones(3))


# --- masks, rows and names that do not fit ---


def test_masks_of_another_size():
    case = Case()
    n = sum(a * b for a, b in zip(case.q_lens, case.kv_lens))
    for wrong in (n - 1, n + 8):
        with pytest.raises(ValueError, match=f"custom_mask has {wrong} elements: must have {n}"):
            prefill(case, custom_mask=torch.ones(wrong, dtype=torch.bool))
    with pytest.raises(ValueError, match="packed_custom_mask has"):
        prefill(case, packed_custom_mask=torch.ones(n, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"torch\.bool"):
        prefill(case, custom_mask=torch.zeros(n))
    q, k = torch.randn(3, HQ, D), torch.randn(5, HK, D)
    with pytest.raises(ValueError, match=r"\[qo_len, kv_len\] = \[3, 5\]"):
        flashinfer.single_prefill_with_kv_cache(q, k, k, custom_mask=torch.ones(5, 3, dtype=torch.bool))


def test_batches_without_requests_or_tokens():
    none, empty = torch.empty(0, HQ, D), int32([])
    cache, rows = torch.randn(3, 2, PAGE, HK, D), torch.empty(0, HK, D)
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    paged.plan(int32([0]), int32([0]), empty, empty, HQ, HK, D, PAGE, causal=True, q_data_type=torch.float32)
    steps = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())
    steps.plan(int32([0]), empty, empty, HQ, HK, D, PAGE, q_data_type=torch.float32)
    ragged_one = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    ragged_one.plan(int32([0]), int32([0]), HQ, HK, D, q_data_type=torch.float32)
    for out, lse in (
        paged.run(none, cache, return_lse=True),
        steps.run(none, cache, return_lse=True),
        ragged_one.run(none, rows, rows, return_lse=True),
    ):
        assert out.shape == (0, HQ, D)
        assert lse.shape == (0, HQ)
    table = torch.zeros(0, 2, dtype=torch.int32)
    out = flashinfer.xqa_batch_decode_with_kv_cache(none, cache, workspace(), table, empty, 1)
    assert out.shape == (0, HQ, D)
    before = cache.clone()
    flashinfer.append_paged_kv_cache(rows, rows, empty, empty, cache, empty, int32([0]), empty)
    assert cache.equal(before)
    with pytest.raises(ValueError, match="batch_indices holds 0"):
        flashinfer.append_paged_kv_cache(
            torch.ones(1, HK, D), torch.ones(1, HK, D), int32([0]), int32([0]), cache, empty, int32([0]), empty
        )
    idle = Case([9, 0, 4], [2, 0, 0])  # requests without tokens, without keys
    close(prefill(idle, causal=True).run(idle.q, idle.kv), idle.want(causal=True)[0])


def test_block_tables_with_rows_or_outputs_that_do_not_fit():
    case = Case([9, 4, 1, 13], [1] * 4)
    fixed = (workspace(), block_table(case), int32(case.kv_lens), 13)
    call = flashinfer.trtllm_batch_decode_with_kv_cache
    with pytest.raises(ValueError, match="query has 3 rows for 4 requests"):
        call(case.q[:3], case.kv, *fixed, kv_layout="NHD")
    with pytest.raises(ValueError, match="query has 4 rows for 4 requests of q_len_per_req=2"):
        call(case.q, case.kv, *fixed, kv_layout="NHD", q_len_per_req=2)
    with pytest.raises(ValueError, match="belong together"):
        call(case.q, case.kv, *fixed, kv_layout="NHD", cum_seq_lens_q=offsets([1] * 4))
    for out in (torch.empty(HQ, 4, D), torch.empty(4, HQ, D, dtype=torch.float16)):
        with pytest.raises(ValueError, match="of out"):
            call(case.q, case.kv, *fixed, kv_layout="NHD", out=out.transpose(0, 1)[:3], out_dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="sparse_top_k"):
        call(case.q, case.kv, *fixed, kv_layout="NHD", sparse_top_k=4)
    with pytest.raises(NotImplementedError, match="out_dtype"):
        call(case.q, case.kv, *fixed, kv_layout="NHD", out_dtype="nvfp4")
    with pytest.raises(TypeError, match="sparse_topk"):
        call(case.q, case.kv, *fixed, kv_layout="NHD", sparse_topk=4)
    with pytest.raises(ValueError, match="sinks holds 2 tensors"):
        call(case.q, case.kv, *fixed, kv_layout="NHD", sinks=[torch.randn(HQ)] * 2)
    ask_for_nothing = {"sparse_top_k": 0, "cp_world": 1, "cp_rank": 0, "request_order": None, "mask": None}
    close(call(case.q, case.kv, *fixed, D**-0.5, kv_layout="NHD", **ask_for_nothing), case.want()[0])


def test_rows_that_were_not_planned():
    """Too many or too few rows are an error in every wrapper, with and without out=."""
    case = Case([9, 4, 1, 13], [1] * 4)
    for make in (prefill, decode, ragged, mixed):
        wrapper, cache = make(case), rows_of(case) if make is ragged else (case.kv,)
        for rows in (3, 5, 40):
            q = torch.randn(rows, HQ, D)
            for options in ({}, {"out": torch.empty(rows, HQ, D)}):
                with pytest.raises(ValueError, match=rf"{rows}"):
                    wrapper.run(q, *cache, **options)


BACKENDS = {
    "prefill": lambda b: flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend=b),
    "ragged": lambda b: flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), backend=b),
    "decode": lambda b: flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), backend=b),
    "sink": lambda b: flashinfer.BatchAttentionWithAttentionSinkWrapper(workspace(), backend=b),
    "single": lambda b: flashinfer.single_prefill_with_kv_cache(*[torch.randn(2, 2, D)] * 3, backend=b),
    "single, lse": lambda b: flashinfer.single_prefill_with_kv_cache_return_lse(*[torch.randn(2, 2, D)] * 3, backend=b),
    "trtllm": lambda b: flashinfer.trtllm_batch_decode_with_kv_cache(
        torch.randn(1, 2, D), torch.randn(1, 2, 2, 4, D), workspace(), torch.zeros(1, 1, dtype=torch.int32), int32([2]),
        2, backend=b,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_backends(name):
    call = BACKENDS[name]
    for served in ("auto", *(("trtllm-gen", "xqa") if name == "trtllm" else ("fa2", "fa3"))):
        call(served)
    with pytest.raises(ValueError, match=r"backend='fa9': FlashInfer has auto, fa2, fa3, .*cutlass"):
        call("fa9")
    for other in (None, "", "FA2"):
        with pytest.raises(ValueError, match="FlashInfer has"):
            call(other)
    with pytest.raises(NotImplementedError, match="cudnn"):
        call("cudnn")


# --- cascades ---


def test_a_cascade_refuses_what_depends_on_distance():
    case = Case([9, 4], [3, 4])
    levels = [[int32([0, 7]), case.q_indptr], [int32([0, 2]), case.indptr]]
    levels += [[int32([0, 1]), case.indices], [int32([4]), case.last]]
    for options in ({"window_left": 3}, {"pos_encoding_mode": "ALIBI"}, {"pos_encoding_mode": "ROPE_LLAMA"}):
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace())
        for plan in (wrapper.plan, wrapper.begin_forward):
            with pytest.raises(NotImplementedError, match=rf"cannot do {next(iter(options))}=.*PagedKVCacheWrapper"):
                plan(*levels, HQ, HK, D, PAGE, causal=True, q_data_type=torch.float32, **options)
        one = flashinfer.MultiLevelCascadeAttentionWrapper(1, workspace())
        one.plan(*([x[1]] for x in levels), HQ, HK, D, PAGE, causal=True, q_data_type=torch.float32, **options)
        alone = prefill(case, causal=True, **options)
        torch.testing.assert_close(one.run(case.q, case.kv), alone.run(case.q, case.kv))


def test_a_cascade_takes_what_does_not():
    """Three levels over one cache, soft cap and scale: attention over all keys of a request, in order."""
    case = Case([9, 4], [3, 4])
    wrapper, cap = flashinfer.MultiLevelCascadeAttentionWrapper(3, workspace()), 5.0
    pages = torch.randn(9, 2, PAGE, HK, D)
    table = [(int32([0, 7]), int32([0, 2]), int32([0, 1]), int32([4])), (int32([0, 7]), int32([0, 1]), int32([2]),
             int32([4])), (case.q_indptr, int32([0, 3, 4]), int32([3, 4, 5, 6]), int32([1, 4]))]  # fmt: skip
    wrapper.plan(
        *map(list, zip(*table)), HQ, HK, D, PAGE, causal=True, logits_soft_cap=cap, sm_scale=0.4,
        q_data_type=torch.float32,
    )  # fmt: skip
    out = wrapper.run(case.q, pages)
    for rows, own, count in ((slice(0, 3), [3, 4, 5], 9), (slice(3, 7), [6], 4)):
        both = pages[[0, 1, 2, *own]].transpose(0, 1).reshape(2, -1, HK, D)[:, : 12 + count]
        close(out[rows], attend(case.q[rows], *both, causal=True, cap=cap, scale=0.4)[0])


# --- arguments of 0.7.4 ---


def test_offsets_given_on_the_host_as_well():
    case = Case()
    rows, want = offsets(KV_LENS), case.want(causal=True)[0]
    copies = {"qo_indptr_cpu": case.q_indptr.clone(), "kv_indptr_cpu": rows.clone()}
    close(ragged(case, **copies).run(case.q, *rows_of(case)), want)
    names = list(inspect.signature(flashinfer.BatchPrefillWithRaggedKVCacheWrapper.plan).parameters)
    assert names[-4:] == ["qo_indptr_cpu", "kv_indptr_cpu", "uniform_q_len", "use_token_head_sf"]
    for wrong, message in (
        ({"qo_indptr_cpu": case.q_indptr[:-1]}, "copy of qo_indptr"),
        ({"kv_indptr_cpu": rows.long()}, "copy of kv_indptr"),
        ({"kv_indptr_cpu": rows + 1}, "differs from kv_indptr"),
    ):
        with pytest.raises(ValueError, match=message):
            ragged(case, **wrong)


def test_scales_per_token_are_refused_by_name():
    case = Case([9, 4, 1, 13], [1] * 4)
    for make in (prefill, decode, ragged):
        make(case, use_token_head_sf=False)
        with pytest.raises(NotImplementedError, match="use_token_head_sf"):
            make(case, use_token_head_sf=True)


def test_max_total_num_rows_reserves_for_later_plans():
    sizes = {"qo_indptr_buf": 5, "paged_kv_indptr_buf": 5, "paged_kv_indices_buf": 40, "paged_kv_last_page_len_buf": 4}
    made = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
    kind = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    wrapper = kind(workspace(), use_cuda_graph=True, **made, max_total_num_rows=12)
    for q_lens in ([1, 1, 2, 1], [3, 4, 2, 3], [1, 1, 1, 1]):
        case = Case([9, 4, 5, 13], q_lens)
        prefill(case, wrapper, causal=True)
        close(wrapper.run(case.q, case.kv), case.want(causal=True)[0])
    with pytest.raises(ValueError, match="cannot exceed the number of rows set during initialization 12"):
        prefill(Case([9, 4, 5, 13], [4, 4, 4, 1]), wrapper, causal=True)
    with pytest.raises(ValueError, match="use_cuda_graph=True"):
        kind(workspace(), max_total_num_rows=12)
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match="max_total_num_rows="):
            kind(workspace(), use_cuda_graph=True, **made, max_total_num_rows=wrong)


def test_jit_kwargs():
    kinds = (
        flashinfer.BatchDecodeWithPagedKVCacheWrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        flashinfer.BatchPrefillWithRaggedKVCacheWrapper,
    )  # fmt: skip
    for kind in kinds:
        kind(workspace(), jit_kwargs=None)
        kind(workspace(), jit_kwargs={"use_sliding_window": True, "pos_encoding_mode": 0})
        with pytest.raises(NotImplementedError, match="pos_encoding_mode=1"):
            kind(workspace(), jit_kwargs={"pos_encoding_mode": 1})
        with pytest.raises(TypeError, match="use_sliding_windows"):
            kind(workspace(), jit_kwargs={"use_sliding_windows": True})


# --- all at once ---


@pytest.mark.parametrize("seed", range(16))
def test_random_batches_with_random_rules(seed):
    """Lengths, pages, rules, integer types and forms of sinks crossed at random, paged and ragged."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *x: x[int(torch.randint(len(x), (), generator=generator))]  # noqa: E731
    q_lens = [draw(0, 1, 2, 4) for _ in range(draw(1, 2, 5))] + [draw(1, 3)]
    case = Case([n + draw(0, 1, 7, 16) for n in q_lens], q_lens, page=draw(1, 3, 4, 16))
    rules = {"causal": draw(True, False), "window_left": draw(-1, 3), "logits_soft_cap": draw(None, 5.0),
             "sm_scale": draw(None, 0.4), "q_data_type": torch.float32}  # fmt: skip
    words = {"causal": rules["causal"], "window": rules["window_left"], "cap": rules["logits_soft_cap"] or 0.0,
             "scale": rules["sm_scale"]}  # fmt: skip
    dtype, sinks = draw(torch.int32, torch.int64, torch.int16), draw(None, torch.randn(HQ))
    put = lambda x: x.to(dtype)  # noqa: E731
    paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace())
    paged.plan(put(case.q_indptr), *map(put, case.table), HQ, HK, D, case.page, **rules)
    given = sinks if sinks is None else sinks.view(draw((HQ,), (HK, HQ // HK)))
    out, lse = paged.run(case.q, case.kv, return_lse=True, v_scale=2.0, sinks=given)
    want = case.want(sink=sinks, **words)
    close(out, want[0] * 2, 1e-4)
    close(lse, want[1], 1e-4)
    rows = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace())
    rows.plan(put(case.q_indptr), put(offsets(case.kv_lens)), HQ, HK, D, **rules)
    close(rows.run(case.q, *rows_of(case)), case.want(**words)[0], 1e-4)
