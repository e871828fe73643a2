"""From a spec to the kernels it needs: constants and argument types of `attend.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flashloom.attention.about import PREFILL, about
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.hopper import config as sizes
from flashloom.attention.kernels.hopper.config import Config, width
from flashloom.attention.kernels.triton import asked
from flashloom.attention.kernels.triton.config import split
from flashloom.attention.shape import HeadShape
from flashloom.dataclass import dataclass
from flashloom.kernel.source import Source
from flashloom.kernel.triton import TritonKernel, pointer
from flashloom.target import Target
from flashloom.variant.expr import Expr, topological

if TYPE_CHECKING:
    from flashloom.kernel.gluon import GluonKernel

__all__ = [
    "Form", "attend_kernel", "boxes", "choose", "chunk_map", "mend_kernel", "plan_kernel", "suits",
    "unsuitable", "usual",
]  # fmt: skip

MEND_STRIDES = (
    "q_request", "q_token", "q_head_step", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head", "out_request",
    "out_token", "out_head", "lse_request", "lse_token", "lse_head", "k_scale_head", "v_scale_head",
)  # fmt: skip
LONG = 2048  # query rows of a request
SPECIAL = {"exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "rsqrt", "erf", "sin", "cos", "div"}


@dataclass(frozen=True)
class Form:
    """Of one kernel of a plan: dtype of out, whether sm_scale is negative, whether keys and values lie in chunks
    (`chunks.py`), and whether the plan may cut a tile's keys into ranges (`split.py`)."""

    out_dtype: torch.dtype
    negative: bool = False
    chunked: bool = False
    cut: bool = False


def unsuitable(spec: AttentionSpec) -> str | None:
    """Why the kernel cannot compute this, in a few words, or None."""
    heads, program = spec.heads, spec.program
    if spec.q_dtype not in (torch.float16, torch.bfloat16, torch.float8_e4m3fn) or spec.kv_dtype != spec.q_dtype:
        return "queries, keys and values must all be float16, all bfloat16 or all float8_e4m3fn"
    if not program.softmax:
        return "variants without softmax are not supported"
    if program.key is not None:
        return "key transforms are not supported"
    if program.query is not None and not _own_elements(program.query):
        return "query transforms that mix the elements of a row are not supported"
    if spec.block_sparse:
        return "block patterns are not supported"
    if heads.latent_value:
        return "values that are part of their keys are not supported"
    if max(heads.dim, heads.value_dim) > 256:
        return f"head widths above 256 are not supported (dim={heads.dim}, value_dim={heads.value_dim})"
    vector = 16 // spec.q_dtype.itemsize
    if heads.dim % vector or heads.value_dim % vector:
        return f"head widths must be multiples of {vector} (dim={heads.dim}, value_dim={heads.value_dim})"
    if spec.q_dtype.itemsize == 1:
        if max(heads.dim, heads.value_dim) > 128:
            return f"8-bit heads wider than 128 are not supported (dim={heads.dim}, value_dim={heads.value_dim})"
        if program.query is not None:
            return "query transforms of 8-bit queries are not supported, they would be rounded to 8 bits again"
    return None


def suits(spec: AttentionSpec, page_size: int) -> bool:
    """Whether it is the faster kernel for pages of this size (0: a request is one run of tokens). 8-bit keys that are
    copied row by row leave too few registers."""
    return spec.q_dtype.itemsize > 1 or sizes.box_rows(page_size, 64) > 1


def _own_elements(hook: Expr) -> bool:
    """Whether a vector hook looks at no element of the row but its own."""
    return all(n.args[0].op == "input" and n.args[0].attr == "dim" for n in topological(hook) if n.op == "element")


def _capped(spec: AttentionSpec) -> bool:
    """Whether the logits hook is a soft cap: its tanh is a polynomial, and leaves registers for large tiles unless keys
    are copied row by row."""
    from flashloom.lower import gluon as lower

    return lower.functions(spec.program).cap_factors is not None


def choose(spec: AttentionSpec, mean_q_len: int, page_size: int) -> Config:
    """The config of a spec for a batch's mean query and pages of this size (0: a request is one run of tokens)."""
    heads, logits, mask = spec.heads, spec.program.logits, spec.program.mask
    narrow = spec.q_dtype.itemsize == 1  # then no logits transform has registers for a large tile
    special = logits is not None and any(node.op in SPECIAL for node in topological(logits))
    by_rows = sizes.box_rows(page_size, 128) == 1
    heavy = logits is not None and (narrow or (special and (by_rows or not _capped(spec))))
    spare = logits is None
    if mask is not None:  # of short rows under a mask, tiles of three consumers would compute a third in vain
        spare = spare and mean_q_len >= LONG and not spec.batch_invariant
        spare = spare and all(node.op != "load" for node in topological(mask))
    return sizes.choose(
        heads.dim, heads.value_dim, heads.group, mean_q_len, page_size, spec.batch_invariant, heavy, spare,
        spec.q_dtype.itemsize,
    )  # fmt: skip


def usual(spec: AttentionSpec, config: Config, page_size: int, cut: bool = False) -> Form:
    """The form for a positive scale, and for keys and values whose heads or pages lie side by side."""
    wide = max(chunks(spec.heads.dim), chunks(spec.heads.value_dim)) > 1
    return Form(spec.out_dtype, False, wide and page_size > 0 and config.box > 1 and spec.q_dtype.itemsize > 1, cut)


def chunks(dim: int) -> int:
    """Chunks of 64 columns that one copy of rows of 16 bits can bring together; 1: it brings what it is told."""
    return dim // 64 if dim == width(dim) else 1


def chunk_map(
    sizes: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Of keys or values [pages, page tokens, kv heads, dim] with strides of the first three: sizes and strides of the
    tensor map, and the steps from head to head in groups of 8 tokens and in chunks. None: heads lie neither
    side by side in a token nor page by page."""
    pages, tokens, heads, dim = sizes
    page, token, head = strides
    n, groups = chunks(dim), tokens // 8
    if n == 1:
        return sizes, strides, ()
    if heads == 1 or head == dim:
        return (pages, groups, heads * n, 8, 64), (page, 8 * token, 64, token), (0, n)
    if head == tokens * token:
        return (pages, heads * groups, n, 8, 64), (page, 8 * token, 64, token), (groups, 0)
    return None


def boxes(spec: AttentionSpec, config: Config, chunked: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of the copies of queries, keys, values and results, as far as they have maps."""
    rows, dim, value_dim = 64 // config.pack, width(spec.heads.dim), width(spec.heads.value_dim)
    ends = ((rows, config.pack, dim), (rows, config.pack, value_dim))
    if config.box == 1:  # the threads copy keys and values themselves
        return ends
    between = (
        (1, config.box // 8, chunks(n), 8, 64) if chunked and chunks(n) > 1 else (1, config.box, 1, width(n))
        for n in (spec.heads.dim, spec.heads.value_dim)
    )
    return (ends[0], *between, ends[1])


def attend_kernel(spec: AttentionSpec, form: Form, config: Config, page_size: int, target: Target) -> GluonKernel:
    """The attention kernel of a spec; page_size 0 where each request is one run of tokens."""
    from flashloom.kernel.gluon import GluonKernel, tensor_map_type  # a process that only decodes does without
    from flashloom.lower import gluon as lower

    heads, hooks, dtype = spec.heads, lower.functions(spec.program), spec.q_dtype
    dim, value_dim = width(heads.dim), width(heads.value_dim)
    by_rows = config.box == 1
    k_chunks, v_chunks = (chunks(n) if form.chunked else 1 for n in (heads.dim, heads.value_dim))
    row_warps = sizes.row_warps(config, heads.dim, heads.value_dim, dtype.itemsize)
    names = ("q", "out_map") if by_rows else ("q", "k", "v", "out_map")
    signature: dict[str, Any] = {
        n: tensor_map_type(box, spec.out_dtype if n == "out_map" else dtype)
        for n, box in zip(names, boxes(spec, config, form.chunked))
    }
    signature |= {"out": pointer(form.out_dtype), "lse": "*fp32"}
    signature |= {n: pointer(dtype) for n in ("k_rows", "v_rows") if by_rows}
    signature |= {"items": "*i32", "pages": "*i32", "counter": "*i32"}
    signature |= {"part_out": "*fp32", "part_lse": "*fp32", "arrivals": "*i32"}
    signature |= dict.fromkeys(("q_jump", "out_jump"), "i32")
    signature |= dict.fromkeys(("out_token", "out_head", "lse_token", "lse_head"), "i64")
    signature |= {"ragged": "i32", "sm_scale": "fp32", "flags": "i32"}
    for name, n in (("k_strides", k_chunks), ("v_strides", v_chunks)):
        signature[name] = ("i64",) * 3 if by_rows else ("i32",) * 2 if n > 1 else ()
    signature["scales"] = ("*fp32", "*fp32", "i32", "i32") if dtype.itemsize == 1 else ()
    signature["marks"] = "*i8"
    signature["values"] = asked.value_types(spec.program)
    constants = {
        "LOGITS": None if hooks.cap_factors or hooks.position_slope else hooks.logits_transform,
        "QUERY": hooks.query_transform,
        "CAP": hooks.cap_factors, "SLOPE": hooks.position_slope, "MASK": hooks.logits_mask, "BOUNDS": hooks.mask_bounds,
        "OUTPUT": hooks.output_transform, "RAW": hooks.logits_transform is None and not form.negative, "SCAN": 32,
        "WHOLE": "_block_range(values" not in hooks.text,
        "HEADS": heads.q_heads // config.pack, "PACK": config.pack, "GROUP": heads.group, "DIM": dim,
        "KEY_DIM": heads.dim, "WIDTH": value_dim, "VALUE_DIM": heads.value_dim, "PAGE_SIZE": page_size,
        "BOX": config.box, "CONSUMERS": config.consumers, "BLOCK_N": config.block_n, "STAGES": config.stages,
        "OUT_MAP": form.out_dtype == spec.out_dtype, "REUSE_Q": dim == value_dim == 256,
        "Q_STAGES": sizes.q_stages(config, dim, value_dim, dtype.itemsize), "RING": sizes.RING,
        "CONSUMER_REGISTERS": config.registers, "OTHER_REGISTERS": config.other_registers,
        "TRANSPOSER_REGISTERS": sizes.transposer_registers(config), "ROW_WARPS": row_warps,
        "SCHEDULER_REGISTERS": sizes.scheduler_registers(config, row_warps),
        "K_CHUNKS": k_chunks, "V_CHUNKS": v_chunks, "CUT": form.cut,
    }  # fmt: skip
    constants |= dict.fromkeys(("k", "v") if by_rows else ("k_rows", "v_rows"))
    aligned = ("out", "items", "pages", "part_out", *(n for n in ("k_rows", "v_rows") if by_rows))
    source = Source("flashloom.attention.kernels.hopper.attend", "attend")
    return GluonKernel(source, signature, constants, aligned, target, 4, 1, about(spec, PREFILL, form="Hopper"))


def mend_kernel(
    spec: AttentionSpec, out_dtype: torch.dtype, config: Config, page_size: int, target: Target
) -> TritonKernel:
    """The kernel that computes rows once more that came out as NaN, where a mask may have hidden that NaN."""
    from flashloom.lower import triton as lower

    heads, hooks, dtype = spec.heads, lower.functions(spec.program), spec.q_dtype
    (d0, d1), (v0, v1) = split(heads.dim), split(heads.value_dim)
    signature: dict[str, Any] = {n: pointer(dtype) for n in ("q", "k", "v")}
    signature |= {"out": pointer(out_dtype), **dict.fromkeys(("lse", "k_scale", "v_scale"), "*fp32")}
    signature |= {"items": "*i32", "pages": "*i32", "marks": "*i8", "done": "*i32"}
    signature |= dict.fromkeys(MEND_STRIDES, "i64") | {"sm_scale": "fp32", "flags": "i32"}
    signature["values"] = asked.value_types(spec.program)
    constants = {
        "QUERY": hooks.query_transform, "QUERY_INDEX": hooks.query_index, "QUERY_LOADS": hooks.QUERY_LOADS,
        "LOGITS": hooks.logits_transform, "MASK": hooks.logits_mask, "OUTPUT": hooks.output_transform,
        "HEADS": heads.q_heads // config.pack, "PACK": config.pack, "GROUP": heads.group, "DIM": heads.dim,
        "VALUE_DIM": heads.value_dim, "D0": d0, "D1": d1, "V0": v0, "V1": v1, "PAGE_SIZE": page_size,
        "ROWS": config.block_m, "ROOM": 1 << (config.block_m - 1).bit_length(), "VEC": 16 // dtype.itemsize,
        "VEC_OUT": 16 // out_dtype.itemsize, "SCALES": dtype.itemsize == 1,
    }  # fmt: skip
    source = Source(f"{asked.KERNELS}.mend", "mend")
    aligned = ("q", "k", "v", "out", "items", "pages")
    return TritonKernel(
        source, signature, constants, aligned, target, 4, 1, about(spec, PREFILL, form="Hopper, rows once more")
    )


def plan_kernel(spec: AttentionSpec, config: Config, paged: bool, target: Target, cut: bool = False) -> TritonKernel:
    """The planner kernel: that of the Triton backend, for tiles of this shape."""
    heads = spec.heads
    packed = HeadShape(heads.q_heads, heads.q_heads // config.pack, heads.dim, heads.value_dim)
    return asked.plan_kernel(replace(spec, heads=packed), config, paged, target, sizes.ROWS, cut)  # type: ignore[arg-type]
