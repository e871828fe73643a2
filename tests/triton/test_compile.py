"""Kernels compile for GPUs that are not here, fit their shared memory and do not spill."""

import itertools
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import flashloom as fl
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.triton import asked
from flashloom.attention.kernels.triton.asked import Form
from flashloom.attention.kernels.triton.config import (
    Config,
    Need,
    candidates,
    choose,
    shared_bytes,
    shared_limit,
    split,
    valid,
)  # fmt: skip
from flashloom.attention.triton_append import append_kernel
from flashloom.attention.triton_blocks import Pattern
from flashloom.target import Target

triton = pytest.importorskip("triton", reason="Triton is not installed")
BF16, F16, F32, E4M3, I8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8
G = fl.HeadShape(32, 8, 128)
NARROW, ODD, WIDE = fl.HeadShape(8, 8, 64), fl.HeadShape(5, 1, 80), fl.HeadShape(8, 1, 256)
LATENT = fl.HeadShape.mla(128, 512, 64)
# capability, heads, variant, q dtype, kv dtype, longest q, page size (0: ragged or dense), requests
LISTED = [
    *[(90, G, "causal", BF16, BF16, q, page, 16) for q in (1, 1000) for page in (16, 0)],
    *[(90, h, v, BF16, BF16, q, page, 16) for h, v, q, page in (
        (G, "gemma", 1, 16), (G, "gemma", 1000, 0), (NARROW, "full", 1, 0), (NARROW, "causal", 1000, 16),
        (ODD, "gemma", 1, 16), (ODD, "causal", 1000, 0), (WIDE, "causal", 1, 16), (WIDE, "full", 1000, 0),
        (LATENT, "full", 1, 64), (LATENT, "causal", 1000, 16), (G, "alibi", 1000, 16), (G, "sink", 1, 16),
        (G, "sigmoid", 1000, 16), (G, "rope", 1, 16), (G, "prefix", 1000, 16))],
    *[(90, G, "causal", q, kv, n, 16, 64) for q, kv, n in (
        (F16, F16, 1), (F32, F32, 1), (F32, F32, 1000), (BF16, E4M3, 1), (BF16, E4M3, 1000), (F16, I8, 1))],
    *[(c, h, "causal", BF16, kv, q, 16, 16) for c in (80, 100) for h, kv, q in (
        (G, BF16, 1), (G, BF16, 1000), (G, E4M3, 1), (G, E4M3, 1000), (WIDE, BF16, 1000), (LATENT, BF16, 1))],
]  # fmt: skip
VARIANTS = {
    "full": lambda h: fl.full,
    "causal": lambda h: fl.causal,
    "gemma": lambda h: fl.causal & fl.sliding_window(4095) & fl.softcap(50.0),
    "alibi": lambda h: fl.alibi(h.q_heads) & fl.causal,
    "sink": lambda h: fl.causal & fl.sink(torch.zeros(h.q_heads)),
    "sigmoid": lambda h: fl.sigmoid(0.0) & fl.causal,
    "rope": lambda h: fl.rope(h.dim) & fl.causal,
    "prefix": lambda h: fl.prefix_lm(torch.zeros(4, dtype=torch.int32)),
}


def compiled(job):
    """(shared bytes, registers, bytes of stack per thread, limit of shared bytes, waits for products, products, loads
    of single bytes from shared memory)."""
    capability, heads, variant, q_dtype, kv_dtype, longest, page_size, requests = job
    program = VARIANTS[variant](heads).program.specialise(heads.dim, heads.value_dim)
    spec = AttentionSpec(heads, program, q_dtype, kv_dtype)
    config = choose(asked.need(spec, longest, longest, page_size, capability, requests))
    target = Target(f"sm{capability}")
    stages, metadata = asked.attend_kernel(spec, Form(spec.out_dtype), config, page_size, target).compile()
    file = Path(f"{metadata['name']}.cubin")
    file.write_bytes(stages["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", file)).groups()
    return metadata["shared"], int(registers), int(stack), shared_limit(capability), *_counts(file)


def _tool(name, *arguments):
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _counts(file):
    """(waits for products on Hopper, products, loads of single bytes from shared memory)."""
    code = _tool("nvdisasm", "-c", file)
    return code.count("WARPGROUP.DEPBAR"), code.count(" HGMMA."), code.count(" LDS.U8 ") + code.count(" LDS.S8 ")


def _check(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for i, job in enumerate(jobs):
            folder = tmp_path / str(i)
            folder.mkdir()
            folders.append((job, pool.submit(_in_folder, folder, job)))
        for job, result in folders:
            shared, registers, stack, limit, waits, products, single = result.result()
            assert shared <= limit, f"{job}: {shared} bytes of shared memory"
            # a few registers may be saved around the loops; what a loop uses must stay in registers
            assert stack <= 128 or job[1].latent_value, f"{job}: {stack} bytes of stack with {registers} registers"
            # the assembler waits for each product where it cannot see that those under way are left alone
            assert 2 * waits <= products, f"{job}: {waits} waits for {products} products"
            # a value of 8 bits must not be fetched alone, nor is it for decode; masks are
            assert single <= 8 or job[5] > 1 or job[4].itemsize > 1, f"{job}: {single} loads of single bytes"


def _in_folder(folder, job):
    import os

    os.chdir(folder)
    return compiled(job)


def test_the_planner_append_and_long_strides_compile_without_a_gpu():
    spec = AttentionSpec(G, fl.full.program, BF16, BF16)
    config = choose(asked.need(spec, 1, 1, 16, 80))
    for target in (Target("sm80"), Target("sm90")):
        for kernel in (
            asked.plan_kernel(spec, config, True, target),
            append_kernel(BF16, E4M3, 8, 128, 128, True, True, target),
            asked.attend_kernel(spec, Form(BF16, aligned=False, wide=True), config, 16, target),
        ):
            assert kernel.compile()[0]["cubin"]


def test_listed_kernels_compile_without_a_gpu(tmp_path, monkeypatch):
    """The limits keep the suite short."""
    assert sum(job[0] == 90 for job in LISTED) <= 120
    assert all(sum(job[0] == c for job in LISTED) <= 20 for c in (80, 100))
    _check(LISTED, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("dim", "parts"), [(16, (32, 0)), (64, (64, 0)), (80, (64, 32)), (96, (64, 32)), (112, (128, 0)), (192, (128,
    64)), (576, (512, 64))]
)  # fmt: skip
def test_split_of_widths(dim, parts):
    assert split(dim) == parts
    assert sum(parts) >= dim


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_every_need_has_a_valid_config(capability):
    for bytes_, dim, rows in itertools.product([(2, 2), (2, 1), (4, 4)], [16, 80, 128, 256, 576], [1, 40, 4000]):
        need = Need(4, 2, dim, dim, *bytes_, rows, rows, 16, capability)
        config = choose(need)
        assert isinstance(config, Config)
        assert valid(config, need), need
        assert shared_bytes(config, need) <= shared_limit(capability), need
        assert all(valid(c, need) for c in candidates(need)), need


def test_kernels_of_block_patterns_keep_copies_and_products_in_flight(tmp_path):
    """The list of visited tiles is read ahead, so that keys and values are still copied while others are multiplied."""
    program = fl.causal.program.specialise(128, 128)
    blocks = fl.BlockSparseKV(fl.RaggedKV([1000]), [0] + [1] * 8, [0], block_q=128, block_kv=64)
    pattern = Pattern(fl.Batch([1000], kv=blocks), torch.device("cpu"))
    spec = AttentionSpec(G, pattern.program(program), BF16, BF16, block_sparse=True)
    for page_size in (0, 16):
        config = choose(asked.need(spec, 1000, 1000, page_size, 90, 16))
        stages, metadata = asked.attend_kernel(spec, Form(BF16), config, page_size, Target("sm90"), program).compile()
        assert metadata["shared"] <= shared_limit(90)
        assert stages["ptx"].count("cp.async.cg") >= 3 * config.num_stages
        assert "st.local" not in stages["ptx"]
        (tmp_path / "kernel.cubin").write_bytes(stages["cubin"])
        waits, products, _ = _counts(tmp_path / "kernel.cubin")
        assert 2 * waits <= products, f"{waits} waits for {products} products"


def test_an_invariant_config_does_not_depend_on_the_batch():
    configs = {
        choose(Need(4, 2, 128, 128, 2, 2, rows, mean, 16, 90, invariant=True, pairs=pairs))
        for rows, mean, pairs in ((4, 4, 2), (4, 4, 4000), (9000, 5, 64), (9000, 9000, 2))
    }
    assert len(configs) == 1
