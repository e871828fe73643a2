"""Contexts of records: each owns what it adds, and leaves what is around it as it was."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.tune.conftest import make_record

from flashloom import records
from flashloom.records import Folder, Scope, entered

ONE = (1, 1)


@pytest.fixture
def a(tmp_path):
    return Folder.at(tmp_path / "a")


@pytest.fixture
def b(tmp_path):
    return Folder.at(tmp_path / "b")


def inside(*own, writable=None):
    return entered(Scope(own, writable, records.scope._current.get()))


def tiles(folder, question):
    return sorted(record.config["tile"] for record in Folder(folder.root).records())


def test_an_inner_context_reads_the_outer_and_writes_its_own(a, b, question):
    a.publish(make_record(question, ONE, tile=1))
    with inside(a, writable=a) as outer:
        with inside(b, writable=b) as inner:
            assert records.find(question, ONE) == 1
            inner.publish(make_record(question, (2, 2), tile=2))
            inner.publish(make_record(question, ONE, tile=3))
            assert records.find(question, ONE) == 3, "the inner one comes first"
            assert records.find(question, (2, 2)) == 2
        assert records.find(question, ONE) == 1, "the outer one is whole"
        assert records.find(question, (2, 2)) is None
        outer.publish(make_record(question, (4, 4), tile=4))
    assert records.find(question, ONE) is None
    assert tiles(a, question) == [1, 4]
    assert tiles(b, question) == [2, 3]


def test_an_inner_context_without_a_cache_writes_to_the_outer(a, question):
    with inside(a, writable=a), inside() as inner:
        inner.publish(make_record(question))
    assert tiles(a, question) == [7]


def test_the_same_folder_twice(a, question):
    with inside(a, writable=a), inside(Folder.at(a.root), writable=Folder.at(a.root)) as inner:
        inner.publish(make_record(question))
        assert records.find(question, ONE) == 7
    with inside(a, writable=a):
        assert records.find(question, ONE) == 7


def test_deep_nesting_a_b_a(a, b, question):
    a.publish(make_record(question, ONE, tile=1))
    b.publish(make_record(question, ONE, tile=2))
    seen = []
    with inside(a, writable=a):
        seen.append(records.find(question, ONE))
        with inside(b, writable=b):
            seen.append(records.find(question, ONE))
            with inside(a, writable=a):
                seen.append(records.find(question, ONE))
            seen.append(records.find(question, ONE))
        seen.append(records.find(question, ONE))
    assert seen == [1, 2, 1, 2, 1]


def test_an_exception_restores_the_outer(a, b, question):
    a.publish(make_record(question))
    with inside(a, writable=a):
        with pytest.raises(RuntimeError), inside(b, writable=b):
            raise RuntimeError
        assert records.find(question, ONE) == 7
        assert records.current().writable is a


def test_a_read_only_layer_lies_under_the_writable_one(a, b, question):
    a.publish(make_record(question, ONE, tile=1))
    before = [(path, path.read_bytes()) for path in a.files()]
    with inside(b, a, writable=b) as scope:
        assert records.find(question, ONE) == 1
        scope.publish(make_record(question, ONE, tile=2))
        assert records.find(question, ONE) == 2
    assert [(path, path.read_bytes()) for path in a.files()] == before


def test_threads_do_not_see_each_others(a, b, question):
    a.publish(make_record(question, ONE, tile=1))
    b.publish(make_record(question, ONE, tile=2))
    meet = threading.Barrier(3)

    def work(folder):
        with inside(*([folder] if folder else [])):
            meet.wait(120)
            found = {records.find(question, ONE) for _ in range(200)}
            meet.wait(120)
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, [a, b, None])) == [{1}, {2}, {None}]
    with inside(a), ThreadPoolExecutor(1) as pool:
        assert pool.submit(records.find, question, ONE).result() is None
        assert pool.submit(contextvars.copy_context().run, records.find, question, ONE).result() == 1


def test_tasks_do_not_see_each_others(a, b, question):
    a.publish(make_record(question, ONE, tile=1))
    b.publish(make_record(question, ONE, tile=2))

    async def work(folder):
        with inside(folder):
            await asyncio.sleep(0.01)
            return records.find(question, ONE)

    async def both():
        return await asyncio.gather(work(a), work(b))

    assert asyncio.run(both()) == [1, 2]


def test_threads_publish_at_once(a, question):
    with inside(a, writable=a) as scope, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: scope.publish(make_record(question, (i, 1), tile=i)), range(64)))
        assert [records.find(question, (i, 1)) for i in range(64)] == list(range(64))
    assert tiles(a, question) == list(range(64))


def test_outside_of_every_context_the_users_folder_serves(tmp_path, question):
    assert records.find(question, ONE) is None
    records.current().publish(make_record(question))
    assert records.find(question, ONE) == 7
    assert (tmp_path / "default" / "v1" / "op").is_dir()
    with inside():
        assert records.find(question, ONE) == 7


def test_a_layer_added_later_is_seen_by_contexts_and_threads(a, b, question):
    a.publish(make_record(question))
    with inside(b, writable=b):
        assert records.find(question, ONE) is None
        records.add_layer(a)
        assert records.find(question, ONE) == 7
        assert records.current().writable is b
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(records.find, question, ONE).result() == 7


def test_what_is_never_answered_is_listed(a, question):
    with inside(a) as scope:
        records.find(question, (8, 1))
        records.find(question, (8, 1))
    assert list(scope.missed) == [("op a label", (("rows", 8), ("keys", 1)))]


def test_a_layer_that_fails_is_a_miss(a, question):
    class Broken:
        name = "broken"

        def find(self, question, bucket):
            raise OSError("gone")

        def has(self, operator):
            raise OSError("gone")

        def refresh(self):
            pass

    a.publish(make_record(question))
    with inside(Broken(), a) as scope:
        assert records.find(question, ONE) == 7
        assert scope.counters.corrupt == 1
