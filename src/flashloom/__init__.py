"""flashloom: attention variants written as torch code, compiled into fast kernels for the machine at hand."""

from flashloom.attention import Attention, Batch, BlockSparseKV, HeadShape, Plan, Reserve, attention, merge
from flashloom.kv_cache import DenseKV, PagedKVCache, PageTable, RaggedKV, append
from flashloom.settings import configure
from flashloom.target import Target
from flashloom.variant import *  # noqa: F403
from flashloom.variant import __all__ as _variants

__all__ = [
    "Attention", "Batch", "BlockSparseKV", "DenseKV", "HeadShape", "PageTable", "PagedKVCache", "Plan", "RaggedKV",
    "Reserve", "Target", "append", "attention", "configure", "merge", *_variants,
]  # fmt: skip
