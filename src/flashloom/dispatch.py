"""Which backend serves what: the only place that decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from flashloom.errors import warn

if TYPE_CHECKING:
    from flashloom.attention.batch import Batch, Reserve
    from flashloom.attention.executor import AttentionSpec, Executor
    from flashloom.attention.recorded import Asked
    from flashloom.kernel import Kernel
    from flashloom.target import Target

#: Attention executors by kind of device, the preferred first; a module is imported when it is first asked for.
ATTENTION: dict[str, list[str]] = {
    "cpu": ["flashloom.attention.cpu:CpuExecutor", "flashloom.attention.reference:ReferenceExecutor"],
    "cuda": [
        "flashloom.attention.hopper_executor:HopperExecutor",
        "flashloom.attention.triton_executor:TritonExecutor",
        "flashloom.attention.reference:ReferenceExecutor",
    ],
}
#: Modules with kernels of `fl.append` by kind of device: `append` is called as append_reference is, which serves where
#: there is none, and `append_kernels` answers the kernels that it launches.
APPEND: dict[str, str] = {"cuda": "flashloom.attention.triton_append"}

_only: ContextVar[str | None] = ContextVar("flashloom_executor", default=None)
_warned: set[str] = set()
_log = logging.getLogger("flashloom")


@lru_cache
def _find(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(import_module(module), attribute)


@contextmanager
def only(name: str | None) -> Iterator[None]:
    """Within it, plans use the executor of this name ("reference", "cpu", ...) and no other; None lifts the
    restriction. For comparisons."""
    token = _only.set(name)
    try:
        yield
    finally:
        _only.reset(token)


def _check_place(device: torch.device) -> None:
    if device.type not in ATTENTION:
        raise ValueError(f"device {device}: flashloom computes on {' and '.join(ATTENTION)}; move the tensors there")


def choose(spec: AttentionSpec, device: torch.device) -> Iterable[tuple[type[Executor], str | None]]:
    """The executors for this device in order of preference, each with the reason why it cannot serve the spec, or
    None. One is imported when it is reached."""
    _check_place(device)
    chosen = _only.get()
    for executor in map(_find, ATTENTION[device.type]):
        wanted = chosen is None or executor.name == chosen
        yield executor, executor.refuses(spec, device) if wanted else f"only {chosen!r} was asked for"


def kernels(spec: AttentionSpec, target: Target, max_q_len: int, mean_q_len: int, page_size: int) -> list[Kernel]:
    """The kernels that plans may take from the store on a target, for steps with this longest and mean query and pages
    of this size (0: a request's keys are one run of tokens): those of every backend that serves it, since which one a
    plan prefers depends on more of the batch. None of them is compiled, and no device is needed. Raises ValueError when
    no backend has kernels for it."""
    found: list[Kernel] = []
    for executor in map(_find, ATTENTION["cpu" if target.is_cpu else "cuda"]):
        if hasattr(executor, "kernels"):
            found += executor.kernels(spec, target, max_q_len, mean_q_len, page_size)
    if not found:
        raise ValueError(f"no backend has kernels for {spec.heads} with {spec.q_dtype} queries on {target}")
    return found


def kernels_of(
    spec: AttentionSpec, target: Target, backend: str, config: Any, page_size: int, trial: bool = False
) -> list[Kernel]:
    """The kernels that plans with this config of a backend take from the store on a target; trial: those of the tuner,
    whose tensors are aligned. Raises ValueError for a backend without kernels there."""
    for executor in map(_find, ATTENTION["cpu" if target.is_cpu else "cuda"]):
        if executor.name == backend and hasattr(executor, "kernels_of"):
            return executor.kernels_of(spec, target, config, page_size, trial)
    raise ValueError(f"no backend {backend!r} has kernels on {target}")


def plan(
    spec: AttentionSpec, device: torch.device, batch: Batch, reserve: Reserve | None
) -> tuple[Executor, list[tuple[str, str]]]:
    """The executor that a tuning record names, or the first that serves the spec, planned for the batch, and the
    refusals of those before it as (name, reason). A record whose kernel is not to be had counts as none, with a
    warning."""
    _check_place(device)
    asked = _find("flashloom.attention.recorded:Asked")(spec, device, reserve)
    named = asked(batch)
    try:
        return _plan(spec, device, batch, reserve, asked, None if named is None else named.backend)
    except Exception as error:
        if named is None or asked.strict:
            raise
        _log.warning("flashloom: a tuned config cannot serve (%s) and is passed over: %s", named, error)
    asked.off = True
    return _plan(spec, device, batch, reserve, asked, None)


def _plan(
    spec: AttentionSpec, device: torch.device, batch: Batch, reserve: Reserve | None, asked: Asked, named: str | None
) -> tuple[Executor, list[tuple[str, str]]]:
    refusals: list[tuple[str, str]] = []
    answers = choose(spec, device)
    for cls, reason in sorted(answers, key=lambda answer: answer[0].name != named) if named else answers:
        if reason is None and _only.get() is None and cls.name != named and hasattr(cls, "declines"):
            reason = cls.declines(spec, batch)
        if reason is None:
            try:
                executor = cls(spec, device)
                executor.tuned = asked.of(cls.name)
                executor.plan(batch, reserve)
                return executor, refusals
            except RuntimeError as error:
                if asked.strict:
                    raise
                if type(error).__name__ in ("NoCompiler", "NoToolchain"):
                    reason = _no_compiler(cls.name, error)
                elif type(error).__name__ == "CannotBuild":
                    reason = _cannot_build(cls.name, error)
                else:
                    raise
        refusals.append((cls.name, reason))
    raise RuntimeError(
        "no backend serves this attention: " + "; ".join(f"{name}: {reason}" for name, reason in refusals)
    )


def _no_compiler(name: str, error: Exception) -> str:
    if name not in _warned:
        _warned.add(name)
        advice = (
            "On Debian or Ubuntu `apt install g++` provides a compiler"
            if type(error).__name__ == "NoCompiler"
            else "Kernels from a pack need no compiler"
        )
        warn(
            f"flashloom passes over its {name} kernels, which leaves other kernels or the slow torch reference: "
            f"{error}. {advice}; `flashloom doctor` shows what was found."
        )
    return f"no compiler ({error})"


def _cannot_build(name: str, error: Exception) -> str:
    if name not in _warned:
        _warned.add(name)
        warn(f"flashloom passes over its {name} backend: {error}")
    return str(error)


def append_kernel(device: torch.device) -> Callable[..., None] | None:
    """The kernel that writes tokens into a cache on this device, if there is one."""
    name = APPEND.get(device.type)
    return None if name is None else _find(f"{name}:append")


def append_kernels(spec: AttentionSpec, target: Target) -> list[Kernel]:
    """The kernels that `fl.append` takes from the store on a target, for caches of such layers; [] where torch
    serves."""
    name = APPEND.get("cpu" if target.is_cpu else "cuda")
    return [] if name is None else _find(f"{name}:append_kernels")(spec, target)
