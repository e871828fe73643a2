"""Packs: the same kernels give the same bytes; nothing damaged, foreign or missing goes unseen; they lie over the
store, unwritten.
"""

import os
import time

import pytest

from flashloom import settings, store
from flashloom.store import store as store_module
from flashloom.store.entry import Corrupt, Key

TOOLS = {"compiler": "g++ 12"}


def no_compiler():
    raise store.NoToolchain("no C++ compiler was found")


def fields_of(number: int) -> dict:
    return {"kind": "test", "number": number}


@pytest.fixture
def entries(builder):
    def make(*numbers, size=5_000):
        return [
            store.get_or_build(
                fields_of(n), builder(str(n).encode(), size), toolchain=lambda: TOOLS, label=f"kernel {n}"
            )
            for n in numbers
        ]

    return make


@pytest.fixture
def pack(entries, restart, tmp_path):
    """A pack of three kernels, in a process whose store is empty."""
    path = tmp_path / "kernels.loom"
    store.write_pack(path, entries(1, 2, 3))
    settings.configure(cache_dir=tmp_path / "empty")
    restart()
    return path


def test_the_same_kernels_give_the_same_bytes(entries, restart, tmp_path):
    written = []
    for name, order in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        settings.configure(cache_dir=tmp_path / name)
        restart()
        store.write_pack(tmp_path / f"{name}.loom", entries(*order))
        written.append((tmp_path / f"{name}.loom").read_bytes())
    store.write_pack(tmp_path / "c.loom", entries(2, 1, 3))  # these come from the store
    assert written[0] == written[1] == (tmp_path / "c.loom").read_bytes()


def test_equal_files_are_kept_once(entries, builder, tmp_path):
    noise = os.urandom(4_000).hex().encode()
    more = [store.get_or_build({"copy": n}, builder(noise)) for n in range(5)]
    store.write_pack(tmp_path / "a.loom", more)
    assert (tmp_path / "a.loom").stat().st_size < 8_000


def test_it_serves_without_a_compiler_and_is_never_written(pack, builder):
    before = (pack.read_bytes(), pack.stat().st_mtime_ns)
    store.use(pack)
    for number in (1, 2, 3):
        entry = store.get_or_build(fields_of(number), builder(), toolchain=no_compiler)
        assert entry.files["kernel.so"] == str(number).encode() * 5_000
        assert (entry.metadata, entry.label, entry.origin) == ({"payload": str(number)}, f"kernel {number}", str(pack))
    with pytest.raises(store.NoToolchain):
        store.get_or_build(fields_of(4), builder(), toolchain=no_compiler)
    assert store.counters().hits == 3
    assert not store.default_folder().root.exists()
    assert (pack.read_bytes(), pack.stat().st_mtime_ns) == before


def test_a_miss_is_built_or_an_error(pack, builder):
    store.use(pack)
    assert store.get_or_build(fields_of(4), builder()).origin == "built"
    store.use(pack, on_miss="error")
    with pytest.raises(store.SealedError, match=r'on_miss="error"'):
        store.get_or_build(fields_of(5), builder())
    assert store.get_or_build(fields_of(4), builder()).files  # the user's store still counts
    with pytest.raises(ValueError, match='on_miss=\'never\' is unknown; give "build" or "error"'):
        store.use(pack, on_miss="never")


def test_of_several_packs_the_last_is_asked_first(pack, builder, tmp_path, restart):
    other = tmp_path / "other.loom"
    settings.configure(cache_dir=tmp_path / "another")
    store.write_pack(other, [store.get_or_build(fields_of(1), builder(b"other"))])
    restart()
    store.use(pack)
    store.use(other)
    store.use(other)
    assert store.get_or_build(fields_of(1), builder()).metadata == {"payload": "other"}
    assert store.get_or_build(fields_of(2), builder()).metadata == {"payload": "2"}
    store.use(pack)
    assert store.get_or_build(fields_of(1), builder()).metadata == {"payload": "1"}


def test_no_flipped_byte_and_no_cut_goes_unseen(pack):
    good = pack.read_bytes()
    whole = list(store.PackFile(pack).read_all())
    assert len(whole) == 3
    unseen = 0
    for position in range(0, len(good), 3):
        pack.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            found = list(store.PackFile(pack).read_all())
        except Corrupt:
            continue
        unseen += 1  # a bit that the compressed form does not use: what comes out is the same
        assert found == whole
    assert unseen < len(good) / 100
    for length in range(0, len(good), 7):
        pack.write_bytes(good[:length])
        with pytest.raises(Corrupt):
            store.PackFile(pack)
    pack.write_bytes(good + b"1")
    with pytest.raises(Corrupt, match="should have"):
        store.PackFile(pack)


def test_a_damaged_kernel_in_a_pack_counts_as_missing(pack, builder):
    damaged = store.PackFile(pack)
    offset, length = damaged._blobs[damaged.entries[0]["files"]["kernel.so"]["sha256"]]
    data = bytearray(pack.read_bytes())
    data[damaged._start + offset + length // 2] ^= 1
    pack.write_bytes(data)
    store.use(pack)
    origins = [store.get_or_build(fields_of(number), builder(str(number).encode())).origin for number in (1, 2, 3)]
    assert sorted(origins) == sorted(["built", str(pack), str(pack)])
    assert store.counters().corrupt == 1


def test_a_kernel_that_does_not_load_counts_as_missing(pack, builder):
    store.use(pack)
    store.get_or_build(fields_of(1), builder()).reject("wrong architecture")
    assert store.get_or_build(fields_of(1), builder()).origin == "built"
    assert store.get_or_build(fields_of(2), builder()).origin == str(pack)


def test_a_pack_that_others_can_write_is_refused(pack):
    pack.chmod(0o666)
    with pytest.raises(store.Refused, match=r"the pack .* can be written by others"):
        store.use(pack)
    settings.configure(trusted=(pack.parent,))
    store.use(pack)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")
def test_a_strangers_pack_is_refused(pack):
    os.chown(pack, 12345, 12345)
    with pytest.raises(store.Refused, match="belongs to user 12345"):
        store.use(pack)


def test_what_is_no_pack_is_said_so(tmp_path):
    (tmp_path / "a.loom").write_bytes(b"PK\3\4")
    with pytest.raises(Corrupt, match="is no pack"):
        store.use(tmp_path / "a.loom")
    with pytest.raises(FileNotFoundError):
        store.use(tmp_path / "b.loom")


def test_a_pack_replaced_while_in_use_stays_what_it_was(pack, builder):
    store.use(pack)
    good = pack.read_bytes()
    aside = pack.with_suffix(".new")
    aside.write_bytes(b"0" * len(good))
    os.replace(aside, pack)
    assert store.get_or_build(fields_of(1), builder()).metadata == {"payload": "1"}


def test_a_failed_write_leaves_the_old_pack(pack, entries, monkeypatch):
    good = pack.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    more = entries(7)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        store.write_pack(pack, more)
    assert pack.read_bytes() == good
    assert [path.name for path in pack.parent.iterdir() if "loom" in path.name] == [pack.name]


def test_a_hundred_kernels_are_read_in_time(entries, restart, tmp_path, builder):
    path = tmp_path / "hundred.loom"
    store.write_pack(path, entries(*range(100), size=60_000))
    settings.configure(cache_dir=tmp_path / "empty")
    restart()

    def read() -> float:
        restart()
        start = time.perf_counter()
        store.use(path)
        for number in range(100):
            store.get_or_build(fields_of(number), builder(), toolchain=no_compiler)
        return time.perf_counter() - start

    assert min(read() for _ in range(5)) < 1.0  # about 0.03 s on an idle machine
    assert store.counters().hits == 100


def test_a_key_listed_for_another_kernel_is_refused(entries, tmp_path):
    import dataclasses

    entry = dataclasses.replace(entries(1)[0], key=Key("0" * 64, "1" * 64))
    store.write_pack(tmp_path / "a.loom", [entry])
    with pytest.raises(Corrupt, match="another kernel's key"):
        list(store.PackFile(tmp_path / "a.loom").read_all())


def test_a_forked_child_uses_the_pack(pack, builder, fork, finish):
    store.use(pack)

    def work():
        assert store.get_or_build(fields_of(2), builder(), toolchain=no_compiler).metadata == {"payload": "2"}

    assert [finish(child) for child in [fork(work) for _ in range(4)]] == [0] * 4
    assert store_module._state.layers
