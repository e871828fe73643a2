"""A bounded run of the random cases; `python -m flashloom.testing fuzz` runs more."""

from __future__ import annotations

import math

import pytest
import torch

from flashloom import dispatch, testing
from flashloom.attention.reference import ReferenceExecutor


def test_the_reference_executor_on_many_kernels(capsys):
    assert testing.fuzz(60, seed=1, kernels=60, executor="reference", keep_going=True) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_the_chosen_executor_on_a_few_kernels(capsys):
    assert testing.fuzz(120, seed=2, kernels=6, keep_going=True) == 0, capsys.readouterr().out


def test_kernels_are_of_every_width():
    drawn = [testing.draw_kernel(seed) for seed in range(1500)]
    assert set(range(8, 257, 8)) <= {kernel.heads.dim for kernel in drawn}
    assert sum(kernel.heads.dim % 2 for kernel in drawn) > 100
    eight = {k.heads.dim for k in drawn if k.kv_dtype.itemsize == 1}
    assert {80, 96, 160} <= eight


def test_several_processes_share_the_kernels(capsys):
    asked = ["fuzz", "--cases", "9", "--kernels", "3", "--jobs", "2"]
    assert testing.main([*asked, "--executor", "reference"]) == 0
    assert "9 cases passed (9 by reference), 0 failed" in capsys.readouterr().out
    assert testing.main([*asked, "--executor", "nothing"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED python -m flashloom.testing case ") == 2, "each stops at its first"
    assert "0 cases passed (), 2 failed" in printed


def test_a_run_ends_in_time(capsys):
    assert testing.main(["fuzz", "--cases", "1000000", "--executor", "reference", "--seconds", "0.5"]) == 0
    assert 0 < int(capsys.readouterr().out.split(" cases passed")[0]) < 1000


def test_a_case_is_its_two_numbers():
    a, b = testing.draw_case(5, 9), testing.draw_case(5, 9)
    assert str(a) == str(b)
    assert torch.equal(a.q.nan_to_num(), b.q.nan_to_num())
    assert testing.main(["case", "5", "9", "--executor", "reference"]) == 0


def test_a_failure_prints_the_command_that_repeats_it(monkeypatch, capsys):
    class Wrong(ReferenceExecutor):
        name = "wrong"

        def run(self, q, kv, out, lse, **options):
            super().run(q, kv, out, lse, **options)
            out.mul_(1.5)

    found = dispatch._find
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["test:Wrong"])
    monkeypatch.setattr(dispatch, "_find", lambda name: Wrong if name == "test:Wrong" else found(name))
    assert testing.main(["fuzz", "--cases", "20", "--kernels", "5", "--executor", "wrong"]) == 1
    printed = capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("FAILED"))
    assert command.startswith("FAILED python -m flashloom.testing case ")
    assert command.endswith(" --executor wrong")
    with pytest.raises(AssertionError):
        testing.main(command.split("flashloom.testing ")[1].split())


@pytest.mark.parametrize(
    ("got", "want", "same"),
    [
        ([1.0, math.nan, -math.inf], [1.0, math.nan, -math.inf], True),
        ([0.0], [math.nan], False),
        ([math.nan], [0.0], False),
        ([0.0], [-math.inf], False),
        ([1.001], [1.0], False),
        ([1000.05], [1000.0], True),
    ],
)
def test_assert_close(got, want, same):
    if same:
        testing.assert_close(torch.tensor(got), torch.tensor(want), 1e-4)
    else:
        with pytest.raises(AssertionError, match="should be"):
            testing.assert_close(torch.tensor(got), torch.tensor(want), 1e-4)


def test_results_that_are_all_small_have_to_be_right():
    want = torch.full((3, 4), 1e-3)
    testing.assert_close(want * 1.5, want, 4e-3)
    with pytest.raises(AssertionError, match="of its size away"):
        testing.assert_near(want * 1.5, want, 4e-3)
    testing.assert_near(want * 1.003, want, 4e-3)
    testing.assert_near(want * 1.5, want, 4e-3, want * 0.5)
    with pytest.raises(AssertionError):
        testing.assert_near(want * math.nan, want, 4e-3)


def test_what_float32_does_to_angles_is_no_error(monkeypatch):
    """Rotations by positions of 2,000: results are as near as float32 lets them be, and no further."""
    case = testing.draw_case(11001700000, 13)
    testing.check_case(case, "reference")
    real = ReferenceExecutor.run

    def off(self, q, kv, out, lse, **more):
        real(self, q, kv, out, lse, **more)
        out += 5e-4

    monkeypatch.setattr(ReferenceExecutor, "run", off)
    with pytest.raises(AssertionError, match="should be"):
        testing.check_case(case, "reference")


@pytest.mark.parametrize("more", [["--cases", "0"], ["--cases", "-3"], ["--kernels", "0"]])
def test_no_cases_are_no_success(more, capsys):
    with pytest.raises(SystemExit) as ended:
        testing.main(["fuzz", *more])
    assert ended.value.code == 2
    assert "give 1 or more" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["fuzz", "--cases", "1"], ["case", "0", "0"]])
def test_a_gpu_that_is_not_there_is_said(command, capsys):
    with pytest.raises(SystemExit) as ended:
        testing.main([*command, "--device", "cuda"])
    assert ended.value.code == 2
    assert "torch finds no GPU" in capsys.readouterr().err
