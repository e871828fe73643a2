"""ops.h against NumPy and torch in float64, compiled for every instruction set that this machine runs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from flashloom.target import CPU_TARGETS, Target

HEADERS = Path(__file__).parents[2] / "src" / "flashloom" / "attention" / "kernels" / "cpu"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Werror",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
]
N = 4096
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module", params=[name for name in CPU_TARGETS if name.startswith("x86")])
def lib(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = Target(request.param)
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if not target.supported:
        pytest.skip(f"this machine does not run {target}")
    path = tmp_path_factory.mktemp("ops") / "probe.so"
    source = Path(__file__).with_name("ops_probe.cpp")
    subprocess.run([COMPILER, *FLAGS, *target.flags, f"-I{HEADERS}", str(source), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def test_lanes(lib: ctypes.CDLL, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["lib"]
    assert lib.lanes() == {"x86": 4, "x86-avx2": 8}.get(name, 16)


EDGES = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e-40, 3e38, -3e38, 88.0, 89.0, -88.0, -104.0, np.inf, -np.inf, np.nan]
FUNCTIONS = {  # name: (torch function, sampled interval, allowed ulp)
    "exp": (torch.exp, (-104, 89), 2), "exp2": (torch.exp2, (-150, 128), 2), "log": (torch.log, (1e-3, 1e4), 2),
    "log2": (torch.log2, (1e-3, 1e4), 2), "tanh": (torch.tanh, (-10, 10), 4),
    "sigmoid": (torch.sigmoid, (-100, 100), 3), "sqrt": (torch.sqrt, (0, 1e6), 1),
    "rsqrt": (torch.rsqrt, (1e-3, 1e6), 2), "erf": (torch.erf, (-5, 5), 3), "sin": (torch.sin, (-1e6, 1e6), 2),
    "cos": (torch.cos, (-1e6, 1e6), 2), "floor": (torch.floor, (-1e5, 1e5), 0), "abs_": (torch.abs, (-9, 9), 0),
    "neg": (torch.neg, (-9, 9), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(lib: ctypes.CDLL, name: str) -> None:
    function, (low, high), ulps = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    wide, near = rng.uniform(low, high, N), rng.normal(size=N) * np.exp(rng.uniform(-12, 1, N))
    edges = [e for e in EDGES if name not in ("sin", "cos") or not 1e6 < abs(e) < np.inf]
    x = np.concatenate([wide, near, edges, np.zeros(-len(edges) % 16)]).astype(np.float32)
    want = function(torch.from_numpy(x.astype(np.float64))).numpy()
    for form in ("v", "s"):
        y = np.empty_like(x)
        getattr(lib, f"{form}_{name}")(pointer(x), pointer(y), len(x))
        with np.errstate(all="ignore"):
            rounded = want.astype(np.float32)
            unit = np.spacing(np.abs(rounded)).astype(np.float64)
            good = (np.abs(y.astype(np.float64) - want) <= (ulps + 0.5) * unit) | (rounded == y)
            good |= np.isnan(rounded) & np.isnan(y)
        assert good.all(), [(x[i], y[i], want[i]) for i in np.flatnonzero(~good)[:5]]


def test_fast_exp2(lib: ctypes.CDLL) -> None:
    x = np.concatenate([np.random.default_rng(1).uniform(-130, 8, N), [-np.inf] * 8, [np.nan] * 8]).astype(np.float32)
    y = np.empty_like(x)
    lib.v_fast_exp2(pointer(x), pointer(y), len(x))
    want = np.exp2(x.astype(np.float64))
    kept = x >= -126
    assert np.abs(y[kept] / want[kept] - 1).max() < 3e-7
    assert (y[x < -126] == 0).all()
    assert np.isnan(y[np.isnan(x)]).all()


WIDE = {n: f for n, (f, _, _) in FUNCTIONS.items() if n not in ("erf", "sin", "cos")}


@pytest.mark.parametrize("name", WIDE)
def test_function_of_doubles(lib: ctypes.CDLL, name: str) -> None:
    low, high = FUNCTIONS[name][1]
    x = np.concatenate([EDGES, np.random.default_rng(8).uniform(low, high, 1000)]).repeat(2)[: 2 * 1000]
    with np.errstate(all="ignore"):
        want = WIDE[name](torch.from_numpy(x)).numpy()
    for form in ("vd", "sd"):
        got = np.empty_like(x)
        getattr(lib, f"{form}_{name}")(pointer(x), pointer(got), len(x))
        np.testing.assert_allclose(got, want, rtol=1e-15, atol=0)


def operands(kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    if kind in "fd":
        a, b = rng.normal(size=(2, N)) * np.exp(rng.uniform(-5, 5, (2, N)))
        a[:64], b[:64] = rng.choice([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 3.5], (2, 64))
        return (a.astype(np.float32), b.astype(np.float32)) if kind == "f" else (a, b)
    dtype = np.int32 if kind == "i" else np.int64
    info = np.iinfo(dtype)
    a, b = rng.integers(info.min, info.max, (2, N), dtype)
    a[: N // 2], b[: N // 2] = rng.integers(-40, 40, (2, N // 2), dtype)
    a[:64], b[:64] = rng.choice(np.array([0, 1, -1, 2, -2, info.min, info.max, 16], dtype), (2, 64))
    return a, b


def expected(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    integer = a.dtype.kind == "i"
    if name in ("floordiv", "mod") and integer:
        safe = np.where((b == 0) | (b == -1), 1, b)
        q = np.where(b == 0, 0, np.where(b == -1, np.negative(a), np.floor_divide(a, safe)))
        return q if name == "floordiv" else np.where(b == 0, 0, a - q * b)
    if name in ("floordiv", "mod") and a.dtype == np.float64:
        return (torch.div(ta, tb, rounding_mode="floor") if name == "floordiv" else torch.remainder(ta, tb)).numpy()
    if name in ("floordiv", "mod"):
        wide = ta.double(), tb.double()
        return (
            (torch.div(*wide, rounding_mode="floor") if name == "floordiv" else torch.remainder(*wide)).float().numpy()
        )
    if name in ("shl_", "shr_"):
        bits = a.dtype.itemsize * 8
        out = (b < 0) | (b >= bits)
        count = np.where(out, 0, b)
        return np.where(out, 0, a << count) if name == "shl_" else a >> np.where(out, bits - 1, count)
    table = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "min_": "minimum", "max_": "maximum"}
    table |= {n: n for n in ("lt", "le", "gt", "ge", "eq", "ne")}
    table |= {f"bit{n}_": f"bitwise_{n}" for n in ("and", "or", "xor")}
    return getattr(torch, table[name])(ta, tb).numpy()


COMMON = ["add", "sub", "mul", "min_", "max_", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne"]
BITS = ["bitand_", "bitor_", "bitxor_", "shl_", "shr_"]
BINARY = [(k, n) for k in "fd" for n in [*COMMON, "div"]] + [(k, n) for k in "il" for n in COMMON + BITS]


@pytest.mark.parametrize(("kind", "name"), BINARY)
def test_binary(lib: ctypes.CDLL, kind: str, name: str) -> None:
    a, b = operands(kind)
    for form in ("vv", "ss", "vs", "sv"):
        for lane in range(24) if form in ("vs", "sv") else [0]:
            x = a if form != "sv" else np.full_like(a, a[lane])
            y = b if form != "vs" else np.full_like(b, b[lane])
            with np.errstate(all="ignore"):
                want = expected(name, x, y)
            got = np.empty(N, np.int32 if want.dtype == bool else want.dtype)
            getattr(lib, f"{form}_{kind}_{name}")(pointer(x), pointer(y), pointer(got), N)
            np.testing.assert_array_equal(got, want.astype(got.dtype), err_msg=f"{form} {name}")


def test_division_by_constant(lib: ctypes.CDLL) -> None:
    a = operands("i")[0]
    q, r = np.empty_like(a), np.empty_like(a)
    lib.constant_division(pointer(a), pointer(q), pointer(r), N)
    np.testing.assert_array_equal(q, a // 16)
    np.testing.assert_array_equal(r, a % 16)


def test_logic_and_conversions(lib: ctypes.CDLL) -> None:
    a, b = np.random.default_rng(3).normal(size=(2, N)).astype(np.float32) * 100
    got = np.empty(N, np.int32)
    lib.logic(pointer(a), pointer(b), pointer(got), N)
    p, q = a < b, a > 0
    np.testing.assert_array_equal(got, np.where((p & q) ^ ~p, q.astype(np.int32), p + 2))
    f, i, l = np.empty(N, np.float32), np.empty(N, np.int32), np.empty(N, np.int64)
    lib.conversions(pointer(a), pointer(f), pointer(i), pointer(l), N)
    np.testing.assert_array_equal(i, a.astype(np.int32))
    np.testing.assert_array_equal(l, a.astype(np.int64))
    np.testing.assert_array_equal(f, 2 * np.trunc(a) + (np.trunc(a) != 0))


def test_conversions_of_doubles(lib: ctypes.CDLL) -> None:
    a = np.random.default_rng(3).normal(size=N) * 1e5
    a[:4] = 0.0, 1.7e9 + 0.25, -1.7e9 - 0.75, 0.5
    f, i, l, b, d = (np.empty(N, t) for t in (np.float32, np.int32, np.int64, np.int32, np.float64))
    lib.wide_conversions(pointer(a), pointer(f), pointer(i), pointer(l), pointer(b), pointer(d), N)
    for got, want in ((f, a.astype(np.float32)), (i, a.astype(np.int32)), (l, a.astype(np.int64)), (b, a != 0)):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(d, (f.astype(np.float64) + i) + (l + b.astype(np.float64)))
    x = np.full(N, np.nan)
    lib.wide_conversions(pointer(x), pointer(f), pointer(i), pointer(l), pointer(b), pointer(d), N)
    assert (b == 2).all()
    assert np.isnan(f).all()
    assert (i == -(2**31)).all()


STORAGE = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "b8": torch.bool,
}  # fmt: skip


@pytest.mark.parametrize("tag", STORAGE)
def test_load(lib: ctypes.CDLL, tag: str) -> None:
    generator = torch.Generator().manual_seed(4)
    size = 1000
    values = (
        torch.randint(0, 2, (size,), generator=generator)
        if tag == "b8"
        else torch.randn(size, generator=generator) * 50
    )
    base = values.abs().to(STORAGE[tag]) if tag == "u8" else values.to(STORAGE[tag])
    compute = {"i64": np.int64, "f64": np.float64}.get(tag, np.float32 if tag[0] == "f" or tag == "bf16" else np.int32)
    want = base.to(torch.int64 if np.dtype(compute).kind == "i" else torch.float64).numpy().astype(compute)
    rng = np.random.default_rng(5)
    runs = [np.arange(o, o + 16) for o in (0, 3, 500, size - 16)]
    index = np.concatenate([rng.integers(0, size, 256), *runs, np.full(16, 7)]).astype(np.int32)
    address = ctypes.c_void_p(base.data_ptr())
    for wide in (0, 1):
        got = np.empty(len(index), compute)
        getattr(lib, f"load_{tag}")(address, pointer(index), pointer(got), len(index), wide)
        np.testing.assert_array_equal(got, want[index])
    getattr(lib, f"one_{tag}")(address, pointer(index), pointer(got), len(index))
    np.testing.assert_array_equal(got, want[index])

    low, high = getattr(lib, f"low_{tag}"), getattr(lib, f"high_{tag}")
    for f in (low, high):
        f.restype = {
            np.float32: ctypes.c_float, np.float64: ctypes.c_double, np.int32: ctypes.c_int32, np.int64: ctypes.c_int64,
        }[compute]  # fmt: skip
    grid = want[:990].reshape(33, 30)
    for r0, r1, c0, c1 in [(0, 32, 0, 29), (4, 4, 7, 7), (30, 90, -5, 3), (2, 9, 10, 20)]:
        box = np.array([r0, r1, 33, 30, c0, c1, 30, 1], np.int64)
        inside = grid[r0 : min(r1, 32) + 1, max(c0, 0) : min(c1, 29) + 1]
        assert low(address, pointer(box)) == inside.min()
        assert high(address, pointer(box)) == inside.max()
    huge = np.array([0, 1 << 17, 1 << 18, 0, 0, 0, 1, 1], np.int64)
    limits = (-np.inf, np.inf) if np.dtype(compute).kind == "f" else (np.iinfo(compute).min, np.iinfo(compute).max)
    limits = (0, 1) if tag == "b8" else limits
    assert (low(address, pointer(huge)), high(address, pointer(huge))) == limits


def test_nan_bound(lib: ctypes.CDLL) -> None:
    x = np.array([1, np.nan, 2, 3], np.float32)
    box = np.array([0, 3, 4, 1, 0, 0, 1, 1], np.int64)
    for f in (lib.low_f32, lib.high_f32):
        f.restype = ctypes.c_float
        assert np.isnan(f(pointer(x), pointer(box)))


def test_bits(lib: ctypes.CDLL) -> None:
    rng = np.random.default_rng(6)
    bits = rng.integers(0, 2, 800).astype(np.uint8)
    packed = np.packbits(bits, bitorder="little")
    index = np.concatenate([rng.integers(0, 800, 64), *[np.arange(o, o + 16) for o in (0, 5, 777, 784)]]).astype(
        np.int32
    )
    got = np.empty(len(index), np.int32)
    lib.load_bits(pointer(packed), pointer(index), pointer(got), len(index))
    np.testing.assert_array_equal(got, bits[index])
    bits[100:300] = 1
    bits[400:600] = 0
    packed = np.packbits(bits, bitorder="little")
    long = ctypes.c_int64
    for lo, hi in [(100, 299), (99, 300), (403, 596), (390, 610), (7, 7), (101, 102)]:
        for most, reduce in ((0, np.min), (1, np.max)):
            assert lib.bound_bit(pointer(packed), long(lo), long(hi), long(800), most) == reduce(bits[lo : hi + 1])


def test_clamp(lib: ctypes.CDLL) -> None:
    index = np.random.default_rng(7).integers(-(2**31), 2**31, 64).astype(np.int32)
    index[:32] = np.arange(-8, 24)
    for size in (0, 1, 10, 2**31, 2**40):
        y, z = np.empty(64, np.int32), np.empty(64, np.int64)
        lib.clamps(pointer(index), pointer(y), pointer(z), ctypes.c_int64(size), 64)
        want = np.clip(index.astype(np.int64), 0, max(size - 1, 0))
        np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(z, want)


def test_negative_indices_count_from_the_end(lib: ctypes.CDLL) -> None:
    index = np.random.default_rng(7).integers(-(2**31), 2**31, 64).astype(np.int32)
    index[:32] = np.arange(-16, 16)
    for size in (0, 1, 10, 2**31 - 1):
        y, z, one = np.empty(64, np.int32), np.empty(64, np.int64), np.empty(64, np.int64)
        lib.wraps(pointer(index), pointer(y), pointer(z), pointer(one), ctypes.c_int64(size), 64)
        place = index.astype(np.int64)
        want = np.clip(np.where(place < 0, place + size, place), 0, max(size - 1, 0))
        np.testing.assert_array_equal(y, want)
        np.testing.assert_array_equal(z, want)
        np.testing.assert_array_equal(one, want + (want << 32))


def test_narrow_floats(lib: ctypes.CDLL) -> None:
    codes = np.arange(256, dtype=np.uint8)
    for e5m2, dtype in ((0, torch.float8_e4m3fn), (1, torch.float8_e5m2)):
        got = np.empty(256, np.float32)
        lib.fp8_to_float(pointer(codes), pointer(got), e5m2)
        np.testing.assert_array_equal(got, torch.from_numpy(codes).view(dtype).float().numpy())
    halves = np.arange(65536, dtype=np.uint16)
    index = np.arange(65536, dtype=np.int32)
    for name, dtype, bfloat in (("f16", torch.float16, 0), ("bf16", torch.bfloat16, 1)):
        wide = np.empty(65536, np.float32)
        getattr(lib, f"load_{name}")(pointer(halves), pointer(index), pointer(wide), 65536, 0)
        np.testing.assert_array_equal(wide, torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy())
        x = np.random.default_rng(8).normal(size=N).astype(np.float32)
        x = np.concatenate(
            [
                x * np.exp(np.random.default_rng(9).uniform(-16, 11, N)),
                [0, -0.0, np.inf, -np.inf, 65519, 65520, 7e4, -7e4],
            ]
        )
        x = np.concatenate([x, [np.nan] * 8]).astype(np.float32)
        got16 = np.empty(len(x), np.uint16)
        lib.to_16_bits(pointer(x), pointer(got16), len(x), bfloat)
        got, want = torch.from_numpy(got16.view(np.int16)).view(dtype).float(), torch.from_numpy(x).to(dtype).float()
        assert torch.equal(got.nan_to_num(nan=1e9), want.nan_to_num(nan=1e9))


COARSE = """
#define FL_COARSE 1
#include "ops.h"
using namespace flashloom;
extern "C" void coarse(const float* x, float* t, float* s) {
  for (int i = 0; i < 4096; i += VL) storeu(t + i, tanh(loadu(x + i))), storeu(s + i, sigmoid(loadu(x + i)));
}
"""


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.2, 30.0])
@pytest.mark.parametrize("target", [name for name in CPU_TARGETS if name.startswith("x86")])
def test_coarse(target: str, scale: float, tmp_path: Path) -> None:
    """tanh and sigmoid of kernels with 16-bit queries: to 3e-6, on all sides of the short polynomial's end."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    if not Target(target).supported:
        pytest.skip(f"this machine does not run {target}")
    (tmp_path / "coarse.cpp").write_text(COARSE)
    command = [COMPILER, *FLAGS, *Target(target).flags, f"-I{HEADERS}", "coarse.cpp", "-o", "coarse.so"]
    subprocess.run(command, check=True, cwd=tmp_path)
    x = np.linspace(-scale, scale, N).astype(np.float32)
    x[:6] = np.nan, np.inf, -np.inf, 0.0, -1.0, 1.0
    t, s = np.empty_like(x), np.empty_like(x)
    ctypes.CDLL(str(tmp_path / "coarse.so")).coarse(pointer(x), pointer(t), pointer(s))
    with np.errstate(over="ignore"):
        want = np.tanh(x.astype(np.float64)), 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(t, want[0], rtol=0, atol=3e-6)
    np.testing.assert_allclose(s, want[1], rtol=0, atol=3e-6)
