"""A store of its own for every test: fresh folder, fresh locks, fresh counters; and kernels that cost nothing to
build.
"""

import os
import signal
import tempfile
import traceback
from pathlib import Path

import pytest

from flashloom import settings
from flashloom.settings import Settings
from flashloom.store import store as store_module
from flashloom.store.folder import Folder

#: A machine that stands still for a while must not look like a builder that is gone, or a store that does not answer.
PATIENT = {"wait": 600.0, "store_timeout": 600.0}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Every test starts as a new process would, with its own folders for the store and for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(settings, "_current", Settings(cache_dir=tmp_path / "store", jobs=4, **PATIENT))
    monkeypatch.setattr(store_module, "_state", store_module._State())


@pytest.fixture
def root(tmp_path):
    """The store's folder; it does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def folder(root):
    return Folder(root)


class Builder:
    """A stand-in for a compiler: writes two files of one payload, and counts its calls."""

    def __init__(self, payload: bytes = b"payload", size: int = 1000) -> None:
        self.payload, self.size, self.calls = payload, size, 0

    def __call__(self, folder: Path) -> dict:
        self.calls += 1
        (folder / "kernel.so").write_bytes(self.payload * max(self.size // len(self.payload), 1))
        (folder / "kernel.cpp").write_bytes(self.payload)
        return {"payload": self.payload[:20].decode()}


@pytest.fixture
def builder():
    return Builder


@pytest.fixture
def restart(monkeypatch):
    """Forget what this process has in memory, as a new process would."""

    def restart():
        monkeypatch.setattr(store_module, "_state", store_module._State())

    return restart


@pytest.fixture
def fork():
    """Run a function in a forked child; answers its pid. Children that are left over are killed at the end."""
    children = []

    def start(work) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
        return pid

    yield start
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def for_all_users(tmp_path):
    """Let other users come as far as the test's own folder, and write temporary files in it."""
    for path in (tmp_path, *tmp_path.parents):
        if any(part.startswith("pytest-") for part in path.parts):
            path.chmod(0o755)
    (tmp_path / "tmp").chmod(0o1777)


@pytest.fixture
def finish():
    """Wait for a child and answer its exit status (minus the signal's number when it was killed)."""
    return lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
