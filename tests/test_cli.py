"""The flashloom command: quick help, and a doctor that works where nothing else does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashloom import doctor

SRC = Path(doctor.__file__).resolve().parents[1]


def run(*arguments, path=(), **environment):
    paths = os.pathsep.join([*map(str, path), str(SRC)])
    env = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=1200)


def test_help_lists_commands_without_importing_torch():
    code = "import sys, flashloom.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = run("-c", code)
    for name in ("demo", "doctor", "explain", "bench"):
        assert f"  {name} " in done.stdout
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("name", ["demo", "doctor", "explain", "bench"])
def test_every_command_has_help(name):
    done = run("-m", "flashloom", name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_unknown_command_is_named():
    done = run("-m", "flashloom", "nosuch")
    assert done.returncode == 2
    assert "nosuch" in done.stderr


def test_doctor_works_with_broken_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    for command in (["-m", "flashloom", "doctor"], ["-m", "flashloom.doctor"]):
        done = run(*command, path=[tmp_path])
        assert done.returncode == 1, done.stdout + done.stderr
        assert "libtorch_cpu.so" in done.stdout
        assert "reinstall torch" in done.stdout


def test_doctor_json_names_a_fix_for_every_problem(tmp_path):
    done = run("-m", "flashloom.doctor", "--json", PATH=str(tmp_path), CXX="", FLASHLOOM_CXX="")
    findings = json.loads(done.stdout)
    compiler = next(f for f in findings if f["topic"] == "compiler")
    assert compiler["level"] == "problem"
    assert "g++" in compiler["fix"]
    assert all(f["fix"] for f in findings if f["level"] == "problem")


def test_doctor_survives_a_failing_check(monkeypatch):
    def check_moon():
        raise RuntimeError("no moon")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon, doctor.check_python))
    findings = doctor.examine()
    assert [f.topic for f in findings] == ["moon", "python"]
    assert "no moon" in findings[0].found


def test_doctor_cache_open_to_others(monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("FLASHLOOM_CACHE_DIR", str(tmp_path))
    [finding] = doctor.check_cache()
    assert finding.level == "problem"
    assert "chmod 700" in finding.fix


def test_doctor_cpu_flags():
    assert doctor.cpu_flags("processor: 0\nflags\t\t: fpu avx2 fma f16c\n") == {"fpu", "avx2", "fma", "f16c"}
    assert doctor.cpu_flags("") == set()
