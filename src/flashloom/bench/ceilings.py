"""What the machine can do at most, timed in the same rounds as the kernels: reading memory, and a plain matrix
product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flashloom.attention.cpu import HEADERS
from flashloom.kernel.cpp import build
from flashloom.target import Target

MATMUL = 1536  # rows and columns: large enough for the matrix unit's full rate, small enough to stay in L2 and L3


def reader(*tensors: Tensor) -> tuple[Callable[[], int], int]:
    """A call that reads the tensors' memory with all of torch's threads, and the bytes that it reads. CPU, contiguous
    tensors.

    Raises NoCompiler where there is none.
    """
    here = Path(__file__).with_name("read.cpp")
    read = build(here.read_text(), [HEADERS], Target.here(), {}, "read_bytes").get_function("read_bytes", 3)
    spans = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors]
    threads = torch.get_num_threads()

    def call() -> int:
        word = 0
        for address, size in spans:
            word ^= read(address, size, threads)
        return word

    return call, sum(size & ~0xFFFF for _, size in spans)


def matmul(dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A square matrix product of random numbers in `dtype`, and its flops: on AMX the matrix unit's practical peak."""
    a, b = (torch.randn(MATMUL, MATMUL).to(dtype) for _ in range(2))
    out = torch.empty(MATMUL, MATMUL, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * MATMUL**3
