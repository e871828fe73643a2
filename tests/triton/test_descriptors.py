"""Products of kernels for Hopper read the tiles that they should, in machine code too: every width, type and hook."""

import random
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tests.triton.descriptors import VARIES, disassembled, faults, used, written

import flashloom as fl
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.triton import asked
from flashloom.attention.kernels.triton.asked import Form
from flashloom.attention.kernels.triton.config import Config, Need, candidates, choose, pieces, split
from flashloom.target import Target

triton = pytest.importorskip("triton", reason="Triton is not installed")
BF16, F16, F32, I8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

PTX = """
	mov.b32 	%r1, global_smem;
	add.s32 	%r2, %r1, 24576;
	bfe.u32 	%r3, %r2, 4, 14;
	cvt.u64.u32 	%rd1, %r3;
	or.b64 	%rd2, %rd1, 4611686293305294848;
	add.s64 	%rd3, %rd1, -9223371899415822334;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r9,%r10}, {%r11,%r12}, %rd2, %p1, 1, 1, 0;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r9,%r10}, {%r11,%r12}, %rd3, %p1, 1, 1, 0;
"""
MACHINE = """
        /*0000*/                   S2UR UR8, SR_CgaCtaId ;
        /*0010*/                   UMOV UR9, 0x400 ;
        /*0020*/                   ULEA UR9, UR8, UR9, 0x18 ;
        /*0030*/                   ULDC UR38, c[0x0][0x27c] ;
        /*0040*/                   UIADD3 UR7, UR9, 0x6000, URZ ;
        /*0050*/                   USHF.R.U32.HI UR7, URZ, 0x4, UR7 ;
        /*0060*/                   USGXT.U32 UR42, UR7, 0xe ;
        /*0070*/                   UMOV UR39, URZ ;
        /*0080*/                   {start}
        /*0090*/                   UIADD3 UR14, UP0, {first}, 0x2, URZ ;
        /*00a0*/                   UIADD3.X UR15, UR39, -0x7fffffe0, URZ, UP0, !UPT ;
        /*00b0*/                   UMOV UR43, 0x40000040 ;
.L_x_1:
        /*00c0*/                   HGMMA.64x64x16.F32 R24, R116, gdesc[UR40], RZ, !UPT ;
        /*00d0*/                   HGMMA.64x64x16.F32 R24, R120, gdesc[UR12], R24, gsb0 ;
        /*00e0*/                   {turn}
        /*00f0*/              @!P0 BRA `(.L_x_1) ;
        /*0100*/                   EXIT ;
"""


def machine(start="NOP ;", first="UR42", turn="NOP ;"):
    return MACHINE.format(start=start, first=first, turn=turn)


def test_descriptors_are_those_of_the_compiler():
    tile = (0x400 + 24576) >> 4
    assert written(PTX) == [[(tile, 0x40000040)], [(tile + 2, 0x80000020)]]
    assert [product[2] for product in used(machine())] == [(tile, 0x40000040), (tile + 2, 0x80000020)]
    assert faults(PTX, machine()) == []
    # by way of registers and the stack of a thread
    assert faults(PTX, machine("MOV R9, UR42 ;", turn="R2UR UR42, R9 ;")) == []
    through = "IMAD.U32 R9, RZ, RZ, UR42 ;\n /*0081*/ STL [R1+0x14], R9 ;\n /*0082*/ LDL R8, [R1+0x14] ;"
    assert faults(PTX, machine(f"{through}\n /*0083*/ R2UR UR38, R8 ;", "UR38")) == []
    # and where two registers are exchanged
    one, other = (f"ULOP3.LUT {x}, UR42, UR38, URZ, 0x3c, !UPT ;" for x in ("UR42", "UR38"))
    swap = f"{one}\n /*0081*/ {other}\n /*0082*/ {one}"
    assert faults(PTX, machine(f"{swap}\n /*0083*/ UMOV UR42, UR38 ;", "UR38")) == []
    assert faults(PTX, machine(swap))


@pytest.mark.parametrize(
    "other",
    [
        machine(first="UR38"),  # a number of the launch is still there
        machine(first="UR50"),  # nothing ever was
        machine("UMOV UR39, 0x1 ;"),
        machine("UIADD3 UR42, UR42, 0x40, URZ ;"),
        machine(turn="UIADD3 UR42, UR42, 0x1, URZ ;"),  # right in the first turn of the loop alone
        machine("@P1 UMOV UR42, 0x2 ;"),
        machine("R2UR UR42, R7 ;"),
        machine("LDL R8, [R1+0x18] ;\n /*0081*/ R2UR UR42, R8 ;"),
        machine().replace("EXIT", "HGMMA.64x64x16.F32 R24, R120, gdesc[UR12], R24 ;\n /*0101*/ EXIT"),
    ],
)
def test_other_descriptors_are_found(other):
    assert faults(PTX, other)


def test_of_tiles_that_vary_the_layout_is_compared():
    ptx = PTX.replace("add.s32 	%r2, %r1, 24576", "ld.global.b32 	%r2, [%rd9]")
    assert [x[0][0] for x in written(ptx)] == [VARIES, VARIES]
    varying = machine("S2R R7, SR_TID.X ;\n /*0081*/ R2UR UR42, R7 ;")
    assert faults(ptx, varying) == []
    assert faults(ptx, varying.replace("-0x7fffffe0", "0x40000040"))


def swizzle(width):
    return min(width * 2, 128)


def test_tiles_that_share_an_address_have_one_swizzle():
    for dim, value_dim, keys, values in product(
        range(1, 300), (1, 8, 32, 40, 64, 80, 96, 160, 250), *[(False, True)] * 2
    ):
        parts = pieces(dim, value_dim, (keys, values), 64, 90)
        assert sum(parts[0]) >= dim
        assert sum(parts[1]) >= value_dim
        made = [width for part, own in zip(parts, (keys, values)) if own for width in part if width]
        assert len({swizzle(width) for width in made}) <= 1, (dim, value_dim, parts)
        # what goes to products as it lies is cut as ever, and so is all where products read registers
        assert keys or parts[0] == split(dim)
        assert values or parts[1] == split(value_dim)
        for block_m, capability in ((16, 90), (32, 90), (128, 80), (128, 100)):
            assert pieces(dim, value_dim, (keys, values), block_m, capability) == (split(dim), split(value_dim))


class KeyGain(fl.Variant):
    """Keys are computed, so that they pass through registers whatever their type."""

    gain: fl.PerKVHead

    def key_transform(self, k, at):
        return k * self.gain[at.kv_head]


VARIANTS = {
    "full": lambda heads: fl.full,
    "causal": lambda heads: fl.causal,
    "softcap": lambda heads: fl.causal & fl.softcap(20.0),
    "alibi": lambda heads: fl.alibi(heads.q_heads) & fl.causal,
    "rope": lambda heads: fl.rope(heads.dim // 2 * 2) & fl.causal,
    "turned": lambda heads: fl.rope(heads.dim // 2 * 2),
    "gain": lambda heads: KeyGain(gain=torch.ones(heads.kv_heads)) & fl.causal,
    "sigmoid": lambda heads: fl.sigmoid(0.0) & fl.causal,
}


def built(folder, job, name, aligned, page_size, config=None):
    """What is wrong with the products of a kernel for Hopper."""
    dim, value_dim, q_dtype, kv_dtype, longest = job
    heads = fl.HeadShape(4, 2, dim, value_dim)
    program = VARIANTS[name](heads).program.specialise(dim, value_dim)
    spec = AttentionSpec(heads, program, q_dtype, kv_dtype)
    need = asked.need(spec, longest, longest, page_size, 90)
    config = config or choose(need)
    kernel = asked.attend_kernel(spec, Form(spec.out_dtype, aligned=aligned), config, page_size, Target("sm90"))
    stages, _ = kernel.compile()
    (folder / "kernel.cubin").write_bytes(stages["cubin"])
    return len(written(stages["ptx"])), faults(stages["ptx"], disassembled(folder / "kernel.cubin"))


def drawn(seed, count):
    """Kernels at random: width, type, hooks, alignment, page size; and configs that a tuner might try."""
    draw = random.Random(seed)
    for _ in range(count):
        dim = draw.choice([draw.randrange(8, 257, 8), draw.randrange(1, 257)])
        value_dim = draw.choice([dim, dim, draw.randrange(8, 257, 8)])
        kv_dtype = draw.choice([E4M3, E5M2, I8, BF16, F16])
        q_dtype = kv_dtype if kv_dtype.itemsize == 2 else draw.choice([BF16, F16])
        longest = draw.choice([9, 17, 64, 300])
        vector = 16 // kv_dtype.itemsize
        aligned = dim % vector == 0 and value_dim % vector == 0
        config = None
        if draw.random() < 0.4:
            need = Need(2, 2, dim, value_dim, 2, kv_dtype.itemsize, 2 * longest, 2 * longest, 16, 90)
            config = draw.choice([c for c in candidates(need) if c.block_m >= 64] or [None])
        job = (dim, value_dim, q_dtype, kv_dtype, longest)
        yield (
            job,
            draw.choice([x for x in VARIANTS if x not in ("rope", "turned") or dim > 1]),
            aligned,
            draw.choice([0, 1, 16, 64]),
            config,
        )


# every way in which widths are cut, for each type that is converted
WIDTHS = [(80, 80), (96, 96), (160, 160), (64, 32), (128, 80), (32, 64), (24, 24), (256, 256)]
LISTED = [
    *[((*widths, BF16, kv, 300), "causal", True, 16, None) for widths, kv in zip(WIDTHS, [E4M3, E5M2, I8] * 3)],
    *[((*widths, BF16, E4M3, 17), "full", True, 1, None) for widths in WIDTHS[:3]],
    *[((96, 96, BF16, kv, 300), name, True, 16, None) for name, kv in (("rope", BF16), ("gain", E4M3))],
    ((80, 128, F16, F16, 300), "turned", True, 0, None),
]


def test_products_read_the_tiles_that_the_compiler_meant(tmp_path):
    jobs = [*LISTED, *drawn(0, 16)]
    products = 0
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = []
        for i, job in enumerate(jobs):
            (tmp_path / str(i)).mkdir()
            results.append(pool.submit(built, tmp_path / str(i), *job))
        for job, result in zip(jobs, results):
            count, wrong = result.result()
            products += count
            assert not wrong, f"{job}: {len(wrong)} of {count} products, {wrong[0]}"
    assert products > 400


def test_the_check_sees_an_assembler_that_loses_addresses(tmp_path, monkeypatch):
    """Tiles of two swizzles at one address, as kernels had them before widths were cut for it."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    version = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True).stdout
    if not re.search(r"release 12\.8", version):
        pytest.skip("this fault is of ptxas 12.8")
    monkeypatch.setattr(asked, "pieces", lambda dim, value_dim, *rest: (split(dim), split(value_dim)))
    config = Config(64, 64, 4, 3, 2)
    for kv_dtype in (E4M3, I8):
        count, wrong = built(tmp_path, (96, 96, BF16, kv_dtype, 17), "causal", True, 16, config)
        assert 0 < len(wrong) < count
