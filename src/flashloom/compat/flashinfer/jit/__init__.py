"""flashinfer.jit: what programs import to build kernels ahead. flashloom's plan() builds them, or finds them in its
store; fl.Pack builds them ahead for machines without a compiler."""

from flashloom.compat.flashinfer.jit import env
from flashloom.compat.flashinfer.jit.attention import (
    gen_batch_attention_module,
    gen_batch_decode_module,
    gen_batch_pod_module,
    gen_batch_prefill_attention_sink_module,
    gen_batch_prefill_module,
    gen_pod_module,
    gen_single_decode_module,
    gen_single_prefill_module,
)
from flashloom.compat.flashinfer.jit.core import (
    JitSpec,
    MissingJITCacheError,
    build_jit_specs,
    check_cuda_arch,
    clear_cache_dir,
    generator,
    logger,
)

gen_page_module = generator("page")
gen_quantization_module = generator("quantization")

__all__ = [
    "JitSpec", "MissingJITCacheError", "build_jit_specs", "check_cuda_arch", "clear_cache_dir", "env",
    "gen_batch_attention_module", "gen_batch_decode_module", "gen_batch_pod_module",
    "gen_batch_prefill_attention_sink_module", "gen_batch_prefill_module", "gen_page_module", "gen_pod_module",
    "gen_quantization_module", "gen_single_decode_module", "gen_single_prefill_module", "logger",
]  # fmt: skip
