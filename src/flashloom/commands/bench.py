"""`flashloom bench`: timings against PyTorch, printed as a table, and as JSON and a plot for those who ask."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flashloom.commands import DEVICE, Group, OutputFile, OutputFolder, console, device_of, examples

if TYPE_CHECKING:
    from flashloom.bench.suites import Task

SUITES = ("prefill", "decode", "variants", "dtypes", "overhead", "compile", "minilm")
OUTPUT = click.option(
    "--output", "-o", type=OutputFolder(), help="Folder for JSON and a plot; only the screen unless given."
)
JSON = click.option(
    "--json", "as_json", type=OutputFile(allow_dash=True), help="Write JSON to a file, or - for stdout."
)


@click.group(
    cls=Group,
    epilog=examples("flashloom bench attention decode", "flashloom bench article --shapes 1"),
)
def bench() -> None:
    """Time kernels against PyTorch, interleaved in one process.

    Ctrl-C ends a run early; the rows that are done are printed and written all the same.
    """


@bench.command(
    epilog=examples(
        "flashloom bench attention",
        "flashloom bench attention decode --rounds 5",
        "flashloom bench attention prefill --output results",
        "flashloom bench attention overhead --json - > overhead.json",
    )
)
@click.argument("suites", nargs=-1, type=click.Choice([*SUITES, "all"]))
@click.option("--full", is_flag=True, help="All shapes of each suite, and FlexAttention in every row that it can run.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Interleaved rounds per row.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch and flashloom; torch's choice unless given.")
@DEVICE
@OUTPUT
@JSON
@click.option("--name", help="Name of the files written; the suites' names unless given.")
def attention(
    suites: tuple[str, ...],
    full: bool,
    rounds: int,
    threads: int | None,
    device: str | None,
    output: Path | None,
    as_json: Path | None,
    name: str | None,
) -> None:
    """Time attention: SUITES are prefill and decode unless given.

    The peers are torch's SDPA on contiguous tensors, for decode softmax(q @ k^T) @ v with the query heads of a group as
    rows, and FlexAttention compiled. Medians are of interleaved rounds; errors are against float64.
    """
    device = device_of(device)
    import torch

    from flashloom.bench.suites import Task, tasks
    from flashloom.demo.minilm import LENGTHS, find_weights, speed_rows

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = SUITES if "all" in suites else tuple(dict.fromkeys(suites)) or ("prefill", "decode")
    work = tasks([name for name in chosen if name != "minilm"], full=full, rounds=rounds, device=device)
    if "minilm" in chosen:
        find_weights()  # that they are there is known before minutes of work
        work += [Task(f"minilm: {n} tokens", partial(speed_rows, n, rounds)) for n in LENGTHS]
    name = name or "attention-" + "-".join(chosen if len(chosen) < len(SUITES) else ("all",))
    _measure(work, "attention", output, name, as_json)


@bench.command(
    epilog=examples("flashloom bench article", "flashloom bench article --causal --shapes 2 --output results")
)
@click.option("--causal", is_flag=True, help="Causal attention instead of full.")
@click.option("--rounds", type=click.IntRange(1), help="Interleaved rounds; 15 on a GPU and 3 on a CPU unless given.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="float16 on a GPU, else bfloat16.")
@DEVICE
@click.option(
    "--shapes", default=3, show_default=True, type=click.IntRange(1, 3), help="Only the first so many shapes."
)
@OUTPUT
@JSON
def article(
    causal: bool,
    rounds: int | None,
    dtype: str | None,
    device: str | None,
    shapes: int,
    output: Path | None,
    as_json: Path | None,
) -> None:
    """Time what articles on attention kernels show: (batch, tokens) of (1, 1024), (4, 2048) and (8, 4096), 32 heads of
    128, against naive PyTorch (the whole matrix of scores) and SDPA."""
    device = device_of(device)
    import torch

    from flashloom.bench.article import Article, articles
    from flashloom.bench.suites import Task

    asked = articles(device, getattr(torch, dtype) if dtype else None, causal)[:shapes]
    count = rounds or (15 if device == "cuda" else 3)

    def task(one: Article) -> Task:
        return Task(one.name, lambda: [one.row(count)])

    name = f"article_{device}{'_causal' if causal else ''}"
    _measure([task(one) for one in asked], "three shapes against naive PyTorch", output, name, as_json)


def _measure(work: list[Task], title: str, output: Path | None, name: str, as_json: Path | None) -> None:
    """Run tasks and report their rows; those that are done also where a later one fails or Ctrl-C ends them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from flashloom.bench.machine import Load
    from flashloom.bench.report import Report, Row

    rows: list[Row] = []
    screen = console(stderr=str(as_json) == "-")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    since = Load.now()
    try:
        with Progress(*columns, console=screen) as progress:
            bar = progress.add_task("", total=len(work))
            for task in work:
                progress.update(bar, description=task.title)
                rows += task.run()
                progress.advance(bar)
    except BaseException:
        screen.print(f"Ended early: these rows were done ({len(rows)})." if rows else "Ended before a row was done.")
        raise
    finally:
        if rows:
            report = Report(rows, title=title, others=since.others(Load.now()) if since else None)
            report.table(screen)
            written = report.save(output, name) if output else []
            if as_json is not None and str(as_json) == "-":
                click.echo(report.to_json(), nl=False)
            elif as_json is not None:
                as_json.write_text(report.to_json())
                written.append(as_json)
            for path in written:
                screen.print(f"wrote {path}", highlight=False, soft_wrap=True)
