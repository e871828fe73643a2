"""Runs the `emulated*.py` beside it in a process of its own: that replaces what the kernels import, and Triton decides
at its first import whether it interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

FILES = ("emulated", "emulated_hidden")


def test_kernels_on_the_emulated_machine():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, *(str(root / f"tests/hopper/{name}.py") for name in FILES)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=2400, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
