"""The public names, for type checkers alone. Beside an import from `flashloom.attention` in the package itself, mypy
takes `fl.attention` for the module of that name; `fl.bench`, `fl.append`, `fl.monitor` and `fl.tune` likewise."""

from flashloom.attention import Attention, Batch, BlockSparseKV, HeadShape, Plan, Reserve, attention, merge
from flashloom.bench import Workload, bench, workloads
from flashloom.errors import FlashloomError
from flashloom.kv_cache import DenseKV, PagedKVCache, PageTable, RaggedKV, append
from flashloom.monitor import Monitor, monitor
from flashloom.pack import Pack, prepare
from flashloom.settings import configure
from flashloom.store import SealedError, seal, use
from flashloom.target import Target
from flashloom.tune import autotune, tune, tune_cache_path
from flashloom.variant import (
    Bits,
    PerHead,
    PerKeyToken,
    PerKVHead,
    PerQueryToken,
    PerRequest,
    Scalar,
    TraceError,
    Variant,
    alibi,
    alibi_slopes,
    causal,
    custom_mask,
    document_mask,
    from_flex,
    full,
    length_temperature,
    packed_mask,
    prefix_lm,
    rope,
    rope_frequencies,
    sigmoid,
    sink,
    sliding_window,
    softcap,
)  # fmt: skip

__all__ = [
    "Attention", "Batch", "Bits", "BlockSparseKV", "DenseKV", "FlashloomError", "HeadShape", "Monitor", "Pack",
    "PageTable", "PagedKVCache", "PerHead", "PerKVHead", "PerKeyToken", "PerQueryToken", "PerRequest", "Plan",
    "RaggedKV", "Reserve", "Scalar", "SealedError", "Target", "TraceError", "Variant", "Workload", "alibi",
    "alibi_slopes", "append", "attention", "autotune", "bench", "causal", "configure", "custom_mask",
    "document_mask", "from_flex", "full", "length_temperature", "merge", "monitor", "packed_mask", "prefix_lm",
    "prepare", "rope", "rope_frequencies", "seal", "sigmoid", "sink", "sliding_window", "softcap", "tune",
    "tune_cache_path", "use", "workloads",
]  # fmt: skip
