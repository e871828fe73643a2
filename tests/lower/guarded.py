"""CPU kernels of variants that reach, whose tensors lie at pages that cannot be touched; `test_reaching.py` runs this
file in a process of its own, which a read outside of a tensor ends."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from tests.lower.reaching import KINDS, reaching
from tests.triton.cases import F32, Case, H, check

from flashloom.attention.reads import Sizes

PAGE, kept = mmap.PAGESIZE, []
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def between_pages(x: torch.Tensor, end: bool) -> torch.Tensor:
    """A copy that begins where a page begins, or ends where one ends, with pages on both sides that cannot be read."""
    size = x.numel() * x.element_size()
    inner = -(-size // PAGE) * PAGE
    area = mmap.mmap(-1, inner + 2 * PAGE)
    kept.append(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    offset = PAGE + (inner - size if end else 0)
    moved = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    moved.copy_(x)
    for start in (address, address + PAGE + inner):
        assert libc.mprotect(start, PAGE, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
    return moved


def main() -> None:
    Sizes._check = lambda *_: None  # type: ignore[method-assign]  # as with lengths that only the device knows
    heads = H(4, 2, 32)
    for kind in sys.argv[1:] or KINDS:
        for end in (False, True):
            variant = reaching(kind, lambda x, end=end: between_pages(x, end))
            for q_lens, kv_lens in (([1, 1], [30, 70]), ([40, 5], [40, 70])):
                check(Case(q_lens, kv_lens, heads, F32, kind="ragged", variant=variant), "cpu", "cpu")
        print(kind, flush=True)


if __name__ == "__main__":
    main()
