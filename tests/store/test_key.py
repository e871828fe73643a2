"""The key is a pure function of what is asked and of the toolchain; versions live side by side."""

import os
import random

import pytest

from flashloom import store
from flashloom.store.entry import Key, canonical, difference

FIELDS = {"kind": "test", "config": {"block": 64, "stages": 2}, "target": "x86", "dtypes": ["bf16", "fp32"]}
TOOLS = {"compiler": "g++ 12", "libc": "2.36"}


def test_the_key_does_not_depend_on_order_or_surroundings(tmp_path, monkeypatch):
    keys = {Key.of(FIELDS, TOOLS)}
    monkeypatch.setenv("PATH", "/elsewhere")
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.chdir(tmp_path)
    for seed in range(10):
        names = list(FIELDS)
        random.Random(seed).shuffle(names)
        keys.add(Key.of({name: FIELDS[name] for name in names}, dict(reversed(TOOLS.items()))))
    assert len(keys) == 1


@pytest.mark.parametrize(
    "change", [{"target": "x86-avx2"}, {"config": {"block": 65, "stages": 2}}, {"abi": 1}, {"dtypes": ["fp32", "bf16"]}]
)
def test_every_field_is_in_the_key(change):
    assert Key.of({**FIELDS, **change}, TOOLS).request != Key.of(FIELDS, TOOLS).request


def test_the_toolchain_is_in_the_key_but_not_in_the_request():
    other = Key.of(FIELDS, {**TOOLS, "compiler": "g++ 13"})
    assert other.key != Key.of(FIELDS, TOOLS).key
    assert other.request == Key.of(FIELDS, TOOLS).request


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, b"bytes"])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises((TypeError, ValueError)):
        canonical({"field": value})


def test_two_orders_of_building_give_the_same_store(tmp_path, builder, restart):
    from flashloom import settings

    listings = []
    for name, order in (("a", [1, 2, 3]), ("b", [3, 1, 2])):
        settings.configure(cache_dir=tmp_path / name)
        restart()
        for number in order:
            store.get_or_build({"number": number}, builder(str(number).encode()), label=f"kernel {number}")
        folder = store.default_folder()
        listings.append({key: folder.read(key).files for key in folder.all_keys()})
    assert listings[0] == listings[1]
    assert len(listings[0]) == 3


def test_two_toolchains_live_side_by_side(builder, restart):
    for version in ("g++ 12", "g++ 13", "g++ 12", "g++ 13"):
        restart()
        entry = store.get_or_build(
            FIELDS, builder(version.encode()), toolchain=lambda version=version: {"compiler": version}
        )
        assert entry.metadata == {"payload": version}
    assert store.counters().hits == 1
    assert len(list(store.default_folder().all_keys())) == 2


def test_two_formats_live_side_by_side(builder, restart, monkeypatch):
    store.get_or_build(FIELDS, builder(b"old"))
    for name in ("flashloom.store.entry.FORMAT", "flashloom.store.folder.FORMAT"):
        monkeypatch.setattr(name, 2)
    restart()
    assert store.get_or_build(FIELDS, builder(b"new")).metadata == {"payload": "new"}
    assert sorted(os.listdir(store.default_folder().root)) == ["aside", "v1", "v2"]


def test_difference_names_the_fields():
    found = {**FIELDS, "target": "x86-amx", "config": {"block": 32}}
    assert difference(FIELDS, found) == [
        "config.block: asked 64, found 32",
        "config.stages: asked 2, found nothing",
        'target: asked "x86", found "x86-amx"',
    ]
