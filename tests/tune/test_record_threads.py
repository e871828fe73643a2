"""What other threads do between two steps of a look-up. The other thread's work is done from within the step, so each
test meets its moment every time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.tune.conftest import make_record

from flashloom import records
from flashloom.records import Folder, Memory, Scope, add_layer, base
from flashloom.records import folder as folder_module

ONE, TWO = (1, 1), (2, 2)


@pytest.fixture
def folder(tmp_path, question):
    Folder(tmp_path).publish(make_record(question, (9, 9)))
    return Folder(tmp_path)


def during(monkeypatch, owner, name, act):
    """Let `act` happen once, after `owner.name` has its answer and before the caller has it."""
    real, left = getattr(owner, name), [act]

    def slow(*args, **kwargs):
        answer = real(*args, **kwargs)
        if left:
            left.pop()()
        return answer

    monkeypatch.setattr(owner, name, slow)
    return left


def tile(folder, question, bucket):
    found = folder.find(question, bucket)
    return found and found.config["tile"]


def test_published_while_another_lists(folder, question, monkeypatch):
    left = during(monkeypatch, folder_module.os, "listdir", lambda: folder.publish(make_record(question, ONE, tile=3)))
    assert tile(folder, question, TWO) is None
    assert tile(folder, question, ONE) == 3
    assert not left


def test_refreshed_while_another_lists(folder, question, monkeypatch):
    def act():
        folder.refresh()
        Folder(folder.root).publish(make_record(question, ONE, tile=3))

    left = during(monkeypatch, folder_module.os, "listdir", act)
    folder.find(question, TWO)
    assert tile(folder, question, ONE) == 3
    assert not left


def test_published_while_another_reads(folder, question, monkeypatch):
    folder.publish(make_record(question, ONE, tile=3))
    left = during(monkeypatch, folder_module, "_read_file", lambda: folder.publish(make_record(question, ONE, tile=4)))
    assert tile(folder, question, ONE) == 3
    assert tile(folder, question, ONE) == 4
    assert not left


def test_a_path_has_one_folder(tmp_path, monkeypatch):
    meet = threading.Barrier(4, timeout=60)

    def work(_):
        meet.wait()
        return Folder.at(tmp_path / "new")

    during(monkeypatch, folder_module, "Path", lambda: threading.Event().wait(0.05))
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1


def test_published_while_a_scope_looks(question, monkeypatch):
    layer = Memory()
    scope = Scope((layer,), layer, is_base=True)
    left = during(monkeypatch, layer, "find", lambda: scope.publish(make_record(question, ONE, tile=3)))
    assert scope.find(question, ONE) is None
    assert scope.find(question, ONE) == 3
    assert not left


def test_published_and_asked_while_a_scope_looks(question, monkeypatch):
    layer = Memory()
    scope = Scope((layer,), layer, is_base=True)

    def act():
        scope.publish(make_record(question, ONE, tile=3))
        assert scope.find(question, TWO) is None  # the scope has begun a new memo

    left = during(monkeypatch, layer, "find", act)
    assert scope.find(question, ONE) is None
    assert scope.find(question, ONE) == 3
    assert not left


def test_asked_for_an_operator_while_it_gets_its_first_record(question, monkeypatch):
    layer = Memory()
    scope = Scope((layer,), layer, is_base=True)

    def act():
        scope.publish(make_record(question, ONE, tile=3))
        assert scope.has(question.operator)

    left = during(monkeypatch, layer, "has", act)
    scope.has(question.operator)
    assert scope.has(question.operator)
    assert not left


def test_a_layer_is_added_while_the_base_is_made(question, monkeypatch):
    layer = Memory("added")
    layer.publish(make_record(question, ONE, tile=3))
    records.forget()
    started = threading.Event()

    def add():
        started.set()
        add_layer(layer)

    other = threading.Thread(target=add)

    def act():
        other.start()
        started.wait(60)
        other.join(0.05)  # it either waits for the base, or has added by now

    left = during(monkeypatch, records.scope, "Scope", act)
    base()
    other.join(60)
    assert layer in base().layers
    assert not left
