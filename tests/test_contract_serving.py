"""The public API's meaning, rule by rule (14 to 25): plans over time, batches, dtypes, concurrency, caches. Expected
values come from loops or from torch, never from flashloom."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import pytest
import torch
from tests.oracle import DTYPES, HEADS, block_table, causal, close, expected, make, oracle, paged, ragged

import flashloom as fl

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# --- 14. update and reserve ---


def test_update_within_the_reserve():
    heads = HEADS
    cache, k, v, pages = paged([9, 20, 5], 4, heads)
    table = lambda rows, lens: fl.PageTable.from_block_table(block_table(rows), lens, page_size=4)  # noqa: E731
    layer = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, device="cpu")
    plan = layer.plan(fl.Batch.decode(table(pages[:2], [4, 7])), reserve=fl.Reserve(requests=3, tokens=8, pages=10))
    plan.update(fl.Batch(q_lens=[3, 1, 4], kv=table(pages, [9, 20, 5])))
    q = torch.randn(8, 4, 16)
    close(plan.run(q, cache[0]), expected(q, k, v, [3, 1, 4], [9, 20, 5], keep=causal)[0])
    plan.update(fl.Batch.decode(table(pages[1:2], [20])))
    close(plan.run(q[:1], cache[0]), oracle(q[:1], k[9:29], v[9:29], causal)[0])
    for batch, name in (
        (fl.Batch(q_lens=[3, 1, 5], kv=table(pages, [9, 20, 5])), "tokens"),
        (fl.Batch.decode(table([*pages, []], [9, 20, 5, 0])), "requests"),
        (fl.Batch.decode(table([[0] * 6, [0] * 5], [24, 20])), "pages"),
    ):
        with pytest.raises(ValueError, match=name):
            plan.update(batch)


def test_update_without_a_reserve_grows():
    cache, k, v, pages = paged([9, 20, 5], 4, HEADS)
    table = lambda lens: fl.PageTable.from_block_table(block_table(pages), lens, page_size=4)  # noqa: E731
    plan = fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(fl.Batch.decode(table([1, 1, 1])))
    q = torch.randn(3, 4, 16)
    for lens in ([2, 3, 4], [9, 20, 5], [0, 1, 0]):
        plan.update(fl.Batch.decode(table(lens)))
        ks = torch.cat([k[:9][: lens[0]], k[9:29][: lens[1]], k[29:][: lens[2]]])
        vs = torch.cat([v[:9][: lens[0]], v[9:29][: lens[1]], v[29:][: lens[2]]])
        close(plan.run(q, cache[0]), expected(q, ks, vs, [1] * 3, lens)[0])


def test_update_never_changes_the_page_size_or_the_kind():
    cache, _, _, pages = paged([4], 4, HEADS)
    plan = fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(
        fl.Batch.decode(fl.PageTable.from_block_table(block_table(pages), [4], page_size=4))
    )
    with pytest.raises(ValueError, match="page size"):
        plan.update(fl.Batch.decode(fl.PageTable.from_block_table([[0]], [2], page_size=2)))
    with pytest.raises(ValueError, match="another plan"):
        plan.update(fl.Batch.decode(fl.RaggedKV([4])))
    assert plan.run(torch.randn(1, 4, 16), cache[0]).shape == (1, 4, 16)  # a refused update leaves the plan as it was


def test_rows_beyond_the_batch_stay_untouched():
    plan, q, k, v = make([2, 1], [5, 3])
    padded = torch.cat([q, torch.full((4, 4, 16), math.nan)])
    out, lse = torch.full((7, 4, 16), 7.0), torch.full((7, 4), 7.0)
    plan.run(padded, (k, v), out=out, lse=lse)
    close(out[:3], expected(q, k, v, [2, 1], [5, 3], keep=causal)[0])
    assert (out[3:] == 7).all()
    assert (lse[3:] == 7).all()


@GPU
def test_update_in_a_captured_graph_follows_the_device():
    cache, _, _, pages = paged([40, 23], 4, HEADS)
    gpu = fl.PagedKVCache(1, cache.pages, 4, HEADS, torch.float32, "cuda")
    gpu[0].k.copy_(cache[0].k.nan_to_num())
    gpu[0].v.copy_(cache[0].v.nan_to_num())
    table, lens = block_table(pages).cuda(), torch.tensor([3, 9], dtype=torch.int32, device="cuda")
    layer = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cuda")
    batch = lambda: fl.Batch.decode(fl.PageTable.from_block_table(table, lens, page_size=4))  # noqa: E731
    plan = layer.plan(batch(), reserve=fl.Reserve(requests=2, tokens=2, pages=20))
    q, out = torch.randn(2, 4, 16, device="cuda"), torch.empty(2, 4, 16, device="cuda")
    plan.run(q, gpu[0], out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(batch())
        plan.run(q, gpu[0], out=out)
    for new in ([40, 23], [1, 17]):
        lens.copy_(torch.tensor(new))
        graph.replay()
        for b, n in enumerate(new):
            k, v = (x[pages[b]].reshape(-1, 2, 16)[:n] for x in (cache[0].k, cache[0].v))
            close(out[b : b + 1].cpu(), oracle(q[b : b + 1].cpu(), k, v)[0])


# --- 15. batches ---


@pytest.mark.parametrize("kind", ["list", "int32", "int64"])
def test_batches_from_lists_and_tensors(kind):
    cast = {
        "list": lambda x: x.tolist(),
        "int32": lambda x: x.to(torch.int32),
        "int64": lambda x: x.to(torch.int64),
    }[kind]
    q_lens, kv_lens = torch.tensor([3, 1, 0, 4]), torch.tensor([9, 20, 2, 4])
    cache, k, v, pages = paged(kv_lens.tolist(), 4, HEADS)
    used = [-(-n // 4) for n in kv_lens.tolist()]
    indptr = torch.tensor([0, *used]).cumsum(0)
    indices = torch.tensor([page for row in pages for page in row])
    last = torch.tensor([(n - 1) % 4 + 1 for n in kv_lens.tolist()])
    tables = [
        fl.PageTable.from_block_table(cast(block_table(pages)), cast(kv_lens), page_size=4),
        fl.PageTable.from_csr(cast(indptr), cast(indices), cast(last), page_size=4),
    ]
    q = torch.randn(8, 4, 16)
    want = expected(q, k, v, q_lens.tolist(), kv_lens.tolist(), keep=causal)[0]
    layer = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    for table in tables:
        for lens in ({"q_lens": cast(q_lens)}, {"q_indptr": cast(torch.tensor([0, 3, 4, 4, 8]))}):
            close(layer.plan(fl.Batch(**lens, kv=table)).run(q, cache[0]), want)


def test_what_a_batch_was_made_from_may_change_afterwards():
    cache, k, v, pages = paged([9], 4, HEADS)
    table, lens = block_table(pages), torch.tensor([9], dtype=torch.int32)
    plan = fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(
        fl.Batch.decode(fl.PageTable.from_block_table(table, lens, page_size=4))
    )
    table.fill_(10**6)
    lens.fill_(10**6)
    q = torch.randn(1, 4, 16)
    close(plan.run(q, cache[0]), oracle(q, k, v)[0])


@GPU
def test_lengths_on_the_device_need_max_q_len():
    lens = torch.tensor([3, 2], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="max_q_len"):
        fl.Batch(q_lens=lens, kv=fl.RaggedKV(lens))
    assert fl.Batch(q_lens=lens, kv=fl.RaggedKV(lens), max_q_len=3).tokens is None


def test_entries_past_the_last_page_are_never_read():
    cache, k, v, pages = paged([5, 8], 4, HEADS)
    q = torch.randn(2, 4, 16)
    want = expected(q, k, v, [1, 1], [5, 8])[0]
    for junk in (-1, 2**31 - 1):
        table = fl.PageTable.from_block_table(block_table(pages, junk), [5, 8], page_size=4)
        plan = fl.Attention(HEADS, dtype=torch.float32, device="cpu").plan(fl.Batch.decode(table))
        close(plan.run(q, cache[0]), want)


# --- 16. validation --- (a test per case: tests/attention/test_validation.py)


def test_bad_input_names_value_rule_and_fix():
    plan, q, k, v = make()
    with pytest.raises((TypeError, ValueError), match=r"float16.*float32.*convert"):
        plan.run(q.half(), (k, v))
    with pytest.raises(ValueError, match=r"negative"):
        fl.RaggedKV([3, -1])
    with pytest.raises(ValueError, match=r"shorter"):
        fl.PageTable.from_block_table([[0]], [5], page_size=4)


# --- 17. dtypes ---


def test_out_follows_q_unless_out_is_given():
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = ragged([3], [7], HEADS, dtype=dtype)
        plan = fl.Attention(HEADS, dtype=dtype, device="cpu").plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([7])))
        want = oracle(q, k, v)[0]
        assert plan.run(q, (k, v)).dtype == dtype
        for other in DTYPES:
            out = torch.empty(3, 4, 16, dtype=other)
            plan.run(q, (k, v), out=out)
            close(out, want, dtype)


def test_eight_bit_queries_give_bfloat16():
    q, k, v = ragged([3], [7], HEADS)
    q, k, v = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    plan = fl.Attention(HEADS, dtype=torch.float8_e4m3fn, device="cpu").plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([7])))
    out = plan.run(q, (k, v))
    assert out.dtype == torch.bfloat16
    close(out, oracle(q.float(), k.float(), v.float())[0], torch.bfloat16)


def test_floor_division_and_modulo_floor():
    class Blocks(fl.Variant):
        def logits_transform(self, logits, at):
            d = at.kv_pos - at.q_pos - 1
            return logits + d // 3 + (d % 3) * 0.25 + ((d * 1.0) % 2.5)

    plan, q, k, v = make([3], [7], variant=Blocks())
    f = lambda x, h, i, j: x + (j - i - 1) // 3 + ((j - i - 1) % 3) * 0.25 + float(j - i - 1) % 2.5  # noqa: E731
    close(plan.run(q, (k, v)), oracle(q, k, v, logits=f)[0])


@GPU
def test_float32_on_a_gpu_is_not_tf32():
    heads = fl.HeadShape(4, 2, 128)
    q, k, v = ragged([64], [512], heads)
    q, k, v = q * 4, k * 4, v
    plan = fl.Attention(heads, dtype=torch.float32, device="cuda").plan(fl.Batch(q_lens=[64], kv=fl.RaggedKV([512])))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k.double().repeat_interleave(2, 1)) * 128**-0.5
    want = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v.double().repeat_interleave(2, 1))
    torch.testing.assert_close(plan.run(q.cuda(), (k.cuda(), v.cuda())).cpu().double(), want, atol=1e-4, rtol=1e-4)


# --- 18. concurrency ---


def test_attention_is_thread_safe_and_a_plan_says_when_it_is_misused():
    layer = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    q, k, v = ragged([3], [7], HEADS)
    want = oracle(q, k, v, causal)[0]
    failures = []

    def work():
        try:
            for _ in range(5):
                close(layer.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([7]))).run(q, (k, v)), want)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures

    plan = layer.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([7])))
    real, inside, leave = plan._executor.run, threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        inside.set()
        leave.wait(120)
        return real(*args, **kwargs)

    plan._executor.run = slow
    thread = threading.Thread(target=plan.run, args=(q, (k, v)))
    thread.start()
    assert inside.wait(120)
    try:
        with pytest.raises(RuntimeError, match="thread"):
            plan.run(q, (k, v))
        with pytest.raises(RuntimeError, match="thread"):
            plan.update(plan.batch)
    finally:
        leave.set()
        thread.join()
    close(plan.run(q, (k, v)), want)  # handing it over is fine


@GPU
def test_a_plan_says_when_two_streams_use_it():
    q, k, v = (x.cuda() for x in ragged([3], [7], HEADS))
    plan = fl.Attention(HEADS, dtype=torch.float32, device="cuda").plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([7])))
    a, b = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(a):
        plan.run(q, (k, v))
        torch.cuda._sleep(200_000_000)
    with torch.cuda.stream(b), pytest.raises(RuntimeError, match="stream"):
        plan.run(q, (k, v))
    a.synchronize()
    with torch.cuda.stream(b):
        plan.run(q, (k, v))


# --- 19. autograd ---


def test_gradients_are_refused_by_name():
    plan, q, k, v = make()
    for args in (
        (q.clone().requires_grad_(), (k, v)),
        (q, (k.clone().requires_grad_(), v)),
        (q, (k, v.clone().requires_grad_())),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
            plan.run(*args)
        with torch.no_grad():
            plan.run(*args)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        fl.attention(q.clone().requires_grad_(), k, v)
    with torch.no_grad():
        sink = fl.sink(torch.nn.Parameter(torch.zeros(4)))
        plan, q, k, v = make(variant=sink)
        plan.run(q, (k, v))
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        plan.run(q, (k, v))


# --- 20. torch.compile --- (also tests/attention/test_library.py)


@pytest.mark.slow
def test_compiles_as_one_graph():
    plan, q, k, v = make()

    def step(q, k, v):
        out, lse = plan.run(q * 2, (k, v), return_lse=True)
        return out + 1, lse

    want = expected(q * 2, k, v, (3, 1, 5), (7, 4, 5), keep=causal)
    out, lse = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v)
    close(out, want[0] + 1)
    close(lse, want[1])


# --- 21. scales ---


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("form", ["one", "heads", "pages"])
def test_scaled_caches(dtype, form):
    heads, lens, page_size = fl.HeadShape(4, 2, 16), [9, 4], 4
    shape = {"one": (1,), "heads": (2,), "pages": (6, 2)}[form]
    size = 0.08 if dtype == torch.int8 else 0.5
    k_scale, v_scale = (torch.rand(shape) + 0.5) * size, (torch.rand(shape) + 0.5) * size
    cache = fl.PagedKVCache(1, 6, page_size, heads, dtype, "cpu", k_scale=k_scale, v_scale=v_scale)
    pages = [[5, 0, 2], [3]]
    table = fl.PageTable.from_block_table(block_table(pages), lens, page_size=page_size)
    batch = fl.Batch(q_lens=lens, kv=table)
    k, v = torch.randn(13, 2, 16), torch.randn(13, 2, 16)
    fl.append(cache[0], k, v, batch.slots())
    dense = []
    for stored, scale, x in ((cache[0].k, k_scale, k), (cache[0].v, v_scale, v)):
        by_page = scale.expand(6, 2) if form != "pages" else scale
        real = stored.float() * by_page.view(6, 1, 2, 1)
        rows = torch.cat([real[p].reshape(-1, 2, 16)[:n] for p, n in zip(pages, lens, strict=True)])
        step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 0.0}[dtype]
        torch.testing.assert_close(rows, x, rtol=step, atol=size)  # half a step of the largest scale
        dense.append(rows)
    q = torch.randn(13, 4, 16)
    layer = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, kv_dtype=dtype, device="cpu")
    close(layer.plan(batch).run(q, cache[0]), expected(q, *dense, lens, lens, keep=causal)[0])


# --- 22. append ---


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_append_by_slots(layout):
    heads = fl.HeadShape(4, 2, 16, 8)
    cache = fl.PagedKVCache(2, 5, 4, heads, torch.float32, "cpu", layout=layout)
    table = fl.PageTable.from_block_table([[4, 1, 9], [2, 9, 9]], [7, 3], page_size=4)
    batch = fl.Batch(q_lens=[3, 2], kv=table)
    slots = batch.slots()
    assert slots.dtype == torch.int64
    assert slots.tolist() == [1 * 4 + 0, 1 * 4 + 1, 1 * 4 + 2, 2 * 4 + 1, 2 * 4 + 2]
    k, v = torch.randn(5, 2, 16), torch.randn(5, 2, 8)
    slots[3] = -1
    fl.append(cache[1], k, v, slots)
    assert torch.equal(cache[1].k[1, :3], k[:3])
    assert torch.equal(cache[1].v[2, 2], v[4])
    assert (cache[1].k[2, 1] == 0).all()
    assert (cache[0].k == 0).all()
    assert int((cache[1].k != 0).any(-1).any(-1).sum()) == 4


def test_slots_of_lengths_that_leave_out_this_step_are_refused():
    table = fl.PageTable.from_block_table([[3], [0]], [2, 1], page_size=4)
    with pytest.raises(ValueError, match="request 0 has 4 new tokens but a length of 2"):
        fl.Batch(q_lens=[4, 1], kv=table).slots()


def test_append_then_attend():
    heads = fl.HeadShape(4, 2, 16)
    cache = fl.PagedKVCache(1, 8, 4, heads, torch.float32, "cpu")
    layer = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, device="cpu")
    keys, values = torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    length = 0
    for new in (5, 1, 1, 2):
        step = slice(length, length + new)
        length += new
        batch = fl.Batch(q_lens=[new], kv=fl.PageTable.from_block_table([[6, 1, 3]], [length], page_size=4))
        fl.append(cache[0], keys[step], values[step], batch.slots())
        q = torch.randn(new, 4, 16)
        close(layer.plan(batch).run(q, cache[0]), oracle(q, keys[:length], values[:length], causal)[0])


# --- 23. settings --- (packs come with their own tests)


def test_settings_come_from_the_environment_at_first_use_and_configure_replaces_them():
    code = (
        "import os, flashloom as fl, flashloom.settings as s; os.environ['FLASHLOOM_CHECK'] = '1'; assert "
        "s.get().check; "
        "fl.configure(check=False); assert not s.get().check"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- 25. dependencies and import ---


def test_importing_starts_nothing():
    code = (
        "import sys, torch, flashloom; assert 'tvm_ffi' not in sys.modules; assert 'triton' not in sys.modules; "
        "assert 'transformers' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what the rules rest on ---


def test_results_are_deterministic():
    plan, q, k, v = make([64, 1, 17], [128, 333, 17])
    first = plan.run(q, (k, v))
    assert all(torch.equal(first, plan.run(q, (k, v))) for _ in range(3))


def test_offsets_beyond_32_bits():
    """Views of a small storage whose strides reach past 2**31 elements: only the few rows in use lie in memory."""
    heads = fl.HeadShape(2, 1, 64)
    far = 2**31 + 64
    storage = torch.empty(0).set_(
        torch.UntypedStorage(4 * (far + 4096))
    )  # address space, not memory: pages stay untouched
    kv = storage.as_strided((2, 4, 1, 64), (far, 64, 64, 1))
    k, v = torch.randn(8, 1, 64), torch.randn(8, 1, 64)
    values = storage[8 * 64 :].as_strided((2, 4, 1, 64), (far, 64, 64, 1))
    kv.copy_(k.view(2, 4, 1, 64))
    values.copy_(v.view(2, 4, 1, 64))
    layer = fl.Attention(heads, dtype=torch.float32, device="cpu")
    plan = layer.plan(fl.Batch.decode(fl.PageTable.from_block_table([[1, 0]], [8], page_size=4)))
    q = torch.randn(1, 2, 64)
    swap = [4, 5, 6, 7, 0, 1, 2, 3]
    close(plan.run(q, (kv, values)), oracle(q, k[swap], v[swap])[0])
