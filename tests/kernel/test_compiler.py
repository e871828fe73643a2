"""The compiler is asked once for all processes, and again whenever it may answer otherwise."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashloom
from flashloom import settings, store
from flashloom.kernel import NoCompiler, compiler
from flashloom.store import notes
from flashloom.store import store as store_module

GCC = shutil.which("g++")
pytestmark = pytest.mark.skipif(GCC is None, reason="g++ is not installed")
SAYS = '#!/bin/sh\nprintf "Target: x86_64-none\\ngcc version {}\\n" >&2\n'


@pytest.fixture(autouse=True)
def questions(tmp_path, monkeypatch):
    """Every question that is asked; nothing is known before."""
    monkeypatch.setattr(settings, "_current", settings.Settings(cache_dir=tmp_path / "store"))
    restart(monkeypatch)
    asked = []
    ask = compiler._ask
    monkeypatch.setattr(compiler, "_ask", lambda path: (asked.append(path), ask(path))[1])
    return asked


def restart(monkeypatch) -> None:
    """Forget what this process has in memory, as a new process would."""
    monkeypatch.setattr(store_module, "_state", store_module._State())
    compiler._identify.cache_clear()


@pytest.fixture
def gcc(tmp_path):
    """A copy of GCC's driver, to be changed."""
    path = tmp_path / "g++"
    shutil.copy(os.path.realpath(GCC), path)
    settings.configure(cxx=str(path))
    return path


def note(tmp_path) -> Path:
    return tmp_path / "store" / "v1" / "compilers.json"


def test_another_process_does_not_ask(gcc, questions, monkeypatch):
    first = compiler.find_compiler()
    restart(monkeypatch)
    assert compiler.find_compiler() == first
    assert questions == [str(gcc)]


def test_a_program_that_loads_its_kernels_starts_no_other_program(tmp_path):
    code = f"""
import subprocess, sys
if sys.argv[1] == "warm":
    subprocess.Popen = None
from pathlib import Path
from flashloom import settings, store
from flashloom.kernel import cpp
from flashloom.target import Target
settings.configure(cache_dir=Path({str(tmp_path / "store")!r}), cxx="g++")
source = 'extern "C" __attribute__((visibility("default"))) long flashloom_four() {{ return 4; }}'
assert cpp.build(source, [], Target.here(), {{}}, "four").get_function("four", 0)() == 4
print(store.counters().builds)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(flashloom.__file__).parents[1])}
    builds = [
        subprocess.check_output([sys.executable, "-c", code, how], env=environment, text=True).strip()
        for how in ("cold", "warm")
    ]
    assert builds == ["1", "0"]


def test_a_touched_compiler_is_asked_again_and_is_the_same(gcc, questions, monkeypatch):
    first = compiler.find_compiler()
    os.utime(gcc, (1e9, 1e9))
    assert compiler.find_compiler().identity == first.identity
    assert len(questions) == 2
    restart(monkeypatch)
    compiler.find_compiler()
    assert len(questions) == 2


def test_another_file_of_the_same_size_and_time_is_asked(gcc, questions, monkeypatch):
    """A byte of the version it states is another one."""
    first = compiler.find_compiler()
    status = gcc.stat()
    number = first.version.split()[2]
    other = chr(ord(number[0]) ^ 1) + number[1:]
    gcc.write_bytes(gcc.read_bytes().replace(f"\0{number}\0".encode(), f"\0{other}\0".encode()))
    os.utime(gcc, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert gcc.stat().st_size == status.st_size
    restart(monkeypatch)
    assert compiler.find_compiler().version != first.version
    assert len(questions) == 2


def test_what_passes_on_the_answer_of_another_program_is_asked_in_every_process(tmp_path, questions, monkeypatch):
    """Such as a script, or ccache: they stay as they are when the compiler behind them is replaced."""
    script = tmp_path / "g++"
    inner = tmp_path / "inner"
    script.write_text(f'#!/bin/sh\nexec {inner} "$@"\n')
    script.chmod(0o755)
    settings.configure(cxx=str(script))
    for number in ("98.1", "99.1"):
        inner.write_text(SAYS.format(number))
        inner.chmod(0o755)
        restart(monkeypatch)
        assert compiler.find_compiler().version == f"gcc version {number}"
    assert len(questions) == 2
    assert not note(tmp_path).exists()


def test_no_compiler_is_not_remembered(tmp_path, questions):
    settings.configure(cxx="true")
    with pytest.raises(NoCompiler):
        compiler.find_compiler()
    assert not note(tmp_path).exists()


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "a link", "a folder", "writable by others"])
def test_a_damaged_note_costs_a_question(damage, gcc, questions, monkeypatch, tmp_path, recwarn):
    first = compiler.find_compiler()
    path = note(tmp_path)
    data = path.read_bytes()
    if damage == "a bit":
        path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "a link":
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.chmod(0o666)
    for _ in range(2):
        restart(monkeypatch)
        assert compiler.find_compiler() == first
    assert len(questions) == (3 if damage == "a folder" else 2)  # the others are replaced
    assert not recwarn.list


def test_without_a_store_it_is_asked(gcc, questions, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    settings.configure(cache_dir=tmp_path / "file" / "store")
    with pytest.warns(RuntimeWarning, match="reading the kernel store failed"):
        first = compiler.find_compiler()
    restart(monkeypatch)
    with pytest.warns(RuntimeWarning):
        assert compiler.find_compiler() == first
    assert len(questions) == 2


def test_the_newest_notes_are_kept(tmp_path):
    for number in range(70):
        notes.remember("test", {"number": number % 66}, number)
    assert [notes.recall("test", {"number": number}) for number in (0, 3, 4, 5, 65)] == [66, 69, None, None, 65]
    assert not list((store.default_folder().root / "aside").iterdir())
