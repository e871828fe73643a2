"""Benchmarks on tiny shapes: peers agree with float64, reports hold what was measured, bad input is named."""

import importlib
import json

import pytest
import torch

import flashloom as fl
from flashloom.bench.attention import Options, arrange, inputs, prepare, quantise, time_case, time_together
from flashloom.bench.cases import CASES, exact, sampled_rows
from flashloom.bench.ceilings import reader
from flashloom.bench.host import overhead_rows
from flashloom.bench.peers import PEERS
from flashloom.bench.report import Report, Row, seconds
from flashloom.bench.suites import SUITES, tasks
from flashloom.bench.timing import Timing
from flashloom.bench.workloads import MODELS, Workload, decode, prefill

HEADS = fl.HeadShape(4, 2, 16)
QUICK = Options(rounds=2, sample_time=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
@pytest.mark.parametrize("workload", [prefill(HEADS, 300, 2), decode(HEADS, 3, 300)], ids=lambda w: w.name)
def test_exact_is_the_library_reference(case, workload):
    q, k, v = inputs(workload, torch.float64)
    rows = sampled_rows(workload)
    batch = fl.Batch(q_lens=list(workload.q_lens), kv=fl.RaggedKV(list(workload.kv_lens)))
    attention = fl.Attention(HEADS, variant=case.variant(4), dtype=torch.float32)
    out = attention.plan(batch).run(q.float(), (k.float(), v.float()))
    torch.testing.assert_close(out[rows].double(), exact(case, workload, q, k, v, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peer", ["sdpa", "matmul"])
@pytest.mark.parametrize("workload", [prefill(HEADS, 40, 2), decode(HEADS, 3, 40)], ids=lambda w: w.name)
@pytest.mark.parametrize("case", ["full", "causal"])
def test_peers_compute_the_same(case, workload, peer):
    q, k, v = inputs(workload, torch.float32)
    made = PEERS[peer](CASES[case], workload, q, k, v)
    if peer == "matmul" and workload.phase == "prefill":
        assert made is None
        return
    call, flat = made
    rows = sampled_rows(workload)
    out = flat(call())
    assert out.shape == q.shape
    torch.testing.assert_close(out[rows].double(), exact(CASES[case], workload, q, k, v, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["causal", "window 256", "ALiBi"])
@pytest.mark.parametrize("workload", [prefill(HEADS, 300, 2), decode(HEADS, 3, 300)], ids=lambda w: w.name)
def test_a_variant_as_a_mask_computes_the_same(case, workload):
    q, k, v = inputs(workload, torch.float32)
    call, flat = PEERS["sdpa + mask"](CASES[case], workload, q, k, v)
    rows = sampled_rows(workload)
    expected = exact(CASES[case], workload, q, k, v, rows)
    torch.testing.assert_close(flat(call())[rows].double(), expected, rtol=1e-4, atol=1e-5)
    assert PEERS["sdpa + mask"](CASES["soft cap"], workload, q, k, v) is None  # it does more than add


def test_a_peer_that_fails_is_left_out_and_said(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no room\nand more")

    monkeypatch.setitem(PEERS, "matmul", fail)
    monkeypatch.setattr(importlib.import_module("flashloom.bench.peers"), "find_compilers", list)
    options = Options(rounds=2, sample_time=1e-4, against=("sdpa", "matmul", "flex"))
    row = time_case(CASES["causal"], decode(HEADS, 2, 32), torch.float32, options)
    assert set(row.times) == {"flashloom", "sdpa"}
    Report([row]).table()
    printed = capsys.readouterr().out
    assert "Left out: FlexAttention needs a compiler" in printed
    assert "Left out: matmul failed: no room\n" in printed


def test_peers_leave_out_what_they_cannot_express():
    workload = prefill(HEADS, 8)
    assert PEERS["sdpa"](CASES["ALiBi"], workload, *inputs(workload, torch.float32)) is None
    ragged = Workload("ragged", HEADS, (1, 1), (5, 6))
    with pytest.raises(ValueError, match="equal lengths"):
        PEERS["sdpa"](CASES["full"], ragged, *inputs(ragged, torch.float32))


def test_pages_hold_the_keys():
    workload = Workload("uneven", HEADS, (2, 1), (21, 16), page_size=8)
    _, k, v = inputs(workload, torch.float32)
    batch, pages, _ = arrange(workload, k, v)
    for b, start in ((0, 0), (1, 21)):
        used = batch.pages[batch.page_indptr[b] : batch.page_indptr[b + 1]].long()
        stored = pages[used].flatten(0, 1)[: workload.kv_lens[b]]
        assert torch.equal(stored, k[start : start + workload.kv_lens[b]])


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantise(kv_dtype):
    x = torch.randn(50, 2, 16)
    y, scale = quantise(x, kv_dtype)
    assert y.dtype == kv_dtype
    assert float((y.float() * scale - x).abs().max()) < 0.4


def test_time_case_and_report(tmp_path):
    rows = [
        time_case(CASES["causal"], prefill(HEADS, 32), torch.float32, QUICK),
        time_case(CASES["causal"], decode(HEADS, 2, 32), torch.bfloat16, QUICK),
        time_case(CASES["causal"], decode(HEADS, 2, 32), torch.bfloat16, QUICK, kv_dtype=torch.int8),
    ]
    assert set(rows[0].times) == {"flashloom", "sdpa"}
    assert set(rows[1].times) == {"flashloom", "sdpa", "matmul"}
    assert rows[0].errors["flashloom"] < 1e-5
    assert "int8 KV" in rows[2].dtype
    report = Report(rows)
    paths = report.save(tmp_path, "tiny")
    content = json.loads(paths[0].read_text())
    assert content["machine" if "machine" in content else "cpu"]
    assert content["versions"]["torch"]
    assert len(content["rows"]) == 3
    assert content["rows"][0]["times"]["sdpa"]["rounds"] == 2
    assert [p.suffix for p in paths] == [".json", ".png"]


def test_calls_timed_together_share_a_base():
    options = Options(rounds=2, sample_time=1e-4, against=("sdpa",))
    workload = prefill(HEADS, 24)
    rows = time_together(
        [prepare(CASES[c], workload, torch.float32, options) for c in ("causal", "ALiBi")], options, base="own"
    )
    assert [set(row.times) for row in rows] == [{"flashloom", "sdpa"}, {"flashloom", "own"}]
    assert rows[1].times["own"] == rows[0].times["flashloom"]


def test_a_busy_machine_is_said(tmp_path, capsys):
    def report(spread, others=None, rounds=5):
        middle = [1.0] * (rounds - 4)
        samples = (1 - spread, 1 - spread / 2, *middle, 1 + spread / 2, 1 + spread)
        row = Row("s", "a", "f32", {"flashloom": Timing(samples), "sdpa": Timing((2.0,) * rounds)})
        return Report(
            [row], machine={"cpu": "c", "threads": 2, "date": "d", "command": "x", "compiler": "g++"}, others=others
        )

    assert report(0.05, 0.05).busy == ""
    assert report(0.05).busy == ""
    assert "40% of its processors" in report(0.05, 0.4).busy
    assert "80% of the median" in report(0.8, 0.0).busy
    assert json.loads(report(0.05, 0.4).to_json())["others_share"] == 0.4
    report(0.05, 0.4).table()
    assert "not to be trusted" in capsys.readouterr().out
    assert [path.suffix for path in report(0.05, 0.4).save(tmp_path)] == [".json", ".png"]


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    module = importlib.import_module("flashloom.bench.attention")
    monkeypatch.setattr(module, "exact", lambda *a: torch.full((1,), 9.0, dtype=torch.float64))
    with pytest.raises(ArithmeticError, match="error against float64"):
        time_case(CASES["full"], prefill(HEADS, 8), torch.float32, QUICK)


def test_bench_of_an_attention(capsys):
    heads = fl.HeadShape(*MODELS["minilm-l6"])
    attention = fl.Attention(heads, variant=fl.causal, dtype=torch.bfloat16)
    report = fl.bench(attention, [decode(heads, 2, 64)], against=["matmul"], rounds=2)
    report.table()
    printed = capsys.readouterr().out
    assert "decode 2x64" in printed
    assert "x matmul" in printed


def test_bench_names_bad_input():
    attention = fl.Attention(HEADS, variant=fl.causal, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'nosuch'"):
        fl.bench(attention, [decode(HEADS, 1, 8)], against=["nosuch"])
    with pytest.raises(ValueError, match="workloads is empty"):
        fl.bench(attention, [])
    with pytest.raises(ValueError, match="make them equal"):
        fl.bench(attention, fl.workloads("llama-3-8b", phase="decode"))
    other = fl.Attention(HEADS, variant=fl.sigmoid(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="knows full, causal"):
        fl.bench(other, [decode(HEADS, 1, 8)])


def test_workloads():
    for model in MODELS:
        phases = {w.phase for w in fl.workloads(model)}
        assert phases == {"prefill", "decode", "append", "mixed"}
    assert all(w.phase == "decode" for w in fl.workloads("llama-3-8b", phase="decode"))
    with pytest.raises(ValueError, match="llama-3-8b"):
        fl.workloads("nosuch")
    with pytest.raises(ValueError, match="prefill, decode"):
        fl.workloads("llama-3-8b", phase="train")


def test_workload_counts():
    w = prefill(fl.HeadShape(2, 1, 8), 4)
    assert (w.pairs(False), w.pairs(True)) == (16, 10)
    for window in (1, 3, 4, 9):
        seen = sum(kv <= q and kv > q - window for q in range(4) for kv in range(4))
        assert w.pairs(True, window) == seen
    assert decode(w.heads, 1, 100).kv_bytes(torch.int8, 7) == 7 * 16
    assert w.flops(True) == 10 * 2 * 2 * 16
    assert decode(fl.HeadShape(2, 1, 8), 3, 10).kv_bytes(torch.bfloat16) == 3 * 10 * 16 * 2


def test_reader_reads_everything():
    x = torch.randint(0, 2**31, (3 * 16384,), dtype=torch.int32)
    call, size = reader(x)
    words = x.view(torch.int64).tolist()
    expected = 0
    for word in words:
        expected ^= word
    assert size == 3 << 16
    assert call() == expected


def test_every_suite_has_tasks():
    for suite in SUITES:
        assert tasks([suite])
        assert tasks([suite], full=True)
    with pytest.raises(ValueError, match="nosuch"):
        tasks(["nosuch"])


def test_overhead_rows():
    names = [row.name for row in overhead_rows(1)]
    assert any("run(out=)" in name for name in names)
    assert any("plan of 64" in name for name in names)


def test_geomeans_and_units():
    rows = [
        Row("s", "a", "f32", {"flashloom": Timing((1.0,)), "sdpa": Timing((2.0,))}),
        Row("s", "b", "f32", {"flashloom": Timing((1.0,)), "sdpa": Timing((8.0,))}),
    ]
    assert Report(rows, machine={}).geomeans() == {"s f32": {"sdpa": pytest.approx(4.0)}}
    assert [seconds(x) for x in (2.0, 0.0123, 4.5e-6, 3e-8)] == ["2 s", "12.3 ms", "4.5 us", "30 ns"]
