"""Which of FlashInfer's test cases are run, and why not the others."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

#: Test files by default, below `tests/`.
FILES = (
    "attention/test_single_prefill", "attention/test_logits_cap", "attention/test_batch_prefill_kernels",
    "attention/test_batch_decode_kernels", "attention/test_shared_prefix_kernels", "attention/test_page",
    "utils/test_triton_cascade",
)  # fmt: skip
#: Others that concern names which are served.
MORE = (
    "attention/test_alibi", "attention/test_attention_sink", "attention/test_batch_attention",
    "attention/test_batch_invariant_fa2", "attention/test_batch_prefill", "attention/test_decode_prefill_lse",
    "attention/test_hopper", "attention/test_non_contiguous_decode", "attention/test_non_contiguous_prefill",
    "attention/test_sliding_window", "attention/test_tensor_cores_decode", "attention/test_workspace_size",
    "utils/test_pod_kernels", "utils/test_quantization", "utils/test_jit_warmup",
)  # fmt: skip

NVFP4 = "NVFP4 KV caches are not served yet"
GRAPH = "CUDA graphs need a GPU"
#: (pattern of the case's name, device or "", reason); the first that matches says why a case is left out.
LEFT_OUT = (
    (
        r"rejects_unequal_kv_strides", "",
        "expects an error for keys and values with different strides, which flashloom computes",
    ),
    (r"nvfp4", "", NVFP4),
    (r"cuda_graph", "cpu", GRAPH),
    (r"test_variable_length_merge_states", "cpu", "takes 4 GB of states and 2048 comparisons: GPU only"),
    (r"test_workspace_size", "cpu", "the tests ask for a GPU themselves"),
    (r"test_jit_warmup", "", "asks for modules of names that are not served yet"),
    (r"test_jit_example.*(custom_mask|dump_logits|debug_print|mask)", "", "CUDA text that only FlashInfer compiles"),
)  # fmt: skip

#: So many cases of every file are in a sample, if it has them.
EACH = 24
LENGTHS = ("batch_size", "kv_len", "seq_len", "batch_size_d", "kv_len_d", "shared_kv_len", "kv_len_p", "num_tries")
LIMITS = {"cpu": 3e8, "cuda": 6e10}
MEGABYTES = {"cpu": 512, "cuda": 1200}


def left_out(name: str, params: Mapping[str, Any], device: str) -> str | None:
    """Why a case is not run on a device, or None."""
    for pattern, where, reason in LEFT_OUT:
        if where in ("", device) and re.search(pattern, name):
            return reason
    if "batch_prefill" in name and params.get("use_cuda_graph"):
        return "the test marks itself as expected to fail with CUDA graphs"
    q, kv = _number(params, "qo_len", "q_len", "qo_len_p"), _number(params, "kv_len", "seq_len", "kv_len_p")
    if q and kv and q > kv and params.get("causal"):
        return "the test skips itself: more queries than keys, and causal"
    if _work(params) > LIMITS[device]:
        return f"takes more than {LIMITS[device]:.0e} products of queries and keys"
    if _bytes(params) > MEGABYTES[device] << 20:
        return f"takes more than {MEGABYTES[device]} MB for queries, keys and values in float32: cases run side by side"
    return None


def _number(params: Mapping[str, Any], *names: str, default: int = 0) -> int:
    for name in names:
        value = params.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def _sizes(params: Mapping[str, Any]) -> tuple[int, int, int, int, int, int]:
    batch = _number(params, "batch_size", "batch_size_d", default=1)
    kv = max(_number(params, n) for n in ("kv_len", "seq_len", "kv_len_p", "kv_len_d", "shared_kv_len"))
    q = max(_number(params, n) for n in ("qo_len", "q_len", "qo_len_p", "q_len_per_req", "unique_kv_len")) or 1
    pairs = params.get("seq_len_pairs")
    if isinstance(pairs, (list, tuple)) and pairs:
        batch, kv, q = 1, sum(int(p[0]) for p in pairs), max(int(p[1]) for p in pairs)
    kv_heads = _number(params, "num_kv_heads", "num_heads", default=4)
    q_heads = _number(
        params, "num_qo_heads", "num_heads", default=kv_heads * _number(params, "gqa_group_size", default=1)
    )
    return batch, max(kv, 1), q, kv_heads, q_heads, _number(params, "head_dim", "head_dim_qk", default=128)


def _work(params: Mapping[str, Any]) -> float:
    batch, kv, q, _, q_heads, dim = _sizes(params)
    return float(batch) * kv * q * q_heads * dim


def _bytes(params: Mapping[str, Any]) -> int:
    batch, kv, q, kv_heads, q_heads, dim = _sizes(params)
    return (batch * kv * kv_heads * 2 + batch * q * q_heads) * dim * 4


def group(test: str, params: Mapping[str, Any]) -> str:
    """The name of a case without its lengths: cases of one group run the same kernels, and are sampled together."""
    return test + str(sorted((name, str(value)) for name, value in params.items() if name not in LENGTHS))


def place(name: str) -> float:
    """A number from 0 to 1 that depends on a name alone: a sample is the groups with the least."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / (1 << 56)


def sample(groups: Mapping[str, tuple[str, int]], limit: int) -> list[str]:
    """Names of the groups to run: at least EACH cases of every file, then those of the least hash, `limit` in all.

    `groups` gives each group's file and number of cases."""
    names = sorted(groups, key=place)
    of_file: Counter[str] = Counter()
    first = []
    for name in names:
        file, count = groups[name]
        if of_file[file] < EACH:
            first.append(name)
            of_file[file] += count
    rest = sorted(set(names) - set(first), key=place)
    chosen, total = [], 0
    for name in first + rest:
        if total >= limit:
            break
        chosen.append(name)
        total += groups[name][1]
    return chosen
