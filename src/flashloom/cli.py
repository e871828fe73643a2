"""The `flashloom` command. A subcommand's module is imported when that subcommand runs, so that `--help` is quick and
`flashloom doctor` works where torch, rich or flashloom itself cannot be imported."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from flashloom.commands import Group, examples
from flashloom.commands.errors import sentence

# name -> (module:attribute of a click command or group, one line for `flashloom --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "flashloom.commands.demo:demo",
        "Run the main job on real input: embeddings, generation, speed, pictures.",
    ),
    "doctor": (
        "flashloom.commands.doctor:doctor",
        "Tell what was found on this machine and what to do about each problem.",
    ),
    "config": ("flashloom.commands.config:config", "Show the settings in force, and where each comes from."),
    "explain": ("flashloom.commands.explain:explain", "Print the source that a variant compiles to."),
    "pack": ("flashloom.commands.pack:pack", "Build kernels ahead into one file for machines that compile nothing."),
    "tune": (
        "flashloom.commands.tune:tune",
        "Find the fastest configs for a model's shapes on this machine; keep them.",
    ),
    "store": ("flashloom.commands.store:store", "Look into the kernel store, check it, make room."),
    "bench": ("flashloom.commands.bench:bench", "Time kernels against PyTorch, interleaved in one process."),
}


class Program(Group):
    """The command as a whole: it imports a command's module when that is asked for, and no exception leaves it as a
    traceback unless that is asked for as well."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click has an answer to these
        except Exception as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(sentence(error)) from error

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                if sys.stdout is not None:  # what was not flushed meets a closed pipe here, not as Python ends
                    sys.stdout.flush()
        except OSError as error:
            # nobody reads on, or there is no room: what is left goes nowhere, or Python would try again as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
            sys.exit(1)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"flashloom {version('flashloom')}")
        except PackageNotFoundError:
            click.echo("flashloom (run from a source tree, not installed)")
        ctx.exit()


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("flashloom doctor", "flashloom demo", "flashloom store ls", "flashloom bench --help"),
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version."
)
@click.option("--debug", is_flag=True, envvar="FLASHLOOM_DEBUG", help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Attention kernels compiled from a few lines of torch code."""


if __name__ == "__main__":
    main()
