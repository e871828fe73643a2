"""The bar on stderr while tuning."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Keys done of all, and what is being tried; nothing at all where it is not shown (by default off a terminal)."""

    def __init__(self, shown: bool | None, total: int) -> None:
        self._bar: Any = None
        self._total = total
        self._shown = sys.stderr.isatty() if shown is None else shown

    def __enter__(self) -> Progress:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
            from rich.progress import TimeElapsedColumn as Elapsed

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("tuning", total=self._total)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, job: Any, what: str) -> None:
        """What is going on for a key."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{job.shapes[0]}: {what}")

    def tick(self) -> None:
        """Something went on."""
        if self._bar is not None:
            self._bar.refresh()

    def done(self, job: Any, status: str) -> None:
        """A key is done."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=f"{job.shapes[0]}: {status}")
