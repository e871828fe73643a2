"""A variant's tensor without elements: refused by name where a batch reads it, and no matter where nothing does."""

from __future__ import annotations

import pytest
import torch

import flashloom as fl


class Reads(fl.Variant):
    """A field of any kind, read at `index` in mask or logits."""

    x: torch.Tensor

    def logits_mask(self, at):
        return at.kv_pos <= at.q_pos

    def logits_transform(self, logits, at):
        index = (at.q_head, at.kv_pos)[: self.rank]
        value = self.x[index if self.rank > 1 else index[0]]
        return logits + torch.where(at.kv_pos > at.q_pos + at.kv_len, value, 0)  # read, and never used


class ReadsBits(fl.Variant):
    x: fl.Bits

    def logits_mask(self, at):
        return self.x[at.kv_pos] | (at.kv_pos <= at.q_pos + at.kv_len)


def reads(shape: tuple[int, ...], dtype: torch.dtype) -> fl.Variant:
    cls = type("Reads", (Reads,), {"rank": len(shape)})
    return cls(x=torch.empty(shape, dtype=dtype))


VARIANTS = [reads(shape, t) for shape in ((0,), (0, 4), (4, 0)) for t in (torch.float32, torch.int64, torch.bool)]
VARIANTS.append(ReadsBits(x=torch.empty(0, dtype=torch.uint8)))


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
@pytest.mark.parametrize("q_len", [1, 40])
def test_a_batch_that_reads_it_is_refused(variant: fl.Variant, q_len: int) -> None:
    q, k = torch.randn(q_len, 2, 32), torch.randn(50, 2, 32)
    with pytest.raises(ValueError, match=r"the variant's x has shape \(.*without an element.*give one"):
        fl.attention(q, k, k, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_a_batch_that_reads_nothing_is_served(variant: fl.Variant) -> None:
    """An idle rank's batch: no query tokens, or no keys."""
    heads = fl.HeadShape(q_heads=2, kv_heads=2, dim=32)
    attention = fl.Attention(heads, variant=variant, dtype=torch.float32, device="cpu")
    for q_lens, kv_lens in (([], []), ([0], [0]), ([3], [0]), ([0, 2], [0, 0])):
        plan = attention.plan(fl.Batch(q_lens=q_lens, kv=fl.RaggedKV(kv_lens)))
        q, k = torch.randn(sum(q_lens), 2, 32), torch.randn(sum(kv_lens), 2, 32)
        assert torch.equal(plan.run(q, (k, k)), torch.zeros_like(q))
    with pytest.raises(ValueError, match="without an element"):
        plan.update(fl.Batch(q_lens=[2], kv=fl.RaggedKV([5])))


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_lengths_that_only_the_device_knows_read_a_zero(variant: fl.Variant) -> None:
    """Where the host cannot compare, the kernel must not read address 0 (lengths of the CPU count as the host's, so the
    kernel is called past the comparison)."""
    heads = fl.HeadShape(q_heads=2, kv_heads=2, dim=32)
    plain = fl.Attention(heads, variant=fl.causal, dtype=torch.float32, device="cpu")
    q, k = torch.randn(5, 2, 32), torch.randn(9, 2, 32)
    batch = fl.Batch(q_lens=[5], kv=fl.RaggedKV([9]))
    plan = fl.Attention(heads, variant=variant, dtype=torch.float32, device="cpu").plan(
        fl.Batch(q_lens=[0], kv=fl.RaggedKV([0]))
    )
    plan._hollow = False  # as if nothing were known of the sizes
    plan.update(batch)
    expected = plain.plan(batch).run(q, (k, k)) if not isinstance(variant, ReadsBits) else None
    got = plan.run(q, (k, k))
    assert torch.isfinite(got).all()
    assert expected is None or torch.allclose(got, expected, atol=1e-5)
