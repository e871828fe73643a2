"""Decode over a paged KV cache: one plan, updated every step; a long prompt joins while others decode."""

import torch

import flashloom as fl

torch.manual_seed(0)
heads, page_size = fl.HeadShape(q_heads=8, kv_heads=2, dim=64), 16
cache = fl.PagedKVCache(layers=1, pages=64, page_size=page_size, heads=heads, dtype=torch.bfloat16, device="cpu")
attention = fl.Attention(heads, variant=fl.causal, dtype=torch.bfloat16)

tables = torch.arange(48, dtype=torch.int32).view(3, 16)  # request -> its pages
lengths = [100, 37, 0]  # tokens in the cache; the third request has not begun


def step(q_lens, plan=None):
    """Append this step's keys and values, then attend: decode (1 token) and prefill (many) in one call."""
    for i, new in enumerate(q_lens):
        lengths[i] += new
    used = len(q_lens)
    pages = fl.PageTable.from_block_table(tables[:used], lengths[:used], page_size=page_size)
    batch = fl.Batch(q_lens=q_lens, kv=pages)
    if plan is None:
        plan = attention.plan(batch, reserve=fl.Reserve(requests=3, tokens=256, pages=64))
    else:
        plan.update(batch)  # no compiling, no new buffers
    q = torch.randn(sum(q_lens), 8, 64, dtype=torch.bfloat16)
    k, v = torch.randn(2, sum(q_lens), 2, 64, dtype=torch.bfloat16)
    fl.append(cache[0], k, v, batch.slots())
    return plan, q, plan.run(q, cache[0])


lengths[:] = [0, 0, 0]
plan, _, _ = step([100, 37])  # the first two prompts
for _ in range(3):
    step([1, 1], plan)  # decode
plan, q, out = step([1, 1, 90], plan)  # a third request joins with its prompt
print(plan.explain())

# The first request's new token, by torch: the keys of its pages, in order.
keys, values = (x[tables[0].long()].flatten(0, 1)[: lengths[0]].float() for x in (cache[0].k, cache[0].v))
keys, values = (x.repeat_interleave(heads.group, dim=1) for x in (keys, values))
weights = (torch.einsum("hd,khd->hk", q[0].float(), keys) / 8).softmax(-1)
expected = torch.einsum("hk,khd->hd", weights, values)
print(f"largest difference to torch: {(out[0].float() - expected).abs().max():.1e}")
torch.testing.assert_close(out[0].float(), expected, rtol=2e-2, atol=2e-2)
