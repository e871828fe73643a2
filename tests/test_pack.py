"""From a model to a pack to a process that compiles nothing: through the Python names and through the command line."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import flashloom as fl
from flashloom import serving, settings, store
from flashloom.attention import cpu
from flashloom.cli import main
from flashloom.kernel import cpp
from flashloom.store import store as store_module
from flashloom.target import Target

ROOT = Path(fl.__file__).parents[1]
HEADS = fl.HeadShape(4, 2, 64)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A store of its own, and no kernel loaded."""

    def forget():
        monkeypatch.setattr(store_module, "_state", store_module._State())
        monkeypatch.setattr(cpp, "_loaded", {})
        cpu._functions.cache_clear()

    monkeypatch.setattr(settings, "_current", settings.Settings(cache_dir=tmp_path / "store"))
    forget()
    yield forget
    cpu._functions.cache_clear()


def attention(variant=fl.causal, dtype=torch.float32) -> fl.Attention:
    return fl.Attention(HEADS, variant=variant, dtype=dtype, device="cpu")


def batch(*lengths: int) -> fl.Batch:
    return fl.Batch(q_lens=list(lengths), kv=fl.RaggedKV(list(lengths)))


def test_prepare_builds_what_plans_need(fresh):
    fl.prepare([attention(), attention(fl.full)], [batch(3, 5), batch(1)])
    assert store.counters().builds == 2
    fl.seal()
    attention().plan(batch(7))
    attention(fl.full).plan(batch(2, 2))
    with pytest.raises(fl.SealedError, match=r"source: asked .*, found .*fl\.prepare"):
        attention(fl.causal & fl.softcap(3.0)).plan(batch(3))


def test_work_before_a_first_run_needs_to_know_the_device(monkeypatch):
    """On a machine with a GPU, batches on the host and an Attention without device= do not say where it computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    open_ = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32)
    for work in (fl.prepare, fl.tune):
        with pytest.raises(ValueError, match=r'this machine has a GPU: give Attention\(device="cuda"\)'):
            work(open_, [batch(3)])
    fl.prepare(attention(), [batch(3)])


def test_a_pack_serves_a_process_without_a_compiler(fresh, tmp_path, monkeypatch):
    pack = fl.Pack(targets=[Target.here()])
    pack.add(attention(), [batch(3), fl.Workload("a", HEADS, (1, 1), (5, 6))])
    assert len(pack) == 1
    with pytest.raises(ValueError, match=r"has not been built; call build\(path\)"):
        fl.use(pack)
    pack.build(tmp_path / "a.loom")
    q, k, v = torch.randn(3, 4, 64), torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    wanted = attention().plan(batch(3)).run(q, (k, v))

    settings.configure(cache_dir=tmp_path / "empty")
    fresh()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    fl.use(pack, on_miss="error")
    assert torch.equal(attention().plan(batch(3)).run(q, (k, v)), wanted)
    assert (store.counters().hits, store.counters().builds) == (1, 0)


def test_the_same_pack_twice_is_the_same_bytes(fresh, tmp_path):
    written = []
    for name in ("a", "b"):
        settings.configure(cache_dir=tmp_path / name)
        fresh()
        pack = fl.Pack(targets=["x86-avx2", "x86"] if Target("x86").supported else [Target.here()])
        pack.add(attention(), [batch(3)]).build(tmp_path / f"{name}.loom", jobs=2)
        written.append((tmp_path / f"{name}.loom").read_bytes())
    assert written[0] == written[1]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="a pack needs targets"):
        fl.Pack(targets=[])
    with pytest.raises(ValueError, match="Target 'sm9' is unknown"):
        fl.Pack(targets=["sm9"])
    with pytest.raises(ValueError, match="the pack has no kernels"):
        fl.Pack(targets=["x86"]).build(tmp_path / "a.loom")
    wide = fl.Attention(fl.HeadShape(1, 1, 4096), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="no backend has kernels for"):
        fl.Pack(targets=["x86"]).add(wide, [batch(1)])


# Models


def test_every_known_model_has_attentions():
    for name in serving.MODELS:
        for one in serving.attentions(serving.model_config(name)):
            assert one.dtype == torch.bfloat16


def test_a_configuration_says_which_layers_there_are(tmp_path):
    config = {
        "model_type": "gemma2", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "torch_dtype": "float16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = serving.attentions(serving.model_config(str(tmp_path)), tensor_parallel=2)
    assert [one.heads for one in found] == [fl.HeadShape(4, 2, 256)] * 2
    assert found[0].dtype == torch.float16
    digests = [one.variant.program.digest for one in found]
    assert digests == [
        (fl.causal & fl.softcap(1.0)).program.digest,
        (fl.causal & fl.sliding_window(7) & fl.softcap(1.0)).program.digest,
    ]
    deepseek = {"num_attention_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert serving.attentions(deepseek)[0].heads == fl.HeadShape.mla(q_heads=128, latent=512, rope=64)


def test_configurations_without_attention_are_refused():
    with pytest.raises(ValueError, match=r"neither a config\.json nor one of llama"):
        serving.model_config("nosuch")
    with pytest.raises(ValueError, match="has no 'num_attention_heads'"):
        serving.attentions({})
    with pytest.raises(ValueError, match="do not divide over 3 ranks"):
        serving.attentions(serving.model_config("llama-3-8b"), tensor_parallel=3)


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "x86-avx2"])
def test_steps_cover_every_choice(target):
    """Random batches need no kernel that the steps do not."""
    if target.startswith("sm"):
        pytest.importorskip("triton", reason="GPU kernels are written in Triton")
    import random

    choices = random.Random(3)
    one = serving.attentions(serving.model_config("qwen2.5-7b"))[0]
    pack = fl.Pack(targets=[target]).add(one, serving.steps(one.heads, 16))
    count = len(pack)
    for _ in range(200):
        q_lens = [int(2 ** choices.uniform(0, 13)) for _ in range(choices.randint(1, 9))]
        pack.add(one, [fl.Workload("random", one.heads, tuple(q_lens), tuple(q_lens))])
    assert len(pack) == count


@pytest.mark.parametrize("model", ["llama-3-8b", "qwen2.5-0.5b", "phi-3-mini"])
def test_a_pack_has_what_plans_on_a_gpu_ask_for(model):
    """Whatever the number of requests, their longest and their mean: what such a plan chooses is in the pack."""
    pytest.importorskip("triton", reason="GPU kernels are written in Triton")
    import random

    from flashloom.attention.kernels.triton import asked
    from flashloom.attention.kernels.triton.config import choose

    one = serving.attentions(serving.model_config(model))[0]
    pack = fl.Pack(targets=["sm90"]).add(one, serving.steps(one.heads, 16))
    choices = random.Random(5)
    for _ in range(300):
        requests, longest = int(2 ** choices.uniform(0, 10)), int(2 ** choices.uniform(0, 13))
        mean = choices.randint(-(-longest // requests), longest)
        config = choose(asked.need(one.spec, longest, mean, 16, 90, requests))
        for form in dispatch_forms(one.spec):
            kernel = asked.attend_kernel(one.spec, form, config, 16, Target("sm90"))
            assert store.digest(kernel.fields) in pack._kernels, (requests, longest, mean, config)


@pytest.mark.parametrize("model", ["llama-3-8b", "deepseek"])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.int8])
def test_a_pack_has_the_kernels_of_append(model, kv_dtype, monkeypatch):
    """Tokens of the queries' dtype and of the cache's own, with scales and without: what `fl.append` launches."""
    pytest.importorskip("triton", reason="GPU kernels are written in Triton")
    from flashloom.attention import triton_append

    config = {"num_attention_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 128}
    one = serving.attentions(config if model == "deepseek" else serving.model_config(model), kv_dtype=kv_dtype)[0]
    pack = fl.Pack(targets=["sm90"]).add(one, [fl.Workload("a", one.heads, (1, 1), (5, 6), 16)])
    launched = []
    monkeypatch.setattr(triton_append, "_launchers", {})
    monkeypatch.setattr(
        triton_append.launch, "launcher", lambda kernel, device: launched.append(kernel) or (lambda *words: None)
    )
    scale = torch.ones(1)
    for scales in ({}, {"k_scale": scale}, {"k_scale": scale, "v_scale": scale}):
        if one.heads.latent_value and len(scales) == 1:
            continue
        cache = fl.PagedKVCache(1, 2, 16, one.heads, dtype=one.kv_dtype, device="cpu", **scales)
        for dtype in {one.dtype, one.kv_dtype}:
            k = torch.zeros(3, one.heads.kv_heads, one.heads.dim, dtype=dtype)
            v = None if one.heads.latent_value else torch.zeros(3, one.heads.kv_heads, one.heads.value_dim, dtype=dtype)
            triton_append.append(cache[0], k, v, torch.arange(3))
    assert len(launched) >= 2
    assert {store.digest(kernel.fields) for kernel in launched} <= set(pack._kernels)


def test_a_lesser_target_of_a_pack_serves(fresh, tmp_path, monkeypatch):
    """A pack without kernels for the best target of this machine, which compiles nothing."""
    best = Target.here()
    if not best.lesser:
        pytest.skip(f"{best} is the least target")
    one = attention(fl.causal & fl.softcap(3.0))
    pack = fl.Pack(targets=best.lesser).add(one, [batch(3)])
    pack.build(tmp_path / "lesser.loom")
    q, k, v = torch.randn(3, 4, 64), torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    settings.configure(cache_dir=tmp_path / "empty")
    fresh()
    fl.use(pack, on_miss="error")
    with pytest.warns(RuntimeWarning, match=f"runs kernels for {best.lesser[0]} on this {best} machine") as said:
        plan = one.plan(batch(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        one.plan(batch(2))
    assert len([w for w in said if "runs kernels for" in str(w.message)]) == 1
    assert f"compiled for {best.lesser[0]}" in plan.explain()
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, 1)) / 8
    scores = (3 * torch.tanh(scores / 3)).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double().repeat_interleave(2, 1))
    torch.testing.assert_close(plan.run(q, (k, v)).double(), want, atol=1e-5, rtol=1e-5)
    settings.configure(target=best.name)  # who names a target gets that one
    fresh()
    fl.use(pack, on_miss="error")
    with pytest.raises(fl.SealedError, match="target"):
        one.plan(batch(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sealed_serving_from_a_pack_appends_and_decodes(fresh, tmp_path, monkeypatch):
    """A pack made from shapes alone serves a loop of steps, from the prompt on, in a process that compiles nothing."""
    from flashloom.attention import triton_append

    heads = fl.HeadShape(8, 2, 128)
    one = fl.Attention(heads, variant=fl.causal, dtype=torch.bfloat16, device="cuda")
    pack = fl.Pack(targets=[Target.of(one.device)]).add(one, serving.steps(heads, 16))
    pack.build(tmp_path / "serve.loom")
    settings.configure(cache_dir=tmp_path / "empty")
    fresh()
    monkeypatch.setattr(triton_append, "_launchers", {})
    fl.use(pack, on_miss="error")
    cache = fl.PagedKVCache(layers=1, pages=16, page_size=16, heads=heads, dtype=torch.bfloat16, device="cuda")
    keys, values = [], []
    for length in (37, 38, 39, 40):
        new = length if length == 37 else 1
        pages = fl.PageTable.from_block_table(torch.arange(16).view(1, 16), [length], page_size=16)
        step = fl.Batch(q_lens=[new], kv=pages)
        q = torch.randn(new, 8, 128, device="cuda").bfloat16()
        k, v = torch.randn(2, new, 2, 128, device="cuda").bfloat16()
        fl.append(cache[0], k, v, step.slots().cuda())
        out = one.plan(step).run(q, cache[0]).double()
        keys.append(k.double().repeat_interleave(4, 1))
        values.append(v.double().repeat_interleave(4, 1))
        scores = torch.einsum("qhd,khd->hqk", q.double(), torch.cat(keys)) / 128**0.5
        seen = torch.arange(length, device="cuda") <= torch.arange(length - new, length, device="cuda")[:, None]
        want = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), torch.cat(values))
        assert (out - want).norm() < 1e-2 * want.norm()
    assert store.counters().builds == 0


def dispatch_forms(spec):
    from flashloom.attention.triton_executor import TritonExecutor

    return TritonExecutor._forms(spec)


# The command line


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    return done.output


def test_pack_commands(tmp_path):
    target, path = Target.here().name, str(tmp_path / "a.loom")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 64, "dtype": "float32"}))
    made = run("pack", "build", "--target", target, "--model", str(tmp_path / "config.json"), "-o", path, "-j", "1")
    assert f"{path}: 1 kernels" in made
    assert "1 kernels, all whole" in run("pack", "verify", path)
    assert target in run("pack", "ls", path)
    data = bytearray(Path(path).read_bytes())
    data[-1000] ^= 1
    Path(path).write_bytes(data)
    assert "causal, 1:1x32, f32" in run("pack", "verify", path, code=1)
    assert "neither a config.json" in run("pack", "build", "--target", target, "--model", "nosuch", "-o", path, code=1)
    assert "'sm9' is unknown" in run("pack", "build", "--target", "sm9", "--model", "llama-3-8b", "-o", path, code=1)


def test_store_commands():
    def build(folder):
        (folder / "kernel.so").write_bytes(b"1" * 1000)

    for number in range(3):
        store.get_or_build({"kind": "test", "number": number, "target": "x86"}, build, label=f"kernel {number}")
    assert "3 kernels, 0.00 MB" in run("store", "ls")
    assert "3 kernels whole, 0 damaged" in run("store", "verify")
    missed = run("store", "why-miss", "kernel 2")
    assert "number: asked 2, found" in missed
    assert "no kernel's name holds 'nosuch'" in run("store", "why-miss", "nosuch", code=1)
    folder = store.default_folder()
    (folder.path(next(folder.all_keys())) / "kernel.so").write_bytes(b"2" * 1000)
    assert "2 kernels whole, 1 damaged" in run("store", "verify", code=1)
    assert "removed 0 kernels" in run("store", "prune")
    assert "removed 1 kernels" in run("store", "prune", "--size", "2000")
    assert "removed 1 kernels" in run("store", "clear")
    assert "0 kernels" in run("store", "ls")


# Another process


SERVE = """
import sys, torch
import flashloom as fl
fl.use(sys.argv[1], on_miss="error")
fl.seal()
heads = fl.HeadShape(4, 2, 64)
q, k, v = torch.ones(3, 4, 64), torch.ones(3, 2, 64), torch.ones(3, 2, 64)
attention = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, device="cpu")
plan = attention.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([3])))
assert plan.executor == "cpu", plan.explain()
assert torch.allclose(plan.run(q, (k, v)), torch.ones(3, 4, 64))
"""


def test_an_offline_process_without_a_compiler_and_a_home(tmp_path):
    fl.Pack(targets=[Target.here()]).add(attention(), [batch(3)]).build(tmp_path / "a.loom")
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "HOME": "/nowhere", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SERVE, str(tmp_path / "a.loom")]
    unshare = shutil.which("unshare")
    if unshare and os.geteuid() == 0:  # a network namespace without a route
        command = [unshare, "--net", *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_ranks_with_warm_and_cold_stores_have_the_same_kernels(tmp_path):
    """Four processes at once, two of them with a warm store: the same kernels, the same plans, the same results."""
    warm = tmp_path / "warm"
    settings.configure(cache_dir=warm)
    fl.prepare(attention(), [batch(3)])
    code = f"""
import sys, torch
import flashloom as fl
from flashloom import store
torch.manual_seed(0)
torch.set_num_threads(1)
attention = fl.Attention(fl.HeadShape(4, 2, 64), variant=fl.causal, dtype=torch.float32, device="cpu")
plan = attention.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([3])))
out = plan.run(torch.randn(3, 4, 64), (torch.randn(3, 2, 64), torch.randn(3, 2, 64)))
kernel = fl.dispatch.kernels(attention.spec, fl.Target({Target.here().name!r}), 3, 3, 0)[0].entry()
print(kernel.key.key, store.digest(kernel.files["kernel.so"]), store.digest(out.numpy().tobytes()), plan.explain())
"""
    stores = [warm, tmp_path / "cold", warm, tmp_path / "cold"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "FLASHLOOM_CACHE_DIR": str(path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in stores
    ]
    answers = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert len(set(answers)) == 1
    assert answers[0]


def test_gpu_kernels_hold_nothing_of_this_machine(fresh, tmp_path, monkeypatch):
    """The same kernel, compiled twice with other folders for temporary files, is the same bytes, without any path."""
    pytest.importorskip("triton", reason="GPU kernels are written in Triton")
    import re
    import tempfile

    from flashloom.lower import triton as lower

    built = []
    for name in ("a", "b"):
        (tmp_path / f"tmp-{name}").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / f"tmp-{name}"))
        settings.configure(cache_dir=tmp_path / name)
        fresh()
        for cached in vars(lower).values():
            getattr(cached, "cache_clear", lambda: None)()
        kernels = fl.dispatch.kernels(attention(dtype=torch.bfloat16).spec, Target("sm90"), 1, 1, 16)
        built.append(kernels[-1].entry().files)
        assert store.counters().builds == 1
    assert built[0] == built[1]
    assert not re.search(rb"\.py|/tmp|\.debug_line", built[0]["kernel.cubin"])
