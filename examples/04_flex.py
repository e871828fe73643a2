"""Functions written for FlexAttention run unchanged, also for decode, and compose with flashloom's variants."""

import torch

import flashloom as fl

torch.manual_seed(0)
heads, tokens = 4, 256
slopes = fl.alibi_slopes(heads)
documents = torch.tensor([0] * 100 + [1] * 156)


def score_mod(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)


def mask_mod(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (documents[q_idx] == documents[kv_idx])


variant = fl.from_flex(score_mod, mask_mod)  # captured tensors become run-time parameters
q, k, v = (torch.randn(1, heads, tokens, 64) for _ in range(3))
out = fl.attention(q, k, v, variant=variant)

index = torch.arange(tokens)
head, rows, columns = torch.arange(heads)[:, None, None], index[:, None], index[None]
scores = score_mod(q @ k.transpose(-1, -2) / 8, 0, head, rows, columns)
expected = scores.masked_fill(~mask_mod(0, head, rows, columns), float("-inf")).softmax(-1) @ v
print(f"largest difference to torch: {(out - expected).abs().max():.1e}")
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

# For decode the query's index is its position, which FlexAttention's local index is not: ask for absolute positions.
absolute = fl.from_flex(score_mod, mask_mod, q_index="absolute") & fl.softcap(20.0)
last = fl.attention(q[:, :, -1:], k, v, variant=absolute)
capped = 20.0 * torch.tanh(scores / 20.0)
expected = capped.masked_fill(~mask_mod(0, head, rows, columns), float("-inf")).softmax(-1)[:, :, -1:] @ v
print(f"largest difference of the last token: {(last - expected).abs().max():.1e}")
torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
