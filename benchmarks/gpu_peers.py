"""What the GPU benchmarks time flashloom against: torch SDPA, FlexAttention and, where they can be imported, FlashInfer
with each of its backends and FlashAttention-4. Every function answers names with what sets that peer up: a call of no
arguments that answers (a call whose output [tokens, heads, dim] is checked, the calls that are timed, one per set).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashloom.bench.machine import describe

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def _installed(package: str, part: str = "") -> bool:
    """Without importing it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and any((Path(x) / part).is_dir() for x in spec.submodule_search_locations or ())


FLASHINFER, FA4 = _installed("flashinfer"), _installed("flash_attn", "cute")
LIMIT = 60.0  # seconds in which a peer must set up all its rows
LIMITS = {"flex": 150.0}  # where it is another: FlexAttention compiles anew for every row
AGAIN = 75  # exit status of a process that is to be run again, without the peer that ended it
_DECODE = {
    "cuda cores": {"use_tensor_cores": False},
    "tensor cores": {"use_tensor_cores": True, "backend": "fa2"},
    "cudnn": {"backend": "cudnn"},
}
Call = Callable[[], torch.Tensor]
Maker = Callable[[], tuple[Call, list[Call]]]


def versions() -> dict[str, str]:
    """Those of the optional peers that are installed."""
    found = {}
    for name, installed in (("flashinfer-python", FLASHINFER), ("flash-attn-4", FA4)):
        try:
            found[name] = version(name) if installed else "not installed: left out"
        except PackageNotFoundError:
            found[name] = "of unknown version"
    return found


def about() -> dict[str, object]:
    """The machine and its versions, and the command that was typed instead of the one that it starts for its rows."""
    program, *given = [x for x in sys.argv if x not in ("--rows", "--resume")]
    command = f"PYTHONPATH=src:. python benchmarks/{Path(program).name} {shlex.join(given)}".rstrip()
    return {**describe(), "command": command, **versions()}


class SetUp:
    """Sets peers up, their compiling included, before anything is timed, and compares what they compute with ours.

    `gone`: peer -> why it is left out from now on. A peer whose rows take over LIMIT seconds together is; one that
    hangs or leaves the device unusable ends the process with AGAIN after `save()`: see `supervise`.
    """

    def __init__(self, gone: dict[str, str], save: Callable[[], None], capture: Callable, limit: float = LIMIT):
        self.gone, self.save, self.capture, self.limit = gone, save, capture, limit
        self.seconds: dict[str, float] = {}

    def _end(self, name: str, why: str) -> None:
        print(f"  {name} is left out: {why}", flush=True)
        self.gone[name] = why
        self.save()
        os._exit(AGAIN)

    def __call__(self, name: str, make: Maker, expected: torch.Tensor, bound: float):
        """(what `capture` answers for the timed calls, relative error), or text: why there is nothing to time."""
        if name in self.gone:
            return self.gone[name]
        spent, start, limit = self.seconds.get(name, 0.0), time.perf_counter(), LIMITS.get(name, self.limit)
        late = f"setting up its rows took over {limit:.0f} s"
        hung = threading.Timer(limit - spent + 10, self._end, (name, late))
        hung.daemon = True
        hung.start()
        try:
            check, calls = make()
            error = relative_error(check().reshape(expected.shape), expected)
            if not error <= bound:  # NaN too
                return f"relative error {error:.1e} against flashloom, allowed are {bound:.0e}: not the same work"
            return self.capture(calls), error
        except Exception as problem:
            text = f"{type(problem).__name__}: {str(problem)[:300]}"
            try:
                torch.cuda.synchronize()
            except Exception:
                self._end(name, f"it left the device unusable: {text}")
            return text
        finally:
            hung.cancel()
            self.seconds[name] = spent + time.perf_counter() - start
            if self.seconds[name] > limit:
                self.gone[name] = late


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected|, over all of both."""
    difference = out.float() - expected.float()
    return (difference.norm() / expected.float().norm()).item()


def supervise(command: list[str], timeout: float | None = None) -> int:
    """Run `command`, again with --resume while a peer ends it; its exit status."""
    end = time.monotonic() + timeout if timeout else None
    resume: list[str] = []
    while True:
        left = max(1.0, end - time.monotonic()) if end else None
        try:
            status = subprocess.run([*command, *resume], timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{command} was ended after {timeout:.0f} s", flush=True)
            return 124
        if status != AGAIN:
            return status
        resume = ["--resume"]


@lru_cache
def workspace(purpose):
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def _heads_last(x):
    """[batch, heads, tokens, dim] as [batch * tokens, heads, dim]."""
    return x.transpose(1, 2).flatten(0, 1)


def sdpa(q, pairs, causal=False, in_order=None):
    """q [batch, heads, tokens, dim] over dense (k, v) of that form; `in_order`: the first with its keys in order."""

    def maker(backend):
        def call(k, v):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        check = pairs[0] if in_order is None else in_order
        return lambda: (lambda: _heads_last(call(*check)), [lambda kv=kv: call(*kv) for kv in pairs])

    return {f"sdpa {name}": maker(backend) for name, backend in BACKENDS.items()}


def flex(q, pairs, case, heads, in_order=None):
    """FlexAttention with the case's score and mask functions; queries are the last of the keys' positions."""
    queries, keys = q.shape[2], pairs[0][0].shape[2]
    first, score = keys - queries, None
    if case.score_mod is not None:
        with torch.device("cuda"):
            modify = case.score_mod(heads.q_heads)

        def score(s, b, h, i, j):
            return modify(s, b, h, i + first, j)

    def make():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = None
        if case.mask_mod is not None:
            mask = create_block_mask(
                lambda b, h, i, j: case.mask_mod(b, h, i + first, j), None, None, queries, keys, device="cuda"
            )
        torch._dynamo.reset()  # torch compiles 8 forms of a function and runs any further one uncompiled
        compiled = torch.compile(flex_attention, dynamic=False)

        def call(k, v):
            return compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)

        check = pairs[0] if in_order is None else in_order
        return lambda: _heads_last(call(*check)), [lambda kv=kv: call(*kv) for kv in pairs]

    return {"flex": make}


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def starts(lengths):
    """[0, lengths[0], lengths[0] + lengths[1], ...], int32 on the device."""
    return ints([0, *accumulate(lengths)])


def block_table(lens, order, page):
    """[requests, longest], int32 on the device, of the page numbers `order` holds one request after another."""
    used = [-(-n // page) for n in lens]
    rows = order.cpu().split(used)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).int().contiguous().cuda()


def fa4(heads, q_lens, kv_lens, causal, q, sets, order=None, page=0, softcap=0.0):
    """FlashAttention-4 of q [tokens, heads, dim] over ragged (k, v), or over pages where `order` has their numbers.

    Requests that all have one length go to it with a batch dimension, others with cumulative lengths. It splits no
    keys on Hopper.
    """
    if not FA4:
        return {}

    def make():
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        batch, even_q, even = len(q_lens), len(set(q_lens)) == 1, len(set(kv_lens)) == 1
        dense = page == 0 and even_q and even
        options = {"causal": causal and max(q_lens) > 1, "softcap": softcap}
        queries, pairs, run = q, sets, flash_attn_func if dense else flash_attn_varlen_func
        if even_q and (page or even):
            queries = q.view(batch, -1, *q.shape[1:])
        elif not dense:
            options |= {"cu_seqlens_q": starts(q_lens), "max_seqlen_q": max(q_lens)}
        if dense:
            pairs = [tuple(x.view(batch, -1, *x.shape[1:]) for x in kv) for kv in sets]
        elif page:
            table = block_table(kv_lens, order, page)
            options |= {"page_table": table, "seqused_k": ints(kv_lens), "max_seqlen_k": max(kv_lens)}
        else:
            options |= {"cu_seqlens_k": starts(kv_lens), "max_seqlen_k": max(kv_lens)}

        def call(k, v):
            with torch.no_grad():
                out = run(queries, k, v, **options)
            return out[0] if isinstance(out, tuple) else out

        calls = [lambda kv=kv: call(*kv) for kv in pairs]
        return calls[0], calls

    return {"fa4": make}


def flashinfer_decode(heads, lens, kv_dtype, q, out, sets, order, page):
    """FlashInfer's batch decode over the same pages (k, v) [pages, page, kv_heads, dim]; `order`: their numbers."""
    if not FLASHINFER:
        return {}
    used = [-(-n // page) for n in lens]

    def planned(name, options):
        def make():
            import flashinfer

            plan = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(name), "NHD", **options)
            shape = (heads.q_heads, heads.kv_heads, heads.dim, page)
            last = ints([(n - 1) % page + 1 for n in lens])
            plan.plan(starts(used), order.cuda(), last, *shape, q_data_type=q.dtype, kv_data_type=kv_dtype)
            calls = [lambda s=s: plan.run(q, s, out=out) for s in sets]
            return calls[0], calls

        return make

    def xqa():
        import flashinfer

        table, lengths = block_table(lens, order, page), ints(lens)

        def call(kv):
            return flashinfer.decode.trtllm_batch_decode_with_kv_cache(
                q, kv, workspace("xqa"), table, lengths, max(lens), bmm1_scale=heads.dim**-0.5, bmm2_scale=1.0,
                out=out, kv_layout="NHD", backend="xqa",
            )  # fmt: skip

        calls = [lambda s=s: call(s) for s in sets]
        return calls[0], calls

    found = {
        f"flashinfer {name}": planned(name, options)
        for name, options in _DECODE.items()
        if name != "cudnn" or kv_dtype == q.dtype
    }
    return found | {"flashinfer xqa": xqa}


def flashinfer_prefill(heads, batch, n, causal, q, k, v, out):
    """FlashInfer's ragged prefill of `batch` requests of n tokens, [tokens, heads, dim]."""
    if not FLASHINFER:
        return {}

    def planned(backend):
        def make():
            import flashinfer

            indptr = starts([n] * batch)
            plan = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(backend), "NHD", backend=backend)
            dtypes = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
            plan.plan(indptr, indptr, heads.q_heads, heads.kv_heads, heads.dim, causal=causal, **dtypes)
            calls = [lambda: plan.run(q, k, v, out=out)]
            return calls[0], calls

        return make

    return {f"flashinfer {backend}": planned(backend) for backend in ("fa3", "fa2")}
