"""What programs import from flashinfer.utils."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch

from flashloom.compat.flashinfer import _later

__all__ = [
    "BackendSupportedError",
    "GPUArchitectureError",
    "LibraryError",
    "MaskMode",
    "PosEncodingMode",
    "TensorLayout",
    "canonicalize_torch_dtype",
    "ceil_div",
    "check_shape_dtype_device",
    "determine_attention_backend",
    "device_support_pdl",
    "get_alibi_slopes",
    "get_compute_capability",
    "get_device_sm_count",
    "get_indptr",
    "has_flashinfer_jit_cache",
    "is_fa3_backend_supported",
    "is_fa3_prefill_head_dim_supported",
    "is_float8",
    "is_sm12x_supported",
    "is_sm90a_supported",
    "is_sm100a_supported",
    "is_sm100f_supported",
    "is_sm110a_supported",
    "is_sm120a_supported",
    "is_sm120f_supported",
    "is_sm121a_supported",
    "last_positive_power_of_2",
    "next_positive_power_of_2",
    "round_up",
]  # fmt: skip


__getattr__ = _later.names(__name__)


class PosEncodingMode(Enum):
    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(Enum):
    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class TensorLayout(Enum):
    NHD = 0
    HND = 1


class GPUArchitectureError(Exception):
    """The GPU cannot do what was asked."""


class LibraryError(Exception):
    """A library that is needed is missing or too old."""


class BackendSupportedError(Exception):
    """The chosen backend cannot do what was asked."""


# --- layouts ---


def _check_kv_layout(kv_layout: str) -> None:
    if kv_layout not in TensorLayout.__members__:
        raise KeyError(f"Invalid kv_layout {kv_layout}")


def _check_pos_encoding_mode(pos_encoding_mode: str) -> None:
    if pos_encoding_mode not in PosEncodingMode.__members__:
        raise KeyError(f"Invalid pos_encoding_mode {pos_encoding_mode}")


def _with_page(x: torch.Tensor, rank: int, kv_layout: str) -> torch.Tensor:
    """Pages of one token may come without the dimension of their size."""
    _check_kv_layout(kv_layout)
    if x.dim() not in (rank - 1, rank):
        raise ValueError(f"the KV cache has shape {tuple(x.shape)}: must have {rank} dimensions, or {rank - 1} for "
                         "pages of one token")  # fmt: skip
    return x if x.dim() == rank else x.unsqueeze(-3 if kv_layout == "NHD" else -2)


def _unpack_paged_kv_cache(
    paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, v) as 4-D views in the layout: of a tuple, or of one tensor [pages, 2, ...]."""
    if isinstance(paged_kv_cache, tuple):
        k, v = paged_kv_cache
        return _with_page(k, 4, kv_layout), _with_page(v, 4, kv_layout)
    if isinstance(paged_kv_cache, torch.Tensor):
        k, v = _with_page(paged_kv_cache, 5, kv_layout).unbind(1)
        return k, v
    raise KeyError(
        f"Unrecognized paged_kv_cache type {type(paged_kv_cache)}, expect a single tensor or a tuple of tensor."
    )


# --- checks ---


def check_shape_dtype_device(
    x: torch.Tensor,
    expected_shape: Sequence[int] | None,
    expected_dtype: torch.dtype | None,
    expected_device: torch.device | None,
    name: str,
) -> None:
    for what, want, have in (
        ("shape", None if expected_shape is None else tuple(expected_shape), tuple(x.shape)),
        ("dtype", expected_dtype, x.dtype),
        ("device", expected_device, x.device),
    ):
        if want is not None and have != want:
            raise ValueError(f"Invalid {what} of {name}: expected {want}, got {have}")


def _check_workspace_buffer_alignment(x: torch.Tensor, name: str, alignment: int = 16) -> None:
    if x.numel() and x.data_ptr() % alignment:
        raise ValueError(
            f"{name} must be {alignment}-byte aligned, got data_ptr % {alignment} = {x.data_ptr() % alignment}"
        )


def _check_cached_qkv_data_type(q: torch.Tensor, k: torch.Tensor, dtype_q: torch.dtype, dtype_kv: torch.dtype) -> None:
    for name, x, want in (("query", q, dtype_q), ("key", k, dtype_kv)):
        if x.dtype != want:
            raise ValueError(
                f"The dtype of {name} {x.dtype} does not match the {'q' if x is q else 'kv'}_data_type {want} "
                "specified in plan function."
            )


def canonicalize_torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype {dtype!r}: torch has none of that name")
        return found
    if isinstance(dtype, torch.dtype):
        return dtype
    raise TypeError(f"dtype must be a string or torch.dtype, got {type(dtype)}")


#: FlashInfer's backends of attention; those that `check_backend` lets pass all mean flashloom's own kernels.
BACKENDS = (
    "auto", "fa2", "fa3", "cake", "cudnn", "cute-dsl", "cute-dsl-prims", "cutile", "cutlass", "fmha_v2", "prims-ts",
    "trtllm-gen", "xqa",
)  # fmt: skip


def check_backend(backend: str, served: Sequence[str] = ("auto", "fa2", "fa3")) -> str:
    """FlashInfer's name for a backend. Its own kernels cannot be chosen here: flashloom chooses among its own. Raises
    ValueError for a name that is none, NotImplementedError for one that is not served."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: FlashInfer has {', '.join(BACKENDS)}; here use {', '.join(served)}")
    if backend not in served:
        raise NotImplementedError(
            f'backend={backend!r}: flashloom has kernels of its own; leave backend at "auto" '
            f"({', '.join(served[1:])} mean the same here)"
        )
    return backend


def sinks_of(sinks: torch.Tensor, q_heads: int, kv_heads: int) -> torch.Tensor:
    """Sinks as [q_heads], from that or from [kv_heads, query heads of each]."""
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"sinks is {type(sinks).__name__}: give a tensor [q_heads]")
    shape = [size for size in sinks.shape if size != 1]
    group = q_heads // kv_heads
    if shape not in ([size for size in form if size != 1] for form in ((q_heads,), (kv_heads, group))):
        raise ValueError(
            f"sinks has shape {list(sinks.shape)}: must be [q_heads] = [{q_heads}] or [kv_heads, query heads of each]"
            f" = [{kv_heads}, {group}]"
        )
    return sinks if sinks.dim() == 1 else sinks.reshape(-1)


def per_head(name: str, scale: torch.Tensor, q_heads: int, kv_heads: int) -> torch.Tensor:
    """A scale of 8-bit tensors as [q_heads], from one for all, [q_heads] or [kv_heads]."""
    flat = scale.reshape(-1)
    if flat.numel() == q_heads:
        return flat
    if flat.numel() not in (1, kv_heads):
        raise ValueError(
            f"{name} has shape {list(scale.shape)}: must have one entry, q_heads = {q_heads} or kv_heads = {kv_heads}"
        )
    return flat.repeat_interleave(q_heads // flat.numel())


def narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in a dtype of 8 bits, saturated, or in any other."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    limit = (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max
    return x.clamp(-limit, limit).to(dtype)


# --- numbers ---


def next_positive_power_of_2(x: int) -> int:
    return 1 if x < 1 else 1 << (x - 1).bit_length()


def last_positive_power_of_2(x: int) -> int:
    power = next_positive_power_of_2(x)
    return power if power == x else power // 2


def _ceil_pow2(x: int) -> int:
    return 1 << (x - 1).bit_length()


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def round_up(x: int, y: int) -> int:
    return ceil_div(x, y) * y


def is_float8(x: torch.Tensor) -> bool:
    return x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def get_indptr(x: torch.Tensor) -> torch.Tensor:
    offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    offsets[1:] = x.to(torch.int64).cumsum(0)
    return offsets


def get_alibi_slopes(n_heads: int, device: torch.device | None = None) -> torch.Tensor:
    from flashloom.variant import alibi_slopes

    return alibi_slopes(n_heads).to(device)


@functools.lru_cache(maxsize=256)
def _range(size: int, device: torch.device) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32).to(device)  # from the host: there, whichever stream uses it first


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _get_range_buf(seq_len: int, device: torch.device | str) -> torch.Tensor:
    """0, 1, ... as int32; a view of a tensor that is kept."""
    if capturing(torch.device(device)):  # what is made there is filled at a replay
        return torch.arange(seq_len, dtype=torch.int32, device=device)
    return _range(_ceil_pow2(max(seq_len, 1)), torch.device(device))[:seq_len]


# --- the device ---


def get_compute_capability(device: torch.device) -> tuple[int, int]:
    if torch.device(device).type != "cuda":
        raise ValueError("device must be a cuda device")
    return torch.cuda.get_device_capability(device)


def get_device_sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def get_device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def device_support_pdl(device: torch.device) -> bool:
    return torch.device(device).type == "cuda" and get_compute_capability(device)[0] >= 9


def _is(major: int, minor: int | None = None) -> Any:
    def supported(device: torch.device) -> bool:
        device = torch.device(device)
        if device.type != "cuda" or not torch.cuda.is_available():
            return False
        have = torch.cuda.get_device_capability(device)
        return have[0] == major and (minor is None or have[1] == minor)

    return supported


is_sm90a_supported = _is(9)
is_sm100a_supported = is_sm100f_supported = _is(10)
is_sm110a_supported = _is(11)
is_sm12x_supported = _is(12)
is_sm120a_supported = is_sm120f_supported = _is(12, 0)
is_sm121a_supported = _is(12, 1)


def is_fa3_backend_supported(
    pos_encoding_mode: int,
    use_fp16_qk_reductions: bool,
    use_custom_mask: bool,
    dtype_q: torch.dtype,
    dtype_kv: torch.dtype,
) -> bool:
    """Whether FlashInfer would take its "fa3" for this: what `_backend` of a wrapper says."""
    if use_custom_mask or pos_encoding_mode != PosEncodingMode.NONE.value or use_fp16_qk_reductions:
        return False
    return dtype_kv != torch.uint8 and (dtype_kv.itemsize > 1 or dtype_q.itemsize == 1)


def is_fa3_prefill_head_dim_supported(head_dim_qk: int, head_dim_vo: int) -> bool:
    return (head_dim_qk, head_dim_vo) in ((64, 64), (128, 128), (256, 256), (192, 128))


def determine_attention_backend(
    device: torch.device,
    pos_encoding_mode: int,
    use_fp16_qk_reductions: bool,
    use_custom_mask: bool,
    dtype_q: torch.dtype,
    dtype_kv: torch.dtype,
    *,
    head_dim_qk: int | None = None,
    head_dim_vo: int | None = None,
) -> str:
    """FlashInfer's name for the backend it would take. flashloom chooses its own kernels; see `Plan.explain()`."""
    fa3 = is_sm90a_supported(device) and is_fa3_backend_supported(
        pos_encoding_mode, use_fp16_qk_reductions, use_custom_mask, dtype_q, dtype_kv
    )
    if fa3 and head_dim_qk is not None and head_dim_vo is not None:
        fa3 = is_fa3_prefill_head_dim_supported(head_dim_qk, head_dim_vo)
    return "fa3" if fa3 else "fa2"


def has_flashinfer_jit_cache() -> bool:
    """True: nothing has to be compiled before first use, plan() builds kernels or finds them in flashloom's store."""
    return True


def scale_of(head_dim: int, sm_scale: float | None) -> float:
    return 1.0 / math.sqrt(head_dim) if sm_scale is None else sm_scale
