"""What numbers mean in hooks, on a GPU: integers of every type, negative indices, float64 and rows that a number fills.
`make test-gpu`."""

import pytest
import torch

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.reference import attention_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
N, HEADS = 200, 2


def functions(device):
    """(score, mask) over tensors on a device."""
    g = torch.Generator().manual_seed(0)
    small = torch.randint(0, 255, (N,), generator=g, dtype=torch.uint8)
    signed, wide = small.to(torch.int8).to(device), (small.long() * 2**33).to(device)
    small, when = small.to(device), (1.7e9 + torch.arange(N).double() * 7).to(device)
    bias = torch.randn(N, generator=g).to(device)

    def score(s, b, h, i, j):
        filled = torch.where(i < 9, torch.finfo(torch.float32).min, s + bias[i - j])
        return torch.where(i == 10, -1e30, filled)

    def mask(b, h, i, j):
        near = (when[i] - when[j]).abs() <= 60.0
        hashed = (i * 2654435761 + j * 40503) % 100 < 30
        bytes_ = (small[j] - 7 < signed[i - j]) & (wide[j] >> 34 > (j << 3) % -60)
        return near | hashed & bytes_ | (j * 2**40 < wide[-1]) & (j < 3) | (i < 11)

    return score, mask


@pytest.mark.parametrize("executor", ["triton", "hopper"])
def test_numbers_are_torchs(executor):
    torch.manual_seed(0)
    if executor == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of capability 9.0")
    q, k, v = (torch.randn(N, HEADS, 64, dtype=torch.bfloat16) for _ in range(3))
    batch = fl.Batch([N], kv=fl.RaggedKV([N]))
    want, _ = attention_reference(q, k, v, batch, fl.from_flex(*functions("cpu")))
    torch.testing.assert_close(want[:9], v.double().mean(0).expand(9, -1, -1), atol=1e-9, rtol=0)
    attention = fl.Attention(
        fl.HeadShape(HEADS, HEADS, 64), variant=fl.from_flex(*functions("cuda")), dtype=torch.bfloat16, device="cuda"
    )
    with dispatch.only(executor):
        got = attention.plan(batch).run(q.cuda(), (k.cuda(), v.cuda()))
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-2, rtol=0)
