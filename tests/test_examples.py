"""Every example runs, says what it found, and stays short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashloom

ROOT = Path(flashloom.__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert [path.name[:2] for path in EXAMPLES] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path):
    assert len(path.read_text().splitlines()) < 60
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
