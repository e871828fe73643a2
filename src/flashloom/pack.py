"""Kernels built ahead: `prepare` for this machine and these batches, `Pack` for other machines and every batch that
serving brings.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from flashloom import dispatch, store
from flashloom.attention import Attention, Batch
from flashloom.attention.tuning import tuned_for
from flashloom.bench.workloads import Workload
from flashloom.kernel import Kernel
from flashloom.records import Record
from flashloom.store.jobs import job_limit
from flashloom.target import Target

__all__ = ["Pack", "prepare"]


def prepare(attention: Attention | Sequence[Attention], batches: Iterable[Batch], *, jobs: int | None = None) -> None:
    """Build all kernels that plans for these batches and `fl.append` for their caches need, side by side, so that
    later plans find them.

    Processes that prepare the same kernels at the same time share the work. jobs: plans made at a time, by default as
    many as CPUs and memory allow. Raises what `plan` raises, and ValueError on a machine with a GPU for an Attention
    without a device and a batch on the host, which do not say where.
    """
    attentions: Sequence[Attention] = attention if isinstance(attention, Sequence) else [attention]
    for each in attentions:
        if not isinstance(each, Attention):
            raise TypeError(f"{type(each).__name__} cannot be prepared: give an fl.Attention, or a list of them")
    if isinstance(batches, Batch) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is one {type(batches).__name__}: give a list of them, as in fl.prepare(attention, [batch])"
        )
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, Batch):
            raise TypeError(f"batches holds {type(batch).__name__}: give fl.Batch objects")
    asked = [(one, batch) for batch in batches for one in attentions]
    for one, batch in asked:
        if batch.host:
            one.device_before("preparing")
    random.Random(os.getpid()).shuffle(asked)  # so that processes begin with different kernels
    with ThreadPoolExecutor(jobs or job_limit(), "flashloom-prepare") as pool:
        here = [contextvars.copy_context() for _ in asked]  # with the records in force
        plans = pool.map(lambda context, one: context.run(one[0].plan, one[1]), here, asked)
        places = {(plan.attention.spec, plan.device) for plan in plans}
        appends = [kernel for spec, device in places for kernel in dispatch.append_kernels(spec, Target.of(device))]
        for _ in pool.map(lambda kernel: kernel.entry(), {store.digest(k.fields): k for k in appends}.values()):
            pass
    store.finish()


class Pack:
    """A list of kernels to build for named targets, on any machine, into one file that machines without a compiler use.

        pack = fl.Pack(targets=[fl.Target("sm90"), fl.Target("x86-avx2")])
        pack.add(attention, fl.workloads("llama-3-8b"))
        pack.build("llama.loom")
        fl.use("llama.loom", on_miss="error")

    targets: Target or its name. Raises ValueError when there is none.
    """

    def __init__(self, targets: Iterable[Target | str]) -> None:
        self.targets = [target if isinstance(target, Target) else Target(target) for target in targets]
        if not self.targets:
            raise ValueError('a pack needs targets; give some, such as Pack(targets=["sm90", "x86-avx2"])')
        self.path: Path | None = None
        self._kernels: dict[str, Kernel] = {}
        self._records: dict[str, Record] = {}

    def add(self, attention: Attention, workloads: Iterable[Workload | Batch]) -> Pack:
        """Add what plans of `attention` for these workloads or batches need, and what `fl.append` does for its caches,
        on every target. Tokens are appended in the queries' dtype or in the cache's own.

        Tuning records in force for it (see `fl.autotune`) travel along, with the kernels of their configs. Raises
        ValueError when a target has no kernel for it.
        """
        shapes = dict.fromkeys(_shape(workload) for workload in workloads)
        for target in self.targets:
            needed = [kernel for shape in shapes for kernel in dispatch.kernels(attention.spec, target, *shape)]
            for kernel in needed + dispatch.append_kernels(attention.spec, target):
                self._add(kernel)
            for record, choice in tuned_for(attention.spec, target):
                self._records[record.key.key] = record
                page_size = dict(zip(record.sizes, record.bucket))["page_size"]
                for kernel in dispatch.kernels_of(attention.spec, target, choice.backend, choice.config, page_size):
                    self._add(kernel)
        return self

    def _add(self, kernel: Kernel) -> None:
        """Of kernels that differ in name alone the first name by alphabet stays, so that order leaves no trace."""
        request = store.digest(kernel.fields)
        known = self._kernels.get(request)
        if known is None or kernel.label < known.label:
            self._kernels[request] = kernel

    def __len__(self) -> int:
        return len(self._kernels)

    def __repr__(self) -> str:
        built = "not built" if self.path is None else f"built to {self.path}"
        targets = ", ".join(str(target) for target in self.targets)
        return f"Pack([{targets}], {len(self._kernels)} kernels, {built})"

    def build(
        self,
        path: str | os.PathLike[str],
        *,
        jobs: int | None = None,
        progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    ) -> store.PackFile:
        """Build all kernels that the user's store lacks and write the pack; the same kernels always give the same
        bytes.

        jobs: kernels built at a time, by default as many as CPUs and memory allow. progress: called with the number
        done, the
        number in all and the name of the kernel just done. Raises ValueError for an empty pack, and what building
        raises; then
        nothing is written.
        """
        if not self._kernels:
            raise ValueError("the pack has no kernels; add() some first")
        entries = []
        with ThreadPoolExecutor(jobs or job_limit(), "flashloom-pack") as pool:
            building = {pool.submit(kernel.entry): kernel for kernel in self._kernels.values()}
            try:
                for future in as_completed(building):
                    kernel = building[future]  # the store may know it by another variant's name
                    entries.append(dataclasses.replace(future.result(), label=kernel.label, about=kernel.about))
                    progress(len(entries), len(building), building[future].name)
            finally:
                for future in building:
                    future.cancel()
        found = [self._records[key] for key in sorted(self._records)]
        store.write_pack(Path(path), entries, [json.loads(record.to_bytes()) for record in found])
        self.path = Path(path)
        return store.PackFile(path)

    def __fspath__(self) -> str:
        if self.path is None:
            raise ValueError("this pack has not been built; call build(path) first")
        return str(self.path)


def _shape(workload: Workload | Batch) -> tuple[int, int, int]:
    """(longest query, mean query, page size or 0) of a step."""
    if isinstance(workload, Batch):
        requests, page_size = workload.requests, 0 if workload.ragged else workload.page_size
        tokens = workload.tokens if workload.tokens is not None else workload.max_q_len * requests
        return workload.max_q_len, -(-tokens // max(requests, 1)), page_size
    return max(workload.q_lens), -(-workload.tokens // len(workload.q_lens)), workload.page_size or 0
