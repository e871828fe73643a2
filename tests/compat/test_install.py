"""`import flashinfer` served by flashloom: in processes of their own, since an installed finder stays."""

import functools
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from enum import EnumMeta
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


def test_programs_that_are_not_there_are_one_sentence(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "broken.py").write_text("import nosuchmodule")
    for arguments, said in (
        (["nofile.py"], "nofile.py cannot be read (No such file or directory): give the path"),
        (["package"], "package/__main__.py cannot be read"),
        (["-m", "nomodule"], "no module 'nomodule' on the path"),
        (["-m", "nomodule.inner"], "no module 'nomodule.inner' on the path"),
        (["-m", "package.inner"], "no module 'package.inner' on the path"),
        (["-m", ".inner"], "no module '.inner'"),
    ):
        status, out, error = run("-m", "flashloom.compat", *arguments, cwd=tmp_path)
        assert (status, out, len(error.splitlines())) == (1, "", 1), error
        assert error.startswith(said)
    status, _, error = run("-m", "flashloom.compat", "broken.py", cwd=tmp_path)  # a program's own error stays whole
    assert status == 1
    assert "Traceback" in error
    assert "nosuchmodule" in error


def test_the_documentation_shows_what_a_name_says():
    text = (SRC.parent / "docs" / "compat.md").read_text()
    with pytest.raises(NotImplementedError) as refused:
        importlib.import_module(f"{_later.PACKAGE}.mla").BatchMLAPagedAttentionWrapper()
    assert f"```\n{refused.value}\n```" in text


# --- names that are not served ---


def every_name():
    for module in ["", *_later.modules()]:
        for name in _later.names_of(module):
            yield module, name


def test_every_name_of_the_table_is_there_and_refuses_with_advice():
    """As an attribute, by import, and where FlashInfer defines it: a constant, an enumeration, an exception, something
    that is served, or what says what to use."""
    kinds = Counter()
    for module, name in every_name():
        found = importlib.import_module(f"{_later.PACKAGE}.{module}".rstrip("."))
        value = getattr(found, name)
        assert getattr(found, name) is value
        if isinstance(value, EnumMeta):
            kinds["enum"] += 1
            assert len(value) > 1
        elif isinstance(value, (int, float)):
            kinds["constant"] += 1
        elif isinstance(value, type) and issubclass(value, Exception):
            kinds["exception"] += 1
        elif (value.__doc__ or "").startswith("Not served: "):
            kinds["refused"] += 1
            with pytest.raises(NotImplementedError) as refused:
                value(1, x=2)
            where, _, advice = str(refused.value).partition(" is not served by flashloom: ")
            assert where == ".".join(filter(None, ("flashinfer", module, name)))
            assert advice == _later.advice(module, name)
            assert len(advice) > 20
        else:
            kinds["served"] += 1
            assert value.__module__.startswith("flashloom") or isinstance(value, functools.partial)
    assert kinds["refused"] > 1500
    assert kinds["served"] > 50
    assert kinds["enum"] > 20


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("mla.BatchMLAPagedAttentionWrapper", "flashloom.HeadShape.mla"),
        ("decode.trtllm_batch_decode_with_kv_cache_mla", "flashloom.HeadShape.mla"),
        ("page.append_paged_mla_kv_cache", "flashloom.append"),
        ("page.nvfp4_quantize_append_paged_kv_cache", "float8_e4m3fn"),
        ("sparse.BlockSparseAttentionWrapper", "flashloom.BlockSparseKV"),
        ("prefill.trtllm_batch_context_with_kv_cache", "BatchPrefillWithPagedKVCacheWrapper"),
        ("cudnn.decode.cudnn_batch_decode_with_kv_cache", "BatchDecodeWithPagedKVCacheWrapper"),
        ("prefill.trtllm_ragged_attention_deepseek", "BatchPrefillWithRaggedKVCacheWrapper"),
        ("sampling.top_p_sampling_from_probs", "torch.multinomial"),
        ("norm.rmsnorm", "torch.nn.functional.rms_norm"),
        ("activation.silu_and_mul", "torch.nn.functional.silu"),
        ("rope.apply_rope_pos_ids", "flashloom.rope"),
        ("gemm.gemm_base.bmm_fp8", "torch.matmul"),
        ("fused_moe.core.cutlass_fused_moe", "torch.topk"),
        ("comm.allreduce.allreduce_fusion", "torch.distributed"),
        ("gdn_prefill.chunk_gated_delta_rule", "recurrent"),
        ("testing.bench_gpu_time", "flashloom bench"),
        ("jit.attention.gen_customize_batch_prefill_module", "flashloom.Variant"),
        ("attention.BatchDecodeWithAttentionSinkWrapper", "sinks="),
        ("gdn_kernels.experimental.gdn_fused_decode.gdn_fused_decode_step", "recurrent"),
    ],
)
def test_what_to_use_instead(name, use):
    module, _, last = name.rpartition(".")
    with pytest.raises(NotImplementedError, match=re.escape(use)):
        getattr(importlib.import_module(f"{_later.PACKAGE}.{module}"), last)()


def test_advice_names_what_flashloom_and_torch_have():
    import torch

    import flashloom as fl

    said = " ".join([*(sentence for _, sentence in _later.ADVICE), _later.ELSE])
    for path in re.findall(r"\b(?:torch|flashloom)(?:\.\w+)+", said):
        found = fl if path.startswith("flashloom") else torch
        for part in path.split(".")[1:]:
            found = importlib.import_module("torch.utils.benchmark") if part == "benchmark" else getattr(found, part)


def test_names_as_programs_write_them():
    """Attributes through modules, imports of modules three deep, and a function named as its module, under both names
    of the package."""
    code = """
import flashloom.compat
flashloom.compat.install()
import flashinfer
import flashinfer.fi_trace, flashinfer.xqa, flashinfer.cute_dsl.attention.wrappers.batch_decode as deep
import flashloom.compat.flashinfer.moe_ep.layer
from flashinfer.gemm.gemm_base import bmm_fp8
from flashinfer.comm.trtllm_ar import AllReduceFusionPattern
from flashinfer.fused_moe import ActivationType
from flashinfer.tllm_enums import ActivationType as same
assert flashinfer.gemm.gemm_base.bmm_fp8 is bmm_fp8
assert flashinfer.cute_dsl.attention.wrappers.batch_decode is deep
assert flashinfer.xqa.__module__.endswith("xqa") and callable(flashinfer.xqa) and callable(flashinfer.fi_trace)
import importlib
assert importlib.import_module("flashinfer.fi_trace").fi_trace is not None
assert AllReduceFusionPattern.kARResidualRMSNorm == 1 and ActivationType.Swiglu == 3 and ActivationType is same
assert importlib.util.find_spec("flashinfer.moe_ep.layer") and "bmm_fp8" in dir(flashinfer.gemm.gemm_base)
assert flashinfer.autotuner.autotuner.autotune is flashinfer.autotune
for name in ("flashinfer.gemm.nosuch", "flashinfer.nosuch.deeper"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert run("-c", code) == (0, "flashinfer.gemm.nosuch\nflashinfer.nosuch\n", "")


def test_a_class_that_is_not_served_can_be_looked_into():
    from flashloom.compat import flashinfer

    assert not isinstance(3, flashinfer.BatchMLAPagedAttentionWrapper)
    with pytest.raises(
        NotImplementedError, match=r"flashinfer\.gemm\.gemm_base\.SegmentGEMMWrapper\.run is not served"
    ):
        flashinfer.gemm.gemm_base.SegmentGEMMWrapper.run(1)
    assert issubclass(flashinfer.moe_ep.MoEEpConfigError, Exception)
    with pytest.raises(AttributeError, match="nosuch"):
        _ = flashinfer.gemm.nosuch


def test_names_that_engines_must_not_find():
    """Their presence is a promise: of a fused operator, of a table of compiled group sizes."""
    from flashloom.compat import flashinfer

    assert not hasattr(flashinfer, "gdn_fused_decode_step")
    assert not hasattr(flashinfer.decode, "_grouped_size_compiled_for_decode_kernels")


def test_contexts_and_decorators_without_effect():
    from flashloom.compat import flashinfer

    with flashinfer.autotune(True), flashinfer.autotune_v2(mode="tune", persistent_cache=False):
        flashinfer.autotune_v2_reload()
    assert flashinfer.MeasurementPolicy(cold_l2=True).execution_mode == "auto"
    with pytest.raises(ValueError, match="replay"), flashinfer.autotune_v2("replays"):
        pass
    plain = lambda: 3  # noqa: E731
    assert flashinfer.api_logging.flashinfer_api(plain) is plain
    assert flashinfer.api_logging.flashinfer_api(trace=None)(plain) is plain


def test_the_table_is_what_its_generator_writes(tmp_path):
    """A small package in FlashInfer's manner, read without being imported."""
    package = tmp_path / "flashinfer"
    (package / "ops" / "inner").mkdir(parents=True)
    (package / "one_backend").mkdir()
    (package / "__init__.py").write_text(
        "from .ops import run as run, Kind as Kind\nfrom .plain import helper as assist\nfrom . import ops\n"
        "_X_LAZY_EXPORTS = frozenset({'late'})\nraise SystemExit('this must not run')\n"
    )
    (package / "ops" / "__init__.py").write_text(
        "from .inner.core import run, Kind, Fault\n__all__ = ['run', 'Kind', 'Fault']"
    )
    (package / "ops" / "inner" / "core.py").write_text(
        "from enum import IntEnum\nclass Kind(IntEnum):\n    A = 0\n    B = (2,)\nclass Fault(ValueError): pass\n"
        "@flashinfer_api(trace=None)\ndef run(): pass\nclass Plan:\n    @flashinfer_api\n    def run(self): pass\n"
        "def private_helper(): pass\n"
    )
    (package / "plain.py").write_text("def helper(): pass\ndef other(): pass\n")
    (package / "one_backend" / "__init__.py").write_text("def hidden(): pass\n")
    status, out, error = run("-m", "flashloom.compat.conformance.names", str(package))
    assert (status, error) == (0, "")
    assert out.splitlines() == [
        ".: Kind{A=0,B=2} assist late run",
        "ops: Fault! Kind{A=0,B=2} run",
        "ops.inner.core: Fault! Kind{A=0,B=2} Plan run",
        "plain: helper",
    ]
    status, _, error = run("-m", "flashloom.compat.conformance.names", str(tmp_path))
    assert status == 1
    assert "is no package" in error


def test_memory_pool_size_is_a_setting():
    from flashloom import settings
    from flashloom.compat import flashinfer

    before = settings.get().memory_pool_size
    try:
        flashinfer.set_memory_pool_size(1 << 30)
        assert settings.get().memory_pool_size == 1 << 30
    finally:
        settings.configure(memory_pool_size=before)
