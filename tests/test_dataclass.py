"""flashloom's dataclasses are the standard library's in all that is used of them."""

import copy
import dataclasses
import inspect
import pickle
from functools import cached_property

import pytest

from flashloom.dataclass import dataclass


def both(**options):
    """The same class by the standard decorator and by ours."""

    def define(decorate):
        class Point:
            """A point."""

            x: int
            y: float = 1.5
            tags: list = dataclasses.field(default_factory=list, compare=False, repr=False)

            def __post_init__(self):
                if self.x < 0:
                    raise ValueError("negative")

            @cached_property
            def double(self):
                return 2 * self.x

        return decorate(**options)(Point)

    return define(dataclasses.dataclass), define(dataclass)


@pytest.mark.parametrize("frozen", [True, False])
def test_they_behave_as_the_standard_ones(frozen):
    answers = []
    for cls in both(frozen=frozen):
        a, b = cls(1), cls(x=1, y=1.5, tags=[3])
        text = repr(b).rpartition(".")[2]
        hashes = hash(a) == hash(b) if frozen else cls.__hash__ is None
        other = dataclasses.replace(b, y=2.0)
        answers.append(
            (a == b, a != other, text, hashes, a.double, dataclasses.asdict(other), a.tags == [], a.tags is cls(1).tags,
             copy.deepcopy(b) == b, str(inspect.signature(cls)).partition(" ->")[0], dataclasses.is_dataclass(cls),
             [f.name for f in dataclasses.fields(cls)], cls.__match_args__, a.__eq__(3))
        )  # fmt: skip
    assert answers[0] == answers[1]


@pytest.mark.parametrize("arguments", [((), {}), ((1, 2, 3, 4), {}), ((1,), {"x": 2}), ((1,), {"z": 2})])
def test_wrong_arguments_are_type_errors(arguments):
    for cls in both(frozen=True):
        with pytest.raises(TypeError):
            cls(*arguments[0], **arguments[1])


def test_what_was_made_is_checked_and_stays():
    for cls in both(frozen=True):
        with pytest.raises(ValueError, match="negative"):
            cls(-1)
        point = cls(1)
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'x'"):
            point.x = 2
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'x'"):
            del point.x
    mutable = both()[1](1)
    mutable.x = 5
    assert mutable.x == 5


def test_inherited_fields_and_own_methods():
    @dataclass(frozen=True)
    class Base:
        a: int

        def __eq__(self, other):
            return self.a % 2 == other.a % 2

        def __hash__(self):
            return self.a % 2

    @dataclass(frozen=True, eq=False)
    class Derived(Base):
        b: int = 2

    assert Derived(1).b == 2
    assert Derived(1) == Derived(3, 7)
    assert hash(Derived(1)) == hash(Derived(3))


def test_they_are_pickled():
    from flashloom import HeadShape

    shape = HeadShape(4, 2, 64)
    assert pickle.loads(pickle.dumps(shape)) == shape


def test_what_is_not_supported_is_refused():
    with pytest.raises(TypeError, match="init=False are not supported"):

        @dataclass(frozen=True)
        class Odd:
            x: int = dataclasses.field(default=1, init=False)
