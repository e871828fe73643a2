"""Random batches for the Hopper kernel whose keys are split: few rows on many keys, of lengths that differ."""

from __future__ import annotations

import random

from tests.triton.cases import BF16, E4M3, F16, Case, H, alibi, causal, documents, gemma, holes, sinks, window

HEADS = (H(4, 1, 128), H(8, 2, 64), H(2, 2, 128), H(6, 2, 128), H(8, 4, 80), H(4, 2, 256), H(4, 4, 192, 128))
VARIANTS = (None, causal, causal, causal, window, gemma, alibi, sinks, holes, documents)


def drawn(seed: int, longest: int) -> Case:
    """One case with up to so many keys in a request."""
    rng = random.Random(seed)
    requests = rng.choice((1, 1, 2, 3, 5))
    kv_lens = [int(longest ** rng.uniform(0.5, 1)) for _ in range(requests)]
    kv_lens[rng.randrange(requests)] = rng.randint(longest // 2, longest)
    q_lens = [min(rng.choice((1, 7, 16, 33, 64, 100, 130, 200)), n) for n in kv_lens]
    if requests > 1 and rng.random() < 0.2:
        kv_lens[0] = q_lens[0] = 0
    kind = rng.choice(("paged", "paged", "ragged", "dense"))
    heads, dtype = rng.choice(HEADS), rng.choice((BF16, BF16, F16, E4M3))
    if dtype == E4M3 and max(heads.dim, heads.value_dim) > 128:
        dtype = BF16
    page_size, layout = rng.choice((1, 3, 8, 16, 64)), rng.choice(("NHD", "HND"))
    return Case(
        q_lens, kv_lens, heads, dtype, kind=kind, page_size=page_size, layout=layout, variant=rng.choice(VARIANTS),
        on_device=kind == "paged" and rng.random() < 0.5, partial=rng.random() < 0.2,
    )  # fmt: skip
