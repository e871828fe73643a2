"""FlashInfer's names on flashloom: a translation, without kernels of its own.

`flashloom.compat.install()` serves this package as `flashinfer`. Names that are not served raise NotImplementedError,
with what to use instead, when they are called; docs/compat.md lists what is."""

from __future__ import annotations

from flashloom.compat.flashinfer import (
    _later,
    api_logging,
    attention,
    autotune_cache,
    autotuner,
    cascade,
    decode,
    jit,
    page,
    pod,
    prefill,
    quantization,
    triton,
    utils,
    version,
)
from flashloom.compat.flashinfer import (
    xqa as _xqa,  # noqa: F401
)
from flashloom.compat.flashinfer.attention import BatchAttention, BatchAttentionWithAttentionSinkWrapper
from flashloom.compat.flashinfer.autotune_cache import MeasurementPolicy, autotune_v2, autotune_v2_reload
from flashloom.compat.flashinfer.autotuner import autotune
from flashloom.compat.flashinfer.cascade import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from flashloom.compat.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan,
    single_decode_with_kv_cache,
    trtllm_batch_decode_with_kv_cache,
    xqa_batch_decode_with_kv_cache,
)
from flashloom.compat.flashinfer.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from flashloom.compat.flashinfer.pod import BatchPODWithPagedKVCacheWrapper, PODWithPagedKVCacheWrapper
from flashloom.compat.flashinfer.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from flashloom.compat.flashinfer.quantization import packbits, segment_packbits
from flashloom.compat.flashinfer.utils import next_positive_power_of_2
from flashloom.compat.flashinfer.version import __git_commit__, __git_version__, __version__
from flashloom.compat.flashinfer.xqa import xqa

__all__ = [
    "BatchAttention", "BatchAttentionWithAttentionSinkWrapper", "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", "BatchPODWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "MeasurementPolicy", "MultiLevelCascadeAttentionWrapper", "PODWithPagedKVCacheWrapper", "__git_commit__",
    "__git_version__", "__version__", "api_logging", "append_paged_kv_cache", "attention", "autotune",
    "autotune_cache", "autotune_v2", "autotune_v2_reload", "autotuner", "cascade", "decode", "fast_decode_plan",
    "get_batch_indices_positions", "get_seq_lens", "jit", "merge_state", "merge_state_in_place", "merge_states",
    "next_positive_power_of_2", "packbits", "page", "pod", "prefill", "quantization", "segment_packbits",
    "set_memory_pool_size", "single_decode_with_kv_cache", "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse", "triton", "trtllm_batch_decode_with_kv_cache", "utils", "version",
    "xqa", "xqa_batch_decode_with_kv_cache",
]  # fmt: skip


def set_memory_pool_size(size: int) -> None:
    """Bytes that the workspaces of all live plans may take together, on each device: `fl.configure(memory_pool_size=)`.
    A plan that needs more is a MemoryError."""
    from flashloom.settings import configure

    configure(memory_pool_size=size)


_later.publish()
__getattr__ = _later.names(__name__)
