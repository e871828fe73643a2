"""Dataclasses that cost little to define: `from flashloom.dataclass import dataclass`.

The standard decorator writes the text of six methods for each class and compiles it, about a millisecond each time a
process starts, and a first call meets thirty such classes. Here the methods are ordinary functions over the names of
the fields. Everything else is the standard library's: `field`, `fields`, `replace`, `asdict`, `__post_init__`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool = False, eq: bool = True) -> Callable[[type], type]:
        """As `dataclasses.dataclass`, for classes without slots, keyword-only fields or InitVar."""

        def define(cls: type) -> type:
            own = dict(cls.__dict__)
            dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
            fields = dataclasses.fields(cls)
            if any(f.kw_only or not f.init for f in fields):
                raise TypeError(f"{cls.__name__}: keyword-only fields and init=False are not supported here")
            compared = _values(tuple(f.name for f in fields if f.compare))
            methods = {"__init__": _init(cls, fields), "__repr__": _repr(tuple(f.name for f in fields if f.repr))}
            if eq:
                methods["__eq__"] = _eq(compared)
                methods["__hash__"] = (lambda self: hash(compared(self))) if frozen else None
            for name, method in methods.items():
                if own.get(name) is None:  # a class with an __eq__ of its own has a __hash__ of None
                    setattr(cls, name, method)
            if frozen:
                cls.__setattr__, cls.__delattr__ = _refuse_set, _refuse_delete
            cls.__signature__ = _Signature()
            return cls

        return define


def _values(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """The values of these fields of an object."""
    if len(names) < 2:  # attrgetter answers a bare value for one name
        return lambda self: tuple(getattr(self, name) for name in names)
    return attrgetter(*names)


def _init(cls: type, fields: tuple[dataclasses.Field[Any], ...]) -> Callable[..., None]:
    names, title = tuple(f.name for f in fields), cls.__qualname__
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    factories = {f.name: f.default_factory for f in fields if f.default_factory is not dataclasses.MISSING}
    known, count, finish = frozenset(names), len(names), hasattr(cls, "__post_init__")

    def __init__(self: Any, /, *values: Any, **named: Any) -> None:
        values_of = self.__dict__
        given = len(values)
        values_of.update(zip(names, values))
        if given != count or named:
            if given > count:
                raise TypeError(f"{title}() takes {count} arguments and got {given}")
            for name in named:
                if name not in known:
                    raise TypeError(f"{title}() got an unexpected argument {name!r}; its fields are {', '.join(names)}")
                if name in values_of:
                    raise TypeError(f"{title}() got two values of {name!r}")
            for name in names[given:]:
                if name in named:
                    values_of[name] = named[name]
                elif name in defaults:
                    values_of[name] = defaults[name]
                elif name in factories:
                    values_of[name] = factories[name]()
                else:
                    raise TypeError(f"{title}() needs a value of {name!r}")
        if finish:
            self.__post_init__()

    return __init__


def _repr(names: tuple[str, ...]) -> Callable[[Any], str]:
    def __repr__(self: Any) -> str:
        inner = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__qualname__}({inner})"

    return __repr__


def _eq(values: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any, object], Any]:
    def __eq__(self: Any, other: object) -> Any:
        if type(other) is not type(self):
            return NotImplemented
        return values(self) == values(other)

    return __eq__


def _refuse_set(self: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


class _Signature:
    """What help() and inspect.signature() show of a class; made when they ask."""

    def __get__(self, instance: object, owner: type) -> Any:
        import copy
        import inspect

        fields = [(f.name, f.type, copy.copy(f)) for f in dataclasses.fields(owner)]
        return inspect.signature(dataclasses.make_dataclass(owner.__name__, fields))
