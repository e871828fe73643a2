"""Names of FlashInfer that flashloom does not serve yet: they can be imported, and say so when they are used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

#: Module -> names there that come later. Modules without a file of their own are made from this table alone.
TABLE = {
    "activation": "gelu_and_mul gelu_tanh_and_mul silu_and_mul silu_and_mul_scaled_nvfp4_experts_quantize",
    "autotuner": "AutoTuner ConstraintSpec DynamicTensorSpec TunableRunner TuningConfig get_autotune_process_group "
    "set_autotune_process_group",
    "cascade": "",
    "comm": "AllReduceFusionPattern Mapping TorchDistBackend allreduce_fusion create_allreduce_fusion_workspace "
    "trtllm_allreduce_fusion trtllm_create_ipc_workspace_for_all_reduce_fusion",
    "comm.mnnvl": "CommBackend McastGPUBuffer MnnvlConfig TorchDistBackend is_mnnvl_fabric_supported "
    "is_multicast_supported",
    "concat_ops": "concat_mla_k",
    "cudnn": "cudnn_batch_decode_with_kv_cache cudnn_batch_prefill_with_kv_cache",
    "decode": "BatchDecodeMlaWithPagedKVCacheWrapper cudnn_batch_decode_with_kv_cache "
    "single_decode_with_kv_cache_with_jit_module "
    "trtllm_batch_decode_with_kv_cache_mla xqa_batch_decode_with_kv_cache_mla",
    "fp4_quantization": "block_scale_interleave e2m1_and_ufp8sf_scale_to_float fp4_quantize mxfp4_dequantize "
    "mxfp4_dequantize_host mxfp4_quantize nvfp4_batched_quantize nvfp4_block_scale_interleave nvfp4_kv_dequantize "
    "nvfp4_kv_dequantize_paged nvfp4_kv_quantize nvfp4_quantize nvfp4_quantize_paged_kv_cache "
    "scaled_fp4_grouped_quantize shuffle_matrix_a shuffle_matrix_sf_a silu_and_mul_nvfp4_quantize",
    "fp8_quantization": "mxfp8_dequantize_host mxfp8_grouped_quantize mxfp8_quantize",
    "fused_moe": "RoutingMethodType cutlass_fused_moe fused_topk_deepseek interleave_moe_scales_for_sm90_mixed_gemm "
    "interleave_moe_weights_for_sm90_mixed_gemm reorder_rows_for_gated_act_gemm trtllm_bf16_moe "
    "trtllm_bf16_routed_moe trtllm_fp4_block_scale_moe trtllm_fp4_block_scale_routed_moe trtllm_fp8_block_scale_moe "
    "trtllm_fp8_block_scale_routed_moe trtllm_fp8_per_tensor_scale_moe trtllm_fp8_per_tensor_scale_routed_moe",
    "gdn_decode": "gated_delta_rule_decode_pretranspose",
    "gdn_prefill": "chunk_gated_delta_rule",
    "gemm": "SegmentGEMMWrapper batch_deepgemm_fp8_nt_groupwise bmm_bf16 bmm_fp8 bmm_mxfp8 fp8_blockscale_gemm_sm90 "
    "gemm_fp8_nt_blockscaled gemm_fp8_nt_groupwise group_deepgemm_fp8_nt_groupwise group_gemm_fp8_nt_groupwise mm_bf16 "
    "mm_bf16_fp4 mm_fp4 mm_fp8 mm_mxfp8 prepare_bf16_fp4_weights tgv_gemm_sm100 tinygemm_bf16",
    "grouped_mm": "grouped_mm_bf16 grouped_mm_fp4 grouped_mm_fp8 grouped_mm_mxfp8",
    "jit.attention": "gen_batch_mla_module gen_customize_batch_decode_module gen_customize_batch_prefill_module "
    "gen_customize_single_decode_module gen_customize_single_prefill_module",
    "kda": "RecurrentKDAPrefillWrapper recurrent_kda",
    "mamba": "selective_state_update",
    "mla": "BatchMLAPagedAttentionWrapper trtllm_batch_decode_with_kv_cache_mla",
    "norm": "fused_add_rmsnorm fused_add_rmsnorm_quant fused_qk_rmsnorm_rope fused_rmsnorm_silu "
    "gemma_fused_add_rmsnorm gemma_rmsnorm layernorm layernorm_quant rmsnorm rmsnorm_quant",
    "page": "append_paged_mla_kv_cache nvfp4_quantize_append_paged_kv_cache "
    "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
    "prefill": "single_prefill_with_kv_cache_with_jit_module trtllm_batch_context_with_kv_cache trtllm_fmha_v2_prefill "
    "trtllm_ragged_attention_deepseek trtllm_sage_attention_quantize",
    "quantization.fp4_quantization": "block_scale_interleave e2m1_and_ufp8sf_scale_to_float fp4_quantize "
    "mxfp4_dequantize mxfp4_quantize nvfp4_kv_dequantize nvfp4_kv_quantize nvfp4_quantize",
    "quantization.fp8_quantization": "mxfp8_dequantize_host mxfp8_grouped_quantize mxfp8_quantize",
    "quantization.nvfp4_quantization_utils": "NVFP44Over6Config NVFP44Over6ErrMode nvfp4_e4m3_max",
    "rope": "apply_llama31_rope apply_llama31_rope_inplace apply_llama31_rope_pos_ids "
    "apply_llama31_rope_pos_ids_inplace apply_rope apply_rope_inplace apply_rope_pos_ids apply_rope_pos_ids_inplace "
    "apply_rope_with_cos_sin_cache apply_rope_with_cos_sin_cache_inplace mla_rope_quantize_fp8 rope_quantize_fp8 "
    "rope_quantize_fp8_append_paged_kv_cache",
    "sampling": "chain_speculative_sampling min_p_sampling_from_probs sampling_from_logits sampling_from_probs softmax "
    "top_k_mask_logits top_k_renorm_probs top_k_sampling_from_probs top_k_top_p_sampling_from_logits "
    "top_k_top_p_sampling_from_probs top_p_renorm_probs top_p_sampling_from_probs",
    "sparse": "BlockSparseAttentionWrapper VariableBlockSparseAttentionWrapper",
    "testing": "attention_flops bench_gpu_time",
    "tllm_enums": "ActivationType RoutingMethodType SfLayout is_gated_activation",
    "topk": "TopKTieBreak top_k top_k_page_table_transform top_k_ragged_transform",
    "topk_varlen": "top_k_varlen",
    "utils": "FP4Tensor backend_requirement get_shuffle_matrix_a_row_indices "
    "get_trtllm_gen_multi_ctas_kv_counter_bytes supported_compute_capability",
    "xqa": "xqa_mla",
}
#: Modules that only make their names known here, not at the top of the package.
_BELOW = {"autotuner", "comm.mnnvl", "jit.attention", "testing", "utils"}


class _Refusing(type):
    """A class that comes later: its attributes can be looked up, as decorators of programs do, and its calls refuse."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        return _function(f"{cls.__module__}.{cls.__name__}.{name}")


def _refuse(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name.replace(PACKAGE, 'flashinfer')} is not served by flashloom yet: it is one of the names that come later"
    )


def _function(name: str) -> Callable[..., Any]:
    def later(*args: Any, **options: Any) -> Any:
        raise _refuse(name)

    later.__module__, _, later.__name__ = name.rpartition(".")
    later.__qualname__ = later.__name__
    later.__doc__ = f"{name.replace(PACKAGE, 'flashinfer')}: not served yet, raises NotImplementedError."
    return later


def make(module: str, name: str) -> Any:
    """What stands for a name until it is served: a class where FlashInfer has one."""
    full = f"{module}.{name}"
    if not name[0].isupper():
        return _function(full)

    def __new__(cls: type, *args: Any, **options: Any) -> Any:
        raise _refuse(full)

    return _Refusing(name, (), {"__new__": __new__, "__module__": module, "__doc__": f"{name}: not served yet."})


def names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module: its names of the table, made when they are first looked up."""
    known = set(TABLE.get(module.removeprefix(PACKAGE).lstrip("."), "").split())

    def __getattr__(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        made = make(module, name)
        setattr(sys.modules[module], name, made)
        return made

    return __getattr__


def top(name: str) -> Any:
    """A name at the top of the package, from the module it lives in. Raises AttributeError for what is none."""
    for module, text in TABLE.items():
        if module not in _BELOW and name in text.split():
            return getattr(sys.modules[f"{PACKAGE}.{module}"], name)
    raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")


def publish() -> None:
    """Put the modules that have no file into the package, above the names that they hold."""
    for name in TABLE:
        full = f"{PACKAGE}.{name}"
        if full not in sys.modules:
            module = ModuleType(full, f"flashinfer.{name}: not served yet; every name raises NotImplementedError.")
            module.__path__ = []
            module.__getattr__ = names(full)  # type: ignore[method-assign]
            sys.modules[full] = module
            parent, _, last = full.rpartition(".")
            setattr(sys.modules[parent], last, module)
