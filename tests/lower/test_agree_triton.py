"""The generated Triton functions mean the same as torch, under Triton's interpreter.

The interpreter is chosen when functions are decorated, so the comparison runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_variants_agree_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "tests.lower.triton_probe"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "variants agree" in done.stdout
