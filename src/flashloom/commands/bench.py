"""`flashloom bench`: timings against PyTorch, printed as a table and saved as JSON and a plot."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from flashloom.commands import console

SUITES = ("prefill", "decode", "variants", "dtypes", "overhead", "compile", "minilm")


@click.group()
def bench() -> None:
    """Time kernels against PyTorch, interleaved in one process."""


@bench.command()
@click.argument("suites", nargs=-1, type=click.Choice([*SUITES, "all"]))
@click.option("--full", is_flag=True, help="All shapes of each suite, and FlexAttention in every row that it can run.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Interleaved rounds per row.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and flashloom; torch's choice unless given.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The GPU where there is one, unless given.")
@click.option(
    "--output", default="benchmarks/results", show_default=True, type=click.Path(file_okay=False, path_type=Path)
)
@click.option("--name", help="Name of the files written; the suites' names unless given.")
def attention(
    suites: tuple[str, ...],
    full: bool,
    rounds: int,
    threads: int | None,
    device: str | None,
    output: Path,
    name: str | None,
) -> None:
    """Time attention: SUITES are prefill and decode unless given.

    The peers are torch's SDPA on contiguous tensors, for decode softmax(q @ k^T) @ v with the query heads of a group as
    rows, and FlexAttention compiled. Medians are of interleaved rounds; errors are against float64.
    """
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from flashloom.bench.report import Report
    from flashloom.bench.suites import Task, tasks
    from flashloom.demo.minilm import LENGTHS, speed_rows

    if threads is not None:
        torch.set_num_threads(threads)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = SUITES if "all" in suites else suites or ("prefill", "decode")
    screen, rows = console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    work = tasks([name for name in chosen if name != "minilm"], full=full, rounds=rounds, device=device)
    if "minilm" in chosen:
        work += [Task(f"minilm: {n} tokens", partial(speed_rows, n, rounds)) for n in LENGTHS]
    with Progress(*columns, console=screen) as progress:
        bar = progress.add_task("", total=len(work))
        for task in work:
            progress.update(bar, description=task.title)
            rows += task.run()
            progress.advance(bar)
    report = Report(rows)
    report.table(screen)
    for path in report.save(output, name or "attention-" + "-".join(chosen if len(chosen) < len(SUITES) else ("all",))):
        screen.print(f"wrote {path}", highlight=False, soft_wrap=True)
