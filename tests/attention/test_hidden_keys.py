"""What a mask hides does not matter: NaN and infinities in keys and values reach the rows that see them, and no
others. On the CPU's kernels, each target's, and in the definition; the GPU's kernels have theirs beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.attention.hidden import BF16, E4M3, E5M2, F16, F32, Hidden

from flashloom.target import CPU_TARGETS, Target

TYPES = [(F32, F32), (BF16, BF16), (BF16, BF16), (F16, F16), (BF16, E4M3), (BF16, E5M2)]
HERE = bool(os.environ.get("FLASHLOOM_TARGET"))


@pytest.mark.parametrize("seed", range(48))
def test_definition(seed: int) -> None:
    Hidden(seed, TYPES).check("reference")


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("seed", range(12 if HERE else 36))
def test_kernels(seed: int) -> None:
    Hidden(seed + 1000, TYPES).check("cpu")


@pytest.mark.skipif(HERE, reason="this is the process of one target")
@pytest.mark.parametrize("target", CPU_TARGETS)
def test_kernels_of_targets(target: str) -> None:
    if not Target(target).supported or Target(target) == Target.here():
        pytest.skip(f"{target} is not another target that this machine runs")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "FLASHLOOM_TARGET": target,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "test_kernels["]
    done = subprocess.run([*command, __file__], env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
