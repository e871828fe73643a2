"""The CPU backend: one C++ kernel per variant and shape, compiled when a plan first needs it.

A plan owns one `Args` (kernels/cpu/args.h, mirrored here field by field), the schedule's items, the partial results of
split rows and each thread's scratch. run() overwrites the fields that changed and makes one call with one integer.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashloom import forked, settings, store
from flashloom.attention import pool
from flashloom.attention.about import BOTH, about
from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.blocks import Pattern
from flashloom.attention.executor import AttentionSpec, Tuned, guard, readable, untuned
from flashloom.attention.kernels.cpu.config import DEFAULT, Config
from flashloom.attention.overlap import Apart
from flashloom.attention.rows import steps
from flashloom.errors import warn
from flashloom.kernel import cpp
from flashloom.kv_cache.cache import KV
from flashloom.lower.cpp import render
from flashloom.target import Target
from flashloom.variant.expr import Program

__all__ = ["CpuExecutor", "kernel", "source"]

HEADERS = Path(__file__).parent / "kernels" / "cpu"
STORAGE = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "s8",
}  # fmt: skip
OUT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ITEM_BYTES = 48
LARGEST_DIM = 1024


class Args(ctypes.Structure):
    """`struct Args` of kernels/cpu/args.h."""

    _fields_ = [
        (name, ctypes.c_double if name == "sm_scale" else ctypes.c_int64)
        for name in (
            "q k v out lse k_scale v_scale words sm_scale partial out_type "
            "q_request q_token q_head out_request out_token out_head lse_request lse_token lse_head "
            "k_page k_token k_head v_page v_token v_head k_scale_page k_scale_head v_scale_page v_scale_head "
            "q_indptr kv_indptr kv_lens page_indptr pages page_size requests kv_heads threads batch_invariant "
            "items item_count item_capacity workspace workspace_size counters counter_count scratch scratch_size "
            "cut_pieces cut_shortest cut_state cut_decode_rows cut_block_rows"
        ).split()
    ]


FIRST = struct.Struct("4q")  # q, k, v and out, written together


def source(spec: AttentionSpec) -> str:
    """The generated C++ of one kernel: its configuration, its variant, and the plain headers it includes."""
    heads = spec.heads
    config = (
        f"struct Config {{\n  typedef {STORAGE[spec.q_dtype]} Q;\n  typedef {STORAGE[spec.kv_dtype]} KV;\n"
        f"  static constexpr int DIM = {heads.dim}, VALUE_DIM = {heads.value_dim}, GROUP = {heads.group};\n}};\n"
    )
    # comments name fields and classes, which are no part of a kernel's key
    variant = re.sub(r" *//.*", "", render(spec.program, heads.dim, heads.value_dim))
    body = f"namespace flashloom {{\n\n{config}\n{variant}\n}}  // namespace flashloom\n"
    coarse = "#define FL_COARSE 1\n" if spec.q_dtype.itemsize <= 2 else ""  # what 16-bit queries need of tanh (vmath.h)
    return f'{coarse}#include "attention.h"\n\n{body}\nFL_ATTENTION\n'


def kernel(spec: AttentionSpec, target: Target, config: Config = DEFAULT) -> cpp.CppKernel:
    """The kernel that serves a spec on a target, not yet compiled."""
    heads = spec.heads
    names = [STORAGE[spec.q_dtype], STORAGE[spec.kv_dtype], f"{heads.dim}", f"{heads.value_dim}", f"{heads.group}"]
    title = f"attention-{'-'.join(names)}"
    told = about(spec, BOTH, any_count=True, form="" if config == DEFAULT else str(config))
    return cpp.CppKernel(title, source(spec), (HEADERS,), target, config.defines, parts=2, about=told)


@functools.lru_cache(maxsize=4096)
def _functions(spec: AttentionSpec, target: Target, vector_decode: int, decode_keys: int) -> tuple[Target, Any, Any]:
    """The target that serves, this one or a lesser, and the kernel's functions."""
    config = Config(vector_decode=vector_decode, decode_keys=decode_keys)
    try:
        built = kernel(spec, target, config)
        module = cpp.build(built.source, [HEADERS], target, built.defines, built.name, built.parts, built.about)
    except (store.SealedError, store.NoToolchain) as error:
        built = _lesser(spec, target, config, error)
        module = cpp.build(built.source, [HEADERS], built.target, built.defines, built.name, built.parts, built.about)
    return built.target, module.get_function("schedule"), module.get_function("run")


def _lesser(spec: AttentionSpec, target: Target, config: Config, error: Exception) -> cpp.CppKernel:
    """The stored kernel of the best lesser target, where the best one's cannot be had; raises `error` if there is none,
    or if FLASHLOOM_TARGET names the target."""
    for other in target.lesser if settings.get().target is None else ():
        found = kernel(spec, other, config)
        if found.stored() is not None:
            if (target, other) not in _told:
                _told.add((target, other))
                warn(
                    f"flashloom runs kernels for {other} on this {target} machine, since those for {target} are not "
                    f"stored and cannot be built here: add {target} to the pack's targets, or set "
                    f"FLASHLOOM_TARGET={other} to have no others"
                )
            return found
    raise error


_told: set[tuple[Target, Target]] = set()


class _Spare:
    """Large buffers of plans that are gone, for the next ones: taking memory from the system and giving it back costs
    more than planning a batch."""

    KEPT = 8

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._returned: deque[np.ndarray] = deque(maxlen=self.KEPT)
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """A buffer of at least `size` bytes, whatever it holds."""
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            del self._free[: -self.KEPT]
            fits = [i for i, x in enumerate(self._free) if size <= x.nbytes <= 4 * size]
            if fits:
                return self._free.pop(min(fits, key=lambda i: self._free[i].nbytes))
        return np.empty(size, dtype=np.uint8)

    def renew(self) -> None:
        """In a forked child: whoever held the lock is not there."""
        self._lock = threading.Lock()

    def give(self, x: np.ndarray | None) -> None:
        """Keep a buffer that nobody uses any more; the oldest one goes. Takes no lock: garbage collection calls this
        at any point, also within `take`."""
        if x is not None:
            self._returned.append(x)

    def give_all(self, buffers: dict[str, np.ndarray]) -> None:
        """Keep the pooled ones among a plan's buffers."""
        for name in POOLED:
            self.give(buffers.pop(name, None))


PAGE = 4096
_HOST = torch.device("cpu")
POOLED = ("scratch", "workspace")
SPARE = _Spare()
os.register_at_fork(after_in_child=SPARE.renew)


class CpuExecutor:
    """Attention by the kernels of kernels/cpu."""

    name = "cpu"
    tuned: Tuned = staticmethod(untuned)

    def __init__(self, spec: AttentionSpec, device: torch.device):
        self._spec = spec
        self.target = Target.here()  # until plan() knows better
        self._args = Args()
        self._address = ctypes.addressof(self._args)
        self._args.batch_invariant = spec.batch_invariant
        self._args.kv_heads = spec.heads.kv_heads
        self._buffers: dict[str, np.ndarray] = {}
        weakref.finalize(self, SPARE.give_all, self._buffers)
        self._words = _Words(spec.program)
        self._pattern: Pattern | None = None
        # what the arguments hold now: run() rewrites only what differs
        self._q_stride: tuple[int, ...] | None = None
        self._out_stride: tuple[int, ...] | None = None
        self._k_stride: tuple[int, ...] | None = None
        self._v_stride: tuple[int, ...] | None = None
        self._out_dtype: torch.dtype | None = None
        self._kv: Callable[[], KV | None] = _nothing
        self._same: Callable[..., bool] | None = None
        self._apart: Apart | None = None
        self._places: tuple[int, ...] = ()
        self._scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._values: tuple[Any, ...] = ()
        self._has_lse = False
        self._options: tuple[float, bool] | None = None
        self._asked: Config | None = None

    @classmethod
    def refuses(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve this, or None."""
        if max(spec.heads.dim, spec.heads.value_dim) > LARGEST_DIM:
            return f"head dims above {LARGEST_DIM}"
        return None

    @classmethod
    def kernels(
        cls, spec: AttentionSpec, target: Target, max_q_len: int, mean_q_len: int, page_size: int
    ) -> list[cpp.CppKernel]:
        """What such plans need on a target; one kernel serves every batch."""
        if spec.block_sparse or cls.refuses(spec, torch.device("cpu")):  # the sizes of blocks are known to a plan
            return []
        return [kernel(spec, target)]

    @classmethod
    def kernels_of(
        cls, spec: AttentionSpec, target: Target, config: Config, page_size: int, trial: bool = False
    ) -> list[cpp.CppKernel]:
        """What plans with this config need on a target."""
        return [kernel(spec, target, config)]

    def plan(self, batch: Batch, reserve: Reserve | None) -> None:
        """Find or compile the kernel, and schedule the batch."""
        if batch.blocks is not None:
            self._pattern = Pattern(batch, _HOST)
            self._spec = replace(self._spec, program=self._pattern.program(self._spec.program))
            self._words = _Words(self._spec.program)
        config = self.config = self.tuned(batch) or DEFAULT
        self.target, self._schedule, self._run = _functions(
            self._spec, Target.here(), config.vector_decode, config.decode_keys
        )
        self._follow(batch)

    def update(self, batch: Batch) -> None:
        """Schedule another batch; compiles nothing. Without memory for it the plan keeps the former one."""
        former = self._batch
        try:
            self._follow(batch)
        except MemoryError:
            self._follow(former)
            raise

    def _follow(self, batch: Batch) -> None:
        a = self._args
        if self._pattern is not None:
            self._pattern.take(batch)
            self._same = None  # what run() was given last is not all that it reads
        self._batch = batch
        self._kv_indptr = batch.kv_indptr
        a.q_indptr, a.kv_indptr, a.kv_lens = (
            _address(batch.q_indptr),
            _address(self._kv_indptr),
            _address(batch.kv_lens),
        )
        a.page_indptr, a.pages = _address(batch.page_indptr), _address(batch.pages)
        a.page_size, a.requests = batch.page_size, batch.requests
        a.threads = threads = _threads()  # the schedule may take fewer
        config = self.tuned(batch) or DEFAULT
        if config is not self._asked:
            self._asked = config
            own = self.config  # update() compiles nothing: the kernel stays that of plan()
            self._cut = replace(config, decode_keys=own.decode_keys, vector_decode=own.vector_decode)
            a.cut_pieces, a.cut_shortest, a.cut_state = config.pieces, config.shortest, config.state_kib << 10
            a.cut_decode_rows, a.cut_block_rows = config.decode_rows, config.block_rows
        self._schedule(self._address)
        if a.item_count > a.item_capacity:
            a.items = self._buffer("items", a.item_count * ITEM_BYTES * 2)
            a.item_capacity = a.item_count * 2
            self._schedule(self._address)
        a.workspace = self._buffer("workspace", a.workspace_size * 4)
        a.counters = self._buffer("counters", a.counter_count * 4)
        a.scratch = self._buffer("scratch", a.scratch_size * a.threads)
        self._threads = threads

    def _buffer(self, name: str, size: int) -> int:
        """Address, aligned to a page, of a buffer of the plan's own, which grows if it has to. Counters begin as zero
        (and are so between launches); what the others hold is of no meaning."""
        held = self._buffers.get(name)
        if held is None or held.nbytes < size + PAGE:
            spare = name in POOLED
            new = SPARE.take(size + PAGE) if spare else np.zeros(size + PAGE, dtype=np.uint8)
            try:
                pool.claim(self, _HOST, self.workspace_size + new.nbytes - (0 if held is None else held.nbytes))
            except MemoryError:
                if spare:
                    SPARE.give(new)
                raise
            if spare:
                SPARE.give(held)
            held = self._buffers[name] = new
        return (held.ctypes.data + PAGE - 1) // PAGE * PAGE

    @property
    def workspace_size(self) -> int:
        """Bytes of the buffers it owns."""
        return sum(held.nbytes for held in self._buffers.values())

    def run(
        self,
        q: torch.Tensor,
        kv: KV,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        *,
        sm_scale: float,
        partial: bool,
        values: tuple[Any, ...],
    ) -> None:
        """Write out and lse for the batch's tokens."""
        a = self._args
        a.q, a.out = q.data_ptr(), out.data_ptr()
        if (stride := q.stride()) != self._q_stride or len(stride) == 4:
            self._q_stride, (a.q_request, a.q_token, a.q_head) = stride, steps(q)
        if (stride := out.stride()) != self._out_stride or len(stride) == 4:
            self._out_stride, (a.out_request, a.out_token, a.out_head) = stride, steps(out)
        if out.dtype is not self._out_dtype:
            self._out_dtype, a.out_type = out.dtype, OUT_TYPES[out.dtype]
        if kv is not self._kv():
            self._take(kv)
        if lse is not None:
            a.lse, (a.lse_request, a.lse_token, a.lse_head) = lse.data_ptr(), steps(lse, width=False)
            self._has_lse = True
        elif self._has_lse:
            a.lse, self._has_lse = 0, False
        if (options := (sm_scale, partial)) != self._options:
            self._options, a.sm_scale, a.partial = options, sm_scale, partial
        if self._pattern is not None:
            values = self._pattern.after(values)
        if values:
            a.words = self._words(values)
        if _threads() != self._threads:
            self.update(self._batch)
        self._run(self._address)
        if lse is None and (self._same is None or not self._same(q, kv.k, kv.v, out)):
            self._same = guard(q, kv.k, kv.v, out)
        self._apart = None
        self._scales, self._values, self._places = (kv.k_scale, kv.v_scale), values, (a.q, a.k, a.v, a.out)

    @property
    def repeat(self) -> Callable[..., bool] | None:
        """What serves a call like the last one at once, or None (not an attribute: it would keep this object alive)."""
        return None if self._same is None else self._repeat

    def _repeat(self, q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, out: Any) -> bool:
        """Run as the last time, and answer True, if these arguments differ from the last ones in addresses alone."""
        scales = self._scales
        if self._same is None or not self._same(q, k, v, out) or k_scale is not scales[0] or v_scale is not scales[1]:
            return False
        places = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        if places != self._places:
            if self._apart is None:
                self._apart = Apart(q, k, v, out, self._places)
            if not self._apart(*places):
                return False
            self._places = places
        return self.again(*places)

    def again(self, q: int, k: int, v: int, out: int) -> bool:
        """Run as the last time, and answer True, with these addresses of tensors that are otherwise as they were."""
        if _threads() != self._threads:
            return False
        FIRST.pack_into(self._args, 0, q, k, v, out)
        self._kv = _nothing
        if self._values:
            self._args.words = self._words(self._values)
        self._run(self._address)
        return True

    def _take(self, kv: KV) -> None:
        a, k, v = self._args, kv.k, kv.v
        self._kv = weakref.ref(kv)  # a plan that waits for its next batch holds no cache
        a.k, a.v = k.data_ptr(), v.data_ptr()
        if (stride := k.stride()) != self._k_stride:
            self._k_stride, a.k_page, a.k_token, a.k_head = stride, *stride[:3]
        if (stride := v.stride()) != self._v_stride:
            self._v_stride, a.v_page, a.v_token, a.v_head = stride, *stride[:3]
        a.k_scale, a.k_scale_page, a.k_scale_head = _scale(kv.k_scale)
        a.v_scale, a.v_scale_page, a.v_scale_head = _scale(kv.v_scale)

    def explain(self) -> str:
        """Which kernel serves this plan."""
        spec, a = self._spec, self._args
        kind = "AMX" if self.target.name == "x86-amx" and spec.kv_dtype is torch.bfloat16 else "vectors"
        return (
            f"compiled for {self.target} ({kind}), {a.item_count} pieces of work on {a.threads} threads, "
            f"{a.counter_count} of them merged from parts" + (f"; tuned: {self._cut}" if self._cut != DEFAULT else "")
        )


def _nothing() -> None:
    """In place of a reference to the cache that the arguments hold."""


def _threads() -> int:
    """Threads that kernels run on."""
    return 1 if forked.one_thread else settings.get().threads or torch.get_num_threads()


def _address(x: torch.Tensor) -> int:
    return x.data_ptr()


def _scale(scale: torch.Tensor | None) -> tuple[int, int, int]:
    """Address, page stride and head stride."""
    if scale is None:
        return 0, 0, 0
    if scale.dim() == 2:
        return scale.data_ptr(), scale.stride(0), scale.stride(1)
    return scale.data_ptr(), 0, scale.stride(0) if scale.shape[0] > 1 else 0


class _Words:
    """A variant's values as the flat words that kernels take: a scalar's bits, or data pointer, sizes and strides."""

    KEPT = 256

    def __init__(self, program: Program):
        self._params = program.params
        self._known: dict[int, tuple[tuple[Any, ...], list[torch.Tensor], list[int], ctypes.Array]] = {}

    def __call__(self, values: tuple[Any, ...]) -> int:
        known = self._known.get(id(values))
        if known is None or known[0] is not values or any(t.data_ptr() != at for t, at in zip(known[1], known[2])):
            if len(self._known) >= self.KEPT:
                self._known.clear()
            taken = [readable(x) if isinstance(x, torch.Tensor) else x for x in values]
            tensors = [x for x in taken if isinstance(x, torch.Tensor)]
            known = self._known[id(values)] = (values, tensors, [t.data_ptr() for t in tensors], self._pack(taken))
        return ctypes.addressof(known[3])

    def _pack(self, values: list[Any]) -> ctypes.Array:
        words: list[int] = []
        for param, value in zip(self._params, values):
            if isinstance(value, torch.Tensor):
                words += [value.data_ptr(), *value.shape, *value.stride()]
            elif param.compute_dtype == "float32":
                words.append(ctypes.c_int64.from_buffer_copy(ctypes.c_double(float(value))).value)
            else:
                words.append(int(value))
        return (ctypes.c_int64 * max(1, len(words)))(*words)
