"""`flashloom doctor`: the report of flashloom.doctor as a command."""

from __future__ import annotations

import sys

import click

from flashloom import doctor as checks
from flashloom.commands import examples


@click.command(epilog=examples("flashloom doctor", "flashloom doctor --json > report.json"))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Tell what was found on this machine (CPU, compiler, OpenMP, GPU, cache, versions) and how to mend each problem.

    Exits with 1 when something needs mending before flashloom can compute.
    """
    sys.exit(checks.main(["--json"] if as_json else []))
