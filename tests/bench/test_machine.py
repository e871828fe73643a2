"""What is recorded beside a figure: above all the commit, where there is git and where there is none."""

import json
import subprocess
from pathlib import Path

import pytest

from flashloom import settings
from flashloom.bench import machine


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(settings, "_current", None)


def git(*words):
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def test_commit_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHLOOM_COMMIT", "named")
    git("init", "-q", tmp_path)
    source = tmp_path / "src" / "module.py"
    source.parent.mkdir()
    source.write_text("1")
    git("-C", tmp_path, "add", "src")
    git("-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first")
    head = git("-C", tmp_path, "rev-parse", "HEAD")[:12]
    assert machine.commit(tmp_path) == head
    source.write_text("2")
    assert machine.commit(tmp_path) == head + "+"


def test_commit_of_a_copy(tmp_path, monkeypatch):
    assert machine.commit(tmp_path) is None
    monkeypatch.setattr(settings, "_current", None)
    monkeypatch.setenv("FLASHLOOM_COMMIT", "0123456789ab")
    assert machine.commit(tmp_path) == "0123456789ab"


def test_described():
    found = json.loads(json.dumps(machine.describe()))
    assert found["versions"]["torch"]
    assert found["commit"] == machine.commit(Path(machine.__file__).parents[3])


def test_a_step_of_a_benchmark_records_the_command_that_was_typed(monkeypatch):
    from benchmarks import gpu_peers

    monkeypatch.setattr("sys.argv", ["/there/benchmarks/gpu_prefill.py", "--rows", "my result.json", "--resume"])
    about = gpu_peers.about()
    assert about["command"] == "PYTHONPATH=src:. python benchmarks/gpu_prefill.py 'my result.json'"
    assert set(gpu_peers.versions()) < set(about)
