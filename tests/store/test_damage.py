"""A damaged entry is a miss: set aside, built anew, counted. Failed builds are never kept."""

import os
import random

import pytest

from flashloom import store
from flashloom.store.entry import Corrupt, Entry, Key, manifest_of

FIELDS = {"kind": "test", "target": "x86"}
KEY = Key.of(FIELDS, {})


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)


def replace_manifest(path, **changes):
    entry = Entry(KEY, "kernel", FIELDS, {}, {}, {"kernel.so": b"1"})
    for name, value in changes.items():
        object.__setattr__(entry, name, value)
    path.write_bytes(manifest_of(entry))


DAMAGE = {
    "truncated": lambda path: os.truncate(path / "kernel.so", 10),
    "flipped": lambda path: flip(path / "kernel.so", 500),
    "emptied": lambda path: os.truncate(path / "kernel.so", 0),
    "removed": lambda path: (path / "kernel.so").unlink(),
    "grown": lambda path: (path / "kernel.so").write_bytes((path / "kernel.so").read_bytes() + b"1"),
    "a folder": lambda path: ((path / "kernel.so").unlink(), (path / "kernel.so").mkdir()),
    "a pipe": lambda path: ((path / "kernel.so").unlink(), os.mkfifo(path / "kernel.so")),
    "manifest truncated": lambda path: os.truncate(path / "entry.json", 100),
    "manifest emptied": lambda path: os.truncate(path / "entry.json", 0),
    "manifest removed": lambda path: (path / "entry.json").unlink(),
    "manifest of another kernel": lambda path: replace_manifest(path / "entry.json", fields={"kind": "other"}),
    "manifest that leads outside": lambda path: replace_manifest(path / "entry.json", files={"../../x": b"1"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_set_aside_and_built_anew(damage, folder, root, builder, restart):
    store.get_or_build(FIELDS, builder())
    DAMAGE[damage](folder.path(KEY))
    restart()
    build = builder()
    entry = store.get_or_build(FIELDS, build)
    assert build.calls == 1
    assert entry.files["kernel.so"] == b"payload" * 142
    assert store.counters().corrupt == 1
    assert len(os.listdir(root / "aside")) == 1
    restart()
    assert store.get_or_build(FIELDS, build).files == entry.files
    assert (build.calls, store.counters().corrupt) == (1, 0)


def test_no_flipped_or_cut_byte_goes_unseen(folder, builder):
    whole = store.get_or_build(FIELDS, builder(size=300))
    path = folder.path(KEY)
    good = {name: (path / name).read_bytes() for name in os.listdir(path)}
    choices = random.Random(1)
    for name, data in good.items():
        for position in choices.sample(range(len(data)), min(150, len(data))):
            for bad in (
                data[:position],
                data[:position] + bytes([data[position] ^ 1 << choices.randrange(8)]) + data[position + 1 :],
            ):
                (path / name).write_bytes(bad)
                try:
                    found = folder.read(KEY)
                except Corrupt:
                    continue
                # Only what follows the manifest's text may differ without harm: its closing line break.
                assert (name, position) == ("entry.json", len(data) - 1)
                assert found.files == whole.files
        (path / name).write_bytes(data)
    assert folder.read(KEY).files == whole.files


def test_a_rejected_entry_is_set_aside_and_built_anew(folder, builder):
    build = builder()
    store.get_or_build(FIELDS, build).reject("wrong architecture")
    assert folder.read(KEY) is None
    assert store.get_or_build(FIELDS, build).files
    assert (build.calls, store.counters().corrupt) == (2, 1)


def test_a_failed_build_is_not_kept(folder, builder):
    def fail(place):
        (place / "kernel.so").write_bytes(b"half")
        raise RuntimeError("error: no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="error: no"):
            store.get_or_build(FIELDS, fail)
    assert list(folder.all_keys()) == []
    assert (store.counters().failures, store.counters().builds) == (2, 0)
    assert store.get_or_build(FIELDS, builder()).files


def test_a_build_that_leaves_nothing_is_a_failure(folder):
    with pytest.raises(ValueError, match="it must leave files"):
        store.get_or_build(FIELDS, lambda place: None)
    assert list(folder.all_keys()) == []
