"""The package's public names: lazy, complete, and not hidden by subpackages of the same name."""

import os
import subprocess
import sys
import types

import pytest

import flashloom as fl


def test_all_names_exist_and_are_listed_once():
    import flashloom

    assert sorted(fl.__all__) == sorted(flashloom._HOME)
    for name in fl.__all__:
        assert not isinstance(getattr(fl, name), types.ModuleType), name
    assert set(fl.__all__) <= set(dir(fl))


def test_functions_are_not_hidden_by_subpackages():
    import flashloom.attention.batch
    import flashloom.bench.timing  # noqa: F401

    assert callable(fl.attention)
    assert callable(fl.bench)


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(fl, "nosuch")


def test_importing_flashloom_alone_imports_no_torch():
    code = "import sys, flashloom; print('torch' in sys.modules, 'numpy' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_the_version_is_there_without_importing_torch():
    code = "import sys, flashloom; print(flashloom.__version__, 'torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    version, torch_is_there = done.stdout.split()
    assert version[0].isdigit()
    assert torch_is_there == "False"


def test_listing_shows_public_names_alone():
    code = "import flashloom as fl; fl.attention, fl.Plan; print(*(n for n in dir(fl) if not n.startswith('__')))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == sorted(fl.__all__), done.stderr


def test_a_misspelled_name_is_answered_with_the_near_one():
    with pytest.raises(AttributeError, match=r"no attribute 'atention'; did you mean 'attention'\?"):
        fl.atention  # noqa: B018


def subclasses(cls):
    return {cls, *(deeper for one in cls.__subclasses__() for deeper in subclasses(one))}


def test_own_exceptions_share_a_base_and_keep_their_kind():
    import importlib
    import pkgutil

    for module in pkgutil.walk_packages(fl.__path__, "flashloom."):
        if module.name.split(".")[1] not in ("compat", "integrations", "__main__", "hopper"):
            try:
                importlib.import_module(module.name)
            except ImportError:  # of a package that is not installed here
                continue
    own = {c for c in subclasses(Exception) if c.__module__.startswith("flashloom.")}
    own = {c for c in own if not (c.__module__.startswith("flashloom.compat") or c.__name__.startswith("_"))}
    assert {c.__name__ for c in own} >= {"SealedError", "Corrupt", "TraceError", "NoCompiler", "CannotBuild"}
    assert not [c for c in own if not issubclass(c, fl.FlashloomError)]
    assert issubclass(fl.SealedError, RuntimeError)
    assert issubclass(fl.TraceError, TypeError)


def test_a_warning_points_at_the_line_outside_of_the_package():
    from flashloom.errors import warn

    scope = {"__name__": "inner", "warn": warn}
    inner = compile("def deep(n):\n    return deep(n - 1) if n else warn('so')\n", f"{fl.__path__[0]}/x.py", "exec")
    exec(inner, scope)
    with pytest.warns(RuntimeWarning, match="so") as caught:
        scope["deep"](4)
    assert caught[0].filename == __file__
