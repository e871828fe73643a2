"""Many rows on AMX tiles: odd shapes, masks, dtypes, and what the kernel does instead of a running maximum."""

from __future__ import annotations

import math

import pytest
import torch

import flashloom as fl
from flashloom.attention.reference import attention_reference
from flashloom.target import Target

pytestmark = pytest.mark.skipif(not Target("x86-amx").supported, reason="this machine has no AMX")


def compare(
    q_lens,
    kv_lens,
    variant=fl.causal,
    heads=(8, 2),
    dims=(64, 64),
    kv_dtype=torch.bfloat16,
    scales=None,
    page=16,
    q_scale=1.0,
    odd_keys=1.0,
    **run,
):
    """Runs a batch over shuffled pages and compares with float64; `out` lies between rows that must stay untouched."""
    torch.manual_seed(0)
    (q_heads, kv_heads), (dim, value_dim) = heads, dims
    needed = [-(-n // page) for n in kv_lens]
    pages, order = sum(needed) + 2, torch.randperm(sum(needed) + 2, dtype=torch.int32)
    table = torch.full((len(needed), max(*needed, 1)), -1, dtype=torch.int32)
    for i, n in enumerate(needed):
        table[i, :n], order = order[:n], order[n:]
    k, v = torch.randn(pages, page, kv_heads, dim), torch.randn(pages, page, kv_heads, value_dim)
    k[:, 1::2] *= odd_keys
    k, v = ((x * 40 if kv_dtype is torch.int8 else x).to(kv_dtype) for x in (k, v))
    q = (torch.randn(sum(q_lens), q_heads, dim) * q_scale).bfloat16()
    kv = (k, v) if scales is None else (k, v, *(torch.rand(scales(pages, kv_heads)) * 0.02 + 0.01 for _ in range(2)))
    batch = fl.Batch(q_lens=q_lens, kv=fl.PageTable.from_block_table(table, kv_lens, page_size=page))
    attention = fl.Attention(
        fl.HeadShape(q_heads, kv_heads, dim, value_dim), variant=variant, dtype=torch.bfloat16, kv_dtype=kv_dtype
    )
    held = torch.full((q.shape[0] + 2, q_heads, value_dim + 3), 7.0, dtype=torch.bfloat16)
    out = held[1:-1, :, 2:-1]
    soft = variant.program.softmax
    lse = torch.empty(q.shape[0], q_heads) if soft else None
    attention.plan(batch).run(q, kv, out=out, lse=lse, **run)
    options = {} if scales is None else {"k_scale": kv[2], "v_scale": kv[3]}
    expected, expected_lse = attention_reference(q, k, v, batch, variant, **options, **run)
    rounding = (expected.bfloat16().double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= 1.6 * rounding + 4e-3 * expected.abs().max()
    if soft:
        empty = expected_lse == -math.inf
        assert torch.equal(lse == -math.inf, empty)
        assert (lse - expected_lse)[~empty].abs().max() < 3e-3
    out.fill_(7.0)
    assert bool((held == 7.0).all())


@pytest.mark.parametrize(
    "lens",
    [([20], [20]), ([33], [33]), ([777], [777]), ([300, 3, 40], [300, 900, 33]), ([64, 10], [2500, 0]), ([99], [31])],
)
@pytest.mark.parametrize("variant", [fl.full, fl.causal, fl.causal & fl.sliding_window(50) & fl.softcap(9.0)])
def test_lengths(lens, variant):
    compare(*lens, variant)


@pytest.mark.parametrize("dims", [(128, 128), (80, 80), (192, 128), (33, 17), (576, 512)])
def test_head_dims(dims):
    compare([100, 20], [2200, 77], dims=dims, page=5)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (16, 1)])
def test_groups(heads):
    compare([100, 20], [300, 77], heads=heads)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize(
    "scales", [lambda pages, heads: (1,), lambda pages, heads: (heads,), lambda pages, heads: (pages, heads)]
)
def test_quantised_keys_and_values(kv_dtype, scales):
    compare([100, 20], [2200, 77], kv_dtype=kv_dtype, scales=scales)


def test_one_head_is_split_over_keys():
    compare([5, 40], [5000, 9000], heads=(4, 1))


def test_logits_that_outgrow_the_first_reference_point():
    """Position biases of hundreds of log2 units, in both directions, and dot products of hundreds."""

    class Bias(fl.Variant):
        slope: float

        def logits_transform(self, logits, at):
            return logits + self.slope * at.kv_pos

    for slope in (-1.0, 1.0, 0.1):
        compare([100, 40], [2500, 333], Bias(slope=slope))
    compare([100, 40], [2500, 333], q_scale=60.0)


class EvenKeys(fl.Variant):
    def logits_mask(self, at):
        return at.kv_pos % 2 == 0


@pytest.mark.parametrize("q_scale", [0.5, 3.0, 30.0])
def test_soft_cap(q_scale):
    """Logits below 0.7 of the cap, where a short polynomial serves, around it, and far above it."""
    compare([100, 40], [300, 333], fl.causal & fl.softcap(9.0), q_scale=q_scale)


def test_soft_cap_beside_masked_keys_that_are_not_numbers():
    compare([100, 40], [300, 330], EvenKeys() & fl.softcap(9.0), q_scale=8.0, odd_keys=math.nan)


@pytest.mark.parametrize(
    "variant", [fl.causal & fl.sink(torch.randn(8)), fl.rope(64) & fl.causal, fl.alibi(8) & fl.causal]
)
def test_hooks(variant):
    compare([100, 40], [2500, 333], variant)
    compare([100, 40], [2500, 333], variant, partial=True)


def test_weights_without_softmax():
    class Sigmoid(fl.Variant):
        softmax = False

        def logits_transform(self, logits, at):
            return torch.sigmoid(logits - 3.0)

    compare([100, 40], [2500, 333], Sigmoid() & fl.causal)


@pytest.mark.parametrize("length", [64, 1024, 2048, 2080, 3000, 4096, 20000])
def test_scratch_is_about_one_head_of_the_batch(length):
    """Packed keys and row tiles together are no more than one head's keys and values, beside 128 KiB of buffers."""
    attention = fl.Attention(fl.HeadShape(32, 8, 128), variant=fl.causal, dtype=torch.bfloat16)
    plan = attention.plan(fl.Batch(q_lens=[length], kv=fl.RaggedKV([length])))
    assert plan._executor._args.scratch_size <= length * 2 * 128 * 2 + (128 << 10)


def test_rows_of_keys_in_several_blocks():
    """Keys that are packed in blocks, more rows than an item may have, and items that follow each other."""
    compare([700, 33, 5], [2100, 4200, 60], heads=(8, 2), dims=(128, 128))
    compare([700, 33, 5], [2100, 4200, 60], fl.causal & fl.sliding_window(300), heads=(8, 2), dims=(128, 128))
