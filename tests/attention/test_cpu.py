"""The CPU kernels against the float64 definition: every dtype, odd shapes, every variant hook, every target that this
machine runs (by forcing it), and clean under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import flashloom as fl
from flashloom import dispatch, settings
from flashloom.attention import cpu
from flashloom.attention.reference import attention_reference
from flashloom.target import CPU_TARGETS, Target

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}  # relative, in norm

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


class ScaledQuery(fl.Variant):
    """A query transform that rounds differently in bfloat16."""

    factor: float

    def query_transform(self, q, at):
        return q * self.factor


class PairBias(fl.Variant):
    """A two-dimensional tensor, indexed by both positions."""

    table: fl.PerHead

    def logits_transform(self, logits, at):
        return logits + self.table[at.q_head] * torch.sin(at.kv_pos * 0.1)


@dataclass
class Case:
    """Shapes, dtypes and variant of one comparison."""

    variant: fl.Variant = fl.causal
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    heads: tuple[int, int] = (8, 2)
    dim: int = 64
    value_dim: int | None = None
    page: int = 16
    layout: str = "NHD"
    scales: bool = False
    q_lens: list[int] = field(default_factory=lambda: [5, 1, 70, 0, 3, 2])
    kv_lens: list[int] = field(default_factory=lambda: [100, 1333, 200, 7, 2, 0])
    seed: int = 0


@dataclass
class Problem:
    """A case's tensors; what a kernel must not read is NaN."""

    attention: fl.Attention
    batch: fl.Batch
    q: torch.Tensor
    kv: tuple
    variant: fl.Variant
    layout: str

    def expected(self, partial: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        k, v, *scales = self.kv
        ks, vs = scales or (None, None)
        return attention_reference(
            self.q, k, v, self.batch, self.variant, layout=self.layout, k_scale=ks, v_scale=vs, partial=partial
        )


def problem(case: Case, batch_invariant: bool = False) -> Problem:
    torch.manual_seed(case.seed)
    kv_dtype = case.kv_dtype or case.dtype
    value_dim = case.value_dim or case.dim
    counts = [-(-n // case.page) for n in case.kv_lens]
    total = sum(counts) + 2
    pages = torch.randperm(total)[: sum(counts)].int()
    indptr = [0, *torch.tensor(counts).cumsum(0).tolist()]

    def storage(width: int) -> torch.Tensor:
        x = torch.randn(total, case.page, case.heads[1], width) * (30 if kv_dtype == torch.int8 else 1)
        x = x.clamp(-120, 120)
        if kv_dtype.is_floating_point and kv_dtype.itemsize > 1:  # unused tokens hold what must not be seen
            used = torch.zeros(total, case.page, dtype=torch.bool)
            for i, n in enumerate(case.kv_lens):
                flat = pages[indptr[i] : indptr[i + 1]].long()[:, None].expand(-1, case.page)
                used[flat.reshape(-1)[:n], torch.arange(case.page).repeat(counts[i])[:n]] = True
            x[~used] = torch.nan
        x = x.to(kv_dtype)
        return x.transpose(1, 2).contiguous() if case.layout == "HND" else x

    last = [n - (c - 1) * case.page if n else 0 for n, c in zip(case.kv_lens, counts)]
    table = fl.PageTable.from_csr(indptr, pages, last, page_size=case.page)
    kv: tuple = (storage(case.dim), storage(value_dim))
    if case.scales:
        kv = (*kv, torch.rand(total, case.heads[1]) + 0.5, torch.rand(case.heads[1]) + 0.5)
    heads = fl.HeadShape(*case.heads, case.dim, value_dim)
    attention = fl.Attention(
        heads,
        variant=case.variant,
        dtype=case.dtype,
        kv_dtype=kv_dtype,
        layout=case.layout,
        device="cpu",
        batch_invariant=batch_invariant,
    )
    q = torch.randn(sum(case.q_lens), case.heads[0], case.dim).to(case.dtype)
    return Problem(attention, fl.Batch(q_lens=case.q_lens, kv=table), q, kv, case.variant, case.layout)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert not got.isnan().any()
    error = float((got.double() - want).norm() / want.norm())
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def compare(case: Case, partial: bool = False) -> None:
    p = problem(case)
    softmax = case.variant.program.softmax
    with dispatch.only("cpu"):
        plan = p.attention.plan(p.batch)
    got = plan.run(p.q, p.kv, return_lse=softmax, partial=partial)
    out, lse = got if softmax else (got, None)
    want, want_lse = p.expected(partial)
    close(out, want, case.dtype)
    if lse is not None and want_lse is not None:
        empty = want_lse == -torch.inf
        assert torch.equal(empty, lse == -torch.inf)
        # matrix units round transformed queries, and float16 keys, to bfloat16
        assert float((lse[~empty] - want_lse[~empty]).abs().max()) < (1e-4 if case.dtype == torch.float32 else 1e-2)
    assert torch.equal(plan.run(p.q, p.kv, partial=partial), out)  # the same bits again


@pytest.fixture(autouse=True)
def _used_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch begins as NaN: no kernel may rely on what it holds."""
    monkeypatch.setattr(cpu.SPARE, "take", lambda size: np.full(size, 255, dtype=np.uint8))


CASES = {
    "float32": Case(),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "odd": Case(dim=7, value_dim=9, page=3, heads=(5, 5)),
    "hnd": Case(fl.full, dim=80, value_dim=48, page=7, layout="HND", heads=(6, 2), dtype=torch.bfloat16),
    "window": Case(fl.causal & fl.sliding_window(33) & fl.softcap(20.0), dim=96, page=1),
    "e4m3": Case(dtype=torch.bfloat16, kv_dtype=E4M3, scales=True, dim=128),
}


@pytest.mark.parametrize("target", [name for name in CPU_TARGETS if name.startswith("x86")])
def test_kernels_compile_for_targets_that_do_not_run_here(target: str) -> None:
    if Target(target).supported:
        pytest.skip(f"this machine runs {target}: the tests below do more")
    for case in CASES.values():
        heads = fl.HeadShape(*case.heads, case.dim, case.value_dim)
        attn = fl.Attention(heads, variant=case.variant, dtype=case.dtype, kv_dtype=case.kv_dtype, device="cpu")
        assert cpu.kernel(attn.spec, Target(target)).entry().files


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", [name for name in CPU_TARGETS if name.startswith("x86")])
def test_targets(target: str, name: str) -> None:
    if not Target(target).supported:
        pytest.skip(f"this machine does not run {target}")
    before = settings.get().target
    fl.configure(target=target)
    try:
        compare(CASES[name])
    finally:
        fl.configure(target=before)


SHAPES = {
    "80": Case(dim=80, dtype=torch.bfloat16, heads=(4, 4)),
    "96": Case(dim=96, dtype=torch.bfloat16, page=32),
    "192/128": Case(dim=192, value_dim=128, dtype=torch.bfloat16, heads=(16, 2)),
    "256": Case(dim=256, heads=(6, 2)),
    "576/512": Case(dim=576, value_dim=512, heads=(16, 1), dtype=torch.bfloat16),
    "group 3": Case(heads=(9, 3), dtype=torch.bfloat16),
    "group 5": Case(heads=(5, 1)),
    "one head": Case(heads=(1, 1), dim=33, page=5),
    "long": Case(q_lens=[1, 2], kv_lens=[9000, 3000], dtype=torch.bfloat16, heads=(4, 2)),
    "prefill": Case(fl.full, q_lens=[300], kv_lens=[300], heads=(2, 1), dim=40),
    "q longer than kv": Case(q_lens=[20, 3], kv_lens=[5, 1]),
}
KV_DTYPES = {
    f"{str(q)[6:]} on {str(kv)[6:]}": Case(dtype=q, kv_dtype=kv, scales=True, page=page, dim=dim)
    for q in (torch.bfloat16, torch.float32)
    for kv, page, dim in ((E5M2, 16, 64), (torch.int8, 6, 96), (torch.float16, 16, 64), (E4M3, 16, 48))
}
FEW = {"dtype": torch.bfloat16, "kv_dtype": torch.int8, "q_lens": [1, 3, 1, 2, 0], "kv_lens": [100, 1333, 5000, 7, 9]}
KV_DTYPES["int8 decode"] = Case(dim=128, scales=True, **FEW)
KV_DTYPES["int8 decode, odd pages"] = Case(fl.causal & fl.rope(64), page=7, heads=(6, 2), value_dim=32, **FEW)
KV_DTYPES["int8 decode, a window"] = Case(fl.sliding_window(99, 0), heads=(8, 8), **FEW)
SLOPES = torch.linspace(-1, 1, 8)
VARIANTS = {
    "alibi": Case(fl.causal & fl.alibi(SLOPES.abs())),
    "sink": Case(fl.causal & fl.sink(SLOPES), dtype=torch.bfloat16),
    "sigmoid": Case(fl.causal & fl.sigmoid(-1.0)),
    "sigmoid decode": Case(fl.sigmoid(-1.0), q_lens=[1, 1], kv_lens=[2000, 30], dtype=torch.bfloat16),
    "rope": Case(fl.causal & fl.rope(64), dtype=torch.bfloat16),
    "query": Case(ScaledQuery(factor=0.7731), dtype=torch.bfloat16, q_lens=[1, 2, 1], kv_lens=[100, 700, 33]),
    "bias": Case(PairBias(table=SLOPES) & fl.sliding_window(40, 3), q_lens=[1, 30], kv_lens=[3000, 300]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    compare(SHAPES[name])


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, E5M2, torch.int8])
def test_scales_beyond_the_last_key(kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One short request: nothing has written to scratch before, whose bits stay NaN when rounded."""
    nan = np.array(np.nan, dtype=np.float32)
    monkeypatch.setattr(cpu.SPARE, "take", lambda size: np.full(-(-size // 4), nan).view(np.uint8))
    compare(Case(dtype=torch.bfloat16, kv_dtype=kv_dtype, scales=True, q_lens=[1], kv_lens=[5]))


@pytest.mark.parametrize("name", KV_DTYPES)
def test_kv_dtypes(name: str) -> None:
    compare(KV_DTYPES[name])


def test_int8_keys_and_odd_queries() -> None:
    """Queries become digits relative to their largest element, which may be 0, tiny, large or NaN."""
    p = problem(KV_DTYPES["int8 decode"])
    p.q[0, 1], p.q[0, 3] = 0.0, p.q[0, 3] * 1e-36
    p.q[2, 5, 7] = 1000.0
    want, _ = p.expected()
    plan = p.attention.plan(p.batch)
    close(plan.run(p.q, p.kv), want, torch.bfloat16)
    p.q[1, 2, 3] = torch.nan
    got = plan.run(p.q, p.kv)
    assert got[1, 2].isnan().all()
    got[1, 2] = want[1, 2]
    close(got, want, torch.bfloat16)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    compare(VARIANTS[name])
    compare(VARIANTS[name], partial=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype: torch.dtype) -> None:
    """Rows that begin at odd addresses, K and V of different strides, out and lse in the middle of something."""
    p = problem(Case(dtype=dtype))
    want, want_lse = p.expected()
    k, v = p.kv
    wide = torch.full((*k.shape[:-1], k.shape[-1] + 3), torch.nan, dtype=dtype)
    wide[..., 1 : 1 + k.shape[-1]] = k
    q = torch.zeros(p.q.shape[0], p.q.shape[1] + 1, p.q.shape[2] + 5, dtype=dtype)[:, 1:, 3:-2]
    q.copy_(p.q)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1] + 1, dtype=torch.float32)
    lse = torch.zeros(q.shape[1], q.shape[0]).T
    plan = p.attention.plan(p.batch)
    plan.run(q, (wide[..., 1:-2], v), out=out[..., 1:], lse=lse)
    close(out[..., 1:], want, dtype)
    assert (out[..., 0] == 0).all()
    seen = want_lse > -torch.inf
    assert float((lse[seen] - want_lse[seen]).abs().max()) < 1e-4


def test_repeated_runs() -> None:
    """A run takes over nothing from the one before that has changed: addresses, strides, dtypes, lse, scales."""
    p = problem(Case(fl.causal & fl.alibi(SLOPES.abs()), dtype=torch.bfloat16))
    plan = p.attention.plan(p.batch)
    want, want_lse = p.expected()
    wide = torch.zeros(p.q.shape[0], p.q.shape[1], 2 * p.q.shape[2], dtype=p.q.dtype)[..., : p.q.shape[2]]
    wide.copy_(p.q)
    half = torch.tensor([0.5])
    for _ in range(2):
        for q in (p.q, p.q.clone(), wide):
            for kv in (p.kv, tuple(x.clone() for x in p.kv)):
                close(plan.run(q, kv), want, torch.bfloat16)
                close(plan.run(q, kv, out=torch.empty(want.shape)), want, torch.bfloat16)
                _, lse = plan.run(q, kv, return_lse=True)
                assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
        close(plan.run(p.q, (*p.kv, torch.ones(1), half)), want * 0.5, torch.bfloat16)
        close(plan.run(p.q, (*p.kv, torch.ones(1), half * 2)), want, torch.bfloat16)
    q = p.q * 2
    close(plan.run(q, p.kv), attention_reference(q, *p.kv, p.batch, p.variant)[0], torch.bfloat16)


def test_far_apart() -> None:
    """Element offsets beyond 2^31: two pages at the ends of a large reserved array."""
    pages, page = 2, 16
    stride = 2**31 + 64
    store = torch.empty(stride + page * 2 * 32, dtype=torch.int8)  # only what is written becomes memory
    k = store.as_strided((pages, page, 2, 32), (stride, 64, 32, 1))
    k.copy_(torch.randint(-100, 100, k.shape))
    q = torch.randn(2, 4, 32)
    attention = fl.Attention(fl.HeadShape(4, 2, 32), dtype=torch.float32, kv_dtype=torch.int8, sm_scale=0.01)
    batch = fl.Batch(q_lens=[1, 1], kv=fl.PageTable.from_block_table([[1, 0], [0, 1]], [32, 20], page_size=page))
    want, _ = attention_reference(q, k, k, batch, sm_scale=0.01)
    close(attention.plan(batch).run(q, (k, k)), want, torch.float32)


def test_invariance() -> None:
    """With batch_invariant a request's bits do not depend on what else is in the batch."""
    case = Case(dtype=torch.bfloat16, q_lens=[1, 30, 1], kv_lens=[5000, 200, 64])
    p = problem(case, batch_invariant=True)
    together = p.attention.plan(p.batch).run(p.q, p.kv)
    indptr = p.batch.page_indptr
    for i, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens)):
        pages = p.batch.pages[indptr[i] : indptr[i + 1]]
        alone = fl.Batch(q_lens=[q_len], kv=fl.PageTable.from_block_table(pages[None], [kv_len], page_size=case.page))
        start = int(p.batch.q_indptr[i])
        rows = slice(start, start + q_len)
        assert torch.equal(p.attention.plan(alone).run(p.q[rows], p.kv), together[rows])


def test_threads_and_update() -> None:
    """The result does not depend on the number of threads beyond rounding, and update follows other lengths."""
    p = problem(Case())
    plan = p.attention.plan(p.batch)
    want, _ = p.expected()
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, threads):
            torch.set_num_threads(n)
            close(plan.run(p.q, p.kv), want, torch.float32)
    finally:
        torch.set_num_threads(threads)
    shorter = fl.Batch(q_lens=[2], kv=fl.PageTable.from_block_table(p.batch.pages[None, :2], [20], page_size=16))
    plan.update(shorter)
    want, _ = attention_reference(p.q[:2], *p.kv, shorter, p.variant)
    close(plan.run(p.q[:2], p.kv), want, torch.float32)


SANITIZED = """
import sys
sys.path.insert(0, {here!r})
from flashloom.kernel import cpp
cpp.FLAGS = tuple(f for f in cpp.FLAGS if f != "-O2") + (
    "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all")
import test_cpu
for case in {cases}:
    test_cpu.compare((test_cpu.CASES | test_cpu.SHAPES | test_cpu.KV_DTYPES | test_cpu.VARIANTS)[case])
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cases"),
    [
        ("x86", ["odd", "hnd"]),
        ("x86-avx2", ["odd", "float32", "bfloat16"]),
        ("x86-avx512", ["odd", "window", "bfloat16", "bfloat16 on int8"]),
        ("x86-amx", ["odd", "float32", "bfloat16", "e4m3", "hnd", "192/128", "group 3", "int8 decode", "rope"]),
    ],
)
def test_sanitized(target: str, cases: list[str], tmp_path: Path) -> None:
    """Kernels built with AddressSanitizer and UBSan read and write nothing that is not theirs."""
    if not Target(target).supported:
        pytest.skip(f"this machine does not run {target}")
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("g++ has no libasan here")
    code = SANITIZED.format(here=str(Path(__file__).parent), cases=cases)
    environment = os.environ | {
        "LD_PRELOAD": os.path.realpath(library),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FLASHLOOM_CACHE_DIR": str(tmp_path),
        "FLASHLOOM_TARGET": target,
    }
    fixed = ["setarch", platform.machine(), "-R"]  # AddressSanitizer's own memory has a place that others may be given
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    done = subprocess.run([*fixed, sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "clean" in done.stdout


def test_spare_buffers_can_come_back_while_one_is_taken():
    """Garbage collection ends plans at any point: a buffer comes back within take()."""
    import threading

    from flashloom.attention.cpu import _Spare

    spare = _Spare()

    class Returning(np.ndarray):
        @property
        def nbytes(self):
            spare.give(np.empty(8, dtype=np.uint8))
            return super().nbytes

    spare.give(np.empty(64, dtype=np.uint8).view(Returning))
    taken = []
    thread = threading.Thread(target=lambda: taken.append(spare.take(32)), daemon=True)
    thread.start()
    thread.join(120)
    assert [x.size for x in taken] == [64]
    assert [spare.take(8).size for _ in range(3)] == [8, 8, 8]
