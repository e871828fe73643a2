"""One module per subcommand of `flashloom`; each exports a click command or group and is listed in flashloom.cli."""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

DEVICE = click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The GPU where there is one, unless given.")


def console(*, stderr: bool = False) -> Console:
    """Where commands print: the terminal, or 140 columns where the output goes to a file or pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else 140, stderr=stderr)


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def device_of(given: str | None) -> str:
    """The device that an option names, or the GPU where there is one."""
    import torch

    there = torch.cuda.is_available()
    if given == "cuda" and not there:
        raise click.ClickException(
            "--device cuda: torch finds no GPU here. Leave --device out; `flashloom doctor` says what was found"
        )
    return given or ("cuda" if there else "cpu")


class Group(click.Group):
    """A group that says which command a misspelled one may have meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            known = self.list_commands(ctx)
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(known)}"
            raise click.UsageError(f"there is no command {name!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)


class OutputFile(click.Path):
    """A file to write, looked at before any work: its folder is there and takes files. replaced: it is written aside
    and renamed."""

    def __init__(self, *, allow_dash: bool = False, replaced: bool = False) -> None:
        super().__init__(dir_okay=False, writable=True, allow_dash=allow_dash, path_type=Path)
        self.replaced = replaced

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if str(path) == "-":
            return path
        path = path.resolve() if self.replaced else path  # a link stays, and what it leads to is replaced
        if path.exists() and not self.replaced:
            return path
        if path.exists() and not path.is_file():
            self.fail(f"{path} is not a plain file", param, ctx)
        if not path.parent.exists():
            self.fail(f"there is no folder {path.parent}: make it first", param, ctx)
        if problem := unwritable(path.parent):
            self.fail(problem, param, ctx)
        return path


class OutputFolder(click.Path):
    """A folder to write into, looked at before any work; it is made when it is needed."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if problem := unwritable(there):
            self.fail(problem, param, ctx)
        return path


def unwritable(folder: Path) -> str | None:
    """Why no file can be made in a folder, or None."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"no file can be written to {folder}: {error.strerror}"
