"""A reader sees a whole entry or none; a group of files is one; what writers leave behind is never taken for an
entry.
"""

import os
import random
import signal
import time

import pytest

from flashloom import store
from flashloom.store import folder as folder_module
from flashloom.store.entry import Entry, Key, manifest_of

FIELDS = {"kind": "test", "target": "x86"}
STEPS = [
    "folders", "write", "write kernel.cpp", "write kernel.so", "write entry.json", "sync", "request folder", "rename",
    "sync folder",
]  # fmt: skip


def entry_of(payload: bytes) -> Entry:
    files = {"kernel.cpp": payload, "kernel.so": payload * 4000, "more": payload * 3}
    return Entry(Key.of(FIELDS, {}), "kernel", FIELDS, {}, {}, files)


def test_a_built_kernel_is_found_by_the_next_process(builder, restart):
    build = builder()
    built = store.get_or_build(FIELDS, build)
    restart()
    found = store.get_or_build(FIELDS, build)
    assert build.calls == 1
    assert (found.files, found.metadata, found.key) == (built.files, {"payload": "payload"}, built.key)
    assert store.counters().hits == 1


def test_steps_are_those_that_are_tested(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(folder_module, "step", seen.append)
    entry = Entry(Key.of(FIELDS, {}), "kernel", FIELDS, {}, {}, {"kernel.cpp": b"1", "kernel.so": b"2"})
    assert folder.publish(entry)
    assert seen == STEPS


@pytest.mark.parametrize("fatal", STEPS)
def test_a_publisher_killed_at_any_step_leaves_a_whole_entry_or_none(fatal, folder, builder, fork, finish, restart):
    def publish():
        folder_module.step = lambda name: name == fatal and os.kill(os.getpid(), signal.SIGKILL)
        store.get_or_build(FIELDS, builder())

    assert finish(fork(publish)) == -signal.SIGKILL
    key = Key.of(FIELDS, {})
    found = folder.read(key)
    assert (found is None) == (fatal != "sync folder")
    restart()
    build = builder()
    entry = store.get_or_build(FIELDS, build)
    assert store.counters().waits == 0  # nobody waits for the dead
    assert entry.files["kernel.so"] == b"payload" * 142
    assert build.calls == (0 if fatal == "sync folder" else 1)
    assert folder.read(key).files == entry.files
    assert store.counters().corrupt == 0


def test_a_publisher_that_fails_at_a_step_leaves_nothing(folder, monkeypatch):
    for fatal in STEPS[1:-1]:

        def fail(name, fatal=fatal):
            if name == fatal:
                raise OSError(5, "no more")

        monkeypatch.setattr(folder_module, "step", fail)
        with pytest.raises(OSError, match="no more"):
            folder.publish(entry_of(b"1"))
        assert folder.read(Key.of(FIELDS, {})) is None
        assert os.listdir(folder.root / "aside") == []


def test_writers_with_different_payloads_never_mix(folder, fork, finish, tmp_path):
    """Four writers and an evictor on one key; every read is one writer's group."""
    key = Key.of(FIELDS, {})
    start, stop = time.monotonic(), tmp_path / "stop"

    def write(payload: bytes):
        while not stop.exists():
            folder.publish(entry_of(payload))

    def evict():
        while not stop.exists():
            folder.remove(key)
            time.sleep(random.uniform(0, 0.002))

    children = [fork(lambda payload=payload: write(payload)) for payload in (b"1", b"2", b"3", b"4")] + [fork(evict)]
    seen = set()
    while time.monotonic() < start + (1.5 if len(seen) > 1 else 120.0):
        found = folder.read(key)  # raises Corrupt if a group were mixed or in part
        if found is not None:
            payload = found.files["kernel.cpp"]
            assert found.files == entry_of(payload).files
            seen.add(payload)
    stop.touch()
    assert [finish(child) for child in children] == [0] * 5
    assert len(seen) > 1


@pytest.mark.parametrize("when", ["chmod", "rename"])
def test_an_eviction_that_removes_the_empty_request_folder_stops_no_publisher(when, folder, monkeypatch):
    """It may do so as soon as the folder is made, even before that has its permissions."""
    owner = folder_module.Path if when == "chmod" else os
    real, left = getattr(owner, when), [folder.path(entry_of(b"1").key).parent]

    def late(path, *rest):
        if left and left[0] in (path, *(one.parent for one in rest if when == "rename")):
            left.pop().rmdir()
        return real(path, *rest)

    monkeypatch.setattr(owner, when, late)
    assert folder.publish(entry_of(b"1"))
    assert not left
    assert folder.read(entry_of(b"1").key) is not None


def test_the_first_of_two_publishers_wins(folder):
    assert folder.publish(entry_of(b"1"))
    assert not folder.publish(entry_of(b"2"))
    assert folder.read(Key.of(FIELDS, {})).files["kernel.cpp"] == b"1"


def test_junk_is_never_a_candidate(folder, root, builder, restart):
    store.get_or_build(FIELDS, builder())
    key = Key.of(FIELDS, {})
    request = folder.path(key).parent
    for junk in (root / "v1" / ".tmp", root / "v1" / "junk.so", request / ".nfs0001", request / "tmp", root / "core"):
        junk.write_bytes(b"junk")
    (root / "v1" / ("0" * 63)).mkdir()
    (root / "v1" / ("f" * 64)).write_bytes(b"a file in a folder's place")
    (request / ("e" * 64)).mkdir()  # an entry without anything in it
    (root / "aside" / "half").mkdir()
    (root / "aside" / "half" / "entry.json").write_bytes(manifest_of(entry_of(b"1")))
    (folder.path(key) / "extra").write_bytes(b"a file that the manifest does not list")
    restart()
    entry = store.get_or_build(FIELDS, builder(b"other"))
    assert entry.metadata == {"payload": "payload"}
    assert set(entry.files) == {"kernel.so", "kernel.cpp"}
    assert key in set(folder.all_keys())
    assert len(set(folder.all_keys())) == 2  # and the empty one, which reads as damaged


def test_what_dead_writers_left_goes_after_a_day(folder, root):
    folder.publish(entry_of(b"1"))
    old = root / "aside" / "old"
    old.mkdir()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    (root / "aside" / "new").mkdir()
    folder.remove_old()
    assert os.listdir(root / "aside") == ["new"]
