"""Results that share memory with what is read are refused; what interleaves with it is not."""

import random

import pytest
import torch

import flashloom as fl
from flashloom.attention.cpu import CpuExecutor
from flashloom.attention.overlap import overlap

HEADS = fl.HeadShape(4, 4, 16)


def bytes_of(x):
    places = torch.zeros((), dtype=torch.int64)
    for n, s in zip(x.shape, x.stride()):
        places = places[..., None] + torch.arange(n) * s
    first = x.data_ptr() + places.reshape(-1) * x.element_size()
    return {int(at) + i for at in first for i in range(x.element_size())}


def test_overlap_against_every_byte():
    """Nothing is called an overlap that is none; views with at most one gapped axis are judged in full."""
    rng, memory, found = random.Random(3), torch.zeros(400), {True: 0, False: 0}
    for _ in range(600):
        views = []
        for _ in range(2):
            width = rng.choice([1, 2, 3, 4, 6])
            step, number = rng.choice([6, 6, 6, 12, 7]), rng.randint(1, 6)
            size = rng.choice([(number, width), (2, number, width), (number, 2, width // 2 or 1)])
            strides = {2: (step, 1), 3: (step * number, step, 1) if size[0] == 2 else (step, width // 2 or 1, 1)}[
                len(size)
            ]
            views.append(memory.as_strided(size, strides, rng.randint(0, 80)))
        a, b = views
        truth = bool(bytes_of(a) & bytes_of(b))
        found[truth] += 1
        assert overlap(a, b) == overlap(b, a)
        assert truth or not overlap(a, b), (a.shape, a.stride(), b.shape, b.stride())
        if a.stride()[-2] == b.stride()[-2] == 6:
            assert overlap(a, b) == truth or 3 in (a.dim(), b.dim()), (a.shape, a.stride(), b.shape, b.stride())
    assert min(found.values()) > 100


def plan_of(tokens=6):
    attn = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    return attn.plan(fl.Batch([tokens], kv=fl.DenseKV(1, tokens)))


@pytest.fixture
def launches(monkeypatch):
    seen, run = [], CpuExecutor.run
    monkeypatch.setattr(CpuExecutor, "run", lambda *args, **more: seen.append(1) or run(*args, **more))
    return seen


def test_results_over_inputs_are_refused(launches):
    plan, (q, k, v) = plan_of(), torch.randn(3, 6, 4, 16)
    out, want = torch.empty(6, 4, 16), plan.run(q, (k[None], v[None]))
    del launches[:]
    for _ in range(2):
        for name, x in (("q", q), ("k", k), ("v", v)):
            with pytest.raises(ValueError, match=f"out shares memory with {name}, which would be read after"):
                plan.run(q, (k[None], v[None]), out=x)
            with pytest.raises(ValueError, match=f"lse shares memory with {name}"):
                plan.run(q, (k[None], v[None]), lse=x.view(-1)[8:32].view(6, 4))
        with pytest.raises(ValueError, match="lse shares memory with out"):
            plan.run(q, (k[None], v[None]), out=out, lse=out.view(-1)[-24:].view(6, 4))
        plan.run(q, (k[None], v[None]), out=out)
        assert torch.equal(out, want)
        assert len(launches) == 0
    buffer = torch.empty(2 * 6 * 4 * 16)
    inside = buffer[: 6 * 64].view(6, 4, 16).copy_(q)
    for _ in range(2):
        assert torch.equal(plan.run(inside, (k[None], v[None]), out=buffer[6 * 64 :].view(6, 4, 16)), want)
        with pytest.raises(ValueError, match="out shares memory with q"):
            plan.run(inside, (k[None], v[None]), out=buffer[5 * 64 : 11 * 64].view(6, 4, 16))


@pytest.mark.parametrize("cut", ["last axis", "heads", "tokens"])
def test_slices_of_one_buffer_are_allowed(cut, launches):
    plan, parts = plan_of(), torch.randn(3, 6, 4, 16)
    want = plan.run(parts[0], (parts[1:2], parts[2:]))
    if cut == "last axis":
        views = torch.empty(6, 4, 64).split(16, 2)
    elif cut == "heads":
        views = torch.empty(6, 16, 16).split(4, 1)
    else:
        views = torch.empty(24, 4, 16).split(6, 0)
    for view, part in zip(views, parts):
        view.copy_(part)
    del launches[:]
    for _ in range(3):
        assert torch.equal(plan.run(views[0], (views[1][None], views[2][None]), out=views[3]), want)
    assert len(launches) == (cut != "tokens")  # such calls repeat each other, or one that was as far apart
