"""The generated sources, kept as files: a change of them is seen in review. `python -m tests.lower.test_golden` writes
them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flashloom.variant as v

GOLDEN = Path(__file__).parent / "golden"


class Everything(v.Variant):
    """Every hook and kind of field once."""

    slopes: v.PerHead
    gain: v.PerKVHead
    shift: v.PerRequest
    query_ids: v.PerQueryToken
    key_ids: v.PerKeyToken
    table: torch.Tensor
    bits: v.Bits
    scale: float

    def query_transform(self, q, at):
        return q * self.gain[at.kv_head] + q[at.dim ^ 1]

    def key_transform(self, k, at):
        return torch.where(at.dim < at.head_dim // 2, k[0], k) * self.scale

    def logits_transform(self, logits, at):
        return torch.tanh(logits) + self.table[at.q_head, at.kv_pos % 3] * self.slopes[at.q_head]

    def logits_mask(self, at):
        return (self.query_ids[at.q_pos] == self.key_ids[at.kv_pos]) | self.bits[at.kv_pos + self.shift[at.batch]]

    def output_transform(self, out, lse, at):
        return out * torch.sigmoid(lse)


VARIANTS = {
    "full": v.full,
    "gemma2": v.causal & v.sliding_window(4095) & v.softcap(50.0),
    "alibi": v.causal & v.alibi(8),
    "gpt_oss": v.causal & v.sliding_window(127) & v.sink(torch.zeros(8)),
    "document": v.causal & v.document_mask(torch.zeros(4, dtype=torch.int32)),
    "sigmoid": v.causal & v.sigmoid(-1.0),
    "rope": v.rope(64),
    "everything": Everything(
        slopes=torch.ones(4), gain=torch.ones(2, dtype=torch.bfloat16), shift=torch.zeros(1, dtype=torch.int32),
        query_ids=torch.zeros(2, dtype=torch.int64), key_ids=torch.zeros(3, dtype=torch.int64), table=torch.ones(4, 3),
        bits=torch.zeros(2, dtype=torch.uint8), scale=2.0,
    ),
}  # fmt: skip
SUFFIX = {"torch": "txt", "cpp": "h", "triton": "py.txt"}


def generated(name: str, language: str) -> str:
    return VARIANTS[name].explain(language, dim=64)


@pytest.mark.parametrize("language", SUFFIX)
@pytest.mark.parametrize("name", VARIANTS)
def test_generated_source_is_as_kept(name: str, language: str) -> None:
    path = GOLDEN / f"{name}.{SUFFIX[language]}"
    assert generated(name, language) == path.read_text(), (
        f"{path.name} differs; if the change is meant, write the files anew"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_gluon_kernels_call_the_triton_functions(name: str) -> None:
    assert generated(name, "gluon") == generated(name, "triton")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in VARIANTS:
        for language, suffix in SUFFIX.items():
            (GOLDEN / f"{name}.{suffix}").write_text(generated(name, language))
