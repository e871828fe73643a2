"""`flashloom pack`: build kernels ahead into one file, and look into such a file."""

from __future__ import annotations

from pathlib import Path

import click

from flashloom.commands import Group, OutputFile, examples

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]


@click.group(
    cls=Group,
    epilog=examples(
        "flashloom pack build --target sm90 --target x86-avx512 --model llama-3-8b -o llama.loom",
        "flashloom pack verify llama.loom",
        "flashloom pack ls llama.loom",
    ),
)
def pack() -> None:
    """Build, check and list packs: files of kernels for machines that compile nothing."""


@pack.command(
    epilog=examples(
        "flashloom pack build --target sm90 --model llama-3-8b -o llama.loom",
        "flashloom pack build --target x86-amx --model config.json --kv-dtype float8_e4m3fn -o own.loom",
    )
)
@click.option("--target", "targets", multiple=True, required=True, help="Such as sm90 or x86-amx; give it repeatedly.")
@click.option("--model", "models", multiple=True, required=True, help="A config.json or a known name; repeatable.")
@click.option(
    "--output", "-o", type=OutputFile(replaced=True), required=True, help="The pack; replaced if it is there."
)
@click.option("--page-size", "page_sizes", multiple=True, type=click.IntRange(1), default=(16,), show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES[:3]), help="Of queries; the model's own unless given.")
@click.option("--kv-dtype", type=click.Choice(DTYPES), help="Of the cache; as the queries unless given.")
@click.option(
    "--tensor-parallel", type=click.IntRange(1), default=1, show_default=True, help="Ranks a layer is split over."
)
@click.option("--jobs", "-j", type=click.IntRange(1), help="Kernels built at a time.")
def build(
    targets: tuple[str, ...],
    models: tuple[str, ...],
    output: Path,
    page_sizes: tuple[int, ...],
    dtype: str | None,
    kv_dtype: str | None,
    tensor_parallel: int,
    jobs: int | None,
) -> None:
    """Build all kernels that serving a model needs: prefill, append, decode and mixed steps, paged and ragged.

    No GPU is needed to build for one.
    """
    import time

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from flashloom.pack import Pack
    from flashloom.serving import attentions, model_config, steps

    start = time.monotonic()
    made = Pack(targets)
    for model in models:
        for attention in attentions(
            model_config(model),
            dtype=getattr(torch, dtype) if dtype else None,
            kv_dtype=getattr(torch, kv_dtype) if kv_dtype else None,
            tensor_parallel=tensor_parallel,
        ):
            for page_size in (*page_sizes, None):
                made.add(attention, steps(attention.heads, page_size))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("building", total=len(made))
        try:
            built = made.build(output, jobs=jobs, progress=lambda done, total, name: bar.update(task, completed=done))
        except KeyboardInterrupt:
            bar.console.print("What was built is kept in the store: the same command goes on from there.")
            raise
    click.echo(f"{output}: {len(built.entries)} kernels, {built.size / 1e6:.2f} MB, {time.monotonic() - start:.1f} s")


@pack.command(epilog=examples("flashloom pack verify llama.loom"))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def verify(file: Path) -> None:
    """Read every kernel of a pack and compare it with its digest."""
    from flashloom.store import PackFile

    count = sum(1 for _ in PackFile(file).read_all())
    click.echo(f"{file}: {count} kernels, all whole")


@pack.command(epilog=examples("flashloom pack ls llama.loom"))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def ls(file: Path) -> None:
    """List a pack's kernels: key, size, target, name."""
    from flashloom.store import PackFile

    opened = PackFile(file)
    for listed in opened.entries:
        size = sum(item["size"] for item in listed["files"].values())
        click.echo(f"{listed['key'][:12]}  {size:>9,}  {listed['fields'].get('target', ''):<10}  {listed['label']}")
    click.echo(f"{len(opened.entries)} kernels, {opened.size / 1e6:.2f} MB")
