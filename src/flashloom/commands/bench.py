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


@bench.command()
@click.option("--causal", is_flag=True, help="Causal attention instead of full.")
@click.option("--rounds", type=click.IntRange(1), help="Interleaved rounds; 15 on a GPU and 3 on a CPU unless given.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="float16 on a GPU, else bfloat16.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The GPU where there is one, unless given.")
@click.option(
    "--shapes", default=3, show_default=True, type=click.IntRange(1, 3), help="Only the first so many shapes."
)
@click.option(
    "--output", default="benchmarks/results", show_default=True, type=click.Path(file_okay=False, path_type=Path)
)
def article(causal: bool, rounds: int | None, dtype: str | None, device: str | None, shapes: int, output: Path) -> None:
    """Time what articles on attention kernels show: (batch, tokens) of (1, 1024), (4, 2048) and (8, 4096), 32 heads of
    128, against naive PyTorch (the whole matrix of scores) and SDPA."""
    import torch

    from flashloom.bench.article import articles
    from flashloom.bench.report import Report

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    screen, rows = console(), []
    with screen.status("") as status:
        for one in articles(device, getattr(torch, dtype) if dtype else None, causal)[:shapes]:
            status.update(one.name)
            rows.append(one.row(rounds or (15 if device == "cuda" else 3)))
    report = Report(rows, title="three shapes against naive PyTorch")
    report.table(screen)
    for path in report.save(output, f"article_{device}{'_causal' if causal else ''}"):
        screen.print(f"wrote {path}", highlight=False, soft_wrap=True)
