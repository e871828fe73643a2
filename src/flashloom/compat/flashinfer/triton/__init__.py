"""flashinfer.triton."""

from flashloom.compat.flashinfer import _later
from flashloom.compat.flashinfer.triton import cascade

__all__ = ["cascade"]

__getattr__ = _later.names(__name__)
