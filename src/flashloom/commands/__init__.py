"""One module per subcommand of `flashloom`; each exports a click command or group and is listed in flashloom.cli."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Where commands print: the terminal, or 140 columns where the output goes to a file or pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)
