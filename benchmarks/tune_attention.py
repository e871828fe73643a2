"""Tuned against default: tune a model's workloads from nothing, then time both anew, with other plans and other rounds.

    python benchmarks/tune_attention.py --device cuda --model llama-3-8b --budget 2m

On a GPU calls are replayed from CUDA graphs with a cold L2 cache, on a CPU they are made eagerly with warm caches; the
two configs take turns in every round. Writes benchmarks/results/tune_attention_*.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import flashloom as fl
from flashloom import records
from flashloom.attention.recorded import Fixed
from flashloom.attention.tuning import Choice, question
from flashloom.bench.machine import describe
from flashloom.bench.timing import geomean
from flashloom.bench.workloads import Workload, decode
from flashloom.serving import attentions, model_config
from flashloom.tune.attention import AttentionOperator, batch_of
from flashloom.tune.measure import Policy, Timer, race

ROUNDS = 2  # races, of which each has its own rounds


def cases(model: str, device: str, small: bool) -> list[Workload]:
    """The model's workloads; on a CPU those that do not take minutes."""
    found = fl.workloads(model)
    if device == "cpu":
        found = [w for w in found if w.tokens * max(w.kv_lens) <= 1 << 22 and sum(w.kv_lens) <= 1 << 16]
        found += [decode(found[0].heads, 1, 128), decode(found[0].heads, 4, 512)]
    return found[:3] if small else found


def again(attention: fl.Attention, case: Workload, tuned: dict, default: dict) -> dict:
    """The default's time over the tuned config's, in microseconds each, by new plans on new inputs."""
    operator, batch = AttentionOperator(attention), batch_of(case, attention)
    backends = question(attention.spec, attention.device).fields["kernels"]
    inputs, calls = operator.inputs(batch), {}
    timer = Timer(attention.device, Policy.of(attention.device))
    for name, config in (("default", default), ("tuned", tuned)):
        with records.entered(Fixed(Choice.read(config, backends))):
            plan = attention.plan(inputs.batch)
        calls[name] = [timer.ready(lambda plan=plan: plan.run(inputs.q, inputs.kv, out=inputs.out))]
    found = [race(timer, calls, "default")[0] for _ in range(ROUNDS)]
    times = {name: min(figures[name].median for figures in found) for name in calls}
    ratio = geomean([figures["tuned"].ratio for figures in found])
    return {"default_us": times["default"] * 1e6, "tuned_us": times["tuned"] * 1e6, "speedup": 1 / ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", action="append", dest="models")
    parser.add_argument("--budget", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    dtype, result = getattr(torch, options.dtype), {"machine": describe(), "models": {}}
    for model in options.models or ["llama-3-8b"]:
        made = attentions(model_config(model), dtype=dtype)[0]
        attention = fl.Attention(made.heads, variant=made.variant, dtype=dtype, device=options.device)
        chosen = cases(model, options.device, options.small)
        with tempfile.TemporaryDirectory() as folder, fl.autotune(tune=False, cache=folder):
            report = fl.tune(attention, chosen, options.budget)
            print(f"{attention}\n{report}", flush=True)
            start = time.perf_counter()
            known = fl.tune(attention, chosen)
            warm = time.perf_counter() - start
            assert known.count("known") == sum(o.record is not None and o.record.complete for o in report.outcomes)
        rows = []
        for outcome in report.outcomes:
            if outcome.record is None:
                continue
            config, default = dict(outcome.record.config), dict(outcome.record.default)
            row = {"shapes": list(outcome.shapes), "config": config, "default": default}
            row |= {"while_tuning": outcome.record.speedup, "noise": outcome.record.noise}
            row["complete"] = outcome.record.complete
            row["candidates"] = dict(Counter(t.status for t in outcome.record.tried))
            row["notes"] = sorted({t.note for t in outcome.record.tried if t.note})[:5]
            if config != default:
                named = {AttentionOperator(attention).describe(batch_of(w, attention)): w for w in chosen}
                case = named[outcome.shapes[0]]
                row["again"] = again(attention, case, config, default)
                told = "{default_us:9.1f} us -> {tuned_us:9.1f} us, {speedup:.3f}x".format(**row["again"])
                print(f"{outcome.shapes[0]:<40} again: {told}", flush=True)
            rows.append(row)
        speedups = [row["again"]["speedup"] if "again" in row else 1.0 for row in rows]
        result["models"][model] = {
            "policy": str(Policy.of(attention.device)),
            "seconds": report.seconds,
            "second_time_ms": warm * 1e3,
            "keys": len(report.outcomes),
            "tuned_differently": sum("again" in row for row in rows),
            "geomean_speedup": geomean(speedups),
            "rows": rows,
        }
        print(f"geomean over {len(rows)} keys: {geomean(speedups):.3f}x; second time {warm * 1e3:.1f} ms", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"tune_attention_{options.device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
