"""Nothing is loaded that a stranger could have written, unless the operator vouches for the place."""

import os
import subprocess
from pathlib import Path

import pytest

import flashloom
from flashloom import settings, store
from flashloom.store.entry import Corrupt, Key
from flashloom.store.folder import Folder, Refused

FIELDS = {"kind": "test", "target": "x86"}
KEY = Key.of(FIELDS, {})
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user needs root")
PLACES = {
    "root": lambda folder: folder.root,
    "format": lambda folder: folder.entries,
    "request": lambda folder: folder.path(KEY).parent,
    "entry": lambda folder: folder.path(KEY),
    "manifest": lambda folder: folder.path(KEY) / "entry.json",
    "file": lambda folder: folder.path(KEY) / "kernel.so",
}


def assert_not_used(builder, restart):
    restart()
    build = builder(b"mine")
    entry = store.get_or_build(FIELDS, build)
    assert build.calls == 1
    assert entry.metadata == {"payload": "mine"}


@pytest.mark.filterwarnings("ignore:the kernel store is not used")
@pytest.mark.parametrize("mode", [0o777, 0o775])
@pytest.mark.parametrize("place", PLACES)
def test_what_others_can_write_is_refused(place, mode, folder, builder, restart):
    store.get_or_build(FIELDS, builder(b"theirs"))
    PLACES[place](folder).chmod(mode)
    with pytest.raises((Refused, Corrupt), match="can be written by others"):
        folder.read(KEY)
    assert_not_used(builder, restart)


@NEEDS_ROOT
@pytest.mark.filterwarnings("ignore:the kernel store is not used")
@pytest.mark.parametrize("place", PLACES)
def test_what_a_stranger_owns_is_refused(place, folder, builder, restart):
    store.get_or_build(FIELDS, builder(b"theirs"))
    os.chown(PLACES[place](folder), 12345, 12345)
    with pytest.raises((Refused, Corrupt), match="belongs to user 12345"):
        folder.read(KEY)
    assert_not_used(builder, restart)


@NEEDS_ROOT
def test_what_root_owns_is_used_by_others(folder, builder, fork, finish, restart, for_all_users):
    store.get_or_build(FIELDS, builder())

    def work():
        os.setuid(65534)
        restart()
        build = builder()
        store.get_or_build(FIELDS, build)
        assert build.calls == 0

    assert finish(fork(work)) == 0


@pytest.mark.parametrize("place", ["request", "entry", "manifest", "file"])
def test_a_swapped_link_is_not_followed(place, folder, builder, restart, tmp_path):
    store.get_or_build(FIELDS, builder(b"theirs"))
    path = PLACES[place](folder)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt):
        folder.read(KEY)
    assert_not_used(builder, restart)
    restart()
    assert store.get_or_build(FIELDS, builder()).metadata == {"payload": "mine"}  # and the store has healed
    assert store.counters().hits == 1


def test_the_refusal_is_one_warning_that_says_what_to_do(root, builder):
    root.mkdir()
    root.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=r"can be written by others \(mode 777\).*FLASHLOOM_TRUSTED") as caught:
        _ = [store.get_or_build({"number": number}, builder()) for number in range(3)]
    assert len(caught) == 1
    assert list(root.iterdir()) == []


def test_the_operator_can_vouch_for_a_folder(root, builder, restart):
    root.mkdir()
    root.chmod(0o777)
    settings.configure(trusted=(root.parent,))
    store.get_or_build(FIELDS, builder())
    restart()
    store.get_or_build(FIELDS, builder())
    assert store.counters().hits == 1


@NEEDS_ROOT
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o000])
def test_users_with_any_umask_share_a_trusted_store(umask, root, builder, fork, finish, restart, for_all_users):
    root.mkdir()
    root.chmod(0o777)
    settings.configure(trusted=(root,))

    def use(user, fields, calls):
        os.umask(umask)
        os.setuid(user)
        restart()
        build = builder()
        entry = store.get_or_build(fields, build)
        assert build.calls == calls
        assert store.counters().unpublished == 0
        return entry

    assert finish(fork(lambda: use(12345, FIELDS, 1))) == 0
    assert finish(fork(lambda: use(12346, FIELDS, 0))) == 0
    assert finish(fork(lambda: use(12346, {"another": 1}, 1))) == 0
    assert finish(fork(lambda: use(12346, FIELDS, 0).reject("test"))) == 0  # another user's entry can be set aside
    assert finish(fork(lambda: use(12345, FIELDS, 1))) == 0
    assert len(list(Folder(root, trusted=True).all_keys())) == 2


def test_a_private_folder_stays_private(root, builder):
    root.mkdir(mode=0o700)
    store.get_or_build(FIELDS, builder())
    for path in root.rglob("*"):
        assert not path.stat().st_mode & 0o077, path


def test_nothing_that_was_stored_is_unpickled():
    source = Path(flashloom.__file__).parent
    found = subprocess.run(
        ["grep", "-rlE", r"import (pickle|marshal|shelve)|torch\.load", source], capture_output=True, text=True
    )
    names = {str(Path(line).relative_to(source)) for line in found.stdout.splitlines() if line.endswith(".py")}
    # what goes to a child of this process, through its stdin, as multiprocessing does
    assert names == {"kernel/apart.py", "tune/child.py", "tune/trial.py"}
