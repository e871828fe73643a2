"""The store keeps below its size; whatever it meets while it does."""

import os
import random
import time

from flashloom import settings, store
from flashloom.store import evict
from flashloom.store.entry import Entry, Key


def entry_of(number: int, size: int = 10_000) -> Entry:
    fields = {"number": number}
    return Entry(Key.of(fields, {}), "kernel", fields, {}, {}, {"kernel.so": bytes([number % 256]) * size})


def fill(folder, count: int):
    entries = [entry_of(number) for number in range(count)]
    for age, entry in enumerate(reversed(entries)):
        folder.publish(entry)
        os.utime(folder.path(entry.key), (time.time() - 10_000 * (age + 1),) * 2)
    return entries  # the first is the oldest


def test_the_least_recently_used_go_first(folder):
    entries = fill(folder, 6)
    folder.read(entries[0].key)  # used now
    removed = evict.prune(folder, 35_000)
    assert [item.key for item in removed] == [entry.key for entry in entries[1:4]]
    assert set(folder.all_keys()) == {entry.key for entry in (entries[0], *entries[4:])}
    assert not folder.path(entries[1].key).parent.exists()
    assert evict.prune(folder, 35_000) == []


def test_a_reader_keeps_what_it_has_read(folder, builder):
    entry = store.get_or_build({"kind": "test"}, builder())
    evict.prune(folder, 0)
    assert list(folder.all_keys()) == []
    assert entry.files["kernel.so"] == b"payload" * 142


def test_orphans_stop_nothing(folder, root):
    entries = fill(folder, 3)
    (folder.path(entries[0].key) / "entry.json").unlink()
    (root / "v1" / ("0" * 64)).mkdir()
    (root / "v1" / ("1" * 64)).write_text("a file")
    (root / "v1" / ("2" * 64)).symlink_to("/nowhere")
    (root / "v1" / ("3" * 64) / ("4" * 64)).mkdir(parents=True)
    (folder.path(entries[1].key) / "folder").mkdir()
    evict.prune(folder, 0)
    assert list(folder.all_keys()) == []
    assert folder.publish(entry_of(9))


def test_concurrent_pruners_and_publishers(folder, fork, finish):
    until = time.monotonic() + 1.5

    def prune():
        while time.monotonic() < until:
            evict.prune(folder, 50_000)

    def publish(seed):
        choices = random.Random(seed)
        while time.monotonic() < until:
            number = choices.randrange(20)
            folder.publish(entry_of(number))
            found = folder.read(entry_of(number).key)
            assert found is None or found.files == entry_of(number).files

    children = [fork(prune) for _ in range(3)] + [fork(lambda seed=seed: publish(seed)) for seed in range(3)]
    assert [finish(child) for child in children] == [0] * 6
    evict.prune(folder, 50_000)
    assert sum(item.bytes for item in evict.usage(folder)) <= 50_000


def test_publishing_prunes(folder, builder, monkeypatch):
    import itertools

    monkeypatch.setattr(evict, "_publications", itertools.count())
    settings.configure(cache_size=20_000)
    for number in range(33):
        store.get_or_build({"number": number}, builder(size=2_000))
    assert sum(item.bytes for item in evict.usage(folder)) <= 20_000


def test_leftovers_of_killed_builds_go_after_a_day():
    place = store.locks.local_folder()
    for name, age in (("build-old", 2 * 24 * 3600), ("build-new", 60), ("locks/old", 2 * 24 * 3600)):
        (place / name).mkdir(parents=True)
        os.utime(place / name, (time.time() - age,) * 2)
    evict.remove_old_builds()
    assert [path.name for path in place.glob("build-*")] == ["build-new"]
    assert list(place.glob("locks/*")) == []
