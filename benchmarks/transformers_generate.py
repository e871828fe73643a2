"""transformers on flashloom: are the tokens those of SDPA, and how fast are they?

    python benchmarks/transformers_generate.py check --device cuda     # float32 tokens of six families
    python benchmarks/transformers_generate.py speed --device cuda     # tokens per second beside SDPA

Models are made from their configurations with seeded weights; nothing is downloaded. `speed` writes
benchmarks/results/transformers_generate_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny models

from tests.integrations.tiny import build, gemma2, gpt_oss, llama, mistral, phi, qwen3

from flashloom.bench.machine import describe
from flashloom.integrations.transformers import register

FAMILIES = {maker.__name__: maker for maker in (llama, mistral, gemma2, gpt_oss, qwen3, phi)}
# 1.1 billion parameters (TinyLlama's shape) on a GPU, 42 million on a CPU
SIZES = {
    "cuda": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
    "cpu": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 2},
}  # fmt: skip
#: batch, prompt tokens, new tokens, left padding
CALLS = {
    "cuda": [(1, 1024, 64, False), (8, 1024, 64, False), (8, 1024, 64, True), (8, 4096, 64, False)],
    "cpu": [(1, 512, 32, False), (4, 512, 32, False), (4, 512, 32, True)],
}
REQUESTS, LONGEST = {"cuda": 32, "cpu": 8}, {"cuda": 1024, "cpu": 256}  # of generate_batch, prompt tokens
PEER = "sdpa"


def without_psutil() -> None:
    """transformers asks psutil for the memory of a CPU; without it, say 4 GiB."""
    from transformers.generation.continuous_batching import cache

    cache.PagedAttentionMemoryHandler.get_available_memory = lambda self: 4 << 30


def serve(model, prompts: list[list[int]], name: str, new: int, **options) -> list[list[int]]:
    """Tokens of generate_batch for each prompt."""
    model.set_attn_implementation(f"paged|{name}")
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(**options)
    found = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    return [one.generated_tokens for one in found.values()]


@torch.no_grad()
def check(family: str, device: str) -> list[str]:
    """One line per comparison of a family; raises AssertionError where tokens differ."""
    model, peer = build(FAMILIES[family], device)
    lines = []
    torch.manual_seed(1)
    ids = torch.randint(2, 128, (3, 13), device=device)
    for padding in ("none", "left"):
        mask = torch.ones_like(ids)
        if padding == "left":
            mask[1, :8] = mask[2, :4] = 0
        for cache in ("dynamic", "static"):
            options = {"do_sample": False, "max_new_tokens": 24, "attention_mask": mask, "disable_compile": True}
            if cache == "static":
                options["cache_implementation"] = "static"
            tokens = {}
            for name in ("flashloom", peer):
                model.set_attn_implementation(name)
                tokens[name] = model.generate(ids * mask, **options)
            same = torch.equal(tokens["flashloom"], tokens[peer])
            assert same, f"{family}, {padding} padding, {cache} cache: tokens differ from {peer}"
            lines.append(f"{family}: generate, {padding} padding, {cache} cache: tokens of {peer}")
    prompts = [list(range(3, 3 + n)) for n in (5, 13, 40, 1, 30)]
    model.set_attn_implementation(peer)
    alone = [
        model.generate(torch.tensor([p], device=device), do_sample=False, max_new_tokens=12)[0, len(p) :].tolist()
        for p in prompts
    ]
    small = {"block_size": 8, "num_blocks": 64, "max_batch_tokens": 24}
    assert serve(model, prompts, "flashloom", 12, **small) == alone, f"{family}: generate_batch differs from {peer}"
    return [*lines, f"{family}: generate_batch, 5 prompts read in pieces: tokens of {peer}, each prompt alone"]


def check_all(families: list[str], device: str) -> None:
    """Each family in a process of its own, since most of the time goes into compiling kernels."""

    def run(family: str) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, "check", "--device", device, "--family", family]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed = []
    with ThreadPoolExecutor(len(families) if device == "cuda" else 1) as pool:
        for family, done in zip(families, pool.map(run, families)):
            print(done.stdout, end="")
            if done.returncode:
                failed.append(family)
                print(done.stderr[-3000:])
    if failed:
        raise SystemExit(f"not the same tokens: {', '.join(failed)}")


@torch.no_grad()
def speed(device: str, rounds: int, only: str) -> Iterator[dict]:
    """A row each for generate() and generate_batch(): seconds of the implementations taking turns, medians. `only`:
    rows whose name holds it."""
    dtype = torch.bfloat16
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[device], vocab_size=32000, max_position_embeddings=8192, pad_token_id=0,
                                      bos_token_id=1, eos_token_id=None)  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    for batch, prompt, new, padded in CALLS[device]:
        ids = torch.randint(2, 32000, (batch, prompt), device=device)
        mask = torch.ones_like(ids)
        for b in range(batch if padded else 0):
            mask[b, : b * prompt // (2 * batch)] = 0
        title = f"generate, {batch} x {prompt} + {new}{', left padding' if padded else ''}"
        if only in title:
            yield compare(partial(generate, model, ids * mask, mask), device, new, batch, rounds, title)
    longest, new = LONGEST[device], CALLS[device][0][2]
    prompts = [torch.randint(2, 32000, (longest // 8 * (1 + i % 8),)).tolist() for i in range(REQUESTS[device])]
    title = f"generate_batch, {len(prompts)} prompts of {longest // 8} to {longest} + {new}"
    batching = {"block_size": 64, "num_blocks": sum(map(len, prompts)) // 64 * 2, "max_batch_tokens": 2 * longest}
    if only in title:
        call = partial(serve, model, prompts, **batching)
        yield compare(call, device, new, len(prompts), rounds, title)


def generate(model, ids: torch.Tensor, mask: torch.Tensor, name: str, new: int) -> None:
    model.set_attn_implementation(name)
    model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)


def compare(call, device: str, new: int, batch: int, rounds: int, title: str) -> dict:
    """A row of `speed`: call(name, new tokens) of both implementations, taking turns."""
    names = ("flashloom", PEER)
    for name in names:
        call(name, 4)  # kernels are compiled here
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 else names[::-1]:
            synchronize(device)
            start = time.perf_counter()
            call(name, new)
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    median = {name: sorted(s)[len(s) // 2] for name, s in seconds.items()}
    row = {
        "name": title,
        "seconds": median,
        "samples": seconds,
        "times_faster": median[PEER] / median["flashloom"],
        "tokens_per_s": {name: batch * new / s for name, s in median.items()},
    }
    print(f"{title}: {median['flashloom']:.3f} s, {row['times_faster']:.2f} x {PEER}", flush=True)
    return row


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "speed"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows of `speed` whose name holds this")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    register()
    if given.device == "cpu":
        without_psutil()
    if given.what == "check":
        if given.family:
            print("\n".join(check(given.family, given.device)))
        else:
            check_all(list(FAMILIES), given.device)
        return
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"transformers_generate_{given.device}.json"
    found: dict = {**describe(), "model": f"Llama {SIZES[given.device]}, bfloat16", "rows": []}
    for row in speed(given.device, given.rounds, given.only):
        found["rows"].append(row)
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
