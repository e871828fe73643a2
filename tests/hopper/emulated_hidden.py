"""What a mask hides does not matter to the Hopper kernel, on an emulated GPU; `test_emulated.py` runs this file with
TRITON_INTERPRET=1."""

import pytest
from tests.attention.hidden import BF16, F16, Hidden
from tests.hopper.emulator.launch import install

HOOKS = ("", "", "softcap", "alibi", "bias", "output")
MASKS = ("causal", "window", "band", "heads", "every", "documents", "custom")


@pytest.mark.parametrize("seed", range(16))
def test_hidden_keys(seed, monkeypatch):
    install(monkeypatch)
    types = [(F16, F16), (BF16, BF16)]  # the float8 of Triton's interpreter, which runs `mend`, knows no NaN
    Hidden(
        seed + 4000, types, masks=MASKS, hooks=HOOKS, phases=("append", "prefill"), widths=(64, 80, 128), rows=100,
        longest=400,
    ).check("hopper")  # fmt: skip
