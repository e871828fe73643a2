"""`import flashinfer` served by flashloom: in processes of their own, since an installed finder stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashloom
from flashloom.compat.flashinfer import _later

SRC = Path(flashloom.__file__).parents[1]


def run(*arguments, cwd=None, **environment):
    env = {**os.environ, "PYTHONPATH": str(SRC), **environment}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=cwd, timeout=900)
    return done.returncode, done.stdout, done.stderr


def test_install_serves_modules_version_and_spec():
    code = """
import importlib.metadata, importlib.util, sys
import flashloom.compat
flashloom.compat.install(); flashloom.compat.install()
assert sum(type(f).__name__ == "_Finder" for f in sys.meta_path) == 1
assert "torch" not in sys.modules                      # nothing is imported yet
assert importlib.util.find_spec("flashinfer") and importlib.util.find_spec("flashinfer.prefill")
assert importlib.util.find_spec("flashinfer.nosuch") is None
version = importlib.metadata.version
assert version("flashinfer-python") == version("flashinfer_python") == "0.7.2.post1"
import flashinfer, flashinfer.comm.mnnvl
from flashinfer.decode import fast_decode_plan
from flashinfer.jit.attention.variants import attention_sink_decl
from flashinfer.quantization import packbits
import flashloom.compat.flashinfer as ours
assert flashinfer is ours and flashinfer.decode is sys.modules["flashloom.compat.flashinfer.decode"]
assert ours.__spec__.name == "flashloom.compat.flashinfer" and flashinfer.fast_decode_plan is fast_decode_plan
assert importlib.util.find_spec("flashinfer") is not None
try:
    import flashinfer.nosuch
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run("-c", code) == (0, "flashinfer.nosuch\n", "")


def test_install_refuses_beside_the_real_one(tmp_path):
    (tmp_path / "flashinfer.py").write_text("")
    code = "import flashinfer, flashloom.compat; flashloom.compat.install()"
    status, _, error = run("-c", code, PYTHONPATH=f"{SRC}{os.pathsep}{tmp_path}")
    assert status == 1
    assert "imported already" in error
    assert str(tmp_path) in error


def test_programs(tmp_path):
    (tmp_path / "beside.py").write_text("x = 5")
    (tmp_path / "program.py").write_text(
        "import sys, flashinfer, beside\nprint(__name__, sys.argv[1:], flashinfer.__version__, beside.x)"
    )
    want = (0, "__main__ ['-v', 'a'] 0.7.2.post1 5\n", "")
    assert run("-m", "flashloom.compat", str(tmp_path / "program.py"), "-v", "a") == want
    assert run("-m", "flashloom.compat", "-m", "program", "-v", "a", cwd=tmp_path) == want
    status, out, _ = run("-m", "flashloom.compat")
    assert status == 2
    assert out.startswith("usage: python -m flashloom.compat script.py")


def test_plugin(tmp_path):
    (tmp_path / "conftest.py").write_text("import flashinfer")
    (tmp_path / "test_it.py").write_text(
        "import flashinfer\ndef test(): assert flashinfer.packbits.__module__.startswith('flashloom')"
    )
    status, out, _ = run(
        "-m", "pytest", "-q", "-p", "flashloom.compat.pytest_plugin", "-p", "no:cacheprovider", cwd=tmp_path
    )
    assert (status, "1 passed" in out) == (0, True), out


@pytest.mark.parametrize("module", sorted(_later.TABLE))
def test_names_that_come_later_say_so(module):
    import importlib

    from flashloom.compat import flashinfer

    found = importlib.import_module(f"{_later.PACKAGE}.{module}")
    for name in _later.TABLE[module].split():
        value = getattr(found, name)
        with pytest.raises(NotImplementedError, match=name):
            value(1, x=2)
        assert isinstance(value, type) == name[0].isupper()
        if module not in _later._BELOW:
            assert callable(getattr(flashinfer, name))
    with pytest.raises(AttributeError, match="nosuch"):
        _ = found.nosuch


def test_a_class_that_comes_later_can_be_looked_into():
    from flashloom.compat import flashinfer

    assert not isinstance(3, flashinfer.BatchMLAPagedAttentionWrapper)
    with pytest.raises(NotImplementedError, match=r"flashinfer\.gemm\.SegmentGEMMWrapper\.run"):
        flashinfer.gemm.SegmentGEMMWrapper.run(1)


def test_names_that_engines_must_not_find():
    """Their presence is a promise: of a fused operator, of an autotuner, of a table of compiled group sizes."""
    from flashloom.compat import flashinfer

    for place, name in ((flashinfer, "gdn_fused_decode_step"), (flashinfer, "autotune_v2")):
        assert not hasattr(place, name)
    assert not hasattr(flashinfer.decode, "_grouped_size_compiled_for_decode_kernels")


def test_memory_pool_size_is_a_setting():
    from flashloom import settings
    from flashloom.compat import flashinfer

    before = settings.get().memory_pool_size
    try:
        flashinfer.set_memory_pool_size(1 << 30)
        assert settings.get().memory_pool_size == 1 << 30
    finally:
        settings.configure(memory_pool_size=before)
