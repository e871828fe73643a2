"""The built-in variants against their formulas, written out in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashloom.variant as v
from flashloom.lower.torch import evaluate

Q_LEN, KV_LEN, HEADS, DIM = 4, 7, 4, 16
POS = torch.arange(Q_LEN).view(1, -1, 1) + KV_LEN - Q_LEN
KEY = torch.arange(KV_LEN).view(1, 1, -1)
HEAD = torch.arange(HEADS).view(-1, 1, 1)
LOGITS = torch.randn(HEADS, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(0))


def at(**more: Any) -> dict[str, torch.Tensor]:
    fixed = {"batch": 0, "kv_head": 0, "q_len": Q_LEN, "kv_len": KV_LEN, "q_start": 0, "kv_start": 0}
    places = {"q_pos": POS.int(), "kv_pos": KEY.int(), "q_head": HEAD.int()}
    return {**{k: torch.tensor(n, dtype=torch.int32) for k, n in fixed.items()}, **places, **more}


DENSE = torch.rand(Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(1)) < 0.5
PER_HEAD = torch.rand(1, HEADS, Q_LEN, KV_LEN, generator=torch.Generator().manual_seed(2)) < 0.5
FLAT = torch.cat([torch.tensor([True] * 3), DENSE.flatten()])
BYTES = torch.tensor(
    [255, *(sum(int(b) << i for i, b in enumerate(DENSE.flatten()[j : j + 8])) for j in range(0, 28, 8))]
)
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2])
MASKS = {
    "causal": (v.causal, KEY <= POS),
    "left window": (v.sliding_window(2), KEY >= POS - 2),
    "both windows": (v.sliding_window(2, 1), (KEY >= POS - 2) & (KEY <= POS + 1)),
    "right window": (v.sliding_window(None, 0), KEY <= POS),

    "documents": (v.document_mask(DOCUMENTS), DOCUMENTS[KEY] == DOCUMENTS[POS]),
    "prefix": (v.prefix_lm(torch.tensor([5])), (KEY < 5) | (KEY <= POS)),
    "dense": (v.custom_mask(DENSE), DENSE[None]),
    "dense per request": (v.custom_mask(DENSE[None]), DENSE[None]),
    "dense per head": (v.custom_mask(PER_HEAD), PER_HEAD[0]),
    "dense broadcast": (v.custom_mask(DENSE.expand(1, HEADS, -1, -1)), DENSE[None]),
    "ragged": (v.custom_mask(FLAT, torch.tensor([3, 31])), DENSE[None]),
    "packed": (v.packed_mask(BYTES.to(torch.uint8), torch.tensor([1, 5])), DENSE[None]),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    variant, expected = MASKS[name]
    got = evaluate(variant.program, "mask", at(), variant.values)
    assert torch.equal(got.expand(HEADS, Q_LEN, KV_LEN), expected.expand(HEADS, Q_LEN, KV_LEN))


SLOPES = torch.rand(HEADS)
SCORES = {
    "softcap": (v.softcap(1.5), 1.5 * torch.tanh(LOGITS / 1.5)),
    "alibi": (v.alibi(SLOPES), LOGITS + SLOPES.view(-1, 1, 1) * (KEY - POS)),
    "sigmoid": (v.sigmoid(-0.5), torch.sigmoid(LOGITS - 0.5)),
    "temperature": (v.length_temperature(4), LOGITS * torch.clamp(torch.log(POS + 1.0) / math.log(4), min=1)),
    "two": (v.softcap(1.5) & v.alibi(SLOPES), 1.5 * torch.tanh(LOGITS / 1.5) + SLOPES.view(-1, 1, 1) * (KEY - POS)),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str) -> None:
    variant, expected = SCORES[name]
    got = evaluate(variant.program, "logits", at(logits=LOGITS), variant.values)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)


def test_sink_is_one_more_logit_without_a_value() -> None:
    sinks, values = torch.randn(HEADS), torch.randn(KV_LEN, DIM)
    with_sink = torch.cat([LOGITS, sinks.view(-1, 1, 1).expand(-1, Q_LEN, 1)], -1).softmax(-1)[..., :-1] @ values
    out, lse = LOGITS.softmax(-1) @ values, LOGITS.logsumexp(-1, keepdim=True)
    variant = v.sink(sinks)
    places = {k: t for k, t in at().items() if k != "kv_pos"}
    got = evaluate(
        variant.program, "output", {**places, "out": out, "lse": lse, "dim": torch.arange(DIM).int()}, variant.values
    )
    torch.testing.assert_close(got, with_sink)


def test_alibi_slopes_are_those_of_the_paper() -> None:
    assert v.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert v.alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-i for i in range(1, 9)] + [2 ** (-0.5 * (2 * i + 1)) for i in range(4)]
    )


def rotate(x: torch.Tensor, pos: torch.Tensor, inv_freq: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Complex rotation of pairs: an independent way to write it."""
    n = 2 * inv_freq.numel()
    head, tail = x[..., :n].double(), x[..., n:].double()
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else (head[..., : n // 2], head[..., n // 2 :])
    turned = torch.complex(a, b) * torch.polar(torch.ones((), dtype=torch.float64), pos.double() * inv_freq.double())
    pair = (
        torch.stack([turned.real, turned.imag], -1).flatten(-2)
        if interleaved
        else torch.cat([turned.real, turned.imag], -1)
    )
    return torch.cat([pair, tail], -1).float()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [DIM, 10])
def test_rope(rotary: int, interleaved: bool) -> None:
    variant = v.rope(rotary, interleaved=interleaved)
    program = variant.program.specialise(DIM, DIM)
    row, dim = torch.randn(HEADS, Q_LEN, 1, DIM), torch.arange(DIM).int()
    for hook, position in (("query", "q_pos"), ("key", "kv_pos")):
        pos = POS.view(1, -1, 1, 1)
        places = {k: t.unsqueeze(-1) if t.dim() else t for k, t in at().items()} | {position: pos.int()}
        got = evaluate(program, hook, {**places, "row": row, "dim": dim}, variant.values)
        torch.testing.assert_close(got, rotate(row, pos, v.rope_frequencies(rotary), interleaved), rtol=1e-5, atol=1e-5)


def test_rope_frequencies_are_those_of_the_models() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is not installed")
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for parameters, mine in (
        ({"rope_theta": 500000.0, **scaling}, v.rope_frequencies(128, 500000.0, scaling)),
        ({"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}, v.rope_frequencies(128, 10000.0, 4.0)),
    ):
        config = LlamaConfig(
            hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=parameters
        )
        theirs, _ = rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
