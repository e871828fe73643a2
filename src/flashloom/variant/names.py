"""The names in a variant's class are held against the hooks and fields, so that a slip of the pen is an error and not
plain attention."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

#: What each hook is given after self.
HOOK_ARGUMENTS = {
    "query_transform": ("q", "at"), "key_transform": ("k", "at"), "logits_transform": ("logits", "at"),
    "logits_mask": ("at",), "output_transform": ("out", "lse", "at"),
}  # fmt: skip
#: What `at` has.
AT = {"batch", "q_head", "kv_head", "q_pos", "kv_pos", "q_len", "kv_len", "dim", "head_dim"}
_FLEX = {"score_mod": "logits_transform", "mask_mod": "logits_mask", "mask": "logits_mask", "bias": "logits_transform"}
_NEAR = 0.75
_OTHERS = {"torch", "numpy", *sys.stdlib_module_names} - {"__main__"}  # their functions read nothing of a variant
_MOST = 500  # functions whose code is read
_PLAIN_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_LOOKS_UP = {"getattr", "vars", "__dict__", "__getattribute__", "attrgetter", "eval", "exec"}  # names made at run time


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "did you mean ...?", or nothing."""
    import difflib

    lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), lower, 1, cutoff)
    return f"did you mean {lower[found[0]]!r}?" if found else ""


def check_class(cls: type, base: type, new: Iterable[str]) -> None:
    """At the definition of a class with `new` fields: hooks take what hooks are given, and no name is a hook's but for
    its spelling."""
    title, own, fields = cls.__name__, vars(cls), cls._kinds  # type: ignore[attr-defined]
    taken = {n for n in vars(base) if not n.startswith("_")} - {*HOOK_ARGUMENTS, "softmax"}
    for name in sorted({*own, *new}):
        if isinstance(own.get(name), type) and hasattr(own[name], "_kind"):
            raise TypeError(f"{title}.{name} is given a kind of field as its value: write {name}: {own[name].__name__}")
        if name in taken:
            raise TypeError(f"{title}.{name} hides what every variant has under that name: choose another one")
        if name in HOOK_ARGUMENTS:
            if name in new:
                raise TypeError(f"{title}.{name} is annotated as a field, but is a hook: {signature(name)}")
            _check_hook(title, name, own[name])
    for owner in _classes(cls, base):
        for name in HOOK_ARGUMENTS.keys() & vars(owner).keys():
            if getattr(cls, name) is getattr(base, name):
                raise TypeError(
                    f"{owner.__name__}.{name} is hidden by {base.__name__}, which comes before it: write "
                    f"class {title}({owner.__name__}, {base.__name__})"
                )
    if not isinstance(own.get("softmax", True), bool):
        raise TypeError(f"{title}.softmax is {own['softmax']!r}: True or False")
    mixins = [k for k in _classes(cls, base) if k is not cls and not issubclass(k, base)]
    unknown = [(k, n) for k in (cls, *mixins) for n in _attributes(k) if n not in fields]
    unknown += [(cls, n) for n in new if isinstance(own.get(n), bool)]
    if unknown:
        read = _names_read(cls, base)
        if read is None:
            return
        for owner, name in unknown:
            value = vars(owner)[name]
            known = ("softmax",) if isinstance(value, bool) else HOOK_ARGUMENTS if _is_method(value) else ()
            meant = near(name, known, _NEAR) if name not in read else ""
            if meant:
                what = "hook" if _is_method(value) else "setting of a variant"
                raise TypeError(f"{owner.__name__}.{name} is no {what}: {meant}")


def check_read(cls: type, base: type, used: Iterable[str]) -> None:
    """At the first trace of a class: it has a hook, and the hooks read all it has. `used` are fields known as read."""
    title = cls.__name__
    has_hook = any(getattr(cls, hook) is not getattr(base, hook) for hook in HOOK_ARGUMENTS)
    hooks = [getattr(cls, hook) for hook in HOOK_ARGUMENTS]
    lost = [(k, n) for k in _classes(cls, base) if issubclass(k, base) for n in _attributes(k)]
    lost = [(k, n) for k, n in lost if not any(vars(k)[n] is hook for hook in hooks)]  # a hook's other name
    if has_hook or not cls.softmax:  # type: ignore[attr-defined]
        read = _names_read(cls, base)
        if read is None:
            return
        read = (read - AT) | set(used)
        for name in cls._kinds:  # type: ignore[attr-defined]
            if name not in read:
                raise TypeError(
                    f"{title}.{name} is a field that no hook reads, so its value changes nothing: read self.{name} in "
                    f"a hook ({', '.join(HOOK_ARGUMENTS)}), or leave the field out"
                )
        read |= _names_elsewhere(cls, base)
        lost = [(k, n) for k, n in lost if n not in read and n not in cls._kinds]  # type: ignore[attr-defined]
        lost = [(k, n) for k, n in lost if not _is_helper(cls, k, n)]
    for owner, name in lost:
        meant = _FLEX.get(name)
        if _is_method(vars(owner)[name]):
            advice = signature(meant) if meant else near(name, HOOK_ARGUMENTS)
            advice = advice or f"hooks are {', '.join(HOOK_ARGUMENTS)}"
            raise TypeError(
                f"{owner.__name__}.{name} is no hook, and no hook calls it: {advice} (a method of another use begins "
                "with an underscore, or is a classmethod or property)"
            )
        if has_hook:
            meant = near(name, (*cls._kinds, "softmax"))  # type: ignore[attr-defined]
            raise TypeError(
                f"{owner.__name__}.{name} is read by no hook, so it changes nothing: {meant + ' or ' if meant else ''}"
                "leave it out, or let its name begin with an underscore"
            )
    if not has_hook and cls.softmax:  # type: ignore[attr-defined]
        raise TypeError(
            f"{title} has no hook and would be plain attention (fl.full): define one of {', '.join(HOOK_ARGUMENTS)}"
        )


def signature(hook: str) -> str:
    return f"write def {hook}({', '.join(('self', *HOOK_ARGUMENTS[hook]))})"


def _check_hook(title: str, name: str, value: Any) -> None:
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(function, functools.partialmethod):
        return
    if not callable(function):
        raise TypeError(f"{title}.{name} is {type(value).__name__}, but is a hook: {signature(name)}")
    if not isinstance(function, types.FunctionType):
        return
    given = len(HOOK_ARGUMENTS[name]) + (not isinstance(value, staticmethod))
    try:
        inspect.signature(function).bind(*range(given))
    except TypeError:
        listed = ", ".join(function.__code__.co_varnames[: function.__code__.co_argcount])
        raise TypeError(f"{title}.{name} takes ({listed}): {signature(name)}") from None


def _attributes(cls: type) -> Iterator[str]:
    """Public names that a class gives values to, but for hooks and what is plainly of another use."""
    for name, value in vars(cls).items():
        if name.startswith("_") or name in HOOK_ARGUMENTS or name == "softmax":
            continue
        if isinstance(value, staticmethod):  # one that makes a variant is of another use
            if "at" in inspect.signature(value.__func__).parameters:
                yield name
        elif not isinstance(value, (type, property, classmethod, functools.cached_property, str, types.NoneType)):
            yield name


def _is_method(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, staticmethod, functools.partialmethod)) or callable(value)


def _is_helper(cls: type, owner: type, name: str) -> bool:
    """Whether a name is one of those that a base without a hook holds ready for its subclasses, of which each need not
    use all."""
    if owner is cls or HOOK_ARGUMENTS.keys() & vars(owner).keys():
        return False
    return name not in _FLEX and not near(name, (*HOOK_ARGUMENTS, "softmax"))


def _names_elsewhere(cls: type, base: type) -> set[str]:
    """Every attribute that members of another use than hooks read: constructors, properties, special methods."""
    names: set[str] = set()
    for owner in _classes(cls, base):
        for name, value in vars(owner).items():
            if name.startswith("_") or not (isinstance(value, types.FunctionType) or name in HOOK_ARGUMENTS):
                for function in _functions(value):
                    names |= set(_attributes_of(function.__code__))
    return names


def _classes(cls: type, base: type) -> list[type]:
    return [k for k in cls.__mro__ if k is not base and k is not object]


def _names_read(cls: type, base: type) -> set[str] | None:
    """Every attribute that the code reads which the hooks of a class and of its bases reach; None where code looks
    names up."""
    members: dict[str, list[Any]] = {}
    for owner in _classes(cls, base):
        for name, value in vars(owner).items():
            members.setdefault(name, []).append(value)
    pending = [v for hook in HOOK_ARGUMENTS for v in members.get(hook, ())]
    names: set[str] = set()
    seen: set[int] = set()
    while pending:
        for function in _functions(pending.pop()):
            if id(function) in seen:
                continue
            seen.add(id(function))
            found, attributes = set(_names_of(function.__code__)), set(_attributes_of(function.__code__))
            if found & _LOOKS_UP or len(seen) > _MOST:
                return None
            pending += [v for name in attributes - names for v in members.get(name, ())]
            pending += [function.__globals__[n] for n in found if n in function.__globals__]
            pending += _cells(function)
            names |= attributes
    return names


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The user's Python functions behind an attribute or a name."""
    if isinstance(value, types.FunctionType):
        yield from _functions(getattr(value, "__wrapped__", None))
        if (value.__module__ or "").split(".")[0] not in _OTHERS:
            yield value
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        yield from _functions(value.__func__)
    elif isinstance(value, (functools.partial, functools.partialmethod, functools.cached_property)):
        yield from _functions(value.func)
    elif isinstance(value, property):
        yield from _functions(value.fget)


def _cells(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a name that is not bound yet
            continue
    return found


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)


def _attributes_of(code: types.CodeType) -> Iterator[str]:
    """Names that follow a dot. Those of `at` and of fields are told apart by what the program reads."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _attributes_of(constant)


def name_of(value: object, *functions: Any, holder: object = None) -> str | None:
    """What a function calls an object that it reaches by a closure, a global, a default, or an attribute of one of
    these or of self."""
    for function in functions:
        called = function if isinstance(function, _PLAIN_FUNCTIONS) else vars(type(function)).get("__call__")
        owner = getattr(function, "__self__", None if called is function else function)
        for f in _functions(called):
            names = set(_names_of(f.__code__))
            arguments = reversed(f.__code__.co_varnames[: f.__code__.co_argcount])
            scope = dict(zip(arguments, reversed(f.__defaults__ or ())))
            scope |= {n: f.__globals__[n] for n in names if n in f.__globals__}
            scope |= dict(zip(f.__code__.co_freevars, _cells(f)))
            scope |= {"self": owner} if owner is not None else {}
            for name, found in scope.items():
                if found is value:
                    return name
            for name, found in scope.items():
                members = getattr(found, "__dict__", {})
                for attribute in names:
                    if attribute in members and members[attribute] is value:
                        return f"{name}.{attribute}"
    for name in dir(type(holder)) if holder is not None else ():
        if not name.startswith("__") and inspect.getattr_static(holder, name, None) is value:
            return name
    return None


def call_of(function: Callable) -> str:
    """`name(parameters)` of a function, for messages."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        return f"{name}{inspect.signature(function)}"
    except (TypeError, ValueError):
        return f"{name}(...)"
