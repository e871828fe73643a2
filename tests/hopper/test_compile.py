"""The Hopper kernel compiled for sm_90 without a GPU: what the binary must look like."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.hopper.listing import in_memory, innermost_loops
from tests.triton.descriptors import disassembled, faults

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.executor import AttentionSpec
from flashloom.target import Target

triton = pytest.importorskip("triton", reason="Triton is not installed")

from flashloom.attention.kernels.hopper import asked, config  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16, F16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
H = fl.HeadShape
NEWER = not triton.__version__.startswith("3.6.")  # the kernels were fitted to 3.6's assembler; 3.7.1 keeps two numbers


@dataclass(frozen=True)
class Kernel:
    """One binary: wgmma instructions are those of the first tile, the loops and the last values, for each consumer."""

    name: str
    heads: fl.HeadShape
    variant: fl.Variant
    dtype: torch.dtype = BF16
    page_size: int = 0
    mean_q_len: int = 1024
    out: torch.dtype | None = None
    stack: int = 0  # bytes that may be kept there: numbers of the whole kernel, read again once per tile
    cut: bool = False  # joins ranges of keys
    masked: int = 0  # how often a loop that asks the mask may read or write there, for each of its key tiles

    def __str__(self) -> str:
        return self.name

    @property
    def loops(self) -> int:
        """Over key tiles, of each consumer: where the mask is asked, and where it need not be."""
        return 1 if self.variant.program.mask is None else 2

    def products(self, chosen: config.Config) -> int:
        dim, value_dim = config.width(self.heads.dim), config.width(self.heads.value_dim)
        if self.dtype == E4M3:
            return chosen.consumers * (1 + self.loops) * (dim // 32 + chosen.block_n // 32)
        keys, values = dim // 16, chosen.block_n // 16
        return chosen.consumers * ((1 + self.loops) * (keys + values)) * max(1, value_dim // 256)


class Warm(fl.Variant):
    gain: fl.PerHead

    def query_transform(self, q, at):
        return q * self.gain[at.q_head]


DOCUMENTS = fl.document_mask(torch.zeros(9, dtype=torch.int32))
KERNELS = [
    Kernel("causal", H(32, 8, 128), fl.causal),
    Kernel("full, float16, pages of 16", H(32, 8, 128), fl.full, F16, page_size=16, stack=NEWER * 8),
    Kernel("narrow, window, soft cap", H(8, 8, 64), fl.causal & fl.sliding_window(255) & fl.softcap(30.0)),
    Kernel("narrow, three consumers", H(8, 8, 64), fl.causal & fl.sliding_window(255), mean_q_len=4096, stack=64),
    Kernel("wide", H(8, 8, 256), fl.causal, stack=16),
    Kernel("keys wider than values, sink", H(8, 8, 192, 128), fl.causal & fl.sink(torch.zeros(8))),
    Kernel("ALiBi into float32", H(16, 16, 128), fl.causal & fl.alibi(16), out=torch.float32, stack=128),
    Kernel("soft cap", H(32, 8, 128), fl.causal & fl.softcap(30.0), stack=16, masked=2 * (not NEWER)),
    Kernel("pages of 1", H(32, 8, 128), fl.causal, page_size=1, stack=40),
    Kernel("pages of 3, documents", H(32, 8, 128), fl.causal & DOCUMENTS, page_size=3, stack=168, masked=6 + 3 * NEWER),
    Kernel(
        "packed heads, query transform",
        H(32, 8, 128),
        Warm(gain=torch.ones(32)) & fl.causal,
        page_size=64,
        mean_q_len=60,
    ),
    Kernel("8 bits, causal", H(32, 8, 128), fl.causal, E4M3, stack=48),  # 32 with Triton 3.6, 48 with 3.7
    Kernel("8 bits, narrow, pages of 16", H(8, 8, 64), fl.full, E4M3, page_size=16, stack=64),
    Kernel("split keys", H(32, 8, 128), fl.causal, cut=True),
    Kernel("split keys, pages of 16", H(32, 8, 128), fl.causal, page_size=16, mean_q_len=64, cut=True),
    Kernel("split keys, pages of 1", H(32, 8, 128), fl.causal, page_size=1, mean_q_len=64, stack=40, cut=True),
    Kernel("split keys, wide", H(8, 8, 256), fl.causal, stack=40 + NEWER * 56, cut=True),
    Kernel("split keys, 8 bits", H(32, 8, 128), fl.causal, E4M3, stack=96, cut=True),
]


def test_narrow_heads_have_a_third_consumer_where_it_pays():
    def consumers(variant, mean_q_len, invariant=False):
        heads = H(8, 8, 64)
        spec = AttentionSpec(heads, variant.program.specialise(64, 64), BF16, BF16, batch_invariant=invariant)
        return asked.choose(spec, mean_q_len, 0).consumers

    assert [consumers(fl.full, n) for n in (16, 4096)] == [3, 3]
    assert [consumers(fl.causal, n) for n in (16, 1024, 4096)] == [2, 2, 3]
    assert consumers(fl.causal, 4096, invariant=True) == 2
    assert consumers(fl.causal & DOCUMENTS, 4096) == consumers(fl.softcap(30.0), 4096) == 2


def test_kernels_of_a_plan():
    """Packs hold the Hopper kernel, and the Triton kernels for batches and tensors that it leaves to them."""
    heads = H(32, 8, 128)
    spec = AttentionSpec(heads, fl.causal.program.specialise(128, 128), BF16, BF16)

    def kinds(target, mean, page_size):
        kernels = dispatch.kernels(spec, Target(target), 2048, mean, page_size)
        return {type(kernel).__name__ for kernel in kernels}

    for page_size in (0, 1, 3, 16):
        assert kinds("sm90", 500, page_size) == {"GluonKernel", "TritonKernel"}
    for other in (("sm90", 1, 16), ("sm80", 500, 16), ("sm100", 500, 16)):
        assert kinds(*other) == {"TritonKernel"}


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [8, 24, 256])
def test_maps_of_pages_in_chunks(page_size, layout):
    """What the maps of keys and values show is the tensor, also where rows have something beside them."""
    found = set()
    for pages, heads, dim, beside in itertools.product((1, 3), (1, 2, 3), (128, 256), (0, 8, 64)):
        middle = (page_size, heads) if layout == "NHD" else (heads, page_size)
        x = torch.arange(pages * heads * page_size * (dim + beside)).view(pages, *middle, dim + beside)[..., :dim]
        x = x if layout == "NHD" else x.transpose(1, 2)
        made = asked.chunk_map(tuple(x.shape), x.stride()[:3])
        found.add(made is not None)
        assert (made is None) == (heads > 1 and layout == "NHD" and beside > 0)
        if made is not None:
            sizes, strides, (groups, chunks) = made
            seen = x.as_strided(sizes, (*strides, 1))
            for head in range(heads):
                part = seen[:, head * groups :, head * chunks :][:, : page_size // 8, : dim // 64].transpose(2, 3)
                assert torch.equal(part.reshape(pages, page_size, dim), x[:, :, head])
    assert True in found


@pytest.mark.parametrize("variant", [fl.sigmoid(-1.0), fl.rope(64)], ids=str)
def test_variants_for_the_triton_kernels(variant):
    spec = AttentionSpec(H(2, 2, 64), variant.program.specialise(64, 64), F16, F16)
    assert re.search("without softmax|key transforms", asked.unsuitable(spec) or "")


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_binary(kernel, tmp_path):
    heads = kernel.heads
    program = kernel.variant.program.specialise(heads.dim, heads.value_dim)
    spec = AttentionSpec(heads, program, kernel.dtype, kernel.dtype)
    assert asked.unsuitable(spec) is None
    chosen = asked.choose(spec, kernel.mean_q_len, kernel.page_size)
    form = replace(asked.usual(spec, chosen, kernel.page_size, kernel.cut), out_dtype=kernel.out or spec.out_dtype)
    byte = kernel.dtype == E4M3
    stages, metadata = asked.attend_kernel(spec, form, chosen, kernel.page_size, Target("sm90")).compile()
    by_rows = chosen.box == 1  # four warps of their own for that
    assert metadata["num_warps"] == 4 * (chosen.consumers + 1 + byte + by_rows)
    assert metadata["shared"] <= 227 << 10
    assert not metadata["global_scratch_size"]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(stages["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(rf"REG:{128 if chosen.consumers == 3 or byte or by_rows else 168} STACK:(\d+) .*LOCAL:0", usage)
    assert found, usage
    assert int(found[1]) <= kernel.stack, f"registers are spilled: {usage}"
    sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    assert bool(re.search(r"\b(LDL|STL)\b", sass)) <= bool(kernel.stack)
    assert len(re.findall(rf"\b{'Q' if byte else 'H'}GMMA\b", sass)) == kernel.products(chosen)
    assert not faults(stages["ptx"], disassembled(cubin)), "products read other tiles than the compiler meant"
    loops = innermost_loops(sass, "HGMMA", "QGMMA")
    assert len(loops) == chosen.consumers * kernel.loops
    kept = sorted(map(in_memory, loops))  # loops without a mask keep none
    assert not any(kept[: chosen.consumers]), f"loops over key tiles keep numbers in memory: {kept}"
    assert kept[-1] <= kernel.masked, f"loops over key tiles keep numbers in memory: {kept}"
    if byte:  # values are transposed by matrix loads and stores, and nothing else takes bytes apart
        stores = config.width(heads.value_dim) * chosen.block_n // 2048
        assert len(re.findall(r"\bLDSM\.16\.MT88\.4\b", sass)) == stores
        assert len(re.findall(r"\bSTSM\.16\.M88\.4\b", sass)) == stores
        assert len(re.findall(r"\bPRMT\b", sass)) <= 6 * stores
        assert sum(map(in_memory, innermost_loops(sass, "LDSM"))) <= 1
    if form.chunked:  # a copy brings all columns of a page
        assert len(re.findall(r"\bUTMALDG\.5D\b", sass)) == 2 * chosen.block_n // chosen.box
    if by_rows:  # each of 128 threads copies so many vectors of keys and of values, and does little else
        vectors = chosen.block_n * (config.width(heads.dim) + config.width(heads.value_dim)) // 8 // 128
        code = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z]\w*)", sass)
        copies = [i for i, name in enumerate(code) if name == "LDGSTS"]
        assert len(copies) == vectors
        assert copies[-1] - copies[0] < 5 * vectors
        assert not any(map(in_memory, innermost_loops(sass, "LDGSTS")))
    assert len(re.findall(r"\bUSETMAXREG\b", sass)) >= 4, "the assembler ignored the consumers' registers"


class Halved(fl.Variant):
    def output_transform(self, out, lse, at):
        return out * 0.5


MENDED = [
    ("causal", H(32, 8, 128), fl.causal, BF16, 16, BF16),
    ("soft cap into float32", H(32, 8, 128), fl.causal & fl.softcap(30.0), BF16, 0, torch.float32),
    ("odd widths", H(8, 4, 80, 96), fl.causal & fl.sliding_window(9), F16, 3, F16),
    ("8 bits", H(32, 8, 128), fl.causal, E4M3, 16, BF16),
    ("output transform", H(8, 8, 64), fl.causal & Halved(), BF16, 1, BF16),
    ("query transform", H(8, 8, 64), fl.causal & Warm(gain=torch.ones(8)), BF16, 16, BF16),
]


@pytest.mark.parametrize("mended", MENDED, ids=lambda mended: mended[0])
def test_the_kernel_that_mends(mended):
    """Triton's interpreter runs it in other tests, and takes what its compiler refuses."""
    _, heads, variant, dtype, page_size, out = mended
    spec = AttentionSpec(heads, variant.program.specialise(heads.dim, heads.value_dim), dtype, dtype)
    chosen = asked.choose(spec, 2048, page_size)
    stages, metadata = asked.mend_kernel(spec, out, chosen, page_size, Target("sm90")).compile()
    assert metadata["num_warps"] == 4
    assert not metadata["global_scratch_size"]
    assert stages["cubin"]
