"""Random cases that cross width, types, phase, pages and layout, on a GPU, where kernels of all backends compile and
run in many processes at once; and on the CPU."""

import itertools
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import pytest
import torch
from tests.triton import crossing

SECONDS = 40  # after which no case is begun: of those that come first, a quiet host gets through two of each width


def share(seed, first, step, count, until):
    """(runs, what failed, widths seen) of every `step`-th case from the first."""
    runs, wrong, widths = 0, [], set()
    for number in range(first, count, step):
        if time.monotonic() > until:
            break
        more, failed = crossing.failures(seed, [number], "cuda")
        runs, wrong = runs + more, wrong + failed
        widths.add(crossing.draw(seed, number).dim)
        if failed and ("CUDA error" in failed[0] or "illegal" in failed[0]):
            break
    return runs, wrong, widths


def crossed(seed, count, seconds=SECONDS):
    workers = max(1, min(10, (os.cpu_count() or 2) - 1))
    until = time.monotonic() + seconds
    runs, wrong, widths = 0, [], set()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(share, seed, i, workers, count, until) for i in range(workers)]
        for done in as_completed(shares):
            more, failed, seen = done.result()
            runs, wrong, widths = runs + more, wrong + failed, widths | seen
    return runs, wrong, widths


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_cases_on_a_gpu():
    """As many as there is time for: compiling takes most of it, and hosts differ."""
    runs, wrong, widths = crossed(0, 4 * len(crossing.WIDTHS))
    assert not wrong, f"{len(wrong)} failed:\n" + "\n".join(wrong[:10])
    assert runs >= len(widths) > 0
    print(f"{runs} runs, {len(widths)} widths")


def test_random_cases_are_what_they_say():
    """All widths come in turn, and every type meets every phase, kind of memory, page size and layout."""
    cases = [crossing.draw(0, i) for i in range(100 * len(crossing.WIDTHS))]
    for start in range(0, len(cases), len(crossing.WIDTHS)):
        turn = cases[start : start + len(crossing.WIDTHS)]
        assert sorted(case.dim for case in turn) == sorted(crossing.WIDTHS)
    seen = {((c.dtype, c.kv_dtype), c.phase, c.kind, c.layout) for c in cases}
    assert seen == set(itertools.product(crossing.TYPES, crossing.PHASES, ("paged", "ragged", "dense"), ("NHD", "HND")))
    for case in cases:
        for q_lens, kv_lens in case.lengths:
            assert sum(q_lens) == sum(case.lengths[0][0])
            assert all(1 <= q <= k for q, k in zip(q_lens, kv_lens))


WITNESSED = {"full": None, "causal": None, "window": 1, "softcap": 2.0, "alibi": torch.tensor([0.3]),
             "sink": torch.tensor([0.7])}  # fmt: skip


@pytest.mark.parametrize("variant", WITNESSED)
def test_the_witness_is_softmax_attention(variant):
    """Against sums written out, for one head and two queries beside the last of four keys."""
    number = WITNESSED[variant]
    q, k, v = (torch.randn(n, 1, 3, dtype=torch.float64) for n in (2, 4, 4))
    out, lse = crossing.witness(q, k, v, variant, number)
    for i in range(2):
        weights = []
        for j in range(4):
            score = sum(float(q[i, 0, c] * k[j, 0, c]) for c in range(3)) / 3**0.5
            if variant == "softcap":
                score = 2.0 * math.tanh(score / 2.0)
            if variant == "alibi":
                score += float(number) * (j - (i + 2))
            hidden = (variant != "full" and j > i + 2) or (variant == "window" and j < i + 2 - 1)
            weights.append(0.0 if hidden else math.exp(score))
        assert abs(float(lse[i, 0]) - math.log(sum(weights))) < 1e-9
        total = sum(weights) + (math.exp(float(number)) if variant == "sink" else 0.0)
        for c in range(3):
            want = sum(w * float(v[j, 0, c]) for j, w in enumerate(weights)) / total
            assert abs(float(out[i, 0, c]) - want) < 1e-9
