"""Where keys and values live: page tables, caches, and writing this step's tokens into them."""

from flashloom.kv_cache.append import append
from flashloom.kv_cache.cache import KV, PagedKVCache
from flashloom.kv_cache.pages import DenseKV, KVLayout, PageTable, RaggedKV

__all__ = ["KV", "DenseKV", "KVLayout", "PageTable", "PagedKVCache", "RaggedKV", "append"]
