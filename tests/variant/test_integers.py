"""Integers mean what they mean in torch: positions are int64, tensors have their types, and nothing wraps but there."""

from __future__ import annotations

import pytest
import torch
from tests.variant.integers import HEADS, KEYS, Widths, mask_of, score_of, truth

import flashloom.variant as v
from flashloom.lower.torch import evaluate
from flashloom.variant.expr import BOOL, DOUBLE, FLOAT, INT32, INT64, topological
from flashloom.variant.ranges import FULL, PARTIAL, SKIP, tile_verdict

HEAD, ROW = torch.arange(HEADS), torch.arange(KEYS)
PLACE = {"q_len": KEYS, "kv_len": KEYS, "batch": 1, "kv_head": 0, "q_start": 0, "kv_start": 0}
AT = {
    **{k: torch.tensor(n, dtype=torch.int32) for k, n in PLACE.items()},
    "q_head": HEAD.int().view(-1, 1, 1), "q_pos": ROW.int().view(1, -1, 1), "kv_pos": ROW.int().view(1, 1, -1),
}  # fmt: skip


def kept_by(variant: v.Variant) -> torch.Tensor:
    if variant.program.mask is None:
        return torch.ones(HEADS, KEYS, KEYS, dtype=torch.bool)
    return evaluate(variant.program, "mask", AT, variant.values).expand(HEADS, KEYS, KEYS)


@pytest.mark.parametrize("block", range(8))
def test_random_masks_are_torchs(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        text, mask = mask_of(seed)
        variant = v.from_flex(mask_mod=mask)
        expected, got = truth(mask, 1), kept_by(variant)
        assert torch.equal(got, expected), f"{seed}: {text}: {int((got != expected).sum())} differ"
        types = {n.dtype for n in topological(variant.program.mask)} if variant.program.mask is not None else set()
        assert types <= {BOOL, INT32, INT64, FLOAT, DOUBLE}, text
        g = torch.Generator().manual_seed(seed)
        for _ in range(12):
            ends = [torch.randint(0, n, (2,), generator=g).sort().values.tolist() for n in (HEADS, KEYS, KEYS)]
            tile = dict(PLACE)
            for name, (low, high) in zip(("q_head", "q_pos", "kv_pos"), ends):
                tile |= {f"{name}_lo": low, f"{name}_hi": high}
            box = expected[tuple(slice(low, high + 1) for low, high in ends)]
            said = tile_verdict(variant.program, variant.values, tile)
            true = FULL if box.all() else PARTIAL if box.any() else SKIP
            assert said in (true, PARTIAL), f"{seed}: {text}: tile {ends}: said {said}, is {true}"


@pytest.mark.parametrize("block", range(4))
def test_random_scores_are_torchs(block: int) -> None:
    logits = torch.linspace(-3, 3, KEYS * KEYS).view(KEYS, KEYS)
    for seed in range(block * 50, block * 50 + 50):
        text, score = score_of(seed)
        variant = v.from_flex(score)
        expected = truth(score, 1, logits)
        got = evaluate(variant.program, "logits", {**AT, "logits": logits}, variant.values).expand_as(expected)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), expected.double(), rtol=1e-6, atol=1e-5, msg=lambda m, t=text: f"{t}: {m}"
        )


LIMITS = (0, 5, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**40, 2**62)
FAR = 2**30 - 1  # the last position


def placed(q_len: int, kv_len: int, rows: range, keys: range) -> dict[str, torch.Tensor]:
    numbers = {"q_len": q_len, "kv_len": kv_len, "batch": 0, "kv_head": 0, "q_start": 0, "kv_start": 0, "q_head": 0}
    return {
        **{name: torch.tensor(n, dtype=torch.int32) for name, n in numbers.items()},
        "q_pos": torch.tensor(rows, dtype=torch.int32).view(-1, 1),
        "kv_pos": torch.tensor(keys, dtype=torch.int32).view(1, -1),
    }


PLACES = [  # also more queries than keys, whose first positions are negative, and the last positions that there are
    (9, 9, range(9), range(9)), (FAR, 20, range(20 - FAR, 40 - FAR), range(20)),
    (30, FAR, range(FAR - 30, FAR), range(20)), (30, FAR, range(FAR - 30, FAR), range(FAR - 20, FAR)),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p[2]}-{p[3]}".replace(" ", ""))
@pytest.mark.parametrize("n", LIMITS)
def test_no_sum_wraps(n: int, place: tuple) -> None:
    """Against Python's integers: windows, and a class with int and int32 fields."""
    at, (_, _, rows, keys) = placed(*place), place
    for shift in (0, 7, -(2**31), 2**31 - 1):
        for sign in (1, -1):
            m = sign * n
            variant = Widths(n=m, shift=torch.tensor([shift], dtype=torch.int32))
            got = evaluate(variant.program, "mask", at, variant.values)
            for i, q in enumerate(rows):
                for j, k in enumerate(keys):
                    a, b, c = k <= q + m, k - m < q * 3, k + shift >= q - m
                    assert bool(got[i, j]) == ((a and b) ^ (c or abs(q - m) > shift)), (m, shift, q, k)
    for left, right in ((n, None), (n, n), (None, n), (3, n)):
        window = v.sliding_window(left, right)
        expected = torch.tensor(
            [[(left is None or k >= q - left) and (right is None or k <= q + right) for k in keys] for q in rows]
        )
        got = evaluate(window.program, "mask", at, window.values)
        assert torch.equal(got, expected), (left, right)
        tile = {k: int(x) for k, x in at.items() if x.dim() == 0} | {"q_head_lo": 0, "q_head_hi": 0}
        tile |= {"q_pos_lo": rows[0], "q_pos_hi": rows[-1], "kv_pos_lo": keys[0], "kv_pos_hi": keys[-1]}
        true = FULL if expected.all() else PARTIAL if expected.any() else SKIP
        assert tile_verdict(window.program, window.values, tile) in (true, PARTIAL)


def test_a_window_without_limit_shares_the_kernel() -> None:
    assert v.sliding_window(2**40, 2**31 - 1).program == v.sliding_window(4, 4).program
    types = {n.dtype for n in topological(v.sliding_window(4, 4).program.mask)}
    assert types == {INT32, BOOL}


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**200])
def test_numbers_beyond_64_bits_are_refused(value: int) -> None:
    with pytest.raises(v.TraceError, match="beyond int64"):
        v.from_flex(mask_mod=lambda b, h, i, j: j < value).program  # noqa: B018
    with pytest.raises(ValueError, match="at most 64 bits"):
        Widths(n=value, shift=torch.zeros(1, dtype=torch.int32))


def test_division_by_a_constant_zero_is_refused() -> None:
    for text in ("i // 0", "i % 0"):
        with pytest.raises(v.TraceError, match="divided by 0"):
            v.from_flex(mask_mod=eval(f"lambda b, h, i, j: {text} > j")).program  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn])
def test_types_that_torch_does_not_compute_with_are_refused(dtype: torch.dtype) -> None:
    table = torch.zeros(4).to(dtype)
    with pytest.raises(TypeError, match="use one of bool, uint8"):
        v.from_flex(lambda s, b, h, i, j: s + table[h]).program  # noqa: B018


def test_a_float_field_beside_float64_is_not_rounded() -> None:
    class Since(v.Variant):
        when: v.PerKeyToken
        span: float
        scale: float

        def logits_mask(self, at):
            return self.when[at.q_pos] - self.when[at.kv_pos] <= self.span

        def logits_transform(self, logits, at):
            return logits * self.scale

    when = torch.arange(KEYS, dtype=torch.float64) * 0.1
    for span in (0.1, 0.30000000000000004, 0.3, 0.7, 1e-300):
        variant = Since(when=when, span=span, scale=0.1)
        assert torch.equal(kept_by(variant)[0], when.view(-1, 1) - when <= span)
        assert variant.program == Since(when=when, span=0.5, scale=3.0).program
    table = torch.zeros(4, dtype=torch.float64)
    flex = v.from_flex(lambda s, b, h, i, j: torch.where(table[h] + 0.1 == 0.1, s, 0.0))
    got = evaluate(flex.program, "logits", {**AT, "logits": torch.ones(KEYS, KEYS)}, flex.values)
    assert torch.equal(got.expand(HEADS, KEYS, KEYS), torch.ones(HEADS, KEYS, KEYS))
