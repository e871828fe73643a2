"""What the Gluon lowering finds in a logits hook, and the tanh that soft caps are computed with."""

import numpy as np
import pytest
import torch

import flashloom as fl
from flashloom.lower import gluon


class Shifted(fl.Variant):
    """A soft cap of something else than the bare logits."""

    def logits_transform(self, logits, at):
        return 30.0 * torch.tanh((logits + 1.0) / 30.0)


class PerKey(fl.Variant):
    """A bias by distance whose slope depends on the key."""

    slopes: fl.PerKeyToken

    def logits_transform(self, logits, at):
        return logits + self.slopes[at.kv_pos] * (at.kv_pos - at.q_pos)


ALIBI = fl.alibi(torch.ones(4))


@pytest.mark.parametrize(
    ("variant", "cap", "slope"),
    [
        (fl.softcap(30.0) & fl.causal, True, False),
        (ALIBI & fl.causal, False, True),
        (fl.softcap(30.0) & ALIBI, False, False),
        (Shifted(), False, False),
        (PerKey(slopes=torch.ones(9)), False, False),
        (fl.causal, False, False),
    ],
    ids=["cap", "ALiBi", "both", "shifted", "per key", "causal"],
)
def test_forms_of_logits(variant, cap, slope):
    program = variant.program.specialise(64, 64)
    functions = gluon.functions(program)
    assert (gluon.cap(program) is not None, gluon.slope(program) is not None) == (cap, slope)
    assert (functions.cap_factors is not None, functions.position_slope is not None) == (cap, slope)
    assert (functions.logits_transform is None) == (program.logits is None)


def test_text_is_not_that_of_triton():
    """Tile verdicts that read tensors make blocks with layouts; the two languages never share a stored kernel."""
    from flashloom.lower import triton

    program = (fl.causal & fl.document_mask(torch.zeros(9, dtype=torch.int32))).program.specialise(64, 64)
    ours, theirs = gluon.functions(program), triton.functions(program)
    assert "BlockedLayout" in ours.text
    assert "BlockedLayout" not in theirs.text
    assert ours.mask_bounds.identity != theirs.mask_bounds.identity


def test_tanh_of_a_cap():
    """The polynomial, in the float32 arithmetic of the GPU, up to where the exponentials take over."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from flashloom.attention.kernels.hopper import cap

    z = np.concatenate([np.linspace(1e-6, 2, 200001), 10.0 ** np.linspace(-18, 0, 2001)]).astype(np.float32)
    v = z * z
    y = np.full_like(z, cap.COEFFICIENTS[-1])
    for c in cap.COEFFICIENTS[-2::-1]:  # float64 products stand in for fused ones
        y = (y.astype(np.float64) * v + np.float64(np.float32(c))).astype(np.float32)
    want = np.tanh(z.astype(np.float64) * cap._LIMIT / 2)
    assert np.abs((y * z) / want - 1).max() < 7e-7
    assert cap._assembly(8).count("ex2.approx") == 8
