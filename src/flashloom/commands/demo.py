"""`flashloom demo`: the main job on real input."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from flashloom.commands import OutputFolder, console, examples


@click.command(epilog=examples("flashloom demo", "flashloom demo --rounds 5 -o /tmp/demo"))
@click.option("--output", "-o", default="flashloom-demo", show_default=True, type=OutputFolder())
@click.option("--full", is_flag=True, help="Time every row against compiled FlexAttention too (minutes longer).")
@click.option(
    "--rounds", default=15, show_default=True, type=click.IntRange(1), help="Interleaved rounds per timed row."
)
def demo(output: Path, full: bool, rounds: int) -> None:
    """Embed sentences, serve requests, time operators and draw variants, all on this machine.

    Takes under two minutes on two cores, compiling included. What a part lacks (a compiler, a package) is said and left
    out. Exits with 1 when a result differs from PyTorch's. Ctrl-C keeps what is done.
    """

    from flashloom.demo.run import Demo

    sys.exit(0 if Demo(output, console(), full, rounds).run() else 1)
