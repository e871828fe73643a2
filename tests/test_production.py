"""A production configuration through `fl.configure`: each setting has the effect that it states."""

import gc
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import flashloom as fl
from flashloom import dispatch, serving, settings
from flashloom.attention import cpu, pool

HEADS = fl.HeadShape(4, 2, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(settings, "_current", settings.get())  # restored afterwards
    gc.collect()  # plans of former tests, which would give up their memory meanwhile
    monkeypatch.setattr(cpu, "SPARE", type(cpu.SPARE)())  # and what they left, which may be larger than needed


def plan_for(lens, **options):
    layer = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    return layer.plan(fl.Batch(q_lens=lens, kv=fl.RaggedKV(lens)), **options)


def run(plan, tokens, seed=0):
    torch.manual_seed(seed)
    q, k, v = torch.randn(tokens, 4, 16), torch.randn(tokens, 2, 16), torch.randn(tokens, 2, 16)
    return q, k, v, plan.run(q, (k, v))


def test_a_production_configuration_in_one_call():
    now = fl.configure(
        kernel_cache_size="2GB", memory_pool_size="4GB", enable_cudagraph=True, fp16_reduction=True,
        tensor_parallel_size=2, threads=2,
    )  # fmt: skip
    assert (now.cache_size, now.memory_pool_size, now.threads) == (2 << 30, 4 << 30, 2)
    text = plan_for([5, 3]).explain()
    for line in ("memory_pool_size", "fp16_reduction: permitted", "up to 2 requests, 8 query tokens", "2 ranks"):
        assert line in text


def test_kernel_cache_size_is_the_size_of_the_store():
    assert fl.configure(kernel_cache_size="2GB").cache_size == fl.configure(cache_size=2 << 30).cache_size
    assert settings.from_environment({"FLASHLOOM_KERNEL_CACHE_SIZE": "3M"}).cache_size == 3 << 20
    with pytest.raises(ValueError, match="one setting"):
        fl.configure(kernel_cache_size="2GB", cache_size="1GB")
    with pytest.raises(ValueError, match="KERNEL_CACHE_SIZE='3M' is another name of FLASHLOOM_CACHE_SIZE"):
        settings.from_environment({"FLASHLOOM_CACHE_SIZE": "4M", "FLASHLOOM_KERNEL_CACHE_SIZE": "3M"})


def test_memory_pool_size_bounds_the_workspaces_of_all_plans():
    before = pool.held(CPU)
    first = plan_for([64])
    took = pool.held(CPU) - before
    assert took == first.workspace_size > 0
    limit = pool.held(CPU) + took // 2
    fl.configure(memory_pool_size=limit)
    with pytest.raises(MemoryError, match=rf"other plans hold {limit - took // 2}: memory_pool_size allows {limit}"):
        plan_for([64])
    assert f"of at most {limit} (memory_pool_size)" in first.explain()
    del first  # what it held is free for others
    assert plan_for([64]).workspace_size == took


def test_a_full_pool_makes_attention_drop_the_plans_it_keeps():
    q, kv = torch.ones(300, 4, 16), torch.ones(300, 2, 16)
    fl.attention(q, kv, kv)
    fl.configure(memory_pool_size=pool.held(CPU))
    assert fl.attention(q[:64], kv[:64], kv[:64]).eq(1).all()


def test_a_plan_that_cannot_grow_keeps_its_batch():
    plan = plan_for([4])
    fl.configure(memory_pool_size=pool.held(CPU))
    lens = [4096] * 64
    with pytest.raises(MemoryError, match="memory_pool_size"):
        plan.update(fl.Batch(q_lens=lens, kv=fl.RaggedKV(lens)))
    assert plan.batch.tokens == 4
    q, k, v, out = run(plan, 4)
    fl.configure(memory_pool_size=None)
    torch.testing.assert_close(out, fl.attention(q, k, v, variant=fl.causal))


def test_the_pool_counts_triton_buffers_too():
    from flashloom.attention.kernels.triton.config import Config
    from flashloom.attention.triton_buffers import Buffers, Sizes

    sizes = Sizes.of(2, 2, Config(16, 16, 4, 2, 1), 4, 1, 16, 4, 0)
    before = pool.held(CPU)
    buffers = Buffers(sizes, 2, 16, 16, CPU)
    assert pool.held(CPU) - before == buffers.bytes
    fl.configure(memory_pool_size=pool.held(CPU))
    with pytest.raises(MemoryError, match="memory_pool_size"):
        Buffers(sizes, 2, 16, 16, CPU)
    del buffers
    assert pool.held(CPU) == before


def test_enable_cudagraph_keeps_buffers_in_place():
    open_plan = plan_for([4, 2])
    open_plan.update(fl.Batch(q_lens=[9], kv=fl.RaggedKV([9])))
    fl.configure(enable_cudagraph=True)
    plan = plan_for([4, 2])
    plan.update(fl.Batch(q_lens=[5, 1], kv=fl.RaggedKV([5, 1])))
    for lens, name in (([9], "9 tokens"), ([2, 1, 1], "3 requests")):
        with pytest.raises(ValueError, match=f"{name} but the plan reserves"):
            plan.update(fl.Batch(q_lens=lens, kv=fl.RaggedKV(lens)))
    larger = plan_for([4, 2], reserve=fl.Reserve(tokens=9))
    larger.update(fl.Batch(q_lens=[9], kv=fl.RaggedKV([9])))
    assert "up to 2 requests, 9 query tokens, 2 pages" in larger.explain()


def test_attention_follows_lengths_where_plans_keep_their_buffers():
    fl.configure(enable_cudagraph=True)
    for n in range(65, 128, 7):  # of one size class
        x = torch.randn(n, 4, 16)
        want = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(0, 1)[None]] * 3)[0].transpose(0, 1)
        torch.testing.assert_close(fl.attention(x, x, x), want, atol=2e-5, rtol=2e-5)


def test_integrations_follow_lengths_where_plans_keep_their_buffers():
    from flashloom.compat import flashinfer
    from flashloom.integrations.transformers_plans import Layout, Posed

    fl.configure(enable_cudagraph=True)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8), "NHD")
    for n in (70, 100, 90):
        q, k = torch.randn(n, 4, 16), torch.randn(n, 2, 16)
        want = fl.attention(q, k, k, variant=fl.causal)
        layout = Layout(fl.Batch([n], kv=fl.RaggedKV([n])), Posed(fl.causal))
        plan, _ = layout.plan((4, 2, 16, 16), torch.float32, torch.float32, None, CPU, fl.causal)
        torch.testing.assert_close(plan.run(q, (k, k)), want)
        del layout
        indptr = torch.tensor([0, n], dtype=torch.int32)
        wrapper.plan(indptr, indptr, 4, 2, 16, causal=True, q_data_type=torch.float32)
        torch.testing.assert_close(wrapper.run(q, k, k), want)
        tokens = n // 10
        cache, starts = torch.randn(2, 9, 16, 2, 16), torch.tensor([0, 6, tokens], dtype=torch.int32)
        found = flashinfer.decode.trtllm_batch_decode_with_kv_cache(
            q[:tokens], (cache[0], cache[1]), None, torch.arange(8, dtype=torch.int32).view(2, 4),
            torch.tensor([60, 50]), 64, bmm1_scale=0.25, kv_layout="NHD", max_q_len=16, cum_seq_lens_q=starts,
        )  # fmt: skip
        rows = cache[:, 4:8].flatten(1, 2)[:, :50]
        torch.testing.assert_close(found[-1:], fl.attention(q[tokens - 1 : tokens], *rows, variant=fl.causal))


def test_fp16_reduction_is_a_permission():
    assert "fp16_reduction" not in plan_for([3]).explain()
    exact = run(plan_for([3]), 3)[3]
    fl.configure(fp16_reduction=True)
    assert "fp16_reduction: permitted, not used (products are summed in float32)" in plan_for([3]).explain()
    assert torch.equal(run(plan_for([3]), 3)[3], exact)


@pytest.mark.parametrize(("world", "size", "fits"), [("8", 4, True), ("8", 3, False), ("2", 4, False), ("", 4, True)])
def test_tensor_parallel_size_fits_the_launchers_world(monkeypatch, world, size, fits):
    monkeypatch.setenv("WORLD_SIZE", world)
    if fits:
        assert fl.configure(tensor_parallel_size=size).tensor_parallel_size == size
    else:
        with pytest.raises(ValueError, match=f"tensor_parallel_size={size} but WORLD_SIZE is {world}"):
            fl.configure(tensor_parallel_size=size)


def test_tensor_parallel_size_fits_torch_distributed(monkeypatch):
    fl.configure(tensor_parallel_size=2)  # nothing is known of the world yet
    monkeypatch.setenv("WORLD_SIZE", "2")
    known = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 3)
    monkeypatch.setattr(torch, "distributed", known)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 but torch.distributed has a world size of 3"):
        plan_for([3])


def test_tensor_parallel_size_divides_the_heads_of_a_model():
    config = serving.model_config("llama-3-8b")
    whole = serving.attentions(config)[0].heads
    fl.configure(tensor_parallel_size=4)
    share = serving.attentions(config)[0].heads
    assert (share.q_heads, share.kv_heads) == (whole.q_heads // 4, whole.kv_heads // 4)
    assert serving.attentions(config, tensor_parallel=1)[0].heads == whole


def test_threads_of_cpu_kernels():
    plan = plan_for([8])
    if plan.executor != "cpu":
        pytest.skip("no compiler")
    expected = run(plan, 8)[3]
    for threads in (1, 3):
        fl.configure(threads=threads)
        torch.testing.assert_close(run(plan, 8)[3], expected)  # a plan follows
        assert f"on {threads} threads" in plan.explain()
        assert f"on {threads} threads" in plan_for([8]).explain()
    fl.configure(threads=None)
    run(plan, 8)
    assert f"on {torch.get_num_threads()} threads" in plan.explain()


def test_the_reference_takes_the_same_configuration():
    fl.configure(memory_pool_size="1K", enable_cudagraph=True)
    with dispatch.only("reference"):
        assert "memory_pool_size" in plan_for([3]).explain()


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, "warning"),
        ({"FLASHINFER_DEBUG": "1"}, "debug"),
        ({"FLASHINFER_DEBUG": "0"}, "warning"),
        ({"FLASHINFER_LOG_LEVEL": "INFO"}, "info"),
        ({"FLASHINFER_LOG_LEVEL": "warn"}, "warning"),
        ({"FLASHINFER_LOG_LEVEL": "CRITICAL"}, "error"),
        ({"FLASHINFER_LOG_LEVEL": "10"}, "debug"),
        ({"FLASHINFER_LOG_LEVEL": "ERROR", "FLASHINFER_DEBUG": "1"}, "error"),
        ({"FLASHINFER_LOG_LEVEL": "ERROR", "FLASHINFER_DEBUG": "1", "FLASHLOOM_LOG": "info"}, "info"),
    ],
)
def test_flashinfers_log_variables(variables, level):
    assert settings.from_environment(variables).log == level


def test_a_level_that_flashinfer_does_not_have_is_named():
    with pytest.warns(UserWarning, match="FLASHINFER_LOG_LEVEL='loud' has no effect"):
        assert settings.from_environment({"FLASHINFER_LOG_LEVEL": "loud"}).log == "warning"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("memory_pool_size", 0, ValueError),
        ("memory_pool_size", "much", ValueError),
        ("kernel_cache_size", -1, ValueError),
        ("threads", 0, ValueError),
        ("threads", 1.5, ValueError),
        ("tensor_parallel_size", None, TypeError),
        ("enable_cudagraph", "maybe", ValueError),
        ("enable_cudagraph", [], TypeError),
    ],
)
def test_bad_values_are_named(name, value, error):
    with pytest.raises(error, match=f"{name}={value!r}".replace("[", r"\[")):
        fl.configure(**{name: value})


def test_configuring_does_not_import_torch():
    code = (
        "import sys, flashloom.settings as s; s.configure(kernel_cache_size='2GB', tensor_parallel_size=1, threads=2); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
