"""An attention variant of your own: annotated fields are run-time parameters, methods are the hooks."""

import torch

import flashloom as fl


class Recency(fl.Variant):
    """Every head forgets at its own rate, but never the first `keep` tokens."""

    rate: fl.PerHead
    keep: int

    def logits_transform(self, logits, at):
        distance = (at.q_pos - at.kv_pos).to(torch.float32)
        return logits - torch.where(at.kv_pos < self.keep, 0.0, self.rate[at.q_head] * torch.log2(1.0 + distance))


class Stride(fl.Variant):
    """Only every `step`-th key, and the query's own neighbourhood."""

    step: int

    def logits_mask(self, at):
        return (at.kv_pos % self.step == 0) | (at.q_pos - at.kv_pos < 16)


heads = 4
variant = fl.causal & Recency(rate=torch.linspace(0.1, 1.0, heads), keep=4) & Stride(step=8)
print(variant.explain("cpp", dim=64))

torch.manual_seed(0)
q, k, v = (torch.randn(200, heads, 64) for _ in range(3))
out = fl.attention(q, k, v, variant=variant)

# Other numbers, same expressions: nothing is compiled again.
slower = fl.causal & Recency(rate=torch.full((heads,), 0.05), keep=8) & Stride(step=4)
print("outputs differ by", float((fl.attention(q, k, v, variant=slower) - out).abs().max()))

q_pos, kv_pos = torch.arange(200)[:, None], torch.arange(200)
scores = torch.einsum("qhd,khd->hqk", q, k) / 8
decay = torch.linspace(0.1, 1.0, heads)[:, None, None] * torch.log2(1.0 + (q_pos - kv_pos).clamp(min=0))
scores = scores - torch.where(kv_pos < 4, 0.0, decay)
kept = (kv_pos <= q_pos) & ((kv_pos % 8 == 0) | (q_pos - kv_pos < 16))
expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~kept, float("-inf")).softmax(-1), v)
print(f"largest difference to torch: {(out - expected).abs().max():.1e}")
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
