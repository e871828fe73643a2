"""No variant reads outside of its tensors: every kind of field, every index, in C++. Triton and Gluon, where every
address is checked: `tests/triton/interpreted_edges.py` and `tests/hopper/emulated.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.lower.reaching import KINDS


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_no_index_reaches_outside_of_a_field(kind: str) -> None:
    """The kernels run in another process: a read outside of the tensor is its end."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    command = [sys.executable, "-m", "tests.lower.guarded", kind]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
