"""The package's public names: lazy, complete, and not hidden by subpackages of the same name."""

import os
import subprocess
import sys
import types

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
