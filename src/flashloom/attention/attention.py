"""Attention: what a layer computes. Its plans, made for a batch, run it with no decision left to make."""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashloom import dispatch, forked, records, settings, store
from flashloom.attention import check, pool
from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.reads import Sizes
from flashloom.attention.rows import like
from flashloom.attention.shape import HeadShape
from flashloom.kernel import cuda
from flashloom.kv_cache.cache import KV, KV_DTYPES, check_layout, place
from flashloom.kv_cache.views import as_kv
from flashloom.variant import full
from flashloom.variant.plain import transforming
from flashloom.variant.title import name_of
from flashloom.variant.variant import Variant, advice

_log = logging.getLogger("flashloom")
_handles = itertools.count(1)
#: Plans by handle, for calls that come back through torch.library.
PLANS: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()
_NO_LAUNCH = (None, None)
_modes = torch._C._len_torch_dispatch_stack  # fake tensors, make_fx and the like see operators, not launches
_VARIANTS_KEPT = 256  # per plan: other instances of the variant that were accepted


class Attention:
    """What one kind of layer computes: heads, variant, dtypes. Thread-safe, cheap, and independent of any batch. It
    does not change: make another one for another variant.

    heads: HeadShape. dtype: that of the queries (float32, float16, bfloat16, or 8-bit floats); kv_dtype: that of keys
    and values, `dtype` unless given (also float8_e4m3fn, float8_e5m2, int8); where both are float8_e4m3fn a Hopper GPU
    multiplies prefill in that type, less exactly than 16-bit queries are (docs/hopper.md). layout: memory order of
    page tensors passed as tuples, "NHD" or "HND". sm_scale: 1 / sqrt(heads.dim) unless given. batch_invariant: a
    request's result does not depend on the batch's other requests. device: where it computes. Without it, that is
    where the first batch has its lengths and page tables, and if those are on the host, where the tensors of the first
    run are: a plan made before that run is then made once more, which a sealed process or a CUDA graph that is being
    captured refuses, naming both devices. Raises TypeError or ValueError with the value, the rule and the fix."""

    def __init__(
        self,
        heads: HeadShape,
        *,
        variant: Variant = full,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        layout: str = "NHD",
        sm_scale: float | None = None,
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
    ):
        if not isinstance(heads, HeadShape):
            raise TypeError(f"heads is {type(heads).__name__}: give a HeadShape(q_heads, kv_heads, dim)")
        if not isinstance(variant, Variant):
            raise TypeError(f"variant is {advice(variant)}")
        check.dtype("dtype", dtype, check.Q_DTYPES)
        kv_dtype = dtype if kv_dtype is None else kv_dtype
        check.dtype("kv_dtype", kv_dtype, KV_DTYPES)
        own = self.__dict__  # past __setattr__
        own.update(heads=heads, variant=variant, dtype=dtype, kv_dtype=kv_dtype, layout=check_layout(layout))
        own.update(sm_scale=check.scale(sm_scale, heads.dim**-0.5), batch_invariant=bool(batch_invariant))
        own["_settled"] = None if device is None else place(device)
        settings.check_world(settings.get().tensor_parallel_size)
        own["values"] = variant.values
        own["_sizes"] = Sizes(variant)
        check.fields(variant.program, self.values, heads, self._settled)
        self._sizes.check_heads(self.values, heads)
        program = variant.program.specialise(heads.dim, heads.value_dim)
        own["_specs"] = [
            AttentionSpec(heads, program, dtype, kv_dtype, self.batch_invariant, sparse, name_of(variant))
            for sparse in (False, True)
        ]

    if TYPE_CHECKING:
        heads: HeadShape
        variant: Variant
        dtype: torch.dtype
        kv_dtype: torch.dtype
        layout: str
        sm_scale: float
        batch_invariant: bool
        values: tuple[Any, ...]
        _settled: torch.device | None
        _sizes: Sizes
        _specs: list[AttentionSpec]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"an Attention does not change: make another one, Attention(heads, {name}=..., ...)"
            if name in ("variant", "dtype", "kv_dtype", "layout", "sm_scale", "batch_invariant", "device")
            else f"an Attention does not change, and {name!r} is no attribute of it"
        )

    def __getattr__(self, name: str) -> Any:
        hint = ": plan = attention.plan(batch), then plan.run(q, kv)" if name in ("run", "update", "forward") else ""
        raise AttributeError(f"an Attention has no {name!r}{hint}")

    def __call__(self, *args: object, **options: object) -> Any:
        raise TypeError("an Attention is not called: plan = attention.plan(batch), then plan.run(q, kv)")

    @property
    def device(self) -> torch.device:
        """Where it computes; until that is known (see `device` above) the CPU, or where the variant's tensors are."""
        if self._settled is not None:
            return self._settled
        away = (x.device for x in self.values if isinstance(x, Tensor) and x.device.type != "cpu")
        return next(away, torch.device("cpu"))

    def device_before(self, doing: str) -> torch.device:
        """Where it computes, for work before a first run. Raises ValueError where nothing says so and the machine has a
        GPU."""
        if self._settled is None and self.device.type == "cpu" and torch.cuda.is_available():
            raise ValueError(
                f"{doing}: neither this Attention nor its batches say where it computes, and this machine has a GPU: "
                'give Attention(device="cuda"), or device="cpu"'
            )
        return self.device

    def _settle(self, device: torch.device | None) -> None:
        """From now on it computes there."""
        self.__dict__["_settled"] = device

    @property
    def spec(self) -> AttentionSpec:
        """What is asked of a kernel."""
        return self._specs[0]

    def plan(self, batch: Batch, *, reserve: Reserve | None = None) -> Plan:
        """Choose and prepare kernels for a batch. The plan's `update` takes later batches, within `reserve` if one is
        given; with `fl.configure(enable_cudagraph=True)` what it leaves open is the size of this batch."""
        return Plan(self, batch, reserve)

    def __repr__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.kv_dtype)]
        where = "on the device of its first batch or run" if self._settled is None else self._settled
        return f"Attention({self.heads}, variant={self.variant}, dtype={names[0]}, kv_dtype={names[1]}, {where})"


class Plan:
    """An Attention prepared for a batch; made by `Attention.plan`. It belongs to one thread and one stream at a
    time."""

    def __init__(self, attention: Attention, batch: Batch, reserve: Reserve | None):
        if reserve is not None and not isinstance(reserve, Reserve):
            raise TypeError(f"reserve is {type(reserve).__name__}: give a Reserve(requests=, tokens=, pages=)")
        forked.in_use = True
        self.attention, self._reserve = attention, reserve
        heads = attention.heads
        self._program, self._variant, self._values = attention.variant.program, attention.variant, attention.values
        self._others: dict[int, tuple[Variant, tuple[Any, ...]]] = {}
        self._per_batch = any(p.kind in ("request", "query", "key") for p in self._program.params)
        self._sizes = attention._sizes
        self._values_grad = any(isinstance(v, Tensor) and v.requires_grad for v in self._values)
        self._hollow = any(isinstance(v, Tensor) and v.numel() == 0 for v in self._values)
        self._q_dtype, self._sm_scale, self._row = attention.dtype, attention.sm_scale, (heads.q_heads, heads.value_dim)
        self._alike = heads.value_dim == heads.dim and attention.spec.out_dtype is attention.dtype  # out and q
        self._softmax = self._program.softmax
        self._stream: int | None = None
        self._captured = False  # a CUDA graph may hold the addresses of its buffers
        self._busy = threading.Lock()
        # the arguments that run() accepted last; it diagnoses only what differs from them
        self._q_shape: torch.Size | None = None
        self._flat = True
        self._exact = True  # q is flat and has the batch's tokens, no further rows
        self._out_shape: torch.Size = torch.Size(())
        self._kv_signature: tuple | None = None
        self._kv_known: tuple | None = None
        self._pages_known: int | None = None  # a cache of so many pages has all those of the batch
        self._repeat: Any = None  # launches once more if nothing but addresses has changed since it was set
        # the last run's `repeat` and `again` of the executor, for `fl.attention`; another object for every run that was
        # prepared anew, and None where it cannot be repeated
        self.launch: tuple[Any, Any] = _NO_LAUNCH
        check.batch(batch, attention._settled)
        if attention._settled is None and not batch.host:
            check.fields(self._program, self._values, heads, batch.device)
            attention._settle(batch.device)
        self._open = attention._settled is None  # the first run says where
        self._executor: Any = None
        self._refusals: list[tuple[str, str]] = []
        if settings.get().enable_cudagraph:
            self._reserve = (reserve or Reserve()).fixed(batch)
        self._spec = attention._specs[batch.blocks is not None]
        self._out_dtype = self._spec.out_dtype
        self._accept_batch(batch)
        self._device = attention.device
        self._cuda_index = self._device.index if self._device.type == "cuda" else None
        guessed = self._open and self._device.type == "cpu" and torch.cuda.is_available()
        if not guessed:  # else a kernel made here might be of no use
            self._choose(self._device)
        self.handle = next(_handles)
        PLANS[self.handle] = self

    def _choose(self, device: torch.device) -> None:
        """Choose and prepare a kernel there."""
        check.fields(self._program, self._values, self.attention.heads, device)
        former = self._device, self._cuda_index
        self._device, self._cuda_index = device, device.index if device.type == "cuda" else None
        try:
            if self._cuda_index is not None:
                self._check_stream()  # a first run on another stream waits for what planning begins here
            tuner = records.current().tuner
            if tuner is not None:
                tuner(self.attention, self._batch, self._reserve)
            self._executor, self._refusals = dispatch.plan(self._spec, device, self._batch, self._reserve)
        except BaseException:
            self._device, self._cuda_index = former
            raise
        _log.debug("planned %s with %s for %s", self._batch, self._executor.name, self.attention)

    def _settle(self, q: Tensor) -> None:
        """The first run of a plan whose Attention was given no device: it computes where its tensors are."""
        known, here = self.attention._settled, q.device
        if known is not None and known != here:
            raise ValueError(
                f"q is on {here} but this Attention computes on {known}, where its first batch or run was: move q with "
                f".to({str(known)!r}), or make another Attention for {here}"
            )
        if here != self._device:
            captures = here.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if store.is_sealed() or captures:
                raise (RuntimeError if captures else store.SealedError)(
                    f"q is on {here} but the plan was made for {self._device}, since its batch is on the host and the "
                    "Attention was given no device, and no other can be made now ("
                    f"{'a CUDA graph is being captured' if captures else 'this process is sealed'}): give "
                    f"Attention(device={str(here)!r})"
                )
        self.attention._settle(here)
        try:
            if here != self._device or self._executor is None:
                self._choose(here)
        except BaseException:
            self.attention._settle(known)
            raise
        self._open = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    # --- run ---

    def run(
        self,
        q: Tensor,
        kv: KV | tuple,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        partial: bool = False,
        variant: Variant | None = None,
        sm_scale: float | None = None,
    ) -> Any:
        """Attention of q [tokens, q_heads, dim] over `cache[i]`, (k, v) or (k, v, k_scale, v_scale).

        Returns out [tokens, q_heads, value_dim] in q's dtype (bfloat16 for 8-bit q), or (out, lse) with return_lse;
        lse float32 [tokens, q_heads], natural logarithm, before output_transform. With `out` and `lse` given nothing
        is allocated; they must not share memory with what is read. Rows beyond the batch stay untouched. partial:
        leave output_transform to `merge`. variant: another instance of the planned variant (a layer's own sinks,
        slopes, scales). A row with nothing to attend to gives 0 and -inf. sm_scale: in place of the Attention's, for
        this call. Where all requests have as many query tokens, q may be [requests, tokens, q_heads, dim] in any
        strides; out and lse then have that form, and lie in memory as q does. Raises TypeError, ValueError or
        RuntimeError before any work."""
        if torch.compiler.is_compiling() or _modes():
            from flashloom.attention import library

            return library.run(self, q, kv, out, lse, return_lse, partial, variant, sm_scale)
        if not self._busy.acquire(False):
            raise RuntimeError(
                "this plan is being used by another thread: a plan belongs to one thread at a time; make one per thread"
            )
        try:
            plain = variant is None and sm_scale is None and lse is None and not (return_lse or partial)
            if plain and self._repeat is not None:
                if type(kv) is KV:
                    k, v, k_scale, v_scale = kv.k, kv.v, kv.k_scale, kv.v_scale
                else:
                    k, v, k_scale, v_scale = self._pair(kv)
                if k is not None and type(q) is Tensor:
                    if self._cuda_index is not None:
                        self._check_stream()
                    to = self._empty(q) if out is None else out
                    if self._repeat(q, k, v, k_scale, v_scale, to):
                        return to
            if transforming() is not None:
                raise RuntimeError(
                    "a plan runs within torch.vmap, torch.func.functionalize or another transform of torch.func: call "
                    "fl.attention there, which they know as an operator, or run the plan outside"
                )
            if (
                type(q) is not Tensor
                or q.shape != self._q_shape
                or q.dtype is not self._q_dtype
                or not (q.is_contiguous() or q.stride(-1) == 1)
                or q.device != self._device
                or q.requires_grad
                or q.is_neg()
            ):
                self._accept_q(q)
            if type(kv) is not KV:
                kv = as_kv(
                    *check.raw_kv(kv, self._batch, self.attention.heads),
                    ragged=self._batch.ragged,
                    layout=self.attention.layout,
                )
            if kv.signature is not self._kv_signature:
                self._accept_kv(kv)
            if self._cuda_index is not None:
                self._check_stream()
            given = out is not None or lse is not None
            results = out, lse
            if out is None:
                out = self._empty(q)
            elif (
                type(out) is not Tensor
                or out.shape != self._out_shape
                or out.dtype is not self._out_dtype
                or not (out.is_contiguous() or out.stride(-1) == 1)
                or out.device != self._device
                or out.requires_grad
                or out.is_neg()
            ):
                check.output(out, q, self.attention.heads, self._device)
            if lse is not None or return_lse:
                lse = self._accept_lse(lse, q, out)
            if given:
                check.apart(*results, q, kv)
            values = self._values if variant is None or variant is self._variant else self._values_of(variant)
            if self._values_grad:
                check.fields(self._program, values, self.attention.heads, self._device)
            scale = self._sm_scale if sm_scale is None else check.scale(sm_scale, self._sm_scale)
            if self._nothing or not kv.k.numel():
                if not self._nothing:
                    self._no_keys(out, lse)
                return (out, lse) if return_lse else out
            self._executor.run(q, kv, out, lse, sm_scale=scale, partial=partial, values=values)
            self._repeat, self.launch = None, _NO_LAUNCH
            if lse is None and not (self._contents or self._values_grad):
                repeat = getattr(self._executor, "repeat", None)
                if repeat is not None:
                    self.launch = repeat, self._executor.again
                self._repeat = repeat if plain else None
        finally:
            self._busy.release()
        return (out, lse) if return_lse else out

    def _pair(self, kv: Any) -> tuple[Any, Any, Any, Any]:
        """k and v of a tuple that is in the kernels' form as it stands, or None for anything else."""
        if type(kv) is tuple and len(kv) == 2 and self.attention.layout == "NHD" and not self._batch.ragged:
            return (*kv, None, None)
        return None, None, None, None

    def _accept_q(self, q: Tensor) -> None:
        where = q.device if self._open and isinstance(q, Tensor) else self._device
        check.query(q, self.attention.heads, self._q_dtype, where, self._batch)
        if self._open:
            self._settle(q)
        self._q_shape, self._out_shape = q.shape, torch.Size((*q.shape[:-2], *self._row))
        self._flat = q.dim() == 3
        self._exact = self._flat and q.shape[0] == self._batch.tokens

    def _empty(self, q: Tensor) -> Tensor:
        if self._exact:
            if self._alike and q.is_contiguous():
                return torch.empty_like(q)  # in half of new_empty's time
            return q.new_empty(self._out_shape, dtype=self._out_dtype)
        if q.dim() == 4:
            return like(q, self._row[1], self._out_dtype)
        check.further_rows("out", q, self._batch)
        # the batch's tokens are known to the device alone: what lies beyond them is 0
        return q.new_zeros((*q.shape[:-2], *self._row), dtype=self._out_dtype)

    def _no_keys(self, out: Tensor, lse: Tensor | None) -> None:
        """The batch's rows over keys of which there are none."""
        rows = slice(None) if out.dim() == 4 else slice(self._batch.tokens)
        out[rows].zero_()
        if lse is not None:
            lse[rows].fill_(-torch.inf)

    def _accept_kv(self, kv: KV) -> None:
        if kv.signature == self._kv_known and not self._contents:  # only the batch is new
            if self._batch.host and self._pages_known != kv.k.shape[0]:
                self._batch.kv.check_pages(kv.k.shape[0])
                self._pages_known = kv.k.shape[0]
            self._kv_signature = self._kv_known = kv.signature
            return
        check.keys_values(
            kv, self.attention.heads, self.attention.kv_dtype, self._device, self._checked, self._contents
        )
        if not (kv.k.requires_grad or kv.v.requires_grad):
            self._kv_signature = self._kv_known = kv.signature

    def _accept_lse(self, lse: Tensor | None, q: Tensor, out: Tensor) -> Tensor:
        if not self._softmax:
            raise ValueError(
                "this variant has softmax = False, so there is no lse: leave out lse= and return_lse; its partial "
                "results add"
            )
        if lse is None:
            if self._exact or not self._flat:
                return like(out, None, torch.float32)
            check.further_rows("lse", q, self._batch)
            return out.new_full(out.shape[:-1], -torch.inf, dtype=torch.float32)
        if (
            type(lse) is not Tensor
            or lse.shape != self._out_shape[:-1]
            or lse.dtype is not torch.float32
            or lse.device != self._device
            or lse.is_neg()
        ):
            check.logsumexp(lse, q, self.attention.heads, self._device)
        return lse

    def _values_of(self, variant: Variant) -> tuple[Any, ...]:
        """The values of another instance of the planned variant, checked when first seen."""
        known = self._others.get(id(variant))
        if known is not None:
            return known[1]
        values = self._instance(variant)
        check.batch_fields(self._program, values, self._batch)
        self._sizes.check_batch(variant, values, self.attention.heads, self._batch)
        if not self._per_batch:  # a batch's own tensors, such as masks, are large and seldom come again
            if len(self._others) >= _VARIANTS_KEPT:
                self._others.clear()
            self._others[id(variant)] = (variant, values)
        return values

    def _take(self, variant: Variant) -> None:
        """From now on this instance; what depends on the batch is checked with that."""
        self._variant, self._values = variant, self._instance(variant)
        self._hollow = any(isinstance(v, Tensor) and v.numel() == 0 for v in self._values)
        self._others.clear()

    def _instance(self, variant: Variant) -> tuple[Any, ...]:
        if not isinstance(variant, Variant):
            raise TypeError(f"variant is {advice(variant)}")
        if variant.program.digest != self._program.digest:
            raise ValueError(
                f"variant={variant} is another expression than the planned {self._variant}: run() takes another "
                "instance of the planned variant "
                "(other numbers, same code, dtypes and ranks); plan an Attention with this variant instead"
            )
        values = variant.values
        check.fields(self._program, values, self.attention.heads, None if self._open else self._device)
        self._sizes.check_heads(values, self.attention.heads)
        self._values_grad = self._values_grad or any(isinstance(v, Tensor) and v.requires_grad for v in values)
        return values

    def _check_stream(self) -> None:
        """One stream at a time: another one waits for the work on the former (unless that is being captured)."""
        stream = cuda.raw_stream(self._device.index)
        if stream and not self._captured:
            self._captured = torch.cuda.is_current_stream_capturing()
        if stream != self._stream:
            if self._stream is not None and not torch.cuda.is_current_stream_capturing():
                former = cuda.stream_of(self._stream, self._device)
                if not former.query():
                    torch.cuda.current_stream(self._device).wait_stream(former)
            if self._stream is not None and hasattr(self._executor, "buffers"):
                for x in self._executor.buffers():  # whoever gets this memory next waits for this stream, too
                    x.record_stream(cuda.stream_of(stream, self._device))
            self._stream = stream

    # --- update ---

    def update(self, batch: Batch, *, variant: Variant | None = None) -> None:
        """Follow a batch with other lengths, tables and number of requests, within the reserve; compiles nothing, and
        no address changes. Kind of KV, page size (of pages; not the tokens of DenseKV) and device stay those of the
        planned batch; exceeding the reserve is a ValueError. variant: another instance of the planned variant, from now
        on in place of the former one (masks and per-request values of the new batch). Where nothing was reserved a
        larger batch moves the buffers, which is a ValueError for a plan that was captured in a CUDA graph."""
        if not self._busy.acquire(False):
            raise RuntimeError(
                "this plan is being used by another thread: a plan belongs to one thread at a time; make one per thread"
            )
        try:
            check.batch(batch, None if self._open else self._device)
            old = self._batch
            if old.form != batch.form:
                names = "KV", "a page size of", "lengths on", "a block pattern:"
                name, was, now = next(x for x in zip(names, old.form, batch.form) if x[1] != x[2])
                raise ValueError(
                    f"update: the plan was made for {name} {was} and the batch has {now}: make another plan"
                )
            former = self._variant, self._values
            if variant is not None and variant is not self._variant:
                self._take(variant)
            try:
                self._accept_batch(batch)
            except (TypeError, ValueError):
                self._variant, self._values = former
                raise
            if self._executor is None:
                return  # the first run plans for this batch
            if self._cuda_index is not None:
                self._check_stream()
            try:
                self._executor.captured = self._captured
                self._executor.update(batch)
            except (MemoryError, ValueError):  # an executor that refuses a batch still has the one before
                self._variant, self._values = former
                self._accept_batch(old)
                raise
        finally:
            self._busy.release()

    def fits(self, batch: Batch) -> bool:
        """Whether a batch is within the reserve (always, where there is none), as far as the host can know it."""
        try:
            if self._reserve is not None:
                self._reserve.check(batch)
        except ValueError:
            return False
        return True

    def _accept_batch(self, batch: Batch) -> None:
        if self._reserve is not None:
            self._reserve.check(batch)
        self._contents = not batch.host and settings.get().check
        checked = batch.to_host() if self._contents else batch
        if self._per_batch or self._hollow:
            check.batch_fields(self._program, self._values, checked)
            self._others.clear()
        if self._sizes.of_batch:
            self._sizes.check_batch(self._variant, self._values, self.attention.heads, checked)
            self._others.clear()
        self._batch, self._checked, self._nothing = batch, checked, batch.tokens == 0
        if batch.kind == "dense":
            self._kv_known = None  # the tokens per row may be others
        self._repeat, self.launch = None, _NO_LAUNCH
        if self._q_shape is not None:
            rows = self._q_shape[0]
            self._exact = self._flat and rows == batch.tokens
            if not (self._flat and rows >= (batch.tokens or 0)):
                self._q_shape = None
        self._kv_signature = self._pages_known = None  # its pages are compared with the new table in the next run

    # --- looking ---

    @property
    def variant(self) -> Variant:
        """What `run` computes unless it is given another instance; `update(variant=)` replaces it."""
        return self._variant

    @property
    def batch(self) -> Batch:
        """The batch that `run` computes now."""
        return self._batch

    @property
    def executor(self) -> str:
        """The name of the backend that serves this plan."""
        return self._chosen().name

    def _chosen(self) -> Any:
        """The executor; whoever asks before the first run has said where is told of the attention's device so far."""
        if self._executor is None:
            self._choose(self._device)
        return self._executor

    @property
    def workspace_size(self) -> int:
        """Bytes of the buffers that the plan owns."""
        return self._chosen().workspace_size

    def explain(self) -> str:
        """Which kernel and config serve this plan, and why not the others."""
        lines = [f"{self.attention}", f"{self._batch}", f"{self.executor}: {self._executor.explain()}"]
        lines += [f"not {name}: {reason}" for name, reason in self._refusals]
        return "\n".join([*lines, *self._configured()])

    def __repr__(self) -> str:
        chosen = "not chosen before the first run" if self._executor is None else self._executor.name
        return f"Plan({self._batch}, {chosen}, {self.attention})"

    def _configured(self) -> list[str]:
        """What `fl.configure` says about this plan."""
        now, lines = settings.get(), []
        if now.memory_pool_size is not None:
            lines.append(pool.describe(self._device))
        if self._reserve is not None:
            r = self._reserve
            lines.append(f"buffers stay in place up to {r.requests} requests, {r.tokens} query tokens, {r.pages} pages")
        if now.fp16_reduction:
            lines.append("fp16_reduction: permitted, not used (products are summed in float32)")
        if now.tensor_parallel_size > 1:
            lines.append(f"tensor_parallel_size: {now.tensor_parallel_size} ranks, of which this is one")
        return lines
