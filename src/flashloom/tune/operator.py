"""What the tuner asks of an operator: candidates, validity, inputs, run, and whether a result is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from flashloom.records import Question

__all__ = ["Config", "Operator"]


#: One way to compute something: hashable, with `to_json()` that answers the named parameters from which the question's
#: `read` makes the same config.
Config: TypeAlias = Any


@runtime_checkable
class Operator(Protocol):
    """An operator as the tuner sees it. A case is whatever the operator plans for: a batch, a shape."""

    device: torch.device

    def question(self, case: Any) -> tuple[Question, tuple[int, ...]]:
        """What is asked of the records, and the bucket of this case: the same that is looked up in use."""

    def describe(self, case: Any) -> str:
        """A case in a few words."""

    def default(self, case: Any) -> Config:
        """What serves without a record."""

    def candidates(self, case: Any, default: Config) -> Sequence[Config]:
        """What is worth trying beside the default, the likeliest first."""

    def valid(self, config: Config, case: Any) -> bool:
        """Whether a config can serve this case. Asked of every case of a bucket."""

    def dangerous(self, config: Config) -> bool:
        """Whether trying it can end the process or spoil its device: then a child process tries it first."""

    def inputs(self, case: Any) -> Any:
        """Synthetic inputs of a case, with results of their own; nothing of a user's is read or written. Answers the
        same question as the case itself."""

    def run(self, config: Config, case: Any, inputs: Any) -> Callable[[], object]:
        """A call that computes the case into the results of `inputs`; building and planning are done here."""

    def check(self, case: Any, inputs: Any) -> str | None:
        """What is wrong with the results now in `inputs`, by the reference, or None."""

    def prepare(self, configs: Iterable[Config], case: Any) -> None:
        """Compile what these configs need, side by side; a config that cannot be compiled is left out."""
