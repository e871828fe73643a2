"""The Hopper backend: prefill, append and mixed batches by a persistent Gluon kernel.

Batches are planned on the device by the Triton backend's planner, which also splits keys where tiles of queries are
few; `run` is one launch, and under a mask a small one behind it (`kernels/triton/mend.py`). Tensors that tensor maps
cannot describe (rows that are not multiples of 16 bytes, expanded or empty ones) and keys with a scale per page go to
the Triton kernels."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.executor import AttentionSpec, CannotBuild
from flashloom.attention.kernels.hopper import asked
from flashloom.attention.kernels.hopper import config as sizes_of
from flashloom.attention.kernels.hopper.asked import Form
from flashloom.attention.rows import steps
from flashloom.attention.triton_buffers import Buffers, Sizes, Staging
from flashloom.attention.triton_executor import TritonExecutor
from flashloom.kernel import cuda, launch
from flashloom.kernel.triton import TritonKernel
from flashloom.kv_cache.cache import KV
from flashloom.kv_cache.pages import PageTable
from flashloom.target import Target

if TYPE_CHECKING:
    from flashloom.kernel import gluon

__all__ = ["HopperExecutor"]

SMALL_ROWS = 16  # packed query rows of the mean request that the Triton kernels' smallest tile holds
FEW_ROWS = 32  # of heads that share keys but no tile, up to which those kernels, which share them, are faster
MERGE = 2.0  # time of a key tile over that of joining one range's result
UNSPLIT = 1 << 30  # the planner's way to say that keys are not split

_log = logging.getLogger("flashloom")


class HopperExecutor(TritonExecutor):
    """Executor of the Hopper kernel; see `executor.Executor`."""

    name = "hopper"

    @classmethod
    def refuses(cls, spec: AttentionSpec, device: torch.device) -> str | None:
        """Why it cannot serve this, in a few words, or None."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return "it needs compute capability 9.0"
        return asked.unsuitable(spec)

    @classmethod
    def declines(cls, spec: AttentionSpec, batch: Batch) -> str | None:
        """Why another backend should take this batch, or None."""
        if isinstance(batch.kv, PageTable) and not asked.suits(spec, batch.page_size):
            return f"8-bit keys on pages of {batch.page_size} tokens are copied one by one"
        if spec.batch_invariant:
            return "batch-invariant results come from one kernel, whatever else is in the batch"
        if _few(spec, _mean(batch)):
            return f"queries are few ({_mean(batch)} tokens per request on average)"
        return None

    # --- planning ---

    def plan(self, batch: Batch, reserve: Reserve | None) -> None:
        """Choose the config, build the kernels, allocate the buffers and write the first partition."""
        from flashloom.kernel import gluon  # a process that only decodes does without

        spec, heads = self.spec, self.spec.heads
        self._paged, self._ragged = isinstance(batch.kv, PageTable), batch.ragged
        self._table_page = batch.page_size
        self._page = batch.page_size if self._paged else 0
        self._reserve, self._batch = reserve or Reserve(), batch
        self.target = Target("sm90")
        self._config = self.config = self.tuned(batch) or asked.choose(spec, _mean(batch), self._page)
        self._programs = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._groups = heads.q_heads // self._config.pack
        self._cut = self._cuts(batch)
        self._fixed, self._least, self._merge_ratio = (0 if self._cut else UNSPLIT), sizes_of.LEAST, MERGE
        self._masked = spec.program.mask is not None
        self._hopper: dict[Form, gluon.MapLaunch] = {}
        self._menders: dict[torch.dtype, Any] = {}
        self._usual = asked.usual(spec, self._config, self._page, self._cut)
        self._maps = {}  # of queries, results, keys and values, by whether the latter lie in chunks
        for chunked in {False, self._usual.chunked}:
            first, *between, last = asked.boxes(spec, self._config, chunked)
            maps = [gluon.TensorMaps(box, spec.q_dtype) for box in (first, *between)]
            maps.insert(1, gluon.TensorMaps(last, spec.out_dtype))
            self._maps[chunked] = maps
        self._other: TritonExecutor | None = None
        self._one_scale = torch.ones(1, device=self.device)
        self._build()
        self._staging = Staging(self.device)
        self._grow(batch)
        self.update(batch)

    def _build(self) -> None:
        form = self._usual
        with ThreadPoolExecutor(2) as pool:
            kernel = asked.plan_kernel(self.spec, self._config, self._paged, self.target, self._cut)
            planner = pool.submit(launch.launcher, kernel, self.device)
            mender = pool.submit(self._mend, form.out_dtype) if self._masked else None
            self._hopper[form] = self._attend(form)
            self._planner = planner.result()
            if mender is not None:
                mender.result()

    def _attend(self, form: Form) -> gluon.MapLaunch:
        from flashloom.kernel import gluon

        try:
            kernel = asked.attend_kernel(self.spec, form, self._config, self._page, self.target)
            return gluon.launcher(kernel, self.device)
        except Exception as error:
            triton = type(error).__module__.startswith("triton") or type(error) is RuntimeError
            if not triton and not isinstance(error, (ImportError, AttributeError)):
                raise
            raise CannotBuild(f"this Triton cannot compile the kernel ({_first_line(error)})") from error

    def _mend(self, out_dtype: torch.dtype) -> Any:
        """What computes rows once more that came out as NaN: a mask may have hidden it."""
        found = self._menders.get(out_dtype)
        if found is None:
            kernel = asked.mend_kernel(self.spec, out_dtype, self._config, self._page, self.target)
            found = self._menders[out_dtype] = launch.launcher(kernel, self.device)
        return found

    @classmethod
    def kernels(
        cls, spec: AttentionSpec, target: Target, max_q_len: int, mean_q_len: int, page_size: int
    ) -> list[TritonKernel]:
        """What such plans need on a target; see `dispatch.kernels`."""
        if target.name != "sm90" or asked.unsuitable(spec) or not asked.suits(spec, page_size):
            return []
        if spec.batch_invariant or _few(spec, mean_q_len):
            return []
        return cls.kernels_of(spec, target, asked.choose(spec, mean_q_len, page_size), page_size)

    @classmethod
    def kernels_of(
        cls, spec: AttentionSpec, target: Target, config: Any, page_size: int, trial: bool = False
    ) -> list[TritonKernel]:
        """What plans with this config need on a target: whether keys are cut depends on more of the batch."""
        found: list[TritonKernel] = []
        for cut in (False,) if spec.batch_invariant else (False, True):
            found.append(asked.plan_kernel(spec, config, page_size > 0, target, cut))
            form = asked.usual(spec, config, page_size, cut)
            found.append(asked.attend_kernel(spec, form, config, page_size, target))
        if spec.program.mask is not None:
            found.append(asked.mend_kernel(spec, spec.out_dtype, config, page_size, target))
        return found

    def _cuts(self, batch: Batch) -> bool:
        """Whether the plan cuts keys into ranges: where few tiles, or a few long requests, would leave much of the GPU
        idle. Of lengths on the device as few tiles as one and a half for each program are taken for few."""
        if self.spec.batch_invariant:
            return False
        if batch.host:
            q_indptr, kv_lens = batch.numbers[:2]
            return sizes_of.cuts(q_indptr[1:] - q_indptr[:-1], kv_lens, self._config, self._groups, self._programs)
        tokens = batch.max_q_len * batch.requests if batch.tokens is None else batch.tokens
        return tokens * self._config.pack * self._groups < 1.5 * self._programs * self._config.block_m

    def _grow(self, batch: Batch) -> None:
        """Allocate buffers for the reserve, or for this batch where it leaves sizes open."""
        requests = self._reserve.requests or batch.requests
        tokens = self._reserve.tokens or (
            batch.tokens if batch.tokens is not None else batch.max_q_len * batch.requests
        )
        pages = (self._reserve.pages or batch.pages.numel()) if self._paged else 0
        config, groups = self._config, self._groups
        sizes = Sizes.of(config.pack, groups, config, self._programs, requests, tokens, pages, 0)  # type: ignore[arg-type]
        sizes = sizes.halved() if self._cut else replace(sizes, items=sizes.blocks, slots=0)
        value_dim = sizes_of.width(self.spec.heads.value_dim)
        self._buffers = Buffers(sizes, groups if self._cut else 1, config.block_m, value_dim, self.device)
        self._staging.errors.append(self._buffers.error)  # type: ignore[union-attr]
        self._sizes = sizes
        self._error, self.repeat = self._buffers.error_words, None
        self._counter = torch.zeros(3, dtype=torch.int32, device=self.device)
        self._marks = torch.zeros(32, dtype=torch.int8, device=self.device)  # the first says that a NaN was met
        self._mended = self._marks[16:20].view(torch.int32)  # programs that have looked
        self.workspace_size = self._buffers.bytes + self._marks.numel()
        place = {name: view.data_ptr() for name, view in self._buffers.views.items()}
        parts = (place[name] for name in ("part_out", "part_lse", "arrivals"))
        self._run_buffers = (place["items"], place["pages"], self._counter.data_ptr(), *parts)
        self._plan_buffers = (place["items"], place["pages"], place["scratch"], self._buffers.error.data_ptr())
        self._numbers = (int(self._ragged),)
        self._grid = min(self._programs, sizes.items * groups)

    def buffers(self) -> list[torch.Tensor]:
        """Device memory of its own that its launches use."""
        return [
            *super().buffers(),
            self._counter,
            self._marks,
            self._one_scale,
            *([] if self._other is None else self._other.buffers()),
        ]

    def update(self, batch: Batch) -> None:
        """Follow new lengths and tables: one small kernel, and a copy before it if they are on the host."""
        super().update(batch)
        self._batch = batch
        if self._other is not None:
            self._other.captured = self.captured
            self._other.update(batch)

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
        k, v, heads = kv.k, kv.v, self.spec.heads
        qr, q0, q1 = steps(q)
        o_r, o0, o1 = steps(out)
        l_r, l0, l1 = (0, 0, 0) if lse is None else steps(lse, width=False)
        k0, k1, k2, _ = k.stride()
        v0, v1, v2, _ = v.stride()
        places = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        odd = places[0] | places[1] | places[2] | places[3] | q.element_size() * (q0 | q1 | k0 | k1 | k2 | v0 | v1 | v2)
        unfit = (odd | (o0 | o1) * out.element_size()) & 15 or 0 in (q0, q1, k0, k1, k2, v0, v1, v2, o0, o1)
        scales = self._scale_words(kv)
        if unfit or scales is None or not k.numel():
            self._otherwise(q, kv, out, lse, sm_scale, partial, values)
            return
        q_jump, q_tokens = _jump(q, qr, q0)
        out_jump, out_tokens = _jump(out, o_r, o0)
        if q_jump is None or out_jump is None or (lse is not None and l_r != out_jump * l0):
            self._otherwise(q, kv, out, lse, sm_scale, partial, values)
            return
        if self._error[0]:
            self._buffers.raise_error(self._sizes)
        if self._ragged:
            k_sizes = v_sizes = (1, k.shape[0], heads.kv_heads)
            k_strides, v_strides = (0, k0, k2), (0, v0, v2)
        else:
            k_sizes = v_sizes = (k.shape[0], k.shape[1], heads.kv_heads)
            k_strides, v_strides = (k0, k1, k2), (v0, v1, v2)
        sizes = (*k_sizes, heads.dim), (*v_sizes, heads.value_dim)
        chunked, kv_maps, steps_kv = self._maps_of(sizes, (k_strides, v_strides))
        form = Form(out.dtype, sm_scale < 0, chunked, self._cut)
        kernel = self._hopper.get(form)
        if kernel is None:
            kernel = self._hopper[form] = self._attend(form)
        q_map, out_map, *_ = self._maps[chunked]
        maps = [q_map.of((q_tokens, heads.q_heads, heads.dim), (q0, q1)), *kv_maps]
        if out.dtype == self.spec.out_dtype:
            maps.append(out_map.of((out_tokens, heads.q_heads, heads.value_dim), (o0, o1)))
        vector = 16 // out.element_size()
        flags = 2 * partial + (lse is not None)
        mender = self._mend(out.dtype) if self._masked else None
        self._last, self._last_maps, self._lse_place = kernel, maps, 0 if lse is None else lse.data_ptr()
        try:
            first = self._place(*places)
        except cuda.NoMap as error:
            _log.warning("flashloom: %s; Triton kernels compute this instead", error)
            self._otherwise(q, kv, out, lse, sm_scale, partial, values)
            return
        kernel(
            self._grid,
            (
                *first, *self._run_buffers, q_jump, out_jump, o0 // vector, o1 // vector, l0, l1, *self._numbers,
                sm_scale, flags, *steps_kv, *scales, self._marks.data_ptr(), *self._flat(values),
            ),
        )  # fmt: skip
        if mender is not None:
            mender(self._grid, self._mend_words(q, kv, out, lse, sm_scale, flags, values))
        self._last_mender = mender
        self._scales = kv.k_scale, kv.v_scale
        self._repeatable(q, k, v, out, lse, places)

    def _mend_words(
        self, q: torch.Tensor, kv: KV, out: torch.Tensor, lse: torch.Tensor | None, sm_scale: float, flags: int,
        values: tuple[Any, ...],
    ) -> tuple[Any, ...]:  # fmt: skip
        """What `mend` is told of the run before it; `again` changes the first four."""
        one, views = self._one_scale, self._buffers.views
        scales = [one if x is None else x for x in (kv.k_scale, kv.v_scale)]
        tensors = (
            q, kv.k, kv.v, out, one if lse is None else lse, *scales, views["items"], views["pages"], self._marks,
            self._mended,
        )  # fmt: skip
        strides = [*steps(q)]
        for x in (kv.k, kv.v):
            x0, x1, x2, _ = x.stride()
            strides += [x0, x0 if self._ragged else x1, x2]
        strides += [*steps(out)]
        vectors = [16 // q.element_size()] * 9 + [16 // out.element_size()] * 3
        strides = [stride // vector for stride, vector in zip(strides, vectors)]
        strides += (0, 0, 0) if lse is None else steps(lse, width=False)
        strides += [x.stride(-1) if x.numel() > 1 else 0 for x in scales]
        return (*(self._address(x) for x in tensors), *strides, sm_scale, flags, *self._flat(values))

    def _maps_of(self, sizes: Any, strides: Any) -> tuple[bool, list[Any], tuple[int, ...]]:
        """Of keys and values: whether they lie in chunks, their maps, and what the kernel is told of their strides."""
        if self._config.box == 1:
            return False, [], tuple(x * self.spec.kv_dtype.itemsize // 16 for each in strides for x in each)
        if self._usual.chunked:
            of_k, of_v = self._maps[True][2:]
            k, v = (asked.chunk_map(n, steps) for n, steps in zip(sizes, strides))
            if k is not None and v is not None:
                return True, [of_k.of(*k[:2]), of_v.of(*v[:2])], (*k[2], *v[2])
        return False, [maps.of(n, steps) for maps, n, steps in zip(self._maps[False][2:], sizes, strides)], ()

    def _scale_words(self, kv: KV) -> tuple[int, ...] | None:
        """What the kernel gets to know of the scales, or None if it cannot take them."""
        given = (kv.k_scale, kv.v_scale)
        if self.spec.kv_dtype.itemsize > 1:
            return () if given[0] is None and given[1] is None else None
        if any(x is not None and x.dim() == 2 and x.shape[0] > 1 for x in given):
            return None
        found = [self._one_scale if x is None else x for x in given]
        return (*(x.data_ptr() for x in found), *(x.stride(-1) if x.numel() > 1 else 0 for x in found))

    def _place(self, q: int, k: int, v: int, out: int) -> tuple[int, ...]:
        """Give the last kernel the maps of the tensors at these addresses; answers its first words."""
        maps = self._last_maps
        if len(maps) < 3:  # keys and values are read row by row
            self._last.put([maps[0](q), maps[-1](out if len(maps) == 2 else q)])
            return out, self._lse_place, k, v
        self._last.put([maps[0](q), maps[1](k), maps[2](v), maps[-1](out) if len(maps) == 4 else maps[0](q)])
        return out, self._lse_place

    def again(self, q: int, k: int, v: int, out: int) -> bool:
        """Launch as the last time, and answer True, with these addresses of tensors that are otherwise as they were."""
        if (q | k | v | out) & 15 or self._error[0]:
            return False
        self._last.again(self._grid, self._place(q, k, v, out))
        if self._last_mender is not None:
            self._last_mender.again(self._grid, (q, k, v, out))
        return True

    def _otherwise(self, q: Any, kv: KV, out: Any, lse: Any, sm_scale: float, partial: bool, values: Any) -> None:
        """By the Triton kernels, which are built when they are first needed."""
        self.repeat = None
        if self._other is None:
            if torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    "tensors that are not aligned to 16 bytes, or scaled keys, need other kernels than those of this "
                    "plan: run it once before it is captured"
                )
            _log.warning(
                "flashloom: rows that are not multiples of 16 bytes, requests that do not begin at multiples of them, "
                "or scaled keys, are computed by Triton kernels instead of the Hopper kernel"
            )
            other = TritonExecutor(self.spec, self.device)
            other.plan(self._batch, self._reserve)
            self._other = other
        self._other.run(q, kv, out, lse, sm_scale=sm_scale, partial=partial, values=values)

    def explain(self) -> str:
        """Which kernel and config serve this plan, and why."""
        kind = f"paged by {self._page}" if self._page else "ragged" if self._ragged else "dense"
        other = "" if self._other is None else f"; for unaligned or scaled tensors {self._other.explain()}"
        split = "long keys split, " if self._cut else ""
        narrow = "; products of float8_e4m3fn, weights are rounded to it" if self.spec.q_dtype.itemsize == 1 else ""
        return (
            f"gluon {self.target}: rows x keys {self._config}; {kind} KV, {split}longest first over {self._grid} "
            f"programs; workspace {self.workspace_size} bytes{narrow}{other}"
        )


def _first_line(error: BaseException) -> str:
    """The innermost message, in one line: errors within a partition of a Gluon kernel arrive wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _jump(x: torch.Tensor, request: int, token: int) -> tuple[int | None, int]:
    """For rows with these steps: tokens from the end of a request to the next one's first (None where a tensor map,
    which knows of tokens and heads alone, cannot say it), and tokens from the first to the last one's end."""
    if request == 0:
        return 0, x.shape[0] if x.dim() == 3 else x.shape[0] * x.shape[1]
    jump, rest = divmod(request, token)
    tokens = (x.shape[0] - 1) * (x.shape[1] + jump) + x.shape[1]
    return None if rest or tokens >= 1 << 31 else jump, tokens


def _mean(batch: Batch) -> int:
    """Query tokens of the mean request, or the known bound of the longest."""
    return batch.max_q_len if batch.tokens is None else -(-batch.tokens // max(batch.requests, 1))


def _few(spec: AttentionSpec, mean: int) -> bool:
    """Whether the mean request's rows are so few that the Triton kernels take less time: their tiles have 16 rows and
    more, those of the Hopper kernel 64 for each consumer; and theirs hold all heads that share keys."""
    group, pack = spec.heads.group, sizes_of.pack(spec.heads.group, mean)
    if pack < group and mean * pack < FEW_ROWS:
        return True
    return mean < SMALL_ROWS and mean * group <= SMALL_ROWS
