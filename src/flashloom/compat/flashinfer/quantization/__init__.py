"""flashinfer.quantization."""

from flashloom.compat.flashinfer import _later
from flashloom.compat.flashinfer.jit import gen_quantization_module
from flashloom.compat.flashinfer.quantization.packbits import packbits, segment_packbits

__all__ = ["gen_quantization_module", "packbits", "segment_packbits"]

__getattr__ = _later.names(__name__)
