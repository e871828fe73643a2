"""A sample of the random cases of `crossing.py` in Triton's interpreter, every address checked."""

import pytest
from tests.triton.bounds import checked
from tests.triton.crossing import failures

from flashloom import dispatch


@pytest.mark.parametrize("number", range(46))
def test_a_random_case(number, monkeypatch):
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    with checked() as counts:
        runs, wrong = failures(0, [number], "cpu", small=True)
    assert not wrong, wrong[0]
    assert runs == 1
    assert counts[0] >= 4, "the planner and the kernel, twice each"
