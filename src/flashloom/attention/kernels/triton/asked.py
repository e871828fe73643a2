"""From a spec to the kernels it needs: constants, argument types and numbers formats of `attend.py` and `plan.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flashloom.attention.about import BOTH, DECODE, PREFILL, about
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.triton.config import Config, Need, pieces, power_of_two
from flashloom.dataclass import dataclass
from flashloom.kernel.source import Number, Source
from flashloom.kernel.triton import TritonKernel, interpreting, pointer
from flashloom.lower import triton as lower
from flashloom.target import Target
from flashloom.variant.expr import Program

__all__ = ["KERNELS", "Form", "attend_kernel", "need", "parts", "plan_kernel", "value_types"]

KERNELS = "flashloom.attention.kernels.triton"  # kernel files are named, not imported: they import Triton
STRIDES = (
    "q_request", "q_token", "q_head_step", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head", "out_request",
    "out_token", "out_head", "lse_request", "lse_token", "lse_head", "k_scale_page", "k_scale_head", "v_scale_page",
    "v_scale_head",
)  # fmt: skip
PLAN_NUMBERS = (
    "requests", "stride", "max_items", "max_tokens", "max_pages", "page_size", "entries", "room", "programs",
    "min_tiles", "fixed_tiles", "merge_ratio", "item_programs",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """Of one kernel of a plan: dtype of out, whether every row starts at a multiple of 16 bytes, whether scales are per
    page, whether sm_scale is
    negative, whether some stride takes more than 32 bits."""

    out_dtype: torch.dtype
    aligned: bool = True
    page_scales: bool = False
    negative: bool = False
    wide: bool = False


def number_types(spec: AttentionSpec, page_scales: bool) -> tuple[str, str, str, bool]:
    """(type of the q k product, type of the p v product, precision of float32 products, whether query rows are brought
    into float16's range).

    8-bit keys and values are exact in float16. A weight without softmax can be any number, so there float16 will not
    do; tf32 has its digits
    and float32's range. float32 is computed as three tf32 products, which keeps float32's accuracy.
    """
    q, kv, softmax = spec.q_dtype, spec.kv_dtype, spec.program.softmax
    names = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    if q == torch.float32 or kv == torch.float32 or (q in names and kv in names and q != kv):
        return "float32", "float32", "tf32x3", False
    if kv.itemsize == 1:
        exact = spec.program.key is None
        return (
            "float16" if exact else "bfloat16",
            "float16" if softmax and not page_scales else "bfloat16",
            "tf32",
            exact,
        )
    if kv == torch.float16 and not softmax:
        return "float16", "float32", "tf32", False
    return names[kv], names[kv], "tf32", False


def value_types(program: Any) -> tuple[str, ...]:
    """Types of a variant's values as flat words: a number, or pointer, sizes, strides."""
    types: list[str] = []
    for p in program.params:
        if p.kind == "scalar":
            types.append("fp32" if p.dtype.startswith("float") else "i64")
        else:
            types += [
                pointer(getattr(torch, p.dtype)),
                *["i64" if p.kind == "bits" else "i32"] * p.rank,
                *["i64"] * p.rank,
            ]
    return tuple(types)


def parts(form: Form, config: Config) -> int:
    """Into how many blocks of rows a kernel cuts a work item. Unaligned rows take blocks of 32, for which Hopper's
    warpgroup instructions are not used: the assembler of Triton 3.6 (ptxas 12.8) runs out of uniform registers among
    so many narrow loads and overwrites their operands' descriptors."""
    return config.block_m // 32 if not form.aligned and config.block_m >= 64 else 1


def attend_kernel(
    spec: AttentionSpec, form: Form, config: Config, page_size: int, target: Target, own: Program | None = None
) -> TritonKernel:
    """The attention kernel of a spec; page_size 0 where each request is one run of tokens. own: the program without the
    block pattern, where lists among the program's values say which tiles that leaves."""
    heads, hooks, count = spec.heads, lower.functions(spec.program), parts(form, config)
    block_m = config.block_m
    judge, lists = hooks, None
    if own is not None:  # what is left of the mask judges the tiles; its parameters stay in their places
        from flashloom.attention.triton_blocks import LISTS

        judge = lower.functions(replace(spec.program, mask=own.mask))
        lists = len(value_types(replace(spec.program, params=spec.program.params[: -len(LISTS)])))
    if count > 1:
        config = replace(config, block_m=config.block_m // count, num_warps=8)
    qk, pv, precision, factor = number_types(spec, form.page_scales)
    stored = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}.get(spec.kv_dtype)
    made = (spec.program.key is not None or stored != qk, stored != pv)
    if interpreting():  # its matrix product knows numpy's types only
        qk = pv = "float32"
    if precision == "tf32x3" and target.name.startswith("gfx"):
        precision = "ieee"
    bits = spec.kv_dtype == torch.float8_e4m3fn and not target.name.startswith("gfx") and int(target.name[2:]) < 89
    capability = int(target.name[2:]) if target.name.startswith("sm") else 0
    (d0, d1), (v0, v1) = pieces(heads.dim, heads.value_dim, made, config.block_m, capability)
    latent = (
        heads.latent_value
        and heads.value_dim == d0 == v0
        and spec.program.key is None
        and qk == pv
        and not form.page_scales
    )
    merge_rows = min(
        power_of_two(heads.group) if heads.group > 8 else 1 << (heads.group - 1).bit_length(),
        config.block_m,
        max(4096 // v0, 4),
    )
    elements = 2048 * config.num_warps
    # 8-bit values: a 16-bit transpose on the way to the registers, for 8 bits there is none; halves of 16 columns would
    # be too few, as in `split`
    pairs = (
        spec.kv_dtype.itemsize == 1
        and form.aligned
        and not latent
        and (v0 >= 64 and v1 == 0 and heads.value_dim % 2 == 0)
        and config.block_m <= 32
    )
    # a row is summed once, after the loop, where registers are left: the conversion of single bytes takes many
    few = pairs or spec.kv_dtype.itemsize > 1 or config.block_n <= 64
    spread = spec.program.softmax and config.block_m == 16 and few
    assembly = target.name.startswith("sm") and not interpreting()
    sizes = {"q": spec.q_dtype, "k": spec.kv_dtype, "v": spec.kv_dtype, "out": form.out_dtype}
    vector = {name: 16 // dtype.itemsize if form.aligned else 1 for name, dtype in sizes.items()}
    signature: dict[str, Any] = {name: pointer(dtype) for name, dtype in sizes.items()}
    if bits:
        signature |= {"k": "*u8", "v": "*u8"}
    signature |= {
        "lse": "*fp32",
        "k_scale": "*fp32",
        "v_scale": "*fp32",
        "items": "*i32",
        "pages": "*i32",
        "part_out": "*fp32",
    }
    signature |= {
        "part_lse": "*fp32",
        "arrivals": "*i32",
        **dict.fromkeys(STRIDES, "i64" if form.wide else "i32"),
        "sm_scale": "fp32",
        "flags": "i32",
    }
    signature["values"] = value_types(spec.program)
    constants = {
        "QUERY": hooks.query_transform, "QUERY_INDEX": hooks.query_index, "QUERY_LOADS": hooks.QUERY_LOADS,
        "KEY": hooks.key_transform, "KEY_INDEX": hooks.key_index, "KEY_LOADS": hooks.KEY_LOADS,
        "LOGITS": hooks.logits_transform, "MASK": hooks.logits_mask, "BOUNDS": judge.mask_bounds,
        "OUTPUT": hooks.output_transform, "SOFTMAX": spec.program.softmax,
        "SCAN": 0 if "_block_range(values" in judge.text else 128, "KV_HEADS": heads.kv_heads, "GROUP": heads.group,
        "DIM": heads.dim, "VALUE_DIM": heads.value_dim, "D0": d0, "D1": d1, "V0": v0, "V1": v1,
        "PAGE_SIZE": page_size, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "MERGE_ROWS": merge_rows,
        "MERGE_SPLITS": max(1, min(32, elements // (merge_rows * v0))), "VEC_Q": vector["q"], "VEC_K": vector["k"],
        "VEC_V": vector["v"], "VEC_OUT": vector["out"], "QK_TYPE": Number(qk), "PV_TYPE": Number(pv),
        "PRECISION": precision, "K_SCALE": 2 if form.page_scales else 1, "V_SCALE": 2 if form.page_scales else 1,
        "E4M3_BITS": bits, "Q_FACTOR": factor, "LATENT": latent, "NEGATIVE": form.negative,
        "ONE_LOOP": config.block_m == 16 or lists is not None, "PARTS": count, "LISTS": lists,
        "EXACT": spec.program.mask is not None, "SPREAD": spread, "PAIRS": (2 if assembly else 1) if pairs else 0,
        "PASS": max(32 * config.num_warps * 16 // (d0 * spec.kv_dtype.itemsize), 1),
    }  # fmt: skip
    aligned = ("items", "pages", "part_out", "part_lse", *(("q", "k", "v", "out") if form.aligned else ()))
    source = Source(f"{KERNELS}.attend", "attend")
    told = about(spec, _phase(spec, block_m), form=_form(form))
    return TritonKernel(source, signature, constants, aligned, target, config.num_warps, config.num_stages, told)


def _phase(spec: AttentionSpec, block_m: int) -> str:
    """What blocks of so many packed rows are for: a token's heads that fill one leave no difference."""
    if block_m > max(16, spec.heads.group):
        return PREFILL
    return DECODE if spec.heads.group < 16 else BOTH


def _form(form: Form) -> str:
    said = {"unaligned rows": not form.aligned, "scales per page": form.page_scales, "negative scale": form.negative}
    return ", ".join(name for name, holds in said.items() if holds)


def plan_kernel(
    spec: AttentionSpec, config: Config, paged: bool, target: Target, light: int = 0, cut: bool = False
) -> TritonKernel:
    """The planner kernel that goes with an attention kernel; requests of at most `light` packed rows come first; cut:
    for a Hopper kernel that joins ranges of keys."""
    pointers = ("q_indptr", "kv_lens", "page_indptr", "table", "items", "pages", "scratch", "error")
    signature: dict[str, Any] = dict.fromkeys(pointers, "*i32")
    signature |= {name: "fp32" if name == "merge_ratio" else "i32" for name in PLAN_NUMBERS}
    constants = {
        "GROUP": spec.heads.group,
        "KV_HEADS": spec.heads.kv_heads,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PAGED": paged,
        "LIGHT": light,
        "CUT": cut,
    }
    told = {"kernel": "schedule of batches", "heads": f"{spec.heads.q_heads}/{spec.heads.kv_heads}"}
    source = Source(f"{KERNELS}.plan", "plan")
    return TritonKernel(source, signature, constants, ("items", "scratch"), target, 4, 1, told)


def need(
    spec: AttentionSpec, max_q_len: int, mean_q_len: int, page_size: int, capability: int, requests: int = 1
) -> Need:
    """What the config is chosen by."""
    heads = spec.heads
    return Need(
        group=heads.group,
        kv_heads=heads.kv_heads,
        dim=heads.dim,
        value_dim=heads.value_dim,
        q_bytes=4 if number_types(spec, False)[0] == "float32" else spec.q_dtype.itemsize,
        kv_bytes=spec.kv_dtype.itemsize,
        max_rows=max(max_q_len, 1) * heads.group,
        mean_rows=max(mean_q_len, 1) * heads.group,
        page_size=page_size,
        capability=capability,
        invariant=spec.batch_invariant,
        latent=heads.latent_value,
        key_transform=spec.program.key is not None,
        pairs=requests * heads.kv_heads,
    )
