"""Several GPUs in one process: whatever the current device is, work goes to where the tensors lie."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.triton.test_gpu import BF16, G

import flashloom as fl
from flashloom.attention.reference import attention_reference
from flashloom.kv_cache.append import append_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))


def _decode(device, lens, where=None):
    """A plan, its queries, the cache and the page table, which lies on `where`."""
    width = -(-max(lens) // 16)
    cache = torch.randn(2, len(lens) * width, 16, 8, 128, device=device, dtype=BF16)
    table = torch.randperm(len(lens) * width, dtype=torch.int32).view(len(lens), width).to(where or device)
    kv = fl.PageTable.from_block_table(
        table, torch.tensor(lens, dtype=torch.int32, device=where or device), page_size=16
    )
    q = torch.randn(len(lens), 32, 128, device=device, dtype=BF16)
    plan = fl.Attention(G, variant=fl.causal, dtype=BF16, device=device).plan(fl.Batch.decode(kv))
    return plan, q, cache, kv


def _far(out, q, cache, kv):
    want, _ = attention_reference(q, cache[0], cache[1], fl.Batch.decode(kv).to_host(), fl.causal)
    return float((out.double() - want).norm() / want.norm())


@pytest.mark.parametrize("where", [None, "cpu"])
def test_decode_in_turns(where):
    found = [_decode(device, [600, 5000], where) for device in DEVICES]
    for _ in range(3):
        for plan, q, cache, kv in found:  # the current device is 0 throughout
            plan.update(fl.Batch.decode(kv))
            out = plan.run(q, (cache[0], cache[1]))
            assert out.device == q.device
            assert _far(out, q, cache, kv) < 8e-3
    with pytest.raises(ValueError, match="is on cuda:1 but the plan is for cuda:0"):
        found[0][0].run(found[1][1], tuple(found[0][2]))


def test_prefill_append_and_merge():
    for device in reversed(DEVICES):
        x = torch.randn(1, 8, 300, 128, device=device, dtype=BF16)
        want = torch.nn.functional.scaled_dot_product_attention(*(x.double(),) * 3, is_causal=True)
        got = fl.attention(x, x, x, variant=fl.causal)
        assert got.device == device
        assert float((got.double() - want).norm() / want.norm()) < 8e-3
        caches = [fl.PagedKVCache(1, 4, 16, fl.HeadShape(8, 2, 64), BF16, device) for _ in range(2)]
        k, v = torch.randn(2, 40, 2, 64, device=device, dtype=BF16)
        slots = torch.randperm(64, device=device)[:40]
        fl.append(caches[0][0], k, v, slots)
        append_reference(caches[1][0], k, v, slots)
        assert torch.equal(caches[0][0].k, caches[1][0].k)
        outs, lses = torch.randn(2, 5, 8, 64, device=device), torch.randn(2, 5, 8, device=device)
        out, lse = fl.merge(outs[0], lses[0], outs[1], lses[1])
        torch.testing.assert_close(lse, torch.logsumexp(lses, 0))
        torch.testing.assert_close(out, (torch.softmax(lses, 0).unsqueeze(-1) * outs).sum(0))


def test_a_graph_of_the_second_gpu():
    device = DEVICES[1]
    lens = torch.tensor([600, 5000], dtype=torch.int32, device=device)
    table = torch.randperm(2 * 313, device=device).view(2, 313).int()
    cache = torch.randn(2, 2 * 313, 16, 8, 128, device=device, dtype=BF16)
    q = torch.randn(2, 32, 128, device=device, dtype=BF16)
    out = torch.empty_like(q)
    kv = fl.PageTable.from_block_table(table, lens, page_size=16)
    plan = fl.Attention(G, variant=fl.causal, dtype=BF16, device=device).plan(fl.Batch.decode(kv))

    def step():
        kv = fl.PageTable.from_block_table(table, lens, page_size=16)
        plan.update(fl.Batch.decode(kv))
        plan.run(q, (cache[0], cache[1]), out=out)
        return kv

    step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        kv = step()
    for new in ([17, 4000], [5000, 1]):
        lens.copy_(torch.tensor(new))
        with torch.cuda.device(device):
            graph.replay()
        torch.cuda.synchronize(device)
        assert _far(out, q, cache, kv) < 8e-3


def test_a_thread_for_each_gpu():
    def serve(device):
        with torch.cuda.device(device):
            plan, q, cache, kv = _decode(device, [900, 300])
            x = torch.randn(1, 8, 300, 128, device=device, dtype=BF16)
            want = fl.attention(x, x, x, variant=fl.causal)
            for _ in range(30):
                plan.update(fl.Batch.decode(kv))
                out = plan.run(q, (cache[0], cache[1]))
                assert torch.equal(fl.attention(x, x, x, variant=fl.causal), want)
            return _far(out, q, cache, kv)

    with ThreadPoolExecutor(2) as threads:
        assert all(far < 8e-3 for far in threads.map(serve, DEVICES))
