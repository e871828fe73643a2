"""The CPU kernels for 64-bit ARM, cross-compiled and run under qemu-user: the same vectors on another machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import flashloom as fl
from flashloom.attention import cpu
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.reference import attention_reference
from flashloom.kernel import cpp
from flashloom.target import Target

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
LINKING = ("-shared", "-fPIC", "-Wl,--as-needed")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(EMULATOR is None, reason="qemu-aarch64 (qemu-user) is not installed")
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "dim", "group"),
    [
        (torch.float32, torch.float32, 64, 4),
        (torch.bfloat16, torch.bfloat16, 40, 3),
        (torch.float16, torch.float8_e4m3fn, 7, 1),
    ],
    ids=str,
)
def test_kernel(dtype: torch.dtype, kv_dtype: torch.dtype, dim: int, group: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads, page = fl.HeadShape(2 * group, 2, dim), 5
    variant = fl.causal & fl.sliding_window(90) & fl.softcap(20.0)
    q_lens, kv_lens = [1, 21, 0, 3], [333, 40, 6, 2]
    counts = [-(-n // page) for n in kv_lens]
    pages = torch.randperm(sum(counts)).int()
    indptr = [0, *np.cumsum(counts).tolist()]
    last = [n - (c - 1) * page for n, c in zip(kv_lens, counts)]
    batch = fl.Batch(q_lens=q_lens, kv=fl.PageTable.from_csr(indptr, pages, last, page_size=page))
    q = torch.randn(sum(q_lens), heads.q_heads, dim).to(dtype)
    k, v = (torch.randn(sum(counts), page, 2, dim).to(kv_dtype) for _ in "kv")

    spec = AttentionSpec(heads, variant.program.specialise(dim, dim), dtype, kv_dtype)
    kernel = tmp_path / "kernel.inc"
    kernel.write_text(cpu.source(spec))
    flags = [f for f in cpp.FLAGS if f not in LINKING] + list(Target("aarch64").flags)
    main = Path(__file__).with_name("kernel_main.cpp")
    program = tmp_path / "kernel"
    command = [COMPILER, *flags, "-static", f'-DKERNEL="{kernel}"', f"-I{cpu.HEADERS}", str(main), "-o", str(program)]
    subprocess.run(command, check=True)

    words = bytes(cpu._Words(spec.program)._pack(variant.values))
    sizes = [sum(q_lens), heads.q_heads, 2, dim, dim, len(q_lens), len(pages), sum(counts), page]
    sizes += [dtype.itemsize, kv_dtype.itemsize, len(words) // 8]
    with open(tmp_path / "in", "wb") as file:
        file.write(np.array(sizes, np.int64).tobytes())
        file.write(words)
        for x in (batch.q_indptr, batch.kv_indptr, batch.kv_lens, batch.page_indptr, batch.pages, q, k, v):
            file.write(x.contiguous().view(torch.uint8).numpy().tobytes())
    subprocess.run([EMULATOR, str(program), str(tmp_path / "in"), str(tmp_path / "out")], check=True)

    result = torch.from_numpy(np.fromfile(tmp_path / "out", np.float32))
    count = sum(q_lens) * heads.q_heads
    out, lse = result[: count * dim].view(-1, heads.q_heads, dim), result[count * dim :].view(-1, heads.q_heads)
    want, want_lse = attention_reference(q, k, v, batch, variant, sm_scale=0.125)
    assert float((out.double() - want).norm() / want.norm()) < 2e-6
    seen = want_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    assert float((lse[seen] - want_lse[seen]).abs().max()) < 1e-4
