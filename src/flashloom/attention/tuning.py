"""Which backend and config a tuning record names for a plan: what is asked of the records, and how a batch is put in
its bucket. The same functions serve the tuner, so what is tuned and what is looked up cannot differ.

A batch-invariant attention asks nothing: a config that depends on the batch would break its promise.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flashloom import records, settings, store
from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.cpu import config as cpu_config
from flashloom.attention.kernels.hopper import asked as hopper_asked
from flashloom.attention.kernels.hopper import config as hopper_config
from flashloom.attention.kernels.hopper import offered as hopper_offered
from flashloom.attention.kernels.triton import asked as triton_asked
from flashloom.attention.kernels.triton import config as triton_config
from flashloom.attention.recorded import OPERATOR
from flashloom.dataclass import dataclass
from flashloom.kernel import NoCompiler
from flashloom.kernel.cpp import find_compiler
from flashloom.kernel.source import Source
from flashloom.kv_cache.pages import PageTable
from flashloom.lower import triton as lower
from flashloom.records import Folder, Question, Record, bucket_of
from flashloom.target import Target

__all__ = ["Choice", "Facts", "candidates", "question", "tuned_for", "valid"]

CPU_SIZES = ("requests", "mean_q", "max_q", "mean_kv", "page_size", "threads")
GPU_SIZES = ("requests", "mean_q", "max_q", "page_size")  # the lengths of keys are on the device: nobody reads them
MOST = 48  # candidates of one key on a GPU
_CONFIGS: dict[str, tuple[type, dict[str, tuple[int, ...]]]] = {
    "cpu": (cpu_config.Config, cpu_config.OFFERED),
    "triton": (triton_config.Config, triton_config.OFFERED),
    "hopper": (hopper_config.Config, hopper_offered.OFFERED),
}

log = logging.getLogger("flashloom")


@dataclass(frozen=True)
class Choice:
    """A backend and its config."""

    backend: str
    config: Any

    def to_json(self) -> dict[str, Any]:
        """By named parameters, as records keep it."""
        return {"backend": self.backend, **asdict(self.config)}

    @classmethod
    def read(cls, found: Mapping[str, Any], backends: Mapping[str, Any]) -> Choice:
        """From a record. Raises ValueError for a config that is not offered."""
        backend = found.get("backend")
        if backend not in _CONFIGS or backend not in backends:
            raise ValueError(f"backend {backend!r} is none of {', '.join(backends)}")
        kind, offered = _CONFIGS[backend]
        values = {name: value for name, value in found.items() if name != "backend"}
        if set(values) != {field.name for field in fields(kind)}:
            raise ValueError(f"{backend} has no config with {sorted(values)}")
        for name, value in values.items():
            if type(value) is not int or value not in offered[name]:
                raise ValueError(f"{name}={value!r} is none of {offered[name]}")
        return cls(backend, kind(**values))

    def __str__(self) -> str:
        return f"{self.backend}: {self.config}"


@dataclass(frozen=True)
class Facts:
    """What of a batch a config is chosen by: numbers of requests, of query tokens (mean, rounded up, and longest), of
    key tokens (mean; 0 where only a device knows), page size (0: a request is one run of tokens), CPU threads."""

    requests: int
    mean_q: int
    max_q: int
    mean_kv: int
    page_size: int
    threads: int

    @classmethod
    def of(cls, batch: Batch, reserve: Reserve | None, device: torch.device) -> Facts:
        """Of a batch on its way to a device."""
        n = max(batch.requests, 1)
        mean = batch.max_q_len if batch.tokens is None else -(-batch.tokens // n)
        on_cpu = device.type == "cpu"
        keys = -(-(batch.kv_tokens or 0) // n) if on_cpu else 0
        requests = batch.requests if on_cpu or reserve is None else reserve.requests or batch.requests
        threads = settings.get().threads or torch.get_num_threads() if on_cpu else 0
        return cls(requests, mean, batch.max_q_len, keys, _page_size(batch), threads)

    def bucket(self, on_cpu: bool) -> tuple[int, ...]:
        """Sizes rounded up to powers of two; page size and threads as they are."""
        if on_cpu:
            sizes = bucket_of((self.requests, self.mean_q, self.max_q, self.mean_kv))
            return (*sizes, self.page_size, self.threads)
        return (*bucket_of((self.requests, self.mean_q, self.max_q)), self.page_size)


def _page_size(batch: Batch) -> int:
    return batch.page_size if isinstance(batch.kv, PageTable) else 0


def question(spec: AttentionSpec, device: torch.device) -> Question:
    """What is asked of the records for a spec on a device."""
    now = settings.get()
    target = Target.here() if device.type == "cpu" else None
    return _question(spec, device, target, now.tensor_parallel_size)


@functools.lru_cache(maxsize=4096)
def _question(spec: AttentionSpec, device: torch.device, target: Target | None, tensor_parallel: int) -> Question:
    heads = spec.heads
    machine = _cpu(target) if target is not None else _gpu(device)
    asked = {**_computed(spec, Target(machine["target"])), "tensor_parallel": tensor_parallel, **machine}
    backends = asked["kernels"]
    label = f"{heads.q_heads}/{heads.kv_heads}x{heads.dim} {asked['q_dtype']}"
    label += f", {asked['kv_dtype']} KV" if spec.kv_dtype != spec.q_dtype else ""
    return Question(
        OPERATOR,
        asked,
        _compiler() if target is not None else _triton(),
        CPU_SIZES if target is not None else GPU_SIZES,
        lambda found: Choice.read(found, backends),
        label,
    )


def _computed(spec: AttentionSpec, target: Target) -> dict[str, Any]:
    """The part of a question that no machine is needed for."""
    heads = spec.heads
    return {
        "heads": [heads.q_heads, heads.kv_heads, heads.dim, heads.value_dim, heads.latent_value],
        "program": spec.program.digest,
        "q_dtype": str(spec.q_dtype).removeprefix("torch."),
        "kv_dtype": str(spec.kv_dtype).removeprefix("torch."),
        "kernels": _kernels(spec, target),
    }


def tuned_for(spec: AttentionSpec, target: Target) -> list[tuple[Record, Choice]]:
    """The records in force that answer for a spec on a target, whatever machine of that kind they were found on."""
    if spec.batch_invariant or spec.block_sparse:
        return []
    wanted = _computed(spec, target) | {"target": target.name}
    found: dict[str, tuple[Record, Choice]] = {}
    for layer in records.current().layers:
        for record in layer.records() if isinstance(layer, Folder) else getattr(layer, "all", ()):
            if record.operator == OPERATOR and all(record.fields.get(name) == x for name, x in wanted.items()):
                with suppress(ValueError, TypeError, KeyError):
                    found.setdefault(record.key.key, (record, Choice.read(record.config, wanted["kernels"])))
    return list(found.values())


def _kernels(spec: AttentionSpec, target: Target) -> dict[str, str]:
    """Digests of the kernels between which a record chooses, by backend: of sources with all that they include, and of
    what is generated for the variant."""
    if target.is_cpu:
        from flashloom.attention import cpu

        return {"cpu": store.digest(cpu.kernel(spec, target).fields)}
    shared = [Source(f"{triton_asked.KERNELS}.plan", "plan").identity, lower.functions(spec.program).text]
    found = {"triton": store.digest([Source(f"{triton_asked.KERNELS}.attend", "attend").identity, *shared])}
    if target.name == "sm90" and hopper_asked.unsuitable(spec) is None:
        found["hopper"] = store.digest(
            [Source("flashloom.attention.kernels.hopper.attend", "attend").identity, *shared]
        )
    return found


@functools.lru_cache
def _cpu(target: Target) -> dict[str, Any]:
    name = "unknown"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        keys = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part")
        first = dict(reversed([(k.strip(), v.strip()) for k, _, v in (line.partition(":") for line in lines)]))
        name = " ".join(first[key] for key in keys if key in first) or name
    except OSError:
        pass
    return {"device": name, "target": target.name}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "target": f"sm{properties.major}{properties.minor}",
        "processors": properties.multi_processor_count,
        "driver": torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0,
    }


def _compiler() -> dict[str, str] | None:
    try:
        return {"compiler": find_compiler().version}
    except NoCompiler:
        return None


@functools.lru_cache
def _triton() -> dict[str, str] | None:
    try:
        return {"triton": metadata.version("triton")}
    except metadata.PackageNotFoundError:
        return None


def valid(choice: Choice, spec: AttentionSpec, device: torch.device, facts: Facts) -> bool:
    """Whether a choice can serve a batch; asked when it is tuned and whenever it is used."""
    if choice.backend == "triton":
        return triton_config.valid(choice.config, _need(spec, device, facts))
    if choice.backend == "hopper":
        suits = hopper_asked.suits(spec, facts.page_size)
        return suits and hopper_offered.valid(choice.config, spec.heads, facts.page_size, spec.q_dtype.itemsize)
    return True


def _need(spec: AttentionSpec, device: torch.device, facts: Facts) -> triton_config.Need:
    major, minor = torch.cuda.get_device_capability(device)
    return triton_asked.need(spec, facts.max_q, facts.mean_q, facts.page_size, major * 10 + minor, facts.requests)


def candidates(spec: AttentionSpec, device: torch.device, facts: Facts, default: Choice) -> list[Choice]:
    """What is worth trying instead of the default, the nearest to it first."""
    if device.type == "cpu":
        tiles = Target.here().name == "x86-amx" and spec.q_dtype == torch.bfloat16
        rows = facts.max_q * spec.heads.group
        found = [Choice("cpu", c) for c in cpu_config.candidates(rows, facts.mean_kv, spec.heads.kv_heads, tiles)]
    else:
        need = _need(spec, device, facts)
        usual: dict[str, Any] = {"triton": triton_config.choose(need)}
        made: dict[str, Any] = {"triton": triton_config.candidates(need)}
        if "hopper" in question(spec, device).fields["kernels"]:
            chosen = usual["hopper"] = hopper_asked.choose(spec, facts.mean_q, facts.page_size)
            made["hopper"] = hopper_offered.candidates(chosen, spec.heads, facts.page_size, spec.q_dtype.itemsize)
        usual[default.backend] = default.config
        far = {}
        for backend, configs in made.items():
            for config in (usual[backend], *configs):
                away = _distance(config, usual[backend]) + (backend != default.backend)
                far[Choice(backend, config)] = away
        found = sorted(far, key=lambda choice: far[choice])[:MOST]
    kept = [c for c in dict.fromkeys(found) if c != default and valid(c, spec, device, facts)]
    return [c for c in kept if _is_offered(c)]


def _is_offered(choice: Choice) -> bool:
    offered = _CONFIGS[choice.backend][1]
    return all(value in offered[name] for name, value in asdict(choice.config).items())


def _distance(config: Any, usual: Any) -> int:
    """Parameters in which two configs of a backend differ."""
    mine, other = asdict(config), asdict(usual)
    return sum(mine[name] != other[name] for name in mine)
