"""The first attention call of a process: from an empty store, from a warm one, and from a pack.

    python benchmarks/store_first_call.py --device cuda

Every row is several new processes. Not in the time: `import torch, flashloom`, starting the device, making q, k and v.
In the time: everything else up to the result, waited for: flashloom's own modules, which the first use of each name
imports, opening the pack, `Attention`, the page table, `plan` and `run`, for llama-3-8b (causal, bfloat16, pages of
16 tokens): decode of 8 requests, then prefill of one. Further processes say what the time goes to (`stages_apart_ms`).
Bytecode of flashloom is cached, as it is where a package was installed.
Writes benchmarks/results/store_first_call_*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CALL = r"""
import os, sys, time, torch
import flashloom as fl

def measure(device, pack, staged, missing):
    for name in missing:
        sys.modules[name] = None
    kv_lens = {"decode": [1024] * 8, "prefill": [1024]}
    q_lens = {"decode": [1] * 8, "prefill": [1024]}
    tensors, tables = {}, {}
    for name, lens in kv_lens.items():
        pages = sum(-(-n // 16) for n in lens)
        k, v = (torch.ones(pages, 16, 8, 128, dtype=torch.bfloat16, device=device) for _ in "kv")
        tensors[name] = torch.ones(sum(q_lens[name]), 32, 128, dtype=torch.bfloat16, device=device), (k, v)
        indptr = [0]
        for n in lens:
            indptr.append(indptr[-1] - (-n // 16))
        tables[name] = indptr, list(range(pages)), [n - (n - 1) // 16 * 16 for n in lens]
    torch.ones(1, device=device).sum().item()
    spent, loaded = {}, set(sys.modules)
    clock = time.perf_counter

    def timed(place, name, stage):
        inner = getattr(place, name)
        def outer(*a, **k):
            start = clock()
            try:
                return inner(*a, **k)
            finally:
                spent[stage] = spent.get(stage, 0.0) + clock() - start
        setattr(place, name, outer)

    def call(name):
        q, kv = tensors[name]
        marks = [clock()]
        if name == "decode":
            names = fl.HeadShape, fl.Attention, fl.Batch, fl.PageTable, fl.causal
            marks.append(clock())
            if pack:
                fl.use(pack, on_miss="error")
            marks.append(clock())
            if staged and device == "cuda":
                start = clock()
                from flashloom import dispatch
                for one in dispatch.ATTENTION[device][:2]:
                    dispatch._find(one)
                spent["import the backends"] = clock() - start
                from flashloom.attention import triton_buffers
                from flashloom.kernel import cuda, source
                from flashloom.lower import triton as lower
                timed(cuda.store, "find", "look up, read, verify")
                timed(source, "_digest", "digest of kernel files")
                timed(lower, "functions", "text of the variant")
                timed(cuda.Function, "__init__", "load modules into the device")
                timed(triton_buffers.Buffers, "__init__", "allocate buffers")
                timed(triton_buffers.Staging, "_reserve", "allocate pinned memory")
        else:
            marks += [clock(), clock()]
        start = clock()
        attention = fl.Attention(fl.HeadShape(32, 8, 128), variant=fl.causal, dtype=torch.bfloat16, device=device)
        table = fl.PageTable.from_csr(*tables[name], page_size=16)
        batch = fl.Batch(q_lens=q_lens[name], kv=table)
        marks.append(clock())
        plan = attention.plan(batch)
        marks.append(clock())
        out = plan.run(q, kv)
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(clock())
        assert abs(out.float().mean().item() - 1) < 1e-2
        parts = [1e3 * (b - a) for a, b in zip(marks, marks[1:])]
        parts[2] = 1e3 * (marks[3] - start)  # without what only a staged process does
        stages = dict(zip(("imports", "open the pack", "describe", "plan", "run"), parts))
        return sum(parts), stages, plan.executor

    decode = call("decode")
    inner, modules = dict(spent), len(set(sys.modules) - loaded)
    prefill = call("prefill")
    from flashloom import store
    store.finish()  # what the first call did not wait for
    return {
        "decode_ms": decode[0], "prefill_ms": prefill[0], "builds": store.counters().builds, "modules": modules,
        "heavy": sorted({"triton", "torch._dynamo", "torch._inductor", "subprocess"} & {
            name for name, module in sys.modules.items() if module is not None and name not in loaded}),
        "backends": [decode[2], prefill[2]],
        "stages": {**decode[1], **{"plan: " + name: 1e3 * s for name, s in inner.items()}} if staged else decode[1],
    }

print("ready", flush=True)
asked = eval(sys.stdin.readline() or "None")
if asked:
    os.environ.update(asked["environment"])
    done = measure(asked["device"], asked["pack"], asked["staged"], asked["missing"])
    import json
    print(json.dumps(done), flush=True)
"""


class Fresh:
    """Processes that have imported torch and flashloom and nothing else. Several start at a time, which takes no part
    in what is measured; then one after another is used, while none is starting."""

    def __init__(self, device: str, bytecode: Path) -> None:
        self._environment = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
        self._device = device
        self._waiting: list[subprocess.Popen[str]] = []

    def _start(self) -> None:
        command = [sys.executable, "-c", CALL]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        for _ in range(min(os.cpu_count() or 1, 10)):
            self._waiting.append(subprocess.Popen(command, env=self._environment, text=True, **pipes))
        for process in self._waiting:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a process failed to start; its error is above")

    def call(
        self, cache: Path, pack: str = "", *, staged: bool = False, missing: tuple[str, ...] = (), **more: str
    ) -> Any:
        """Figures of one process; `missing` are modules that it cannot import, `more` its environment."""
        if not self._waiting:
            self._start()
        environment = {"FLASHLOOM_CACHE_DIR": str(cache), **more}
        asked = {"device": self._device, "pack": pack, "staged": staged, "missing": missing, "environment": environment}
        answer, _ = self._waiting.pop().communicate(repr(asked) + "\n")
        if not answer:
            raise SystemExit("a process failed; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        for process in self._waiting:
            process.communicate()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of each figure, in milliseconds."""
    row: dict[str, Any] = {"processes": len(runs), **{name: runs[0][name] for name in ("builds", "modules", "heavy")}}
    for name in ("decode_ms", "prefill_ms"):
        values = [run[name] for run in runs]
        row[name] = {"median": round(statistics.median(values), 2), "min": round(min(values), 2),
                     "max": round(max(values), 2), "all": [round(x, 2) for x in values]}  # fmt: skip
    row["backends"] = runs[0]["backends"]
    row["stages_ms"] = stages_of(runs)
    return row


def stages_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each stage of the decode call."""
    names = dict.fromkeys(name for run in runs for name in run["stages"])
    return {name: round(statistics.median(run["stages"].get(name, 0.0) for run in runs), 3) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7, help="processes for each row but the cold one")
    parser.add_argument("--cold", type=int, default=2, help="processes that begin with an empty store")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()

    place = Path(tempfile.mkdtemp(prefix="flashloom-first-call-"))
    fresh = Fresh(asked.device, place / "bytecode")
    pack, rows = str(place / "llama.loom"), {}
    bare = {"PATH": "/nowhere", "CXX": ""}
    gpu = asked.device == "cuda"
    rows["cold"] = summary([fresh.call(place / f"store{i}") for i in range(asked.cold)])
    show("cold", rows["cold"])
    warm = place / "store0"
    kernels = write_pack(warm, Path(pack))
    cases: list[tuple[str, tuple[Path, str], dict[str, Any]]] = [
        ("warm store", (warm, ""), {}),
        ("pack, no compiler in PATH", (place / "empty", pack), bare),
    ]
    if gpu:
        cases.append(("pack, no compiler, no Triton", (place / "empty", pack), {**bare, "missing": ("triton",)}))
    for name, where, more in cases:
        fresh.call(*where, **more)  # brings files into the page cache
        rows[name] = summary([fresh.call(*where, **more) for _ in range(asked.rounds)])
        rows[name]["stages_apart_ms"] = stages_of([fresh.call(*where, staged=True, **more) for _ in range(3)])
        show(name, rows[name])
    fresh.close()
    shutil.rmtree(place)

    import torch

    from flashloom.bench.machine import describe
    from flashloom.target import Target

    target = Target.here().name if not gpu else "sm{}{}".format(*torch.cuda.get_device_capability())
    result = {
        "machine": describe(), "target": target, "pack": f"{kernels} kernels", "runs": rows,
        "in the time": "first use of names (imports), fl.use, Attention, page table, plan, run, synchronise",
        "not in the time": "import torch, flashloom; starting the device; making q, k and v",
    }  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"store_first_call_{asked.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


def show(name: str, row: dict[str, Any]) -> None:
    decode, prefill = row["decode_ms"], row["prefill_ms"]
    print(
        f"{name}: decode {decode['median']} ms ({decode['min']}-{decode['max']}), prefill {prefill['median']} ms "
        f"({prefill['min']}-{prefill['max']}), {row['processes']} processes, {row['builds']} builds, "
        f"{row['modules']} modules imported, of the heavy ones {row['heavy']}, by {row['backends']}",
        flush=True,
    )
    for title in ("stages_ms", "stages_apart_ms"):
        print("   ", title, row.get(title), flush=True)


def write_pack(cache: Path, path: Path) -> int:
    """A pack of all kernels in this store."""
    from flashloom import store
    from flashloom.store.folder import Folder

    folder = Folder(cache)
    entries = [entry for key in folder.all_keys() if (entry := folder.read(key)) is not None]
    store.write_pack(path, entries)
    return len(entries)


if __name__ == "__main__":
    main()
