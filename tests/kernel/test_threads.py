"""Threads that compile the first kernels of a process at the same time."""

import subprocess
import sys

import pytest

CODE = """
from concurrent.futures import ThreadPoolExecutor
import sys, threading, torch
import flashloom as fl
from flashloom import dispatch
from flashloom.attention.executor import AttentionSpec
from flashloom.target import Target

spec = AttentionSpec(fl.HeadShape(4, 1, 64), fl.full.program, torch.bfloat16, torch.bfloat16)
planner = dispatch.kernels(spec, Target("sm90"), 1, 1, 16)[0]
assert "triton" not in sys.modules
barrier = threading.Barrier(8)

def compile(i):
    barrier.wait()
    return planner.compile()[0]["cubin"]

with ThreadPoolExecutor(8) as pool:
    print(len(set(pool.map(compile, range(8)))))
"""


def test_the_first_compiles_of_a_process_may_be_in_several_threads():
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
