"""The script that repeats FlashInfer's tests, on a small checkout made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashloom
from flashloom.compat.conformance.__main__ import copy_tests
from flashloom.compat.conformance.cases import EACH, group, left_out, place, sample

TESTS = {
    "attention/test_mine.py": """
import pytest, torch, flashinfer
from flashinfer.utils import get_compute_capability
from tests.test_helpers.helper import SIZE

@pytest.mark.parametrize("kv_len", [3, 5])
@pytest.mark.parametrize("num_qo_heads", [2, 4])
def test_decode(kv_len, num_qo_heads):
    x = torch.ones(SIZE, device="cuda:0").bool().to(0)
    assert flashinfer.packbits(x).shape == (SIZE // 8,)
    assert get_compute_capability(torch.device("cuda:0")) == (9, 0)
    torch.cuda.synchronize()

def test_wrong():
    assert flashinfer.__version__ == "0"

def test_some_nvfp4_cache():
    raise AssertionError("left out")
""",
    "test_helpers/__init__.py": "",
    "test_helpers/helper.py": "SIZE = 64",
    "utils_fp8.py": "",
}


def run(checkout, *arguments):
    source = str(Path(flashloom.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-m", "flashloom.compat.conformance", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)


def test_a_run_counts_and_names_everything(tmp_path):
    for name, text in TESTS.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    report = tmp_path / "report.json"
    done = run(tmp_path, "--files", "attention/test_mine", "--jobs", "2", "--report", str(report))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "80.00 % of 5 cases pass; 0 not reached" in done.stdout
    assert "1  NVFP4 KV caches are not served yet" in done.stdout
    assert "failed: attention/test_mine.py::test_wrong" in done.stdout
    outcomes = json.loads(report.read_text())["outcomes"]
    assert sorted(outcomes.values()) == ["failed", *["passed"] * 4]
    with pytest.raises(SystemExit, match="no checkout of FlashInfer"):
        copy_tests(tmp_path / "tests", [], "cpu", tmp_path)


def test_what_is_left_out_and_sampled():
    small = {"batch_size": 12, "kv_len": 54, "qo_len": 37, "num_kv_heads": 4, "num_qo_heads": 4, "head_dim": 64}
    assert left_out("test_batch_prefill", small, "cpu") is None
    assert "NVFP4" in left_out("test_nvfp4_x", small, "cuda")
    assert "more queries than keys" in left_out("test_x", {**small, "qo_len": 55, "causal": True}, "cuda")
    assert "products" in left_out("test_x", {**small, "batch_size": 128, "kv_len": 2048, "qo_len": 577}, "cpu")
    assert "expected to fail" in left_out("test_batch_prefill_x", {**small, "use_cuda_graph": True}, "cuda")
    assert left_out("test_cuda_graph_decode", small, "cuda") is None
    assert left_out("test_cuda_graph_decode", small, "cpu")
    assert group("a::t", small) == group("a::t", {**small, "kv_len": 97, "batch_size": 128})
    assert group("a::t", small) != group("a::t", {**small, "qo_len": 17})
    assert 0 <= place("x") < 1
    assert place("x") == place("x") != place("y")


def test_a_sample_leaves_no_file_out():
    groups = {f"large{i}": ("large.py", 50) for i in range(200)} | {f"small{i}": ("small.py", 1) for i in range(4)}
    groups |= {f"middle{i}": ("middle.py", 5) for i in range(40)}
    names = sample(groups, 1000)
    of_file = {file: sum(groups[n][1] for n in names if groups[n][0] == file) for file in ("large.py", "middle.py")}
    assert sum(name.startswith("small") for name in names) == 4
    assert all(count >= EACH for count in of_file.values())
    assert 1000 <= sum(groups[name][1] for name in names) < 1050
    assert len(set(names)) == len(names)
    assert names == sample(dict(reversed(groups.items())), 1000)
    assert set(sample(groups, 10**9)) == set(groups)
