"""What the batch wrappers share: FlashInfer's attributes, and run() over one of the wrapper's plans."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.compiler import is_compiling

import flashloom as fl
from flashloom.attention import Batch, Reserve
from flashloom.compat.flashinfer import _ops, utils
from flashloom.compat.flashinfer._jit import Known, check_options, known
from flashloom.compat.flashinfer._plans import Form, Plans, base_two, scale_tensor
from flashloom.compat.flashinfer._variants import Heads, Instances, Rules, variant
from flashloom.kv_cache.cache import KV
from flashloom.kv_cache.views import as_kv

INT_WORKSPACE = 8 << 20
CACHES_KEPT = 256
NUMBER = (type(None), float, int)


def check_buffer(name: str, x: Any, mode: str) -> None:
    """An index buffer of the caller, which kernels read as it is."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} should be a torch.Tensor in {mode}")
    if x.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {x.dtype}: index buffers must be torch.int32")


def refuse_token_scales(asked: bool) -> None:
    if asked:
        raise NotImplementedError(
            "use_token_head_sf=True: scales per token and head are not supported by flashloom; give one scale for the "
            "cache, k_scale= and v_scale= of run()"
        )


def planning(plan: Callable) -> Callable:
    """A plan() that raises leaves no plan: run() then says so, rather than take new rules with the former batch."""

    @functools.wraps(plan)
    def whole(self: Wrapper, *args: Any, **options: Any) -> Any:
        try:
            return plan(self, *args, **options)
        except BaseException:
            self._plans.batch = None
            raise

    return whole


def with_lse(call: Callable) -> Callable:
    """A method with return_lse=True. torch.compile cannot look into functools.partialmethod."""

    @functools.wraps(call)
    def both(self: Wrapper, *args: Any, return_lse: bool = True, **options: Any) -> Any:
        return call(self, *args, return_lse=return_lse, **options)

    return both


class Module:
    """What engines find in `_cached_module`: a plan() with FlashInfer's positional arguments."""

    def __init__(self, wrapper: Wrapper):
        self._wrapper = wrapper

    def plan(self, float_workspace: Any, int_workspace: Any, pinned: Any, *numbers: Any) -> list[int]:
        """Follow offsets and lengths on the host; page indices are those that the wrapper holds."""
        return planning(type(self._wrapper)._plan_as_module)(self._wrapper, *numbers)


@dataclass(eq=False)
class Call:
    """What a run() comes to."""

    state: tuple | None  # of the wrapper and the arguments; None: for one call only
    plan: fl.Plan
    rules: fl.Variant
    sm_scale: float
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    factor: Any  # of the result
    shape: tuple[int, int, int]
    scaled: weakref.WeakKeyDictionary[KV, KV] = field(default_factory=weakref.WeakKeyDictionary)


class Wrapper:
    """State that clients of FlashInfer's wrappers read and write, and the plans behind it. The caller's workspace is
    kept and not used: plans own their buffers."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        jit_args: Sequence[Any] | None,
        jit_kwargs: dict[str, Any] | None = None,
    ):
        utils._check_kv_layout(kv_layout)
        utils._check_workspace_buffer_alignment(float_workspace_buffer, "float_workspace_buffer")
        self._kv_layout, self._backend = kv_layout, utils.check_backend(backend)
        check_options(jit_kwargs)
        self._asked_backend = backend
        self._float_workspace_buffer = float_workspace_buffer
        self._int: torch.Tensor | None = None
        self._pinned: torch.Tensor | None = None
        self.device = float_workspace_buffer.device
        self._use_cuda_graph = bool(use_cuda_graph)
        self._jit: Known | None = None if jit_args is None else known(jit_args)
        self._jit_module = self._jit
        self._handle = _ops.handle(self)
        self._plans = Plans(torch.empty(0, device=self.device).device, self._use_cuda_graph)
        self._instances = Instances()
        self._seen: dict[tuple[int, ...], tuple] = {}
        self._call: Call | None = None  # of the last run()
        self._mask: fl.Variant | None = None
        self._planned: fl.Variant | None = None  # the variant of _rules, with a mask where there is one
        self._rules = Rules()
        self._causal = False
        self._window_left, self._logits_soft_cap, self._pos_encoding_mode = -1, 0.0, "NONE"
        self._sm_scale: float | None = None
        self._rope_scale: float | None = None
        self._rope_theta: float | None = None
        self._plan_info: list[int] | None = None
        self._cached_module: Any = None
        self._cached_q_data_type = self._cached_kv_data_type = self._cached_o_data_type = torch.float16
        self._batch_invariant = False
        self._fixed_batch_size = 0
        self._batch_size = self._num_qo_heads = self._num_kv_heads = 0
        self._max_total_num_rows: int | None = None
        self._block_tables: torch.Tensor | None = None
        self._prefix_len_ptr = self._token_pos_in_items_ptr = self._max_item_len_ptr = None
        self._token_pos_in_items_len = 0

    # --- workspaces ---

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    @property
    def _int_workspace_buffer(self) -> torch.Tensor:
        if self._int is None:
            self._int = torch.empty(INT_WORKSPACE, dtype=torch.uint8, device=self.device)
        return self._int

    @_int_workspace_buffer.setter
    def _int_workspace_buffer(self, value: torch.Tensor) -> None:
        self._int = value

    @property
    def _pin_memory_int_workspace_buffer(self) -> torch.Tensor:
        if self._pinned is None:
            self._pinned = torch.empty(INT_WORKSPACE, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return self._pinned

    @_pin_memory_int_workspace_buffer.setter
    def _pin_memory_int_workspace_buffer(self, value: torch.Tensor) -> None:
        self._pinned = value

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor, *args: Any
    ) -> None:
        """Other workspaces from now on. Raises ValueError unless they are 16-byte aligned."""
        utils._check_workspace_buffer_alignment(float_workspace_buffer, "float_workspace_buffer")
        utils._check_workspace_buffer_alignment(int_workspace_buffer, "int_workspace_buffer")
        self._float_workspace_buffer, self._int = float_workspace_buffer, int_workspace_buffer
        self._pinned = None

    def prewarm_paged_kv_stride_variant(self, variant: str = "independent") -> None:
        """Nothing to do: strides of keys and values are run-time arguments, independent of each other."""

    def end_forward(self) -> None:
        """Nothing to do; the name is of earlier versions."""

    # --- plan ---

    def _set_rules(
        self,
        causal: bool,
        window_left: int,
        logits_soft_cap: float | None,
        pos_encoding_mode: str,
        sm_scale: float | None,
        rope_scale: float | None,
        rope_theta: float | None,
    ) -> None:
        self._rules = Rules.of(causal, window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
        self._causal, self._window_left = causal, window_left
        self._logits_soft_cap = 0.0 if logits_soft_cap is None else logits_soft_cap
        self._sm_scale, self._pos_encoding_mode = sm_scale, pos_encoding_mode
        self._rope_scale, self._rope_theta = rope_scale, rope_theta
        self._planned = None

    def _set_dtypes(self, q: Any, kv: Any, out: Any) -> None:
        self._cached_q_data_type = q = utils.canonicalize_torch_dtype(q)
        self._cached_kv_data_type = q if kv is None else utils.canonicalize_torch_dtype(kv)
        self._cached_o_data_type = q if out is None else utils.canonicalize_torch_dtype(out)

    def _set_backend(self, head_dim_qk: int, head_dim_vo: int, fp16_reduction: bool) -> None:
        """The name that FlashInfer would show; it chooses nothing here."""
        if self._asked_backend == "auto":
            self._backend = utils.determine_attention_backend(
                self.device,
                utils.PosEncodingMode[self._pos_encoding_mode].value,
                fp16_reduction,
                self._mask is not None,
                self._cached_q_data_type,
                self._cached_kv_data_type,
                head_dim_qk=head_dim_qk,
                head_dim_vo=head_dim_vo,
            )

    def _follow(self, batch: Batch, form: Form, reserve: Reserve | None = None) -> None:
        """Take over the batch; the plan that it is likely to need is made or updated here rather than in run()."""
        before = self._plans.last
        self._plans.follow(batch, reserve)
        self._batch_size, self._num_qo_heads, self._num_kv_heads = batch.requests, form.q_heads, form.kv_heads
        self._dims = form.dim, form.value_dim
        self._cached_module = Module(self)
        self._plan_info = [batch.requests, form.q_heads, form.kv_heads]
        if self._jit is None and (before is None or self._ran_as_planned):
            self._plans.get(form, self._variant(form.q_heads, form.dim))
        self._ran_as_planned = True

    _ran_as_planned = True
    _ragged = False
    _dims = 0, 0

    def _form(self, q_heads: int, kv_heads: int, dim: int, value_dim: int) -> Form:
        q, kv = self._cached_q_data_type, self._cached_kv_data_type
        return Form(q_heads, kv_heads, dim, value_dim, q, kv, self._batch_invariant)

    def _variant(self, q_heads: int, dim: int) -> fl.Variant:
        if self._planned is None or self._mask is None:
            return variant(self._rules, q_heads, dim, self._plans.device)
        return self._planned

    def _workspace_size(self, batch: Batch, form: Form, rules: Rules) -> tuple[int, int]:
        """Bytes of the buffers that a plan owns; the caller's workspaces hold nothing of it, and any will do."""
        from flashloom.compat.flashinfer._plans import attention

        made = attention(form, variant(rules, form.q_heads, form.dim, self._plans.device), self._plans.device)
        return max(made.plan(batch).workspace_size, 16), 16

    def _plan_as_module(self, *numbers: Any) -> list[int]:
        raise NotImplementedError(f"{type(self).__name__}._cached_module.plan")

    # --- run ---

    def _override(
        self, pos_encoding_mode: str, window_left: int, logits_soft_cap: float | None, sm_scale: float | None,
        rope_scale: float | None, rope_theta: float | None, causal: bool | None = None,
    ) -> None:  # fmt: skip
        """What forward() is given replaces what plan() was."""
        causal = self._causal if causal is None else causal
        rules = Rules.of(causal, window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta)
        if rules != self._rules:
            mask = self._mask
            self._set_rules(
                causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, rope_scale, rope_theta
            )  # fmt: skip
            if mask is not None:
                self._take_mask(mask)
            self._ran_as_planned = False
        self._sm_scale = sm_scale

    def _take_mask(self, mask: fl.Variant) -> None:
        from flashloom.compat.flashinfer._variants import with_mask

        self._mask = mask
        self._planned = with_mask(self._rules, self._num_qo_heads, self._dims[0], mask)

    def _pages(self, cache: Any) -> KV:
        """The kernels' form of a cache; the same object for tensors that were seen before, as long as they live."""
        owners = cache if isinstance(cache, tuple) else (cache,)
        key = tuple(map(id, owners))
        known = self._seen.get(key)
        if known is not None and all(ref() is x and at == x.data_ptr() for (ref, at), x in zip(known[0], owners)):
            return known[1]
        kept = all(isinstance(x, torch.Tensor) and not x.requires_grad for x in owners)
        # .data is no view of the caller's tensor, so that what is kept does not keep that
        k, v = utils._unpack_paged_kv_cache(
            cache if not kept else tuple(x.data for x in cache) if isinstance(cache, tuple) else cache.data,
            self._kv_layout,
        )
        kv = as_kv(k, v, None, None, ragged=False, layout=self._kv_layout)
        if not kept:
            return kv
        if len(self._seen) >= CACHES_KEPT:
            self._seen.clear()
        seen = self._seen
        refs = tuple((weakref.ref(x, lambda _: seen.pop(key, None)), x.data_ptr()) for x in owners)
        seen[key] = refs, kv
        return kv

    def _rows(self, k: torch.Tensor, v: torch.Tensor) -> KV:
        """The kernels' form of ragged keys and values."""
        if self._kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        return as_kv(k, v, None, None, ragged=True, layout="NHD")

    def _kv(self, cache: Any) -> KV:
        """What run() is given as keys and values, as kernels take it."""
        return self._pages(cache)

    def _traced(
        self, q: torch.Tensor, cache: tuple, values: tuple, out: torch.Tensor | None, lse: torch.Tensor | None,
        return_lse: bool, lse_base: str, lse_layout: str, override: tuple | None,
    ) -> Any:  # fmt: skip
        """run() while torch.compile traces it: one operator, and the tensors that it fills."""
        owners = list(cache) if self._ragged else _ops.parts(cache[0])
        shape = (q.shape[0], q.shape[1], owners[-1].shape[-1])
        if out is None:
            out = torch.empty(shape, dtype=self._cached_o_data_type, device=q.device)
        if return_lse and lse is None:
            turned = (shape[1], shape[0]) if lse_layout == "HN" else shape[:2]
            lse = torch.empty(turned, dtype=torch.float32, device=q.device)
        encoding, rules = "", []
        if override is not None:
            encoding, *numbers = override
            rules = _ops.split((numbers[-1], *numbers[:-1]))[1]
        torch.ops.flashloom_compat.run(
            self._handle, q, owners, *_ops.split(values), out, lse if return_lse else None, lse_base, lse_layout,
            encoding, rules,
        )  # fmt: skip
        return (out, lse) if return_lse else out

    def _attend(
        self,
        q: torch.Tensor,
        cache: tuple,
        args: tuple,
        *,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        sinks: torch.Tensor | None = None,
        override: tuple | None = None,
    ) -> Any:
        """run() of every wrapper. cache: (the paged cache,), or (k, v) of ragged keys; override: what forward() says in
        place of plan()."""
        if is_compiling():
            values = (q_scale, k_scale, v_scale, sinks, *args)
            return self._traced(q, cache, values, out, lse, return_lse, lse_base, lse_layout, override)
        if override is not None:
            self._override(*override)
        kv = self._kv(*cache)
        if self._plans.batch is None:
            raise RuntimeError(f"{type(self).__name__}: call plan() before run(); a plan() that raised left none")
        _check_lse_form(lse_base, lse_layout)
        scales, state = (q_scale, k_scale, v_scale), None
        if (
            not args
            and sinks is None
            and self._jit is None
            and (type(q_scale) in NUMBER and type(k_scale) in NUMBER and type(v_scale) in NUMBER)
        ):
            state = (
                kv.signature, q.shape, q.dtype, scales, self._plans.step, self._rules, self._planned, self._mask,
                self._sm_scale, self._cached_q_data_type, self._cached_kv_data_type, self._batch_invariant,
            )  # fmt: skip
        call = self._call
        if state is None or call is None or call.state != state:
            call = self._prepare(state, q, kv, args, scales, sinks)
            self._call = None if state is None else call
        if call.k_scale is not None or call.v_scale is not None:
            kv = self._with_scales(kv, call)
        shape, o_dtype = call.shape, self._cached_o_data_type
        if out is not None and (out.dtype != o_dtype or out.shape != shape or out.device != q.device):
            if out.dtype != o_dtype:
                raise ValueError(
                    f"The dtype of out {out.dtype} does not match the o_data_type {o_dtype} specified in plan function."
                )
            utils.check_shape_dtype_device(out, shape, o_dtype, q.device, "out")
        target = out if o_dtype.itemsize > 1 else None
        if target is None:
            target = torch.empty(shape, dtype=o_dtype if o_dtype.itemsize > 1 else torch.float32, device=q.device)
        rows = None
        if return_lse:
            if lse is None:
                lse = torch.empty(
                    (shape[1], shape[0]) if lse_layout == "HN" else shape[:2], dtype=torch.float32, device=q.device
                )
            else:
                utils.check_shape_dtype_device(
                    lse, (shape[1], shape[0]) if lse_layout == "HN" else shape[:2], torch.float32, q.device, "lse"
                )
            rows = lse.t() if lse_layout == "HN" else lse
        call.plan.run(q, kv, out=target, lse=rows, variant=call.rules, sm_scale=call.sm_scale)
        if call.factor is not None:
            target.mul_(call.factor)
        if o_dtype.itemsize == 1:
            small = utils.narrow(target, o_dtype)
            target = small if out is None else out.copy_(small)
        if not return_lse:
            return target
        assert lse is not None
        return target, lse if lse_base == "ln" else base_two(lse)

    def _prepare(
        self, state: tuple | None, q: torch.Tensor, kv: KV, args: tuple, scales: tuple, sinks: torch.Tensor | None
    ) -> Call:
        """The plan of a run() and what it is given; calls of an equal state take the same."""
        q_scale, k_scale, v_scale = scales
        k = kv.k  # [pages, page_size, kv_heads, dim] in every layout
        utils._check_cached_qkv_data_type(q, k, self._cached_q_data_type, self._cached_kv_data_type)
        if k.dtype == torch.uint8:
            raise NotImplementedError("NVFP4 KV caches (uint8 with kv_cache_sf) are not supported by flashloom yet")
        form = self._form(q.shape[1], k.shape[2], q.shape[2], kv.v.shape[3])
        rules = self._variant(form.q_heads, form.dim)
        sm_scale = utils.scale_of(form.dim, self._sm_scale)
        if self._jit is not None:
            rules, sm_scale = self._with_jit(rules, sm_scale, args, form)
        elif args:
            if len(args) != 3 or q.dtype.itemsize != 1:
                raise TypeError(
                    f"run() was given {len(args)} positional arguments behind the KV cache: these are scale_q, "
                    "scale_k and scale_v of 8-bit queries, or belong to jit_args"
                )
            if args[0] is not None:
                scale_q = utils.per_head("scale_q", args[0], form.q_heads, form.kv_heads)
                rules = self._instances.get(rules, _per_head, scale_q, first=True)
            k_scale, v_scale = (a if b is None else b for a, b in zip((k_scale, v_scale), args[1:], strict=True))
        if sinks is not None:
            rules = self._instances.get(rules, fl.sink, utils.sinks_of(sinks, form.q_heads, form.kv_heads))
        plan = self._plans.get(form, rules)
        factor = None
        if isinstance(q_scale, torch.Tensor):
            k_scale = q_scale.float() if k_scale is None else q_scale.float() * k_scale
        elif q_scale is not None:
            sm_scale *= q_scale
        if k_scale is not None and not isinstance(k_scale, torch.Tensor):
            sm_scale, k_scale = sm_scale * k_scale, None
        if (
            v_scale is not None
            and k.dtype.itemsize > 1
            and not (isinstance(v_scale, torch.Tensor) and v_scale.numel() > 1)
        ):
            factor, v_scale = v_scale, None
            if isinstance(factor, torch.Tensor):
                factor = factor.reshape(())
            elif factor == 1.0:
                factor = None
        device = self._plans.device
        shape = (q.shape[0], q.shape[1], form.value_dim)
        return Call(
            state, plan, rules, sm_scale, scale_tensor(k_scale, device), scale_tensor(v_scale, device), factor, shape
        )

    def _with_scales(self, kv: KV, call: Call) -> KV:
        """The cache with the scales of a call, kept while the call is."""
        found = call.scaled.get(kv)
        if found is None:
            found = call.scaled[kv] = KV(kv.k, kv.v, call.k_scale, call.v_scale, kv.layout)
        return found

    def _with_jit(self, rules: fl.Variant, sm_scale: float, args: tuple, form: Form) -> tuple[fl.Variant, float]:
        """The variant behind jit_args with the tensors and numbers of this run()."""
        jit = self._jit
        assert jit is not None
        names = (*jit.tensors, *jit.scalars)
        if len(args) != len(names):
            raise ValueError(f"run() takes {', '.join(names)} behind the KV cache, and was given {len(args)} arguments")
        values = dict(zip(names, args, strict=True))
        if "sink" in values:
            values["sink"] = utils.sinks_of(values["sink"], form.q_heads, form.kv_heads)
        if jit.sm_scale is not None:
            sm_scale = float(values.pop(jit.sm_scale))
        else:
            sm_scale = 1.0  # a scale is among the variant's own numbers
        return self._instances.get(rules, jit.make, *values.values()), sm_scale


def _per_head(scale: torch.Tensor) -> fl.Variant:
    return Heads(scale=scale)


def _check_lse_form(lse_base: str, lse_layout: str) -> None:
    if lse_base not in ("log2", "ln"):
        raise ValueError(f'lse_base={lse_base!r}: must be "log2" or "ln"')
    if lse_layout not in ("NH", "HN"):
        raise ValueError(f'lse_layout={lse_layout!r}: must be "NH" or "HN"')
