"""Many processes share one store: each kernel is built once, and nobody waits for the dead, the stopped or a lock
that lies.
"""

import errno
import fcntl
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from flashloom import settings, store
from flashloom.store import jobs, locks
from flashloom.store import store as store_module
from flashloom.store.entry import Key

FIELDS = {"kind": "test", "target": "x86"}
ENDLESS = 1000.0
"""Seconds that builders take whom nobody is to wait for."""
SOON = 100.0
"""Seconds that no wait of these tests comes near, also where other processes keep the machine from this one."""


def slow(builder, seconds):
    build = builder()

    def work(folder):
        time.sleep(seconds)
        return build(folder)

    return work


def await_holder(fields=FIELDS):
    """Wait until some child builds the kernel."""
    path = store_module._lock_path(Key.of(fields, {}))
    until = time.monotonic() + SOON
    while time.monotonic() < until:
        found = locks.take(path) if path.exists() else None
        if isinstance(found, locks.Busy) and found.holder.startswith("process "):
            return
        if isinstance(found, locks.Lock):  # before the child
            found.release()
        time.sleep(0.01)
    raise AssertionError("no child took the lock")


def test_processes_build_each_kernel_once(tmp_path, builder, fork, finish):
    def work():
        for number in range(8):
            store.get_or_build({"number": number}, slow(builder, 0.05), label=f"kernel {number}")
        counters = store.counters()
        assert counters.builds + counters.shared + counters.hits == 8
        (tmp_path / f"builds-{os.getpid()}").write_text(str(counters.builds))

    children = [fork(work) for _ in range(6)]
    assert [finish(child) for child in children] == [0] * 6
    assert sum(int(path.read_text()) for path in tmp_path.glob("builds-*")) == 8


def test_threads_build_each_kernel_once(builder):
    build = builder()
    threads = [threading.Thread(target=store.get_or_build, args=(FIELDS, build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1


def test_a_killed_builder_blocks_nobody(builder, fork, finish):
    child = fork(lambda: store.get_or_build(FIELDS, slow(builder, ENDLESS)))
    await_holder()
    os.kill(child, signal.SIGKILL)
    finish(child)
    store.get_or_build(FIELDS, builder())
    assert store.counters().waits == 0


def test_a_builder_killed_while_others_wait_blocks_nobody(builder, fork, finish):
    child = fork(lambda: store.get_or_build(FIELDS, slow(builder, ENDLESS)))
    await_holder()

    def kill():
        while not store.counters().waits:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    start = time.monotonic()
    store.get_or_build(FIELDS, builder())
    assert time.monotonic() - start < SOON
    assert store.counters().waits == 1


def test_a_stopped_builder_is_named_and_waited_for_within_bounds(builder, fork, caplog):
    settings.configure(wait=1.0)
    child = fork(lambda: store.get_or_build(FIELDS, slow(builder, ENDLESS)))
    await_holder()
    os.kill(child, signal.SIGSTOP)
    start = time.monotonic()
    with caplog.at_level("INFO", "flashloom"):
        store.get_or_build(FIELDS, builder())
    assert time.monotonic() - start < SOON
    assert f"process {child} on " in caplog.text
    assert store.counters().builds == 1
    start = time.monotonic()
    store.get_or_build({"kind": "another"}, builder())  # the stopped process also holds a place for a compiler
    assert time.monotonic() - start < SOON


def test_all_places_held_by_stopped_processes(builder, fork, monkeypatch):
    settings.configure(wait=2.0, jobs=1)
    child = fork(lambda: store.get_or_build(FIELDS, slow(builder, ENDLESS)))
    await_holder()
    os.kill(child, signal.SIGSTOP)
    start = time.monotonic()
    store.get_or_build({"number": 0}, builder())
    assert time.monotonic() - start < SOON

    def refuse(seconds):
        raise AssertionError("it is paid once, not for every kernel")

    monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=refuse))
    for number in range(1, 4):
        store.get_or_build({"number": number}, builder())


LIES = {
    "always busy": errno.EWOULDBLOCK,
    "no locks": errno.ENOLCK,
    "not supported": errno.EOPNOTSUPP,
    "always granted": None,
}


@pytest.mark.parametrize("lie", LIES)
def test_locks_that_lie_cost_no_correctness(lie, builder, monkeypatch):
    settings.configure(wait=1.0)

    def flock(descriptor, operation):
        if LIES[lie] is not None:
            raise OSError(LIES[lie], lie)

    monkeypatch.setattr(fcntl, "flock", flock)
    start = time.monotonic()
    for number in range(3):
        assert store.get_or_build({"number": number}, builder()).files
    assert time.monotonic() - start < SOON
    assert store.counters().builds == 3


def test_a_holder_may_sign_late(tmp_path, monkeypatch):
    """The machine stood still between its lock and its name."""
    path = tmp_path / "lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(path, (time.time() - 5.0,) * 2)
        assert locks.take(path) is locks.Taken.NOT_AVAILABLE
        sleep = lambda seconds: path.write_text("process 7")  # noqa: E731
        monkeypatch.setattr(locks, "time", SimpleNamespace(time=time.time, sleep=sleep))
        assert locks.take(path).holder == "process 7"


def test_a_forked_child_does_not_keep_its_parents_locks(tmp_path, fork):
    path = tmp_path / "lock"
    lock = locks.take(path)
    fork(lambda: time.sleep(30))
    lock.release()
    again = locks.take(path)
    assert isinstance(again, locks.Lock)
    again.release()


def test_a_child_forked_while_a_thread_builds_can_build(builder, fork, finish):
    build, forked = builder(), threading.Event()
    thread = threading.Thread(
        target=store.get_or_build, args=(FIELDS, lambda folder: forked.wait(SOON) and build(folder))
    )
    thread.start()
    await_holder()
    child = fork(lambda: store.get_or_build(FIELDS, builder()))
    forked.set()
    thread.join()
    assert finish(child) == 0


def test_containers_that_share_a_volume_and_nothing_else(tmp_path, builder, fork, finish, monkeypatch):
    """Their locks are not each other's: kernels may be built twice, never wrongly, and nobody waits."""
    import tempfile

    def work(container):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / container))
        for number in range(8):
            entry = store.get_or_build({"number": number}, builder(str(number).encode()))
            assert entry.files["kernel.cpp"] == str(number).encode()

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    start = time.monotonic()
    assert [finish(child) for child in [fork(lambda name=name: work(name)) for name in ("a", "b", "a", "b")]] == [0] * 4
    assert time.monotonic() - start < SOON
    assert len(list(store.default_folder().all_keys())) == 8


def test_who_cannot_publish_waits_for_nobody(root, builder, fork):
    root.write_text("no folder")
    child = fork(lambda: store.get_or_build(FIELDS, slow(builder, ENDLESS)))
    await_holder()
    with pytest.warns(RuntimeWarning, match="kept in memory"):
        store.get_or_build({"another": 1}, builder())
    start = time.monotonic()
    store.get_or_build(FIELDS, builder())
    assert time.monotonic() - start < SOON
    assert child


def test_without_a_folder_for_locks_all_goes_on(builder, monkeypatch, tmp_path):
    place = tmp_path / "tmp" / f"flashloom-{os.getuid()}"
    place.mkdir(mode=0o777)
    place.chmod(0o777)  # others could have made it
    assert locks.local_folder() is None
    assert store.get_or_build(FIELDS, builder()).files


def test_job_limit_respects_cgroups(tmp_path, monkeypatch):
    settings.configure(jobs=None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    files = {
        "proc/self/cgroup": "0::/pod/app",
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 32000000 kB",
        "sys/fs/cgroup/pod/app/cpu.max": "max 100000",
        "sys/fs/cgroup/pod/cpu.max": "450000 100000",
        "sys/fs/cgroup/pod/app/memory.max": "max",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert jobs.job_limit(tmp_path) == 4
    (tmp_path / "sys/fs/cgroup/pod/memory.max").write_text(str(3 * jobs.JOB_BYTES))
    (tmp_path / "sys/fs/cgroup/pod/memory.current").write_text(str(jobs.JOB_BYTES + 5))
    assert jobs.job_limit(tmp_path) == 1
    (tmp_path / "sys/fs/cgroup/pod/memory.stat").write_text("anon 1\ninactive_file 1000000")
    assert jobs.job_limit(tmp_path) == 2
    settings.configure(jobs=7)
    assert jobs.job_limit(tmp_path) == 7


def test_job_limit_respects_cgroups_of_version_1(tmp_path, monkeypatch):
    settings.configure(jobs=None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name, text in {
        "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "250000",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert jobs.job_limit(tmp_path) == 2
    for name, value in (("memory.limit_in_bytes", 2 * jobs.JOB_BYTES), ("memory.usage_in_bytes", jobs.JOB_BYTES)):
        path = tmp_path / "sys/fs/cgroup/memory/box" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(value))
    assert jobs.job_limit(tmp_path) == 1
