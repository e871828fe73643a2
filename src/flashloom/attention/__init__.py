"""Attention: what a layer computes, batches of requests, and plans that run it."""

from flashloom.attention.attention import Attention, Plan
from flashloom.attention.batch import Batch, BlockSparseKV, Reserve
from flashloom.attention.function import attention
from flashloom.attention.merge import merge
from flashloom.attention.shape import HeadShape

__all__ = ["Attention", "Batch", "BlockSparseKV", "HeadShape", "Plan", "Reserve", "attention", "merge"]
