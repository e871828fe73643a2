"""flashinfer.attention."""

from flashloom.compat.flashinfer import _later
from flashloom.compat.flashinfer.attention._core import BatchAttention, BatchAttentionWithAttentionSinkWrapper
from flashloom.compat.flashinfer.jit.attention import gen_batch_attention_module

__all__ = ["BatchAttention", "BatchAttentionWithAttentionSinkWrapper", "gen_batch_attention_module"]

__getattr__ = _later.names(__name__)
