"""What the tuning records in force say to a plan. Where there are none, which is the usual start, nothing is loaded
that could answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flashloom import records
from flashloom.attention.batch import Batch, Reserve
from flashloom.attention.executor import AttentionSpec
from flashloom.records import Question, Scope

if TYPE_CHECKING:
    from flashloom.attention.tuning import Choice

__all__ = ["OPERATOR", "Asked", "Fixed"]

OPERATOR = "attention"


class Fixed(Scope):
    """A scope in which every plan takes this choice (None: the default), and fails where that does. For the tuner."""

    def __init__(self, choice: Choice | None) -> None:
        super().__init__(is_base=True)
        self.choice = choice

    def has(self, operator: str) -> bool:
        return self.choice is not None


class Asked:
    """The records in force where a plan was made, for one spec on one device; a plan keeps it for its updates."""

    def __init__(self, spec: AttentionSpec, device: torch.device, reserve: Reserve | None) -> None:
        self._spec, self._device, self._reserve = spec, device, reserve
        self.scope = records.current()
        self._on_cpu = device.type == "cpu"
        self._question: Question | None = None
        self.off = spec.batch_invariant or spec.block_sparse

    @property
    def strict(self) -> bool:
        """Whether what cannot serve is an error instead of a reason to take something else."""
        return isinstance(self.scope, Fixed) and self.scope.choice is not None

    def __call__(self, batch: Batch) -> Choice | None:
        """What a record names for this batch, if it is valid for it."""
        if self.off or not self.scope.has(OPERATOR):
            return None
        if isinstance(self.scope, Fixed):
            return self.scope.choice
        from flashloom.attention import tuning  # which knows every backend's configs

        if self._question is None:
            self._question = tuning.question(self._spec, self._device)
        facts = tuning.Facts.of(batch, self._reserve, self._device)
        choice = self.scope.find(self._question, facts.bucket(self._on_cpu))
        if choice is None or not tuning.valid(choice, self._spec, self._device, facts):
            return None
        return choice

    def of(self, backend: str) -> Callable[[Batch], Any]:
        """The same for one backend: its config, or None."""

        def tuned(batch: Batch) -> Any:
            choice = self(batch)
            return choice.config if choice is not None and choice.backend == backend else None

        tuned.trial = self.strict  # type: ignore[attr-defined]
        return tuned
