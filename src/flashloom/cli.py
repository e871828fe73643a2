"""The `flashloom` command. A subcommand's module is imported when that subcommand runs, so that `--help` is quick and
`flashloom doctor` works where torch, rich or flashloom itself cannot be imported."""

from __future__ import annotations

import importlib

import click

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
    "explain": (
        "flashloom.commands.explain:explain",
        "Print the source that a variant compiles to, and the kernel chosen.",
    ),
    "pack": ("flashloom.commands.pack:pack", "Build kernels ahead into one file for machines that compile nothing."),
    "tune": (
        "flashloom.commands.tune:tune",
        "Find the fastest configs for a model's shapes on this machine; keep them.",
    ),
    "store": ("flashloom.commands.store:store", "Look into the kernel store, check it, make room."),
    "bench": ("flashloom.commands.bench:bench", "Time kernels against PyTorch, interleaved; save JSON and a plot."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for, not before."""

    def __init__(self, *args, commands_at: dict[str, tuple[str, str]], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.commands_at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_at)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.commands_at:
            return None
        module, _, attribute = self.commands_at[name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.commands_at.items()])


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"flashloom {version('flashloom')}")
        except PackageNotFoundError:
            click.echo("flashloom (run from a source tree, not installed)")
        ctx.exit()


@click.group(cls=LazyGroup, commands_at=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version."
)
def main() -> None:
    """Attention kernels compiled from a few lines of torch code."""


if __name__ == "__main__":
    main()
