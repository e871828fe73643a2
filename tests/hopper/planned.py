"""The planner's items for the Hopper kernel in the interpreter; `test_plan.py` runs this with TRITON_INTERPRET=1."""

import torch

from flashloom.attention.kernels.triton.plan import plan


def items_of(q_lens: list[int], kv_lens: list[int], light: int) -> torch.Tensor:
    """The items int32 [*, 16] of a ragged batch, rows of 128, tiles of 64 keys, 4 heads packed."""
    n, room = len(q_lens), 64
    q_indptr = torch.tensor([0, *q_lens]).cumsum(0).int()
    kv = torch.tensor(kv_lens, dtype=torch.int32)
    entries = torch.arange(n + 1, dtype=torch.int32)
    items = torch.full((room, 16), -7, dtype=torch.int32)
    scratch, error = torch.zeros(6 * 128, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    plan[(1,)](
        q_indptr, kv, entries, entries, items, items, scratch, error, n, 128, room, 4096, 0, 1 << 30, n, 1 << 30, 8,
        1, 1 << 30, 1.0, 1, GROUP=4, KV_HEADS=2, BLOCK_M=128, BLOCK_N=64, PAGED=False, LIGHT=light,
    )  # fmt: skip
    assert not error.any(), error
    return items[items[:, 0] >= 0]


mixed = items_of([100, 1, 16, 17, 1], [100, 900, 300, 5000, 2000], 64)
assert mixed[:, 0].tolist() == [4, 1, 2, 3, 0, 0, 0, 0], mixed[:, 0]  # few rows first, then the others, longest first
assert (mixed[:, 14] == 8).all()
assert (mixed[:, 15] == 3).all()
alone = items_of([100, 200], [100, 900], 64)
assert alone[:, 0].tolist() == [1] * 7 + [0] * 4
assert (alone[:, 14] == 11).all()
assert (alone[:, 15] == 0).all()
assert items_of([1, 100], [50, 900], 0)[0, 0] == 1  # not asked for: by length alone
print("ok")
