"""Continuous batching: `paged|flashloom` generates the tokens that each prompt alone gets from SDPA (eager where SDPA
does not offer what the model asks for)."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the transformers integration is optional")

from tests.integrations.tiny import build, gemma2, gpt_oss, llama, mistral, phi, qwen3  # noqa: E402

import flashloom as fl  # noqa: E402
from flashloom.attention.cpu import CpuExecutor  # noqa: E402
from flashloom.integrations import transformers_paged as paged  # noqa: E402
from flashloom.integrations.transformers import register  # noqa: E402

register()

PROMPTS = [list(range(3, 3 + n)) for n in (5, 13, 40, 1, 30)]
NEW = 9
MODELS = [llama, mistral, gemma2, gpt_oss, qwen3, phi]


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """transformers asks psutil how much memory there is."""
    from transformers.generation.continuous_batching import cache

    monkeypatch.setattr(cache.PagedAttentionMemoryHandler, "get_available_memory", lambda self: 1 << 30)


def serve(model, prompts, **options):
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(
        **{"block_size": 8, "num_blocks": 64, "max_batch_tokens": 24} | options
    )
    model.set_attn_implementation("paged|flashloom")
    found = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    return [one.generated_tokens for one in found.values()]


def alone(model, peer, prompts):
    model.set_attn_implementation(peer)
    options = {"do_sample": False, "max_new_tokens": NEW}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


@torch.no_grad()
@pytest.mark.parametrize("maker", MODELS, ids=lambda f: f.__name__)
def test_generate_batch(maker):
    # 24 tokens a step: prompts are read in pieces while others decode
    model, peer = build(maker)
    assert serve(model, PROMPTS) == alone(model, peer, PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("maker", [llama, mistral], ids=lambda f: f.__name__)
def test_whole_prompts_then_decoding(maker):
    model, peer = build(maker)
    assert serve(model, PROMPTS, max_batch_tokens=128) == alone(model, peer, PROMPTS)


@torch.no_grad()
def test_a_shared_prefix_is_read_where_it_lies():
    model, peer = build(llama)
    prompts = [[*range(2, 34), n, n + 1] for n in (40, 50, 60)]
    assert serve(model, prompts) == alone(model, peer, prompts)


@torch.no_grad()
def test_layers_share_one_plan_and_steps_update_it(monkeypatch):
    model, _ = build(llama)
    serve(model, PROMPTS[:2])  # kernels are there now
    steps = []
    monkeypatch.setattr(paged, "Step", lambda mark, made=paged.Step: steps.append(1) or made(mark))
    with fl.monitor() as seen:
        serve(model, PROMPTS[:2])
    assert len(seen.runs) == 2 * len(steps)  # two layers
    assert len(seen.plans) + len(seen.updates) == len(steps)
    assert len(seen.plans) < len(steps) / 2
    assert all(run.executor != "reference" for run in seen.runs)


@torch.no_grad()
def test_keys_are_read_from_the_cache_itself(monkeypatch):
    model, _ = build(llama)
    pointers, runs = set(), []

    def run(plan, q, kv, **options):
        if plan.batch.kind == "paged":
            runs.append((kv[0].shape, kv[0].data_ptr()))
        return original(plan, q, kv, **options)

    original = fl.Plan.run
    monkeypatch.setattr(fl.Plan, "run", run)
    made = transformers.generation.continuous_batching.cache.PagedAttentionCache.__init__

    def init(cache, *arguments, **options):
        made(cache, *arguments, **options)
        pointers.update(x.data_ptr() for x in cache.key_cache)

    monkeypatch.setattr(transformers.generation.continuous_batching.cache.PagedAttentionCache, "__init__", init)
    serve(model, PROMPTS[:2])
    assert runs
    assert {shape for shape, _ in runs} == {(66, 8, 2, 16)}
    assert {at for _, at in runs} <= pointers


def test_it_is_for_continuous_batching_only():
    model, _ = build(llama)
    model.set_attn_implementation("paged|flashloom")
    with pytest.raises(ValueError, match="generate_batch"):
        model(torch.tensor([[1, 2, 3]]))


@torch.no_grad()
def test_one_run_in_full_for_each_step(monkeypatch):
    """The layers of a step after the first repeat its call."""
    runs, steps, run, begin = [], [], CpuExecutor.run, paged.Step.__init__
    monkeypatch.setattr(CpuExecutor, "run", lambda self, *a, **k: (runs.append(1), run(self, *a, **k))[1])
    monkeypatch.setattr(paged.Step, "__init__", lambda self, mark: (steps.append(1), begin(self, mark))[1])
    model, _ = build(llama)
    serve(model, PROMPTS)
    assert model.config.num_hidden_layers == 2
    assert len(runs) == len(steps) > NEW
