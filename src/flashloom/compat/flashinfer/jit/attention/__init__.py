"""flashinfer.jit.attention."""

from flashloom.compat.flashinfer import _later
from flashloom.compat.flashinfer.jit.attention import variants
from flashloom.compat.flashinfer.jit.core import generator

__getattr__ = _later.names(__name__)

gen_batch_attention_module = generator("batch_attention")
gen_batch_decode_module = generator("batch_decode")
gen_batch_pod_module = generator("batch_pod")
gen_batch_prefill_attention_sink_module = generator("batch_prefill_attention_sink")
gen_batch_prefill_module = generator("batch_prefill")
gen_pod_module = generator("pod")
gen_single_decode_module = generator("single_decode")
gen_single_prefill_module = generator("single_prefill")

__all__ = [
    "gen_batch_attention_module", "gen_batch_decode_module", "gen_batch_pod_module",
    "gen_batch_prefill_attention_sink_module", "gen_batch_prefill_module", "gen_pod_module",
    "gen_single_decode_module", "gen_single_prefill_module", "variants",
]  # fmt: skip
