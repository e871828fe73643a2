"""Names of FlashInfer that flashloom does not serve: they can be imported, and say what to use instead when they are
called. `_names.txt` lists the public ones, as `flashloom.compat.conformance.names` writes it."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

#: Names of earlier versions, and of places where engines look: module -> names, as in the table.
EARLIER = {
    "": "Mapping TorchDistBackend BatchDecodeMlaWithPagedKVCacheWrapper allreduce_fusion "
    "create_allreduce_fusion_workspace trtllm_allreduce_fusion trtllm_create_ipc_workspace_for_all_reduce_fusion "
    "concat_mla_k cudnn_batch_prefill_with_kv_cache single_decode_with_kv_cache_with_jit_module "
    "trtllm_batch_decode_with_kv_cache_mla xqa_batch_decode_with_kv_cache_mla fused_topk_deepseek "
    "interleave_moe_scales_for_sm90_mixed_gemm interleave_moe_weights_for_sm90_mixed_gemm "
    "gated_delta_rule_decode_pretranspose batch_deepgemm_fp8_nt_groupwise fp8_blockscale_gemm_sm90 "
    "gemm_fp8_nt_blockscaled gemm_fp8_nt_groupwise group_deepgemm_fp8_nt_groupwise group_gemm_fp8_nt_groupwise "
    "tinygemm_bf16 selective_state_update single_prefill_with_kv_cache_with_jit_module "
    "trtllm_batch_context_with_kv_cache trtllm_fmha_v2_prefill trtllm_ragged_attention_deepseek nvfp4_e4m3_max "
    "mla_rope_quantize_fp8 rope_quantize_fp8 rope_quantize_fp8_append_paged_kv_cache top_k_varlen xqa_mla",
    "comm": "TorchDistBackend",
    "comm.mnnvl": "CommBackend McastGPUBuffer MnnvlConfig TorchDistBackend is_mnnvl_fabric_supported "
    "is_multicast_supported",
    "decode": "BatchDecodeMlaWithPagedKVCacheWrapper cudnn_batch_decode_with_kv_cache "
    "trtllm_batch_decode_with_kv_cache_mla xqa_batch_decode_with_kv_cache_mla",
    "jit.attention": "gen_batch_mla_module gen_customize_batch_decode_module gen_customize_batch_prefill_module "
    "gen_customize_single_decode_module gen_customize_single_prefill_module",
    "topk_varlen": "top_k_varlen",
    "utils": "FP4Tensor backend_requirement get_shuffle_matrix_a_row_indices "
    "get_trtllm_gen_multi_ctas_kv_counter_bytes supported_compute_capability",
}
#: Modules that hold the names of another one.
SAME = {
    "fp4_quantization": "quantization.fp4_quantization",
    "fp8_quantization": "quantization.fp8_quantization",
    "cake_causal_conv1d_train": "cake_causal_conv1d_det_train",
}
#: What engines take for a promise when it is there, at the top of the package.
ABSENT = {"gdn_fused_decode_step", "gdn_fused_decode_step_supported"}

_PAGED = "BatchPrefillWithPagedKVCacheWrapper or BatchDecodeWithPagedKVCacheWrapper"
#: What to use instead: the first pattern that is found in "module.name".
ADVICE = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"jit_module|customize", "write the variant as a flashloom.Variant (docs/tutorial.md)"),
        (r"jit\.|get_\w*_module|precompile|compilation", "plan() builds kernels; flashloom.Pack builds them ahead"),
        (r"SinkWrapper", "give sinks= to BatchDecodeWithPagedKVCacheWrapper.run()"),
        (r"BidirectionalRanges", "give BatchPrefillWithPagedKVCacheWrapper.plan() a custom_mask="),
        (r"mqa_|MQA|indexer|proxy_score|hca|[Ll]ogits_schedule|block_table_width|padded_seq_len",
         "score with torch.einsum and choose keys with torch.topk"),
        (r"append\w*mla|mla\w*append|concat_mla|mla_kv_pack",
         "use flashloom.append on a cache of flashloom.HeadShape.mla"),
        (r"MLA|Mla|(\b|_)mla", "use flashloom.Attention(flashloom.HeadShape.mla(...), dtype=...) and its plans"),
        (r"(?i)fp4|mxfp8|mxint|csf", "FP4 and MX formats are not served: keep keys and values in float8_e4m3fn or "
         "int8, which append_paged_kv_cache and every wrapper take, and weights in torch's dtypes"),
        (r"(?i)append", "rotate or normalise with torch, then use append_paged_kv_cache"),
        (r"(?i)sparse|vsa|msa_|qsa|sdsa|dsa_|token_select", "use flashloom.BlockSparseKV, or a flashloom.Variant with "
         "a mask of its own"),
        (r"cascade|[Ss]haredPrefix", "use MultiLevelCascadeAttentionWrapper"),
        (r"ragged_attention", "use BatchPrefillWithRaggedKVCacheWrapper, with head_dim_qk and head_dim_vo"),
        (r"(?i)sampling|sample|logits_processor|speculative|top_?[kp]|min_?p|softmax|lm_head",
         "use torch.softmax, torch.topk and torch.multinomial"),
        (r"(?i)moe|routing|router|expert|megatron|swiglu_oai|mega_", "compute experts with torch: torch.topk for "
         "routes and one torch.nn.functional.linear per expert, or transformers' experts"),
        (r"comm\.|(?i:all_?reduce|all_?gather|alltoall|a2a|ulysses|ipc|mnnvl|dcp|fabric|\bMapping|Dist)",
         "use torch.distributed's collectives between calls"),
        (r"(?i)gdn|gated_delta|delta_rule|delta_product|gdp|kda|mamba|ssu|ssm|state|conv1d|linear_attention|mhc",
         "recurrent layers are not attention: use the model's torch layers, such as those of transformers"),
        (r"(?i)gemm|grouped_mm|(\b|_)mm_|bmm|low_latency|lora|svdquant|shuffle_matrix|interleave",
         "use torch.matmul or torch.nn.functional.linear"),
        (r"(?i)norm(?!aliz)", "use torch.nn.functional.rms_norm or layer_norm"),
        (r"(?i)rope", "rotate with torch before attention, or let it rotate: pos_encoding_mode='ROPE_LLAMA', "
         "flashloom.rope"),
        (r"(?i)and_mul|activation|gated_act", "use torch.nn.functional.silu or gelu and a product"),
        (r"(?i)quantiz|dequant|e4m3|fp8", "use torch's .to(torch.float8_e4m3fn); a cache quantises in "
         "append_paged_kv_cache and flashloom.append"),
        (r"(?i)tun|autotune|MeasurementPolicy|Replay|tactic", "use flashloom.tune, or `flashloom tune`"),
        (r"(?i)testing|bench|flops|bytes_per|profil", "use `flashloom bench` or torch.utils.benchmark"),
        (r"(?i)trace|logging|log", "use flashloom.monitor() to watch runs"),
        (r"green_ctx", "use torch.cuda.Stream; flashloom's plans follow the current one"),
        (r"(?i)batch_invariant", "use flashloom.Attention(..., batch_invariant=True), or disable_split_kv=True"),
        (r"(?i)parallel", "use torch.distributed, and flashloom.merge for parts of the keys"),
        (r"(?i)context|prefill|fmha|attention|decode|xqa", f"use {_PAGED}"),
    )
)  # fmt: skip
ELSE = "compute it with torch's own operators"


@functools.cache
def _lines() -> dict[str, str]:
    """Module -> its names as text."""
    text = (Path(__file__).parent / "_names.txt").read_text().replace("\n  ", " ")
    parts = (line.partition(": ") for line in text.splitlines())
    found = {"" if module == "." else module: names for module, _, names in parts}
    found.update({module: f"{found.get(module, '')} {names}" for module, names in EARLIER.items()})
    return {**found, **{module: found[other] for module, other in SAME.items()}}


def modules() -> list[str]:
    """Modules with names in the table, and the packages above them."""
    parts = [name.split(".") for name in _lines() if name]
    return sorted({".".join(x[: i + 1]) for x in parts for i in range(len(x))})


@functools.cache
def names_of(module: str) -> dict[str, str]:
    """Name -> what the table says behind it, of a module below the package ("" is the package itself)."""
    found = {}
    for entry in _lines().get(module, "").split():
        name = re.match(r"\w+", entry)
        assert name is not None, entry
        if module or name[0] not in ABSENT:
            found[name[0]] = entry[name.end() :]
    return found


def advice(module: str, name: str) -> str:
    """What to use instead of a name."""
    full = f"{module}.{name}"
    return next((sentence for pattern, sentence in ADVICE if pattern.search(full)), ELSE)


def _refuse(module: str, name: str) -> NotImplementedError:
    full = ".".join(filter(None, ("flashinfer", module, name)))
    return NotImplementedError(f"{full} is not served by flashloom: {advice(module, name)}")


class _Refusing(type):
    """A class that is not served: its attributes can be looked up, as decorators of programs do, and its calls
    refuse."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        return _function(cls.__module__, f"{cls.__name__}.{name}")


def _below(module: str) -> str:
    return module.removeprefix(PACKAGE).lstrip(".")


def _function(module: str, name: str) -> Callable[..., Any]:
    def later(*args: Any, **options: Any) -> Any:
        raise _refuse(_below(module), name)

    later.__module__, later.__name__, later.__qualname__ = module, name.rpartition(".")[2], name
    later.__doc__ = f"Not served: {advice(_below(module), name)}. Raises NotImplementedError."
    return later


def make(module: str, name: str, kind: str) -> Any:
    """What stands for a name: a constant or an enumeration as FlashInfer has it, else what refuses to be called."""
    if kind.startswith("="):
        return ast.literal_eval(kind[1:])
    if kind.startswith("{"):
        members = dict(member.split("=") for member in kind[1:-1].split(","))
        numbers = all(re.fullmatch(r"-?\d+", value) for value in members.values())
        made: Any = (
            IntEnum(name, {key: int(value) for key, value in members.items()}, module=module)
            if numbers
            else Enum(name, members, module=module, type=str)
        )
        return made
    doc = f"Not served: {advice(_below(module), name)}."
    if kind == "!":
        return type(name, (Exception,), {"__module__": module, "__doc__": "Never raised by flashloom."})
    if name[0].isupper() == (kind == "()"):
        return _function(module, name)

    def __new__(cls: type, *args: Any, **options: Any) -> Any:
        raise _refuse(_below(module), name)

    return _Refusing(name, (), {"__new__": __new__, "__module__": module, "__doc__": doc})


def names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module: its names of the table, made when they are first looked up. What the package
    serves under such a name is served there too."""
    below = _below(module)

    def __getattr__(name: str) -> Any:
        known = names_of(below)
        if name not in known:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        package = sys.modules[PACKAGE]
        found = getattr(package, name) if name in package.__all__ else None
        if found is None or isinstance(found, ModuleType):
            found = _same(below, name, known[name]) or make(module, name, known[name])
        setattr(sys.modules[module], name, found)
        return found

    return __getattr__


def _same(module: str, name: str, kind: str) -> Any:
    """An enumeration is one class wherever its name is."""
    if not kind.startswith("{"):
        return None
    home = next(m for m in sorted(_lines(), key=lambda m: (-m.count("."), m)) if names_of(m).get(name) == kind)
    return None if home == module else getattr(sys.modules[f"{PACKAGE}.{home}".rstrip(".")], name)


class _Module(ModuleType):
    """A module without a file: its names are made when they are looked up."""

    @property
    def __path__(self) -> list[str]:  # type: ignore[override]
        return []

    @property
    def __spec__(self) -> ModuleSpec:  # type: ignore[override]
        return ModuleSpec(self.__name__, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        return names(self.__name__)(name)

    def __dir__(self) -> list[str]:
        return sorted(names_of(_below(self.__name__)))


def publish() -> None:
    """Put the modules that have no file into the package, above the names that they hold."""
    for name in modules():
        full = f"{PACKAGE}.{name}"
        if full not in sys.modules:
            module = sys.modules[full] = _Module(full, "Not served: its names say what to use instead.")
            parent, _, last = name.rpartition(".")
            if last not in names_of(parent):  # a function of the module's name is what the package offers
                setattr(sys.modules[f"{PACKAGE}.{parent}".rstrip(".")], last, module)
