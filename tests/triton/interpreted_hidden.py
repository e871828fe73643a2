"""What a mask hides does not matter to the Triton kernels, in the interpreter; `test_interpreted.py` runs this file
with TRITON_INTERPRET=1."""

import pytest
from tests.attention.hidden import BF16, F16, F32, Hidden
from tests.triton.bounds import checked

from flashloom import dispatch

TYPES = [(F32, F32), (F16, F16), (BF16, BF16)]  # its float8 knows no NaN


@pytest.mark.parametrize("seed", range(24))
def test_hidden_keys(seed, monkeypatch):
    monkeypatch.setitem(dispatch.ATTENTION, "cpu", ["flashloom.attention.triton_executor:TritonExecutor"])
    with checked():
        Hidden(seed + 3000, TYPES, longest=300, rows=20).check("triton")
