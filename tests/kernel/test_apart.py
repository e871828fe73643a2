"""One process that builds kernels for several GPU targets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = """
import sys
from pathlib import Path
import torch
import flashloom as fl
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.triton_executor import TritonExecutor
from flashloom.target import Target

program = fl.full.program.specialise(64, 64)
spec = AttentionSpec(fl.HeadShape(4, 2, 64), program, torch.float16, torch.float8_e5m2)
for name in sys.argv[2:]:
    kernels = TritonExecutor.kernels(spec, Target(name), 1, 1, 16)
    kernel = next(k for k in kernels if k.name == "attend")
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    assert kernel._build(folder)["name"] == "attend"
"""


def build(folder, *targets):
    folder.mkdir()
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *targets], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [(folder / name / "kernel.cubin").read_bytes() for name in targets]


def test_the_order_of_targets_changes_nothing(tmp_path):
    """Triton would give the second one the conversions of 8-bit floats of the first."""
    newer, older = build(tmp_path / "newer first", "sm90", "sm80")
    assert build(tmp_path / "older first", "sm80", "sm90") == [older, newer]


def test_what_a_child_cannot_compile_is_said():
    from flashloom.kernel import apart
    from flashloom.kernel.source import Source
    from flashloom.kernel.triton import TritonKernel
    from flashloom.target import Target

    nothing = Source("flashloom.attention.kernels.triton.attend", "nothing")
    kernel = TritonKernel(nothing, {}, {}, (), Target("sm80"), 4, 1)
    with pytest.raises(
        RuntimeError, match=r"compiling nothing for sm80 in a process of its own failed: AttributeError"
    ):
        apart.compiled(kernel)
