"""`python -m flashloom.compat.conformance CHECKOUT`: run FlashInfer's tests, from a checkout of it, on flashloom.

The tests are copied into a temporary folder, for the CPU with their device's name replaced, and run by pytest with
flashloom as flashinfer. Cases are chosen by a hash of their names, so that a sample is the same everywhere."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import flashloom
from flashloom.compat.conformance.cases import FILES, MORE

#: A test's words for the device it was written for -> the same on the CPU.
ON_CPU = (
    (r"""(["'])cuda(:0)?\1""", '"cpu"'),
    (r"\.to\(0\)", '.to("cpu")'),
    (r"device=0\b", 'device="cpu"'),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flashloom.compat.conformance", description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder that holds FlashInfer's `tests`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--files", nargs="*", help="test files below tests/; by default those of attention")
    parser.add_argument("--more", action="store_true", help="also the other files that concern served names")
    parser.add_argument("--sample", type=int, default=0, help="number of cases; 0: all that are not left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=0, help="no case begins after this time")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    return parser.parse_args()


def copy_tests(checkout: Path, files: list[str], device: str, target: Path) -> list[Path]:
    """The chosen test files and their helpers, below target/tests."""
    source = checkout / "tests"
    if not (source / "attention").is_dir():
        raise SystemExit(f"{checkout} is no checkout of FlashInfer: it has no tests/attention")
    wanted = [source / f"{name.removesuffix('.py')}.py" for name in files]
    wanted += [*source.glob("test_helpers/*.py"), source / "utils_fp8.py"]
    for path in wanted:
        if not path.is_file():
            raise SystemExit(f"{path} does not exist")
        text = path.read_text()
        if device == "cpu":
            for pattern, replacement in ON_CPU:
                text = re.sub(pattern, replacement, text)
        copy = target / "tests" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    (target / "pytest.ini").write_text("[pytest]\n")
    shim = target / "site"  # so that processes that tests start find flashinfer as well
    shim.mkdir()
    (shim / "sitecustomize.py").write_text("import flashloom.compat\n\nflashloom.compat.install()\n")
    return [target / "tests" / f"{name.removesuffix('.py')}.py" for name in files]


def run(target: Path, paths: list[Path], asked: argparse.Namespace) -> list[dict]:
    """Every process's report."""
    source = Path(flashloom.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(target), str(source), str(target / "site"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    if asked.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    processes = []
    for shard in range(asked.jobs):
        report = target / f"report{shard}.json"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "flashloom.compat.conformance.plugin", "-p", "no:cacheprovider",
            "--import-mode=importlib", "--rootdir", str(target), "--on", asked.device, "--sample", str(asked.sample),
            "--shard", f"{shard}/{asked.jobs}", "--seconds", str(asked.seconds), "--report", str(report), "--tb=short",
            "-W", "ignore", *map(str, paths),
        ]  # fmt: skip
        with (target / f"log{shard}").open("w") as log:
            processes.append(
                (subprocess.Popen(command, env=environment, cwd=target, stdout=log, stderr=subprocess.STDOUT), report)
            )
    reports = []
    for shard, (process, report) in enumerate(processes):
        process.wait()
        if process.returncode not in (0, 1, 5) or not report.exists():  # passed, failed, nothing to run
            print((target / f"log{shard}").read_text()[-4000:], file=sys.stderr)
            raise SystemExit(f"process {shard} ended with {process.returncode}: see above")
        reports.append(json.loads(report.read_text()))
    return reports


def merged(reports: list[dict]) -> dict:
    result: dict = {"left_out": reports[0]["left_out"], "outcomes": {}, "failures": {}, "not_reached": 0}
    for report in reports:
        result["outcomes"].update(report["outcomes"])
        result["failures"].update(report["failures"])
        result["not_reached"] += report["not_reached"]
    return result


def table(result: dict) -> str:
    """What came of it, per file, and every failure and reason."""
    lines = [f"{'file':<44}{'passed':>8}{'failed':>8}{'skipped':>8}{'xfailed':>8}"]
    per_file: dict[str, Counter] = {}
    for name, outcome in result["outcomes"].items():
        per_file.setdefault(name.partition("::")[0], Counter())[outcome] += 1
    kinds = ("passed", "failed", "skipped", "xfailed")
    for name in sorted(per_file):
        lines.append(f"{name:<44}" + "".join(f"{per_file[name][kind]:>8}" for kind in kinds))
    total: Counter = sum(per_file.values(), Counter())
    lines.append(f"{'all':<44}" + "".join(f"{total[kind]:>8}" for kind in kinds))
    ran = total["passed"] + total["failed"]
    if ran:
        lines.append(f"{100 * total['passed'] / ran:.2f} % of {ran} cases pass; {result['not_reached']} not reached")
    lines += ["", "left out:"] + [f"{count:>8}  {reason}" for reason, count in sorted(result["left_out"].items())]
    failed = [name for name, outcome in result["outcomes"].items() if outcome == "failed"]
    lines += ["", *(f"failed: {name}\n        {_last_line(result['failures'][name])}" for name in failed)]
    return "\n".join(lines)


def _last_line(text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("E ")]
    return (errors[0][1:].strip() if errors else text.strip().splitlines()[-1])[:200]


def main() -> None:
    asked = arguments()
    files = list(asked.files) if asked.files else [*FILES, *(MORE if asked.more else ())]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flashloom-conformance-") as folder:
        paths = copy_tests(asked.checkout, files, asked.device, Path(folder))
        result = merged(run(Path(folder), paths, asked))
    result["seconds"] = time.monotonic() - started
    print(table(result))
    print(f"{result['seconds']:.0f} s on {asked.device}")
    if asked.report:
        asked.report.write_text(json.dumps(result, indent=1))
    raise SystemExit(1 if "failed" in result["outcomes"].values() else 0)


if __name__ == "__main__":
    main()
