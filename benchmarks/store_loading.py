"""How long a compiled CPU kernel takes to load: one more from the user's store, and many from a pack.

    python benchmarks/store_loading.py --kernels 100

The kernels are one small function each beside 64 KB of constants, as large as attention kernels are. Every round is a
new process that has imported torch and what loading needs. Prints a table and writes
benchmarks/results/store_loading.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = r"""
#include <stdint.h>
asm(".section .rodata\n.fill 65536, 1, 7\n.text");
extern "C" __attribute__((visibility("default"))) int64_t flashloom_number() { return NUMBER; }
"""


def kernel(number: int):
    from flashloom.kernel.cpp import CppKernel
    from flashloom.target import Target

    return CppKernel(f"number {number}", SOURCE, (), Target.here(), {"NUMBER": number})


def call(number: int) -> None:
    assert kernel(number).load().get_function("number", 0)() == number


def load(folder: str, kernels: int) -> None:
    """One process: the milliseconds that loading and calling every kernel takes."""
    import torch  # noqa: F401

    import flashloom as fl
    from flashloom import store
    from flashloom.kernel.cpp import find_compiler

    find_compiler()
    fl.configure(cache_dir=Path(folder) / "store")
    if kernels == 1:
        call(1)  # what the first kernel of a process pays for, such as opening the store
    start = time.perf_counter()
    if kernels > 1:
        fl.use(Path(folder) / "kernels.loom", on_miss="error")
    for number in range(kernels):
        call(number)
    took = (time.perf_counter() - start) * 1e3
    assert store.counters().builds == 0
    print(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "KERNELS"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "store_loading.json")
    asked = parser.parse_args()
    if asked.load:
        load(asked.load[0], int(asked.load[1]))
        return

    import flashloom as fl
    from flashloom.bench.machine import describe
    from flashloom.store.pack import write_pack

    with tempfile.TemporaryDirectory(prefix="flashloom-bench-") as folder:
        fl.configure(cache_dir=Path(folder) / "store")
        write_pack(Path(folder) / "kernels.loom", [kernel(number).entry() for number in range(asked.kernels)])
        rows = []
        for where, kernels in (("store", 1), ("pack", asked.kernels)):
            command = [sys.executable, __file__, "--load", folder, str(kernels)]
            times = [float(subprocess.check_output(command)) for _ in range(asked.rounds)]
            low, middle, high = statistics.quantiles(times, n=4)
            row = {"from": where, "kernels": kernels, "median_ms": middle, "q1_ms": low, "q3_ms": high}
            rows.append({name: round(x, 2) if isinstance(x, float) else x for name, x in row.items()})
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    asked.output.write_text(json.dumps({"machine": describe(), "rounds": asked.rounds, "rows": rows}, indent=2) + "\n")
    print(f"wrote {asked.output}")


if __name__ == "__main__":
    main()
