"""The planner's items for the Hopper kernel in the interpreter; `test_plan.py` runs this with TRITON_INTERPRET=1."""

import random
from types import SimpleNamespace

import torch

from flashloom.attention.kernels.triton.plan import plan
from flashloom.attention.triton_buffers import Sizes

ROWS, KEYS = 128, 64


def items_of(
    q_lens: list[int], kv_lens: list[int], light: int, *, pack: int = 4, heads: int = 2, programs: int = 8,
    least: int = 1, fixed: int = 1 << 30, room: int = 64,
) -> torch.Tensor:  # fmt: skip
    """The items int32 [*, 16] of a ragged batch: tiles of ROWS x KEYS, `heads` groups of `pack` heads."""
    n = len(q_lens)
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    kv = torch.tensor(kv_lens, dtype=torch.int32)
    entries = torch.arange(n + 1, dtype=torch.int32)
    items = torch.full((room, 16), -7, dtype=torch.int32)
    stride = -(-n // 128) * 128
    scratch, error = torch.zeros(8 * stride, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    grid = -(-room // 128)
    plan[(grid,)](
        q_indptr, kv, entries, entries, items, items, scratch, error, n, stride, room, 1 << 20, 0, 1 << 30, n, 1 << 30,
        programs, least, fixed, 1.0, grid, GROUP=pack, KV_HEADS=heads, BLOCK_M=ROWS, BLOCK_N=KEYS, PAGED=False,
        LIGHT=light, CUT=fixed == 0,
    )  # fmt: skip
    assert not error.any(), error
    return items[items[:, 0] >= 0]


def check_ranges(seed: int) -> int:
    """A random batch: every block's ranges are its keys, each once; partial states have slots of their own, within what
    is allocated; longer ranges come first, of either kind. Answers how many items are one of several ranges."""
    rng = random.Random(seed)
    n = rng.choice((1, 1, 2, 3, 6, 20, 140, 600))
    q_lens = [rng.choice((0, 1, 9, 40, 150, 400)[: 6 if n < 100 else 4]) for _ in range(n)]
    kv_lens = [int(20000 ** rng.random()) if n < 100 else rng.randrange(400) for _ in range(n)]
    pack, heads, programs = rng.choice((1, 2, 8)), rng.choice((1, 4, 8)), rng.choice((8, 132))
    config = SimpleNamespace(block_m=ROWS)
    sizes = Sizes.of(pack, heads, config, programs, n, sum(q_lens), 0, 0).halved()  # type: ignore[arg-type]
    items = items_of(
        q_lens, kv_lens, 64, pack=pack, heads=heads, programs=programs, least=rng.choice((1, 4)), fixed=0,
        room=max(sizes.items, 1),
    )  # fmt: skip
    left = {(r, row): kv_lens[r] for r in range(n) for row in range(0, q_lens[r] * pack, ROWS)}
    slots: set[int] = set()
    lengths: list[tuple[bool, int]] = []
    for request, _, q_len, kv_len, _, row, low, high, _, _, pieces, split, slot, *_ in items.tolist():
        assert (q_len, kv_len) == (q_lens[request], kv_lens[request])
        left[request, row] -= high - low
        assert 0 <= split < pieces
        assert low % KEYS == 0
        assert high == kv_len if split + 1 == pieces else (high - low) * (split + 1) == high > low
        lengths.append((q_len * pack > 64, -((high - low + KEYS - 1) // KEYS or 1)))
        if pieces > 1:
            assert slot + split not in slots
            slots.add(slot + split)
    assert not any(left.values())
    assert len(items) == len(lengths) >= len(left)
    assert all(0 <= slot < sizes.slots for slot in slots)
    if n <= 512:
        assert lengths == sorted(lengths), lengths
    return len(slots)


mixed = items_of([100, 1, 16, 17, 1], [100, 900, 300, 5000, 2000], 64)
assert mixed[:, 0].tolist() == [4, 1, 2, 3, 0, 0, 0, 0], mixed[:, 0]  # few rows first, then the others, longest first
assert (mixed[:, 14] == 8).all()
assert (mixed[:, 15] == 3).all()
alone = items_of([100, 200], [100, 900], 64)
assert alone[:, 0].tolist() == [1] * 7 + [0] * 4
assert (alone[:, 14] == 11).all()
assert (alone[:, 15] == 0).all()
assert items_of([1, 100], [50, 900], 0)[0, 0] == 1  # not asked for: by length alone
cut = [check_ranges(seed) for seed in range(60)]
assert sum(n > 0 for n in cut) > 10, cut
print("ok")
