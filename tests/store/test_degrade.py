"""Where the folder cannot be used, kernels stay in memory: one warning, right results, and no wait that is not
bounded.
"""

import ctypes
import os
import threading
import time
import warnings

import pytest

from flashloom import settings, store
from flashloom.store import folder as folder_module
from flashloom.store.entry import Key
from flashloom.store.folder import Folder

FIELDS = {"kind": "test", "target": "x86"}
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and changing the user need root")
_NEW_MOUNTS, _READ_ONLY, _BIND, _REMOUNT, _PRIVATE = 0x20000, 1, 4096, 32, (1 << 18) | (1 << 14)


def mount(source: str, path, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    """mount(2), in a namespace of this process alone; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    encode = lambda text: None if text is None else str(text).encode()  # noqa: E731
    if libc.mount(encode(source), encode(path), encode(kind), ctypes.c_ulong(flags), encode(options)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))


def own_mounts() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", None, _PRIVATE)


def check_memory(builder, warns: str, size: int = 1000) -> None:
    """Three kernels asked for twice: each built once, kept in memory, one warning in all."""
    builds = [builder(str(number).encode(), size) for number in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for number, build in enumerate(builds):
                entry = store.get_or_build({"number": number}, build)
                assert entry.files["kernel.so"] == str(number).encode() * size
    assert [build.calls for build in builds] == [1, 1, 1]
    messages = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(messages) == 1, messages
    assert warns in messages[0]
    assert "kept in memory" in messages[0]
    assert store.counters().unpublished == 3


def test_a_file_in_the_folders_place(root, builder):
    root.write_text("not a folder")
    check_memory(builder, "kernel store failed")


def test_no_home_folder(builder, monkeypatch):
    settings.configure(cache_dir=None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: "~/.cache/flashloom")
    check_memory(builder, "FLASHLOOM_CACHE_DIR")
    assert not os.path.exists("~")


@NEEDS_ROOT
def test_a_full_disk(root, builder, fork, finish):
    def work():
        own_mounts()
        root.mkdir()
        mount("none", root, "tmpfs", options="size=64k,mode=755")
        check_memory(builder, "No space left", size=200_000)
        assert list(Folder(root).all_keys()) == []
        store.get_or_build({"small": 1}, builder(size=100))  # what fits is kept all the same
        assert len(list(Folder(root).all_keys())) == 1

    assert finish(fork(work)) == 0


@NEEDS_ROOT
def test_a_read_only_mount(root, builder, fork, finish, restart):
    store.get_or_build(FIELDS, builder())

    def work():
        own_mounts()
        mount(root, root, None, _BIND)
        mount(root, root, None, _BIND | _REMOUNT | _READ_ONLY)
        restart()
        build = builder()
        store.get_or_build(FIELDS, build)
        assert build.calls == 0  # what is there is read
        check_memory(builder, "Read-only file system")

    assert finish(fork(work)) == 0


@NEEDS_ROOT
def test_another_users_folder_without_permission(root, builder, fork, finish, for_all_users):
    root.mkdir(mode=0o700)

    def work():
        os.setgid(65534)
        os.setuid(65534)
        check_memory(builder, "Permission denied")

    assert finish(fork(work)) == 0


def test_a_slow_store_is_given_up_after_its_time(root, builder, monkeypatch):
    store.get_or_build({"number": 0}, builder())
    settings.configure(store_timeout=0.2)
    monkeypatch.setattr(Folder, "read", lambda self, key: time.sleep(400))
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"did not answer within 0\.2 s"):
        store.get_or_build(FIELDS, builder())
    store.get_or_build({"number": 2}, builder())  # once is enough
    assert time.monotonic() - start < 200


def test_a_process_that_stood_still_does_not_give_up_its_store(root, builder, monkeypatch, recwarn):
    """It wakes when the store's time is over, and the answer was on its way."""

    class Stopped(threading.Thread):
        stood = False

        def join(self, timeout=None):
            if self.stood:
                super().join(timeout)
            self.stood = True

    def slow(self, key):
        time.sleep(0.05)
        return read(self, key)

    read = Folder.read
    monkeypatch.setattr(Folder, "read", slow)
    monkeypatch.setattr(folder_module.threading, "Thread", Stopped)
    store.get_or_build(FIELDS, builder())
    assert Folder(root).read(Key.of(FIELDS, {})) is not None
    assert not recwarn.list


def test_a_store_that_fails_now_and_then(folder, builder, monkeypatch, restart):
    read, calls = Folder.read, []

    def flaky(self, key):
        calls.append(key)
        if len(calls) % 2:
            raise OSError(5, "Input/output error")
        return read(self, key)

    monkeypatch.setattr(Folder, "read", flaky)
    with pytest.warns(RuntimeWarning, match="Input/output error"):
        entries = [store.get_or_build({"number": number}, builder()) for number in range(4)]
    assert all(entry.files for entry in entries)
    assert len(list(folder.all_keys())) == 4
    assert folder.path(Key.of({"number": 3}, {})).is_dir()
