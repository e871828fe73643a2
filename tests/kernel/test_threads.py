"""Threads that use the first names, or compile the first kernels, of a process at the same time."""

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


NAMES = """
import os, random, sys, threading, torch
import flashloom as fl

def use(start, choose, failures):
    start.wait()
    try:
        for name in choose.sample(fl.__all__, 3):
            getattr(fl, name)
    except BaseException as error:
        failures.append(repr(error))

def child(seed):
    sys.setswitchinterval(1e-6)
    start, failures = threading.Barrier(4), []
    draws = [random.Random(10 * seed + i) for i in range(4)]
    threads = [threading.Thread(target=use, args=(start, draw, failures)) for draw in draws]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(failures, file=sys.stderr, flush=True)
    os._exit(bool(failures))

assert "flashloom.attention" not in sys.modules
children = [os.fork() or child(seed) for seed in range(20)]
print([os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children])
"""


def test_the_first_names_may_be_used_by_several_threads():
    done = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([0] * 20), done.stderr
