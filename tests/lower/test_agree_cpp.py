"""Random variants mean the same in C++ as in torch: logits, masks (lanes over queries and over keys) and tile
verdicts."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.lower.check import compare
from tests.variant.integers import KEYS, mask_of, score_of, widths
from tests.variant.strategies import HEADS, Case, cases, conditions, numbers, tile_inputs, variant_of

import flashloom.variant as v
from flashloom.lower import cpp
from flashloom.lower.torch import evaluate
from flashloom.target import Target
from flashloom.variant.ranges import PARTIAL, tile_verdict

HEADERS = Path(__file__).parents[2] / "src" / "flashloom" / "attention" / "kernels" / "cpu"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fwrapv", "-fno-math-errno", "-Wno-psabi"]
DRIVER = """
struct At { int32_t batch, kv_head, q_len, kv_len, q_start, kv_start; vi q_head, q_pos; };
extern "C" int FUNCTION(const int32_t* a, const int64_t* words, int32_t rows, const int32_t* heads,
                        const int32_t* q_pos, const float* logits, float* out, int32_t* kept) {
  const Variant::Params p(words);
  for (int32_t r = 0; r < rows; r += VL) {
    At at = {a[0], a[1], a[2], a[3], a[4], a[5], {}, {}};
    __builtin_memcpy(&at.q_head, heads + r, sizeof(vi));
    __builtin_memcpy(&at.q_pos, q_pos + r, sizeof(vi));
    const auto score = Variant::bind_logits(at, p);
    const auto mask = Variant::bind_mask(at, p);
    for (int32_t k = 0; k < at.kv_len; ++k) {
      storeu(out + int64_t(k) * rows + r, score(loadu(logits + r), k));
      storeu(out + int64_t(at.kv_len) * rows + int64_t(k) * rows + r, score(loadu(logits + r), add(iota(), k)));
      const vi m = to_int32(where(mask(k), add(iota(), 1) - iota(), iota() - iota()));
      __builtin_memcpy(kept + int64_t(k) * rows + r, &m, sizeof m);
    }
  }
  const Tile t = {a[0], a[1], a[6], a[7], a[8], a[9], 0, a[3] - 1, a[2], a[3], a[4], a[5]};
  return Variant::verdict(t, p);
}
"""


def words_of(variant: v.Variant) -> ctypes.Array:
    words: list[int] = []
    for param, value in zip(variant.program.params, variant.values):
        if param.kind == "scalar":
            words.append(struct.unpack("q", struct.pack("d", value))[0] if isinstance(value, float) else int(value))
        else:
            words += [value.data_ptr(), *value.shape, *value.stride()]
    return (ctypes.c_int64 * max(1, len(words)))(*words)


def build(sources: list[str], folder: Path) -> ctypes.CDLL:
    text = ['#include "ops.h"']
    for i, source in enumerate(sources):
        text += [f"namespace flashloom {{ namespace v{i} {{", source, DRIVER.replace("FUNCTION", f"probe{i}"), "}}"]
    path = folder / f"probe{abs(hash(tuple(sources)))}.cpp"
    path.write_text("\n".join(text))
    library = path.with_suffix(".so")
    command = [str(COMPILER), *FLAGS, *Target.here().flags, f"-I{HEADERS}", str(path), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def run(function: Any, case: Case, variant: v.Variant) -> None:
    group = torch.arange(HEADS)[: HEADS // 2]
    rows = group.numel() * case.q_len
    padded = -(-rows // 16) * 16
    index = torch.arange(padded).clamp(max=rows - 1)
    heads = (index // case.q_len).int()
    q_pos = (index % case.q_len + case.kv_len - case.q_len).int()
    logits = torch.linspace(-3, 3, padded)
    out = torch.full((2, case.kv_len, padded), float("nan"))
    kept = torch.full((case.kv_len, padded), -7, dtype=torch.int32)
    bounds = [int(heads.min()), int(heads.max()), int(q_pos.min()), int(q_pos.max())]
    at = [case.batch, 0, case.q_len, case.kv_len, case.q_start, case.kv_start, *bounds]
    pointer = lambda t: ctypes.c_void_p(t.data_ptr())  # noqa: E731
    said = function(
        (ctypes.c_int32 * 10)(*at),
        words_of(variant),
        padded,
        pointer(heads),
        pointer(q_pos),
        pointer(logits),
        pointer(out),
        pointer(kept),
    )
    tile = {"q_head_lo": bounds[0], "q_head_hi": bounds[1], "q_pos_lo": bounds[2], "q_pos_hi": bounds[3]}
    tile |= {"kv_pos_lo": 0, "kv_pos_hi": case.kv_len - 1, "kv_head": 0}
    tile |= {k: getattr(case, k) for k in ("q_len", "kv_len", "q_start", "kv_start", "batch")}
    inputs = {**tile_inputs(case, tile), "q_head": heads.view(1, -1), "q_pos": q_pos.view(1, -1)}
    for lanes in ("queries", "keys"):
        inputs["kv_pos"] = torch.arange(case.kv_len, dtype=torch.int32).view(-1, 1)
        if lanes == "keys":
            lane = torch.arange(padded, dtype=torch.int32) % out_lanes()
            inputs["kv_pos"] = inputs["kv_pos"] + lane
        compare(variant, "logits", {**inputs, "logits": logits.view(1, -1)}, out[0 if lanes == "queries" else 1])
        if lanes == "queries":
            compare(variant, "mask", inputs, kept != 0)
    if variant.program.mask is not None:
        mask = evaluate(
            variant.program, "mask", inputs | {"kv_pos": torch.arange(case.kv_len).int().view(-1, 1)}, variant.values
        )
        exact = 2 if bool(mask.all()) else 1 if bool(mask.any()) else 0
        assert said in (exact, PARTIAL), f"{variant.program.mask!r}: verdict {said}, is {exact}"
        if said == PARTIAL != exact:
            assert tile_verdict(variant.program, variant.values, tile) in (exact, PARTIAL)


def out_lanes() -> int:
    return {"x86": 4, "x86-avx2": 8, "aarch64": 4}.get(Target.here().name, 16)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@settings(
    max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(st.lists(st.tuples(cases, conditions, numbers), min_size=16, max_size=16))
def test_random_variants_agree(tmp_path_factory: pytest.TempPathFactory, examples: list) -> None:
    variants = [(case, variant_of(case, mask=mask, score=score)) for case, mask, score in examples]
    library = build([cpp.render(variant.program, 16, 16) for _, variant in variants], tmp_path_factory.mktemp("agree"))
    for i, (case, variant) in enumerate(variants):
        run(getattr(library, f"probe{i}"), case, variant)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_random_integers_agree(tmp_path: Path) -> None:
    """Integers of every type, negative indices and float64, of which tests/variant say what they are in torch."""
    case = Case(q_len=KEYS, kv_len=KEYS, q_start=0, kv_start=0, batch=1, seed=0)
    variants = [v.from_flex(score_of(seed)[1], mask_of(seed)[1]) for seed in range(24)] + widths()
    library = build([cpp.render(variant.program, 16, 16) for variant in variants], tmp_path)
    for i, variant in enumerate(variants):
        run(getattr(library, f"probe{i}"), case, variant)
