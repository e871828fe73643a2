"""The portable GPU backend: one Triton kernel for decode, prefill, append and mixed batches, planned on the device.

`plan` fixes the kernels and the buffers; `update` copies host values (if any) and launches the planner kernel, `run`
launches the attention kernel. Neither reads anything back. With TRITON_INTERPRET=1 the same code serves CPU tensors
through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.executor import AttentionSpec, Tuned, guard, readable, untuned
from flashloom.attention.kernels.triton import asked
from flashloom.attention.kernels.triton.asked import Form
from flashloom.attention.kernels.triton.config import PAIRS, Config, choose
from flashloom.attention.overlap import Apart
from flashloom.attention.rows import steps
from flashloom.attention.triton_buffers import Buffers, Sizes, Staging
from flashloom.kernel import cuda, launch
from flashloom.kernel.triton import TritonKernel, interpreting
from flashloom.kv_cache.cache import KV
from flashloom.kv_cache.integers import INT32_MAX
from flashloom.target import Target
from flashloom.variant.expr import Program

if TYPE_CHECKING:
    from flashloom.attention.triton_blocks import Pattern

__all__ = ["TritonExecutor"]

FLATS_KEPT = 256
MOST_KEYS = 1 << 30  # of a request whose length the host has not seen
FIXED_KEYS = 2048  # with batch_invariant, decode rows walk their keys in ranges of this many


class TritonExecutor:
    """Executor of the Triton kernels; see `executor.Executor`."""

    name = "triton"
    tuned: Tuned = staticmethod(untuned)
    captured = False
    _least = 1  # tiles of a range of keys

    def __init__(self, spec: AttentionSpec, device: torch.device):
        self.spec, self.device = spec, device
        self._gpu = device.type == "cuda"
        self._kernels: dict[Form, launch.Launcher] = {}
        # what the last launch was made for: a run that differs in addresses alone rewrites no more than those
        self._state: tuple[Any, ...] | None = None
        self._values: tuple[Any, ...] | None = None
        self._low = 0
        self._last: Any = None
        self._last_grid = 0
        self._pattern: Pattern | None = None
        self._own: Program | None = None  # the program without the pattern
        self._of_variant: Any = None
        self._with_pattern: tuple[Any, ...] = ()
        self._same: Any = None
        self._words: tuple[Any, ...] = ()
        self._flats: dict[int, tuple[tuple[Any, ...], tuple[Any, ...], list[Any]]] = {}
        self._ones: torch.Tensor | None = None  # stands for absent scales
        self._apart: Apart | None = None
        self._places: tuple[int, ...] = ()
        self._scales: tuple[Any, Any] = (None, None)
        self.repeat: Callable[..., bool] | None = None
        self.workspace_size = 0

    @classmethod
    def refuses(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve this, in a few words, or None."""
        if device.type != "cuda" and not interpreting():
            return "Triton needs a GPU"
        if max(spec.heads.dim, spec.heads.value_dim) > 1024:
            return f"head widths above 1024 are not supported (dim={spec.heads.dim})"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 or later"
        return None

    # --- planning ---

    def plan(self, batch: Batch, reserve: Reserve | None) -> None:
        """Choose the config, build the kernels, allocate the buffers and write the first partition."""
        if batch.blocks is not None:
            from flashloom.attention.triton_blocks import Pattern

            self._pattern, self._own = Pattern(batch, self.device), self.spec.program
            self.spec = replace(self.spec, program=self._pattern.program(self.spec.program))
        spec, heads = self.spec, self.spec.heads
        self._paged, self._ragged = batch.kind == "paged", batch.ragged
        self._table_page = batch.page_size
        self._reserve = reserve or Reserve()
        major, minor, processors = 9, 0, 4
        if self._gpu:
            major, minor = torch.cuda.get_device_capability(self.device)
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.target = Target(f"sm{major}{minor}")
        mean = -(-batch.tokens // max(batch.requests, 1)) if batch.tokens is not None else batch.max_q_len
        page_size, requests = batch.page_size if self._paged else 0, self._reserve.requests or batch.requests
        need = asked.need(spec, batch.max_q_len, mean, page_size, major * 10 + minor, requests)
        self.config = self.tuned(batch) or choose(need)
        self._programs = processors * self.config.resident
        self._fixed = (
            -(-FIXED_KEYS // self.config.block_n)
            if spec.batch_invariant and self._paged
            else (1 << 30 if spec.batch_invariant else 0)
        )
        rows = min(self.config.block_m, need.max_rows)
        # a tile comes at one multiprocessor's share of the memory bandwidth, a partial state from the L2 cache several
        # times as fast
        tile = self.config.block_n * (heads.dim + heads.value_dim) * spec.kv_dtype.itemsize
        self._merge_ratio = 4.0 * tile / (rows * heads.value_dim * 4)
        self._build()
        self._ones = torch.ones(1, dtype=torch.float32, device=self.device)
        self._one = self._ones.data_ptr()
        self._staging = Staging(self.device) if self._gpu else None
        self._grow(batch)
        self.update(batch)

    def _build(self) -> None:
        """The kernels that runs of this plan can meet, loaded side by side. Where they must be compiled, plan() waits
        for those of aligned tensors; the others, which take longer and are seldom met, follow meanwhile."""
        forms = self._forms(self.spec) if self._gpu else [Form(self.spec.out_dtype)]
        if getattr(self.tuned, "trial", False):  # for the tuner's own inputs, which are aligned
            forms = forms[:1]
        first, *others = [self._asked(form) for form in forms]
        planner = asked.plan_kernel(self.spec, self.config, self._paged, self.target)
        (self._planner, aligned), made = launch.launchers([planner, first], self.device, others)
        made.insert(0, aligned)
        self._kernels = {form: kernel for form, kernel in zip(forms, made, strict=True) if kernel is not None}

    @staticmethod
    def _forms(spec: AttentionSpec) -> list[Form]:
        forms = [Form(spec.out_dtype), Form(spec.out_dtype, aligned=False)]
        return [*forms, Form(spec.out_dtype, page_scales=True)] if spec.kv_dtype.itemsize == 1 else forms

    @classmethod
    def kernels(
        cls, spec: AttentionSpec, target: Target, max_q_len: int, mean_q_len: int, page_size: int
    ) -> list[TritonKernel]:
        """What such plans need on a target; see `dispatch.kernels`."""
        if not target.name.startswith("sm") or spec.block_sparse:
            return []
        capability = int(target.name[2:])
        found: list[TritonKernel] = []
        seen: set[Config] = set()
        for pairs in (1, *PAIRS):  # one request, and enough of them for each step of `choose`
            requests = -(-pairs // spec.heads.kv_heads)
            config = choose(asked.need(spec, max_q_len, mean_q_len, page_size, capability, requests))
            if replace(config, resident=1) not in seen:
                seen.add(replace(config, resident=1))
                found.append(asked.plan_kernel(spec, config, page_size > 0, target))
                found += [asked.attend_kernel(spec, form, config, page_size, target) for form in cls._forms(spec)]
        return found

    @classmethod
    def kernels_of(
        cls, spec: AttentionSpec, target: Target, config: Any, page_size: int, trial: bool = False
    ) -> list[TritonKernel]:
        """What plans with this config need on a target; trial: those of the tuner."""
        forms = cls._forms(spec)[: 1 if trial else None]
        planner = asked.plan_kernel(spec, config, page_size > 0, target)
        return [planner, *(asked.attend_kernel(spec, form, config, page_size, target) for form in forms)]

    def _asked(self, form: Form) -> TritonKernel:
        page_size = self._table_page if self._paged else 0
        return asked.attend_kernel(self.spec, form, self.config, page_size, self.target, self._own)

    def _grow(self, batch: Batch) -> None:
        """Allocate buffers for the reserve, or for this batch where it leaves sizes open."""
        requests = self._reserve.requests or batch.requests
        tokens = self._reserve.tokens or (
            batch.tokens if batch.tokens is not None else batch.max_q_len * batch.requests
        )
        pages = (self._reserve.pages or batch.pages.numel()) if self._paged else 0
        ranges = requests + -(-pages * self._table_page // FIXED_KEYS) if self.spec.batch_invariant else 0
        heads = self.spec.heads
        sizes = Sizes.of(heads.group, heads.kv_heads, self.config, self._programs, requests, tokens, pages, ranges)
        self._buffers = Buffers(sizes, heads.kv_heads, self.config.block_m, heads.value_dim, self.device)
        if self._staging is not None:
            self._staging.errors.append(self._buffers.error)
        self._sizes = sizes
        self.workspace_size = self._buffers.bytes
        self._error, self._state, self.repeat = self._buffers.error_words, None, None
        self._grid = self._sizes.items * heads.kv_heads
        place = {name: self._address(view) for name, view in self._buffers.views.items()}
        self._run_buffers = tuple(place[name] for name in ("items", "pages", "part_out", "part_lse", "arrivals"))
        self._plan_buffers = (place["items"], place["pages"], place["scratch"], self._address(self._buffers.error))

    def buffers(self) -> list[torch.Tensor]:
        """Device memory of its own that its launches use."""
        found = [self._buffers.memory]
        if self._ones is not None:
            found.append(self._ones)
        if self._staging is not None and self._staging.capacity:
            found.append(self._staging.buffer)
        if self._pattern is not None:
            found += self._pattern.values
        return found

    def _address(self, x: torch.Tensor) -> Any:
        """How a launcher takes a tensor: its address, or the tensor itself in the interpreter."""
        return x.data_ptr() if self._gpu else x

    def update(self, batch: Batch) -> None:
        """Follow new lengths and tables: one small kernel, and a copy before it if they are on the host."""
        if self._error[0]:
            self._buffers.raise_error(self._sizes)
        self._flats.clear()
        if self._gpu and batch.host and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "update() with lengths on the host cannot be captured, a replay would repeat them: put lengths and "
                "tables on the GPU"
            )
        heads, pattern, sizes, entries = self.spec.heads, None, self._sizes, batch.pages.numel()
        if self._pattern is not None:
            pattern = self._pattern.read(batch, heads.group, self.config.block_m, self.config.block_n)
        if (
            batch.requests > sizes.requests
            or (batch.tokens or 0) > sizes.tokens
            or (self._paged and self._reserve.pages is None and entries > sizes.pages)
        ):
            self._check_moving()
            self._grow(batch)
            sizes = self._sizes
        if self._pattern is not None and pattern is not None:
            if not self._pattern.holds(pattern):
                self._check_moving()
            self._pattern.write(pattern, sizes.requests, sizes.tokens, sizes.blocks)
            self._of_variant = None
        if not self._gpu:
            tensors: tuple[Any, ...] = (
                batch.q_indptr,
                batch.kv_lens,
                batch.page_indptr,
                batch.pages if entries else batch.page_indptr,
            )
        elif batch.host:
            assert self._staging is not None
            tensors = self._staging.copy(batch, 3 * sizes.requests + 2 + sizes.pages)
        else:
            self._inputs = batch  # the kernel reads them later
            if self._staging is not None:
                self._staging.stream = cuda.raw_stream(self.device.index)
            tensors = (
                batch.q_indptr.data_ptr(),
                batch.kv_lens.data_ptr(),
                batch.page_indptr.data_ptr(),
                batch.pages.data_ptr(),
            )
        room, row = INT32_MAX, batch.kv.row  # the host has compared
        if not (self._gpu and batch.host):
            room = -1 if row is None else min(row * batch.page_size, MOST_KEYS)
        item_programs = -(-sizes.items // 128)
        self._planner(
            item_programs + (sizes.requests if self._paged else 0),
            (
                *tensors, *self._plan_buffers, batch.requests, sizes.stride, sizes.items, sizes.tokens, sizes.pages,
                batch.page_size, entries, room, self._programs, self._least, self._fixed, self._merge_ratio,
                item_programs,
            ),
        )  # fmt: skip

    def _check_moving(self) -> None:
        """Raise ValueError where larger buffers would be unknown to a CUDA graph."""
        if self._gpu and (self.captured or torch.cuda.is_current_stream_capturing()):
            raise ValueError(
                "this batch needs larger buffers, and a CUDA graph in which the plan was captured would go on with the "
                "former ones: plan with a Reserve for the largest batch"
            )

    # --- running ---

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
        """One launch; see `executor.Executor.run`."""
        if self._error[0]:
            self._buffers.raise_error(self._sizes)
        if self._pattern is not None:
            if values is not self._of_variant:
                self._of_variant, self._with_pattern = values, (*values, *self._pattern.values)
            values = self._with_pattern
        k, v, k_scale, v_scale = kv.k, kv.v, kv.k_scale, kv.v_scale
        state = (
            q.shape[1], q.stride(), k.stride(), v.stride(), out.stride(), out.dtype, sm_scale, partial,
            None if lse is None else lse.stride(), None if k_scale is None else k_scale.shape,
            None if v_scale is None else v_scale.shape,
        )  # fmt: skip
        if not self._gpu:
            tensors = tuple(self._ones if x is None else x for x in (q, k, v, out, lse, k_scale, v_scale))
            kernel, grid, words = self._prepared(q, kv, out, lse, sm_scale, partial, 0)
            kernel(grid, (*tensors, *words, *self._flat(values)))
            return
        places = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        low = (places[0] | places[1] | places[2] | places[3]) & 15
        pointers = (
            *places, 0 if lse is None else lse.data_ptr(), self._one if k_scale is None else k_scale.data_ptr(),
            self._one if v_scale is None else v_scale.data_ptr(),
        )  # fmt: skip
        if state == self._state and low == self._low and values is self._values:
            self._last.again(self._last_grid, pointers)
        else:
            self.repeat = None
            if state != self._state or low != self._low:
                self._state = None
                self._last, self._last_grid, self._words = self._prepared(q, kv, out, lse, sm_scale, partial, low)
            self._last(self._last_grid, (*pointers, *self._words, *self._flat(values)))
            self._state, self._low, self._values = state, low, values
        self._scales = k_scale, v_scale
        self._repeatable(q, k, v, out, lse, places)

    def _repeatable(self, q: Any, k: Any, v: Any, out: Any, lse: Any, places: tuple[int, ...]) -> None:
        """What was launched may be launched again, if it stored no lse."""
        self._apart, self._places, self.repeat = None, places, None
        if lse is None:
            if self._same is None or not self._same(q, k, v, out):
                self._same = guard(q, k, v, out)
            self.repeat = None if self._same is None else self._repeat

    def _repeat(self, q: Any, k: Any, v: Any, k_scale: Any, v_scale: Any, out: Any) -> bool:
        """Launch as the last time, and answer True, if these arguments differ from the last ones in addresses alone."""
        scales = self._scales
        if k_scale is not scales[0] or v_scale is not scales[1] or not self._same(q, k, v, out):
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
        """Launch as the last time, and answer True, with these addresses of tensors that are otherwise as they were."""
        if (q | k | v | out) & 15 != self._low or self._error[0]:
            return False
        self._last.again(self._last_grid, (q, k, v, out))
        return True

    def _prepared(
        self,
        q: torch.Tensor,
        kv: KV,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        sm_scale: float,
        partial: bool,
        low: int,
    ) -> tuple[Any, int, tuple[Any, ...]]:
        """The kernel for these arguments, its number of programs, and its words between the seven pointers and the
        variant's values."""
        qr, q0, q1 = steps(q)
        o_r, o0, o1 = steps(out)
        k0, k1, k2, _ = kv.k.stride()
        v0, v1, v2, _ = kv.v.stride()
        if self._ragged:
            k1, v1 = k0, v0
        size_q, size_kv, size_o = q.element_size(), kv.k.element_size(), out.element_size()
        odd = low | (qr | q0 | q1) * size_q | (k0 | k1 | k2 | v0 | v1 | v2) * size_kv | (o_r | o0 | o1) * size_o
        aligned = odd & 15 == 0
        n, m, o = (16 // size_q, 16 // size_kv, 16 // size_o) if aligned else (1, 1, 1)
        strides = (
            *(x // n for x in (qr, q0, q1)), *(x // m for x in (k0, k1, k2, v0, v1, v2)),
            *(x // o for x in (o_r, o0, o1)),
        )  # fmt: skip
        (kp, kh), (vp, vh) = _scale_strides(kv.k_scale), _scale_strides(kv.v_scale)
        lse_strides = (0, 0, 0) if lse is None else steps(lse, width=False)
        wide = max(map(abs, (*strides, *lse_strides, kp, kh, vp, vh))) >= 1 << 31
        form = Form(out.dtype, aligned, bool(kp or vp), sm_scale < 0, wide)
        kernel = self._kernels.get(form)
        if kernel is None:
            kernel = self._kernels[form] = launch.launcher(self._asked(form), self.device)
        flags = 2 * partial + (lse is not None)
        grid = self._grid * asked.parts(form, self.config)
        return kernel, grid, (*self._run_buffers, *strides, *lse_strides, kp, kh, vp, vh, sm_scale, flags)

    def _flat(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The variant's values as flat words. Those of several layers' instances are known, until the batch changes."""
        known = self._flats.get(id(values))
        if known is None or known[0] is not values:
            words: list[Any] = []
            taken = [readable(x) if isinstance(x, torch.Tensor) else x for x in values]
            for x in taken:
                words += [self._address(x), *x.shape, *x.stride()] if isinstance(x, torch.Tensor) else [x]
            if len(self._flats) >= FLATS_KEPT:
                self._flats.clear()
            known = self._flats[id(values)] = values, tuple(words), taken
        return known[1]

    def explain(self) -> str:
        """Which kernel and config serve this plan, and why."""
        kind = f"paged by {self._table_page}" if self._paged else "ragged" if self._ragged else "dense"
        split = "fixed ranges" if self.spec.batch_invariant else f"balanced over {self._programs} programs"
        return (
            f"triton {self.target}: rows x keys {self.config}; {kind} KV, split {split}; workspace "
            f"{self.workspace_size} bytes"
        )


def _scale_strides(scale: torch.Tensor | None) -> tuple[int, int]:
    """(page stride, head stride) of a scale [1], [kv_heads] or [pages, kv_heads]."""
    if scale is None or scale.numel() == 1:
        return 0, 0
    return (scale.stride(0), scale.stride(1)) if scale.dim() == 2 else (0, 1)
