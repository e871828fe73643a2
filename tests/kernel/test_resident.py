"""Loaded modules: the least recently used go, those that are held stay."""

import gc

import pytest

from flashloom.kernel.resident import Resident


class Module:
    unloaded: list[int] = []  # noqa: RUF012 - shared by all on purpose

    def __init__(self, number):
        self.number = number

    def __del__(self):
        Module.unloaded.append(self.number)


@pytest.fixture
def resident():
    Module.unloaded.clear()
    return Resident(lambda: 3)


def test_the_least_recently_used_are_unloaded(resident):
    for number in (1, 2, 3, 1, 4, 5):
        resident.get(number, lambda number=number: Module(number))
    gc.collect()
    assert Module.unloaded == [2, 3]
    assert len(resident) == 3


def test_what_is_held_stays_loaded_and_is_found(resident):
    held = resident.get(1, lambda: Module(1))
    for number in range(2, 9):
        resident.get(number, lambda number=number: Module(number))
    gc.collect()
    assert 1 not in Module.unloaded
    assert resident.get(1, lambda: Module(-1)) is held
    del held
    for number in range(2, 9):
        resident.get(number, lambda number=number: Module(number))
    gc.collect()
    assert 1 in Module.unloaded


def test_a_value_that_cannot_be_made_leaves_nothing(resident):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        resident.get(1, fail)
    assert resident.get(1, lambda: Module(1)).number == 1
