"""A first call: causal attention with a sliding window and a soft cap, compared with plain torch."""

import torch

import flashloom as fl

torch.manual_seed(0)
tokens, q_heads, kv_heads, dim = 300, 8, 2, 64
q = torch.randn(tokens, q_heads, dim)
k = torch.randn(tokens, kv_heads, dim)
v = torch.randn(tokens, kv_heads, dim)

variant = fl.causal & fl.sliding_window(127) & fl.softcap(30.0)
out, lse = fl.attention(q, k, v, variant=variant, return_lse=True)

# The same in torch: scores, soft cap, mask, softmax, weighted sum of the values.
group = q_heads // kv_heads
k_all, v_all = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
scores = torch.einsum("qhd,khd->hqk", q, k_all) / dim**0.5
scores = 30.0 * torch.tanh(scores / 30.0)
q_pos, kv_pos = torch.arange(tokens)[:, None], torch.arange(tokens)
scores = scores.masked_fill((kv_pos > q_pos) | (kv_pos < q_pos - 127), float("-inf"))
expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_all)

print(f"largest difference of the output: {(out - expected).abs().max():.1e}")
print(f"largest difference of the log-sum-exp: {(lse - scores.logsumexp(-1).T).abs().max():.1e}")
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(lse, scores.logsumexp(-1).T, rtol=1e-4, atol=1e-5)
