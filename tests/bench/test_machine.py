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


STAT = """cpu  900 0 0 0 0 0 0 0 0 0
cpu0 {0} 10 20 1000 50 1 2 {1} 0 0
cpu1 100 0 0 9999 0 0 0 0 0 0
cpu3 77777 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""


def test_what_others_took_of_the_processors():
    """100 ticks a second; 10 s on two processors, of which this process took 4 s and all others together 6 s."""
    ticks = machine.os.sysconf("SC_CLK_TCK")
    first = machine.Load.read(STAT.format(300, 0), {0, 1})
    assert first.processors == 2
    assert first.busy * ticks == 300 + 10 + 20 + 1 + 2 + 100
    later = machine.Load(first.clock + 10.0, first.busy + 10.0, first.own + 4.0, 2)
    assert first.others(later) == pytest.approx(6 / 20)
    assert machine.Load.read(STAT.format(300, 5 * ticks), {0, 1}).busy == pytest.approx(first.busy + 5.0)  # stolen time
    assert first.others(machine.Load(first.clock + 0.1, first.busy, first.own, 2)) is None
    assert first.others(None) is None
    assert first.others(machine.Load(first.clock + 1, first.busy, first.own + 9, 2)) == 0.0


def test_a_program_beside_this_one_is_seen():
    since = machine.Load.now()
    if since is None or since.busy == 0:
        pytest.skip("the system does not say what its processors do")
    burn = "import time\nend = time.process_time() + 1.5\nwhile time.process_time() < end: pass"
    child = subprocess.Popen([machine.sys.executable, "-c", burn])
    while child.poll() is None:
        machine.time.sleep(0.05)
        share = since.others(machine.Load.now())  # the child is not ours yet: it has not been waited for
        if share is not None and share * since.processors > 0.3:
            break
    else:
        pytest.fail("a processor was kept busy and nobody saw it")
    child.kill()
    child.wait()
