"""The package as others get it: what importing does, and what is in the wheel and the source archive."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import flashloom

ROOT = Path(flashloom.__file__).parents[2]
SOURCES = {
    path.relative_to(ROOT / "src").as_posix()
    for path in (ROOT / "src").rglob("*")
    if path.suffix in (".py", ".h", ".cpp") or path.name == "py.typed"
}


def run(code: str, **environment) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    ).stdout


def test_importing_writes_nothing_and_starts_no_gpu(tmp_path):
    folders = {name: tmp_path / name for name in ("home", "cache", "tmp")}
    for folder in folders.values():
        folder.mkdir()
    names = "[getattr(fl, name) for name in fl.__all__]"
    run(
        f"import flashloom as fl, torch; {names}; assert not torch.cuda.is_initialized()",
        HOME=str(folders["home"]), XDG_CACHE_HOME=str(folders["cache"]), TMPDIR=str(folders["tmp"]),
    )  # fmt: skip
    assert [path for path in tmp_path.rglob("*") if path not in folders.values()] == []


def test_importing_adds_little_to_importing_torch():
    code = """
import sys, time, torch
start = time.process_time()  # what other processes take of the machine is not its cost
import flashloom as fl
[getattr(fl, name) for name in fl.__all__]
assert not {"torch._dynamo", "torch._inductor", "triton", "transformers"} & set(sys.modules)
print(time.process_time() - start)
"""
    assert min(float(run(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(4)) < 1.0  # a fifth of it on an idle machine


def test_importing_does_without_optional_packages():
    absent = "import sys; sys.modules.update(dict.fromkeys(['triton', 'transformers', 'matplotlib'])); "
    run(absent + "import flashloom as fl; [getattr(fl, name) for name in fl.__all__]")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling", reason="building without the network needs hatchling here")
    place = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", place, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_the_wheel_holds_the_kernel_sources(built):
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert names >= SOURCES
    assert any(name.endswith("cpu/threads.h") for name in names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_archive_holds_all_that_tests_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {f"src/{name}" for name in SOURCES}
    assert names >= {"pyproject.toml", "constraints.txt", "LICENSE", "Makefile", "tests/test_package.py"}


def test_type_checkers_see_the_public_names(tmp_path, monkeypatch):
    mypy = pytest.importorskip("mypy.api")
    (tmp_path / "user.py").write_text(
        "from typing import Any, Callable\nimport torch, flashloom as fl\n\nq = torch.ones(1)\n"
        "out: torch.Tensor = fl.attention(q, q, q, causal=True)\n"
        "calls: list[Callable[..., Any]] = [fl.append, fl.bench, fl.monitor, fl.tune]\n"
        "fl.attention(q, q, q, causal='yes')\n"
    )
    found, errors, _ = mypy.run(
        ["--config-file=", "--no-incremental", "--follow-imports=silent", str(tmp_path / "user.py")]
    )
    assert not errors
    assert [line.split(": ")[0].rpartition(":")[2] for line in found.splitlines() if ": error" in line] == ["7"], found
