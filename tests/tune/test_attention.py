"""Attention, tuned: what a record changes in a plan, when plans tune, and that nothing else changes."""

import contextvars
import math
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import flashloom as fl
from flashloom import records, store
from flashloom.attention import tuning
from flashloom.attention.kernels.cpu import config as cpu_config
from flashloom.attention.kernels.cpu.config import Config
from flashloom.attention.kernels.hopper import asked as hopper_asked
from flashloom.attention.kernels.hopper import config as hopper_config
from flashloom.attention.kernels.hopper import offered as hopper_offered
from flashloom.attention.kernels.triton import config as triton_config
from flashloom.attention.recorded import OPERATOR, Asked, Fixed
from flashloom.attention.reference import attend_tokens, attention_reference
from flashloom.attention.tuning import Choice, Facts
from flashloom.kv_cache.views import as_kv
from flashloom.records import Folder, Record
from flashloom.store import store as store_module
from flashloom.target import Target
from flashloom.tune import context, tuner
from flashloom.tune.attention import AttentionOperator, NothingToTune
from flashloom.tune.measure import Timer
from flashloom.tune.report import Report

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
HEADS = fl.HeadShape(4, 2, 32)


class Once(Timer):
    """Runs each call once per round and finds all equally fast: the winner does not matter here, and a busy machine
    would take minutes."""

    def repeats(self, call):
        return 1

    def sample(self, call, repeats):
        call()
        return 1.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tuner, "Timer", Once)


@pytest.fixture(scope="module")
def attention():
    return fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def decode(requests=2, kv=300):
    return fl.Batch(q_lens=[1] * requests, kv=fl.RaggedKV([kv] * requests))


def paged(requests=2, kv=300, page_size=16):
    pages = -(-kv // page_size)
    table = torch.arange(requests * pages).view(requests, pages).int() + 1000
    return fl.Batch.decode(fl.PageTable.from_block_table(table, [kv] * requests, page_size=page_size))


def record_of(attention, batch, **config):
    """A record as if this config had won for the batch."""
    asked, bucket = AttentionOperator(attention).question(batch)
    return Record(
        asked.operator, asked.fields, asked.toolchain, asked.sizes, bucket, Choice("cpu", Config(**config)).to_json(),
        Choice("cpu", Config()).to_json(), 1.5, 0.01, label=asked.label,
    )  # fmt: skip


def test_tuning_on_the_cpu_and_the_plan_that_follows(attention, cache, monkeypatch):
    monkeypatch.setattr(tuner, "BUSY", math.inf)  # on a busy machine the key would stay open
    batches = [decode(), paged(), fl.Batch(q_lens=[40], kv=fl.RaggedKV([40]))]
    with fl.autotune(tune=False, cache=cache) as session:
        report = fl.tune(attention, batches, budget="2h")
        assert [outcome.status for outcome in report.outcomes] == ["tuned"] * 3, report.table()
        assert report.complete
        assert {t.status for o in report.outcomes for t in o.record.tried} <= {"won", "slower"}, report.to_json()
        assert fl.tune(attention, batches).count("known") == 3
        for batch, outcome in zip(batches, report.outcomes):
            plan = attention.plan(batch)
            assert Choice("cpu", plan._executor.config).to_json() == dict(outcome.record.config)
        assert session.missed == []
        assert session.counters.hits >= 3


def test_records_change_plans_and_not_results(attention, cache):
    batch = decode(kv=2000)
    q = torch.randn(2, 4, 32)
    k, v = torch.randn(2, 4000, 2, 32).unbind()
    usual = attention.plan(batch)
    expected = usual.run(q, (k, v))
    Folder.at(cache).publish(record_of(attention, batch, pieces=16, shortest=64))
    with fl.autotune(tune=False, cache=cache):
        plan = attention.plan(batch)
    assert "tuned: pieces 16, shortest 64" in plan.explain()
    assert "tuned" not in usual.explain()
    assert plan._executor._args.item_count > usual._executor._args.item_count
    torch.testing.assert_close(plan.run(q, (k, v)), expected)
    plan.update(decode(kv=100))  # another bucket: the default
    assert "tuned" not in plan.explain()
    plan.update(batch)  # outside of the context: a plan keeps the records that it was made with
    assert "tuned" in plan.explain()
    torch.testing.assert_close(plan.run(q, (k, v)), expected)


def test_a_kernel_of_another_config(attention, cache):
    batch = decode()
    Folder.at(cache).publish(record_of(attention, batch, decode_keys=64))
    with fl.autotune(tune=False, cache=cache):
        plan = attention.plan(batch)
    assert plan._executor.config == Config(decode_keys=64)
    q, k, v = torch.randn(2, 4, 32), *torch.randn(2, 600, 2, 32).unbind()
    torch.testing.assert_close(plan.run(q, (k, v)), attention.plan(batch).run(q, (k, v)))


def test_a_plan_tunes_in_a_context_that_tunes(attention, cache, tmp_path):
    with fl.autotune(tune=False, cache=tmp_path / "outer"), fl.autotune(cache=cache) as session:
        attention.plan(decode())
        attention.plan(decode())
        with fl.autotune(tune=False):
            attention.plan(decode(kv=5000))
    assert [outcome.status for outcome in session.report.outcomes] == ["tuned"]
    assert len(list(Folder(cache).files())) == 1
    assert not list(Folder(tmp_path / "outer").files())
    assert session.refused is None


def test_sealed_processes_plan_without_tuning(attention, cache, monkeypatch):
    attention.plan(decode())
    monkeypatch.setattr(store_module, "_state", store_module._State())
    store.seal()
    with fl.autotune(cache=cache) as session:
        plan = attention.plan(decode())
    assert plan.executor == "cpu"
    assert session.report.outcomes == []
    assert "sealed" in session.refused
    assert session.missed == [
        (
            "attention 4/2x32 float32",
            {
                "requests": 2,
                "mean_q": 1,
                "max_q": 1,
                "mean_kv": 512,
                "page_size": 0,
                "threads": torch.get_num_threads(),
            },
        )
    ]


def test_a_used_up_budget_stops_tuning_in_plans(attention, cache, monkeypatch):
    with fl.autotune(cache=cache, budget=1e-6) as session:
        attention.plan(decode())
        attention.plan(decode(kv=5000))
    assert {outcome.status for outcome in session.report.outcomes} <= {"left"}
    assert "budget" in session.refused


def test_a_tuned_kernel_that_is_not_to_be_had_is_passed_over(attention, cache, monkeypatch, caplog):
    batch = decode()
    Folder.at(cache).publish(record_of(attention, batch, decode_keys=64))
    from flashloom.attention import cpu

    made = cpu._functions

    def refuse(spec, target, vector_decode, decode_keys):
        if decode_keys:
            raise store.SealedError("not in the pack")
        return made(spec, target, vector_decode, decode_keys)

    monkeypatch.setattr(cpu, "_functions", refuse)
    with fl.autotune(tune=False, cache=cache):
        plan = attention.plan(batch)
    assert plan._executor.config == Config()
    assert "not in the pack" in caplog.text


def test_batch_invariant_attention_asks_nothing(cache):
    attention = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, batch_invariant=True, device="cpu")
    with pytest.raises(NothingToTune, match="batch-invariant"):
        fl.tune(attention, [decode()])
    with fl.autotune(cache=cache) as session:
        attention.plan(decode())
    assert session.report.outcomes == []
    assert session.missed == []


def test_every_option_is_in_the_question(monkeypatch):
    def key(heads=HEADS, batch=None, **options):
        made = fl.Attention(heads, **{"variant": fl.causal, "dtype": torch.float32, "device": "cpu", **options})
        asked, bucket = AttentionOperator(made).question(batch or decode())
        return asked.key(bucket).key

    keys = [
        key(),
        key(variant=fl.full),
        key(variant=fl.causal & fl.softcap(30.0)),
        key(dtype=torch.bfloat16),
        key(kv_dtype=torch.bfloat16),
        key(heads=fl.HeadShape(8, 2, 32)),
        key(heads=fl.HeadShape(4, 4, 32)),
        key(heads=fl.HeadShape(4, 2, 64)),
        key(heads=fl.HeadShape(4, 2, 32, 64)),
        key(heads=fl.HeadShape.mla(4, 24, 8)),
        key(batch=decode(requests=3)),
        key(batch=decode(kv=600)),
        key(batch=paged()),
        key(batch=paged(page_size=8)),
        key(batch=fl.Batch(q_lens=[2, 1], kv=fl.RaggedKV([300, 300]))),
    ]
    assert len(set(keys)) == len(keys)
    assert key(sm_scale=0.3) == key(batch=decode(kv=257)) == key(), "numbers of the run, and the same bucket"
    assert key(variant=fl.causal & fl.softcap(20.0)) == keys[2]
    torch.set_num_threads(threads := torch.get_num_threads() + 1)
    try:
        assert key() not in keys
    finally:
        torch.set_num_threads(threads - 1)
    monkeypatch.setattr(tuning, "_cpu", lambda target: {"device": "another", "target": target.name})
    tuning._question.cache_clear()
    assert key() not in keys
    tuning._question.cache_clear()


def test_synthetic_inputs_have_the_key_of_their_case(attention):
    operator = AttentionOperator(attention)
    for batch in (decode(), paged(), fl.Batch(q_lens=[3, 0, 5], kv=fl.RaggedKV([3, 7, 40]))):
        assert operator.question(operator.inputs(batch).batch) == operator.question(batch)
    assert operator.inputs(paged()).kv.k.shape[0] == 38, "as many pages as the batch takes, not as its cache has"


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8, torch.float16])
def test_inputs_of_every_dtype_are_checked(kv_dtype):
    attention = fl.Attention(HEADS, variant=fl.causal, dtype=torch.bfloat16, kv_dtype=kv_dtype, device="cpu")
    operator, batch = AttentionOperator(attention), paged()
    inputs = operator.inputs(batch)
    with fl.dispatch.only("reference"), records.entered(Fixed(None)):
        attention.plan(inputs.batch).run(inputs.q, inputs.kv, out=inputs.out)
    assert operator.check(batch, inputs) is None
    inputs.out[1, 3, 5] = torch.nan
    assert "error" in operator.check(batch, inputs)
    inputs.out.zero_()
    assert "error" in operator.check(batch, inputs)


def test_a_wrong_row_that_the_reference_did_not_sample_is_found(attention):
    operator, batch = AttentionOperator(attention), fl.Batch(q_lens=[100], kv=fl.RaggedKV([100]))
    inputs = operator.inputs(batch)
    call = operator.run(operator.default(batch), batch, inputs)
    call()
    assert operator.check(batch, inputs) is None
    row = next(i for i in range(100) if i not in inputs.tokens)
    inputs.out[row] *= 1.01
    assert "differs from the default" in operator.check(batch, inputs)


def test_the_reference_of_some_tokens(attention):
    q, k, v = torch.randn(8, 4, 32), *torch.randn(2, 60, 2, 32).unbind()
    batch = fl.Batch(q_lens=[3, 0, 5], kv=fl.RaggedKV([30, 10, 20]))
    out, lse = attention_reference(q, k, v, batch, fl.causal)
    tokens = [7, 0, 3]
    kv = as_kv(k, v, None, None, ragged=True, layout="NHD")
    some, some_lse = attend_tokens(attention.spec.program, (), q, kv, batch, 32**-0.5, tokens)
    torch.testing.assert_close(some, out[tokens])
    torch.testing.assert_close(some_lse, lse[tokens])


@pytest.mark.parametrize(
    "found",
    [
        {"backend": "cpu"},
        {"backend": "triton", "block_m": 16, "block_n": 64, "num_warps": 4, "num_stages": 2, "resident": 1},
        {**Choice("cpu", Config()).to_json(), "pieces": 3},
        {**Choice("cpu", Config()).to_json(), "pieces": True},
        {**Choice("cpu", Config()).to_json(), "pieces": 2.0},
        {**Choice("cpu", Config()).to_json(), "more": 1},
        {**Choice("cpu", Config()).to_json(), "backend": ["cpu"]},
    ],
)
def test_configs_that_are_not_offered(found):
    with pytest.raises((ValueError, TypeError)):
        Choice.read(found, {"cpu": "digest"})


def test_configs_are_read_as_written():
    for choice in (Choice("cpu", Config(pieces=2, vector_decode=1)), Choice("cpu", Config())):
        assert Choice.read(choice.to_json(), {"cpu": "digest"}) == choice


def test_all_cpu_candidates_are_offered_and_the_first_is_the_default():
    for rows in (1, 4, 12, 13, 64, 5000):
        found = cpu_config.candidates(rows, 1000, 8, True)
        assert found[0] == Config()
        assert len(set(found)) == len(found) > 4
        for config in found:
            assert Choice.read(Choice("cpu", config).to_json(), {"cpu": ""}).config == config


def test_all_gpu_candidates_are_offered_and_fit(monkeypatch):
    for rows, capability in ((1, 80), (4, 90), (64, 90), (4096, 100), (4096, 120)):
        need = triton_config.Need(4, 8, 128, 128, 2, 2, rows, rows, 16, capability)
        found = triton_config.candidates(need)
        assert found
        for config in [*found, triton_config.choose(need)]:
            assert triton_config.valid(config, need)
            assert Choice.read(Choice("triton", config).to_json(), {"triton": ""}).config == config
    for heads, page_size in (
        (fl.HeadShape(32, 8, 128), 16),
        (fl.HeadShape(8, 8, 64), 0),
        (fl.HeadShape(8, 8, 256), 64),
        (fl.HeadShape(32, 8, 128), 12),
        (fl.HeadShape(8, 8, 64), 1),
        (fl.HeadShape(8, 8, 256), 3),
    ):
        default = hopper_config.choose(heads.dim, heads.value_dim, heads.group, 1000, page_size, False)
        found = hopper_offered.candidates(default, heads, page_size)
        assert found
        assert hopper_offered.valid(default, heads, page_size)
        for config in [*found, default]:
            assert Choice.read(Choice("hopper", config).to_json(), {"hopper": ""}).config == config


@pytest.fixture
def pretended(monkeypatch):
    """An H100, as far as questions, candidates and keys of kernels can tell."""
    seen = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (seen.major, seen.minor))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: seen)
    tuning._question.cache_clear()
    yield seen
    tuning._question.cache_clear()


def test_on_a_gpu_a_record_chooses_between_backends(attention, pretended, cache):
    device = torch.device("cuda", 0)
    spec = fl.Attention(fl.HeadShape(32, 8, 128), variant=fl.causal, dtype=torch.bfloat16, device="cpu").spec
    asked = tuning.question(spec, device)
    assert asked.fields["device"] == "NVIDIA H100"
    assert asked.fields["target"] == "sm90"
    assert set(asked.fields["kernels"]) == {"triton", "hopper"}
    assert asked.sizes == tuning.GPU_SIZES
    for q, page_size in ((1, 16), (512, 16), (512, 0), (512, 12)):
        facts = Facts(8, q, q, 0, page_size, 0)
        default = Choice("hopper", hopper_asked.choose(spec, q, page_size or 0))
        if q == 1:
            default = Choice("triton", triton_config.choose(tuning._need(spec, device, facts)))
        found = tuning.candidates(spec, device, facts, default)
        assert 20 < len(found) <= tuning.MOST
        assert default not in found
        assert {choice.backend for choice in found} == {"triton", "hopper"}
        for choice in found:
            assert tuning.valid(choice, spec, device, facts)
            assert asked.read(choice.to_json()) == choice
            names = fl.dispatch.kernels_of(spec, Target("sm90"), choice.backend, choice.config, page_size, True)
            assert len(names) == {"triton": 2, "hopper": 5}[choice.backend]  # hopper: cut or not, and what mends rows
    facts = Facts(8, 1, 1, 0, 16, 0)
    won = tuning.candidates(
        spec, device, facts, Choice("triton", triton_config.choose(tuning._need(spec, device, facts)))
    )[0]
    bucket = facts.bucket(False)
    Folder.at(cache).publish(
        Record(OPERATOR, asked.fields, asked.toolchain, asked.sizes, bucket, won.to_json(), won.to_json(), 1.0, 0.0)
    )
    batch = fl.Batch.decode(fl.PageTable.from_csr([*range(8)], [*range(7)], [16] * 7, page_size=16))
    with fl.autotune(tune=False, cache=cache):
        ask = Asked(spec, device, fl.Reserve(requests=8))
    assert ask(batch) == won
    assert ask.of(won.backend)(batch) == won.config
    assert ask.of("reference")(batch) is None
    pretended.multi_processor_count = 114
    tuning._question.cache_clear()
    with fl.autotune(tune=False, cache=cache):
        assert Asked(spec, device, fl.Reserve(requests=8))(batch) is None, "another device"


def test_other_gpus_have_no_hopper_candidates(pretended):
    pretended.major, pretended.minor = 8, 0
    spec = fl.Attention(fl.HeadShape(32, 8, 128), variant=fl.causal, dtype=torch.bfloat16, device="cpu").spec
    device, facts = torch.device("cuda", 0), Facts(1, 512, 512, 0, 16, 0)
    default = Choice("triton", triton_config.choose(tuning._need(spec, device, facts)))
    assert {choice.backend for choice in tuning.candidates(spec, device, facts, default)} == {"triton"}


@pytest.mark.parametrize(
    "variant",
    [
        fl.causal & fl.sliding_window(5) & fl.softcap(3.0),
        fl.causal & fl.alibi(4),
        fl.rope(32) & fl.sink(torch.zeros(4)),
        fl.from_flex(lambda score, b, h, q, k: score * 2, None),
    ],
    ids=str,
)
def test_any_variant_can_be_sent_to_a_child_process(variant):
    operator = AttentionOperator(fl.Attention(HEADS, variant=variant, dtype=torch.float32, device="cpu"))
    sent, batch = pickle.loads(pickle.dumps((operator, paged())))
    keys = [asked.key(bucket) for asked, bucket in (operator.question(batch), sent.question(batch))]
    assert keys[0] == keys[1]
    assert [type(value) for value in sent.attention.values] == [type(value) for value in operator.attention.values]


def test_a_batch_of_another_bucket_is_another_key_and_the_same_batch_the_same(attention):
    facts = Facts.of(decode(5, 700), None, attention.device)
    assert facts.bucket(True) == (8, 1, 1, 1024, 0, torch.get_num_threads())
    reserve = fl.Reserve(requests=64)
    assert Facts.of(decode(5), reserve, torch.device("cuda")).bucket(False) == (64, 1, 1, 0)


def test_two_threads_tune_one_after_the_other(attention, cache):
    def work(kv):
        with fl.autotune(cache=cache) as session:
            attention.plan(decode(kv=kv))
        return [outcome.status for outcome in session.report.outcomes]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, [300, 3000])) == [["tuned"], ["tuned"]]
    assert len(list(Folder(cache).files())) == 2


def test_threads_in_one_context_share_its_budget(attention, cache, monkeypatch):
    """Both find that there is time left; the first takes all of it, and nothing is left for the other."""
    both, asked = threading.Barrier(2), threading.local()

    def allowed(device):
        if not hasattr(asked, "once"):
            asked.once = True
            both.wait(120)

    def tune(*arguments, **options):
        assert tuner.seconds_of(arguments[2]) > 0
        time.sleep(0.3)
        return Report()

    monkeypatch.setattr(context, "forbidden", allowed)
    monkeypatch.setattr(context, "tune", tune)
    with fl.autotune(cache=cache, budget=0.2) as session, ThreadPoolExecutor(2) as pool:
        batches = decode(), decode(kv=3000)
        plans = [pool.submit(contextvars.copy_context().run, attention.plan, batch) for batch in batches]
        assert [plan.result().executor for plan in plans] == ["cpu", "cpu"]
    assert session.refused == "the budget is used up"


def test_several_threads_may_be_in_one_context(cache):
    session, entered, left = fl.autotune(tune=False, cache=cache), threading.Event(), threading.Event()

    def longer():
        before = records.current()
        with session:
            entered.set()
            left.wait(120)
            assert records.current().writable is Folder.at(cache)
        return records.current() is before

    with ThreadPoolExecutor(1) as pool:
        with session:
            other = pool.submit(longer)
            assert entered.wait(120)
        assert records.current().writable is not Folder.at(cache)
        left.set()
        assert other.result()


def test_workloads_of_other_heads_are_refused(attention):
    with pytest.raises(ValueError, match="make them equal"):
        fl.tune(attention, fl.workloads("llama-3-8b", phase="decode"))
    with pytest.raises(TypeError, match=r"give fl\.Batch"):
        fl.tune(attention, [[1, 2]])
    assert tuner.jobs_of(attention, []) == []
