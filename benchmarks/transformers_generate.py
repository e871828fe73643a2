"""transformers on flashloom: are the tokens those of SDPA, and how fast are they?

    python benchmarks/transformers_generate.py check --device cuda     # float32 tokens of six families
    python benchmarks/transformers_generate.py speed --device cuda     # tokens per second beside SDPA

Models are made from their configurations with seeded weights; nothing is downloaded. `speed` writes
benchmarks/results/transformers_generate_<device>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import io
import json
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny models

from tests.integrations.tiny import build, gemma2, gpt_oss, llama, mistral, phi, qwen3

from flashloom import store
from flashloom.attention.attention import Plan
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
    "cuda": [(1, 1024, 16, False), (8, 1024, 16, False), (8, 1024, 16, True), (8, 4096, 16, False)],
    "cpu": [(1, 512, 32, False), (4, 512, 32, False), (4, 512, 32, True)],
}
REQUESTS, LONGEST = {"cuda": 8, "cpu": 8}, {"cuda": 1024, "cpu": 256}  # of generate_batch, prompt tokens
PEER = "sdpa"
NAMES = ("flashloom", PEER)
WARM_UP = 2  # calls of each implementation before those that are timed


def without_psutil() -> None:
    """transformers asks psutil for the memory of a CPU; without it, say 4 GiB."""
    from transformers.generation.continuous_batching import cache

    cache.PagedAttentionMemoryHandler.get_available_memory = lambda self: 4 << 30


def serve(model, prompts: list[list[int]], name: str, new: int, steps: object = None, **options) -> list[list[int]]:
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
def speed(device: str, rounds: int, only: str, profiled: str | None = None) -> Iterator[dict]:
    """A row each for generate() and generate_batch(): seconds of the implementations taking turns, medians. `only`:
    rows whose name holds it. profiled: rows of generate() for which to print where the host's time goes."""
    model = seeded(device)
    for batch, prompt, new, padded in CALLS[device]:
        ids = torch.randint(2, 32000, (batch, prompt), device=device)
        mask = torch.ones_like(ids)
        for b in range(batch if padded else 0):
            mask[b, : b * prompt // (2 * batch)] = 0
        title = f"generate, {batch} x {prompt} + {new}{', left padding' if padded else ''}"
        if only in title:
            call = partial(generate, model, ids * mask, mask)
            yield compare(call, device, new, batch, rounds, title)
            if profiled is not None and profiled in title:
                for name in NAMES:
                    print_profile(call, device, name, title)
    longest, new = LONGEST[device], CALLS[device][0][2]
    prompts = [torch.randint(2, 32000, (longest // 8 * (1 + i % 8),)).tolist() for i in range(REQUESTS[device])]
    title = f"generate_batch, {len(prompts)} prompts of {longest // 8} to {longest} + {new}"
    batching = {"block_size": 64, "num_blocks": sum(map(len, prompts)) // 64 * 2, "max_batch_tokens": 2 * longest}
    if only in title:
        call = partial(serve, model, prompts, **batching)
        yield compare(call, device, new, len(prompts), rounds, title)


def seeded(device: str):
    """The Llama that `speed` runs, with random weights in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[device], vocab_size=32000, max_position_embeddings=8192, pad_token_id=0,
                                      bos_token_id=1, eos_token_id=None)  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model


class Steps(transformers.LogitsProcessor):
    """Notes when each step of generate() has its logits; generate() waits for the device once in every step. `at`:
    functions to call at the step of a number."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None):
        self.times: list[float] = []
        self.at = at or {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        self.at.get(len(self.times), int)()
        return scores

    def seconds(self) -> list[float]:
        """Of each step, prompt and first token aside."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:])]


def generate(model, ids: torch.Tensor, mask: torch.Tensor, name: str, new: int, steps: Steps) -> None:
    model.set_attn_implementation(name)
    model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, logits_processor=[steps])


class Meanwhile:
    """What should not happen while time is taken: plans that are made, kernels that are built or loaded, and
    collections of all of Python's garbage. Each use as a context adds to the totals."""

    def __init__(self) -> None:
        self.found = dict.fromkeys(("plans made", "kernels built", "kernels loaded", "garbage collections"), 0)
        self.cpu: list[float] = []

    def __enter__(self) -> Meanwhile:
        self._init, self._store, self._cpu = Plan.__init__, store.counters(), time.process_time()

        def counted(plan: Plan, *args: object) -> None:
            self.found["plans made"] += 1
            self._init(plan, *args)

        Plan.__init__ = counted  # fl.monitor() would take each run's time, too
        gc.callbacks.append(self._collected)
        return self

    def __exit__(self, *error: object) -> None:
        Plan.__init__ = self._init
        gc.callbacks.remove(self._collected)
        now = store.counters()
        self.found["kernels built"] += now.builds - self._store.builds
        self.found["kernels loaded"] += now.hits - self._store.hits
        self.cpu.append(time.process_time() - self._cpu)

    def _collected(self, phase: str, info: dict) -> None:
        self.found["garbage collections"] += phase == "start" and info["generation"] == 2


def compare(call, device: str, new: int, batch: int, rounds: int, title: str) -> dict:
    """A row of `speed`: call(name, new tokens, steps) of both implementations, taking turns, after WARM_UP calls of
    each, in which kernels are compiled, and in which cuDNN, behind SDPA, makes its plans for every length."""
    first: dict[str, float] = {}
    samples: dict[str, list[float]] = {name: [] for name in NAMES}
    steps: dict[str, list[list[float]]] = {name: [] for name in NAMES}  # by call
    meanwhile = {name: Meanwhile() for name in NAMES}
    for i in range(WARM_UP + rounds):
        for name in NAMES if i % 2 else NAMES[::-1]:
            clock, warm = Steps(), i < WARM_UP
            with contextlib.nullcontext() if warm else meanwhile[name]:
                synchronize(device)
                start = time.perf_counter()
                call(name, new, clock)
                synchronize(device)
                seconds = time.perf_counter() - start
            if warm:
                first.setdefault(name, seconds)
            else:
                samples[name].append(seconds)
                steps[name].append(clock.seconds())
    median = {name: statistics.median(s) for name, s in samples.items()}
    row = {
        "name": title,
        "seconds": median,
        "low_high": {name: [min(s), max(s)] for name, s in samples.items()},
        "samples": samples,
        "first_call_s": first,
        "cpu_s": {name: statistics.median(meanwhile[name].cpu) for name in NAMES},
        "meanwhile": {name: meanwhile[name].found for name in NAMES},
        "times_faster": median[PEER] / median["flashloom"],
        "rounds": rounds,
        "faster_rounds": sum(a < b for a, b in zip(*samples.values())),  # each has both, one right after the other
        "tokens_per_s": {name: batch * new / s for name, s in median.items()},
    }
    print(
        f"{title}: {_times(samples, 1, 's')}, {row['times_faster']:.2f} x {PEER}, faster in "
        f"{row['faster_rounds']} of {rounds} rounds",
        flush=True,
    )
    if all(map(all, steps.values())):
        medians = {name: [statistics.median(call) for call in calls] for name, calls in steps.items()}
        row["step_s"] = {name: statistics.median(x) for name, x in medians.items()}
        row["step_low_high"] = {name: [min(x), max(x)] for name, x in medians.items()}  # of the calls' medians
        row["prompt_s"] = {  # what is left: the prompt, the first step, and what generate() does before and after
            name: statistics.median(t - sum(call) for t, call in zip(samples[name], calls))
            for name, calls in steps.items()
        }
        row["slowest_step_s"] = {name: max(map(max, calls)) for name, calls in steps.items()}
        row["step_times_faster"] = row["step_s"][PEER] / row["step_s"]["flashloom"]
        print(f"    a step: {_times(medians, 1e3, 'ms')}, {row['step_times_faster']:.2f} x {PEER}")
    for name in NAMES:
        happened = ", ".join(f"{n} {what}" for what, n in meanwhile[name].found.items() if n) or "nothing else happened"
        slowest = ""
        if "step_s" in row:
            slowest = f", slowest step {row['slowest_step_s'][name] * 1e3:.1f} ms, prompt and rest "
            slowest += f"{row['prompt_s'][name] * 1e3:.1f} ms"
        print(
            f"    {name}: first call {first[name]:.2f} s, CPU {row['cpu_s'][name]:.3f} s{slowest}; {happened}",
            flush=True,
        )
    return row


def _times(samples: dict[str, list[float]], scale: float, unit: str) -> str:
    return ", ".join(
        f"{name} {statistics.median(s) * scale:.3f} {unit} ({min(s) * scale:.3f}-{max(s) * scale:.3f})"
        for name, s in samples.items()
    )


def print_profile(call, device: str, name: str, title: str, steps: int = 8) -> None:
    """The functions in which `steps` decode steps of an implementation spend the host's time, with what they call."""
    found = cProfile.Profile()
    call(name, steps + 6, Steps({4: found.enable, 4 + steps: found.disable}))
    synchronize(device)
    text = io.StringIO()
    pstats.Stats(found, stream=text).sort_stats("cumulative").print_stats(25)
    print(f"{title}: {steps} steps of {name}\n{text.getvalue()}", flush=True)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "speed"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--family", choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="rows of `speed` whose name holds this")
    parser.add_argument(
        "--profile",
        help="print profiles of a few decode steps on the host, for rows of generate() whose name holds this",
    )
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
    for row in speed(given.device, given.rounds, given.only, given.profile):
        found["rows"].append(row)
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
