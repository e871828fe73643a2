"""`flashloom tune`: tune a model's shapes on this machine, and look into what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flashloom.commands import Group, OutputFile, console, examples
from flashloom.commands.pack import DTYPES

CACHE = click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of the records; the user's own unless given."
)


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog=examples(
        "flashloom tune --model llama-3-8b --budget 5m",
        "flashloom tune --model config.json --phase decode --dry-run",
        "flashloom tune ls",
        "flashloom tune export tuned.json",
    ),
)
@click.option("--model", "models", multiple=True, help="A config.json or a known name; give it repeatedly.")
@click.option("--target", help="Such as sm90 or x86-amx: refuse to run on anything else.")
@click.option("--phase", type=click.Choice(["prefill", "decode", "append", "mixed"]), help="All of them unless given.")
@click.option("--page-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES[:3]), help="Of queries; the model's own unless given.")
@click.option("--kv-dtype", type=click.Choice(DTYPES), help="Of the cache; as the queries unless given.")
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, show_default=True)
@click.option("--budget", help='In all, such as "30s" or "5m"; the next call goes on.')
@click.option("--again", is_flag=True, help="Measure also what is known.")
@click.option("--isolate/--no-isolate", default=None, help="Try every candidate, or none, in a child process first.")
@click.option("--dry-run", is_flag=True, help="List the shapes, and what is known of them.")
@click.option("--output", "-o", type=OutputFile(), help="Write the report as JSON, also when it is interrupted.")
@CACHE
@click.pass_context
def tune(
    context: click.Context, models: tuple[str, ...], output: Path | None, cache: Path | None, **given: Any
) -> None:
    """Find the fastest configs for a model's shapes on this machine, and keep them for every process that looks there.

    A candidate wins only if its result is right and if it beats the default by more than the noise.
    """
    if context.invoked_subcommand is not None:
        if models:
            raise click.UsageError(f"--model tunes; leave it out with {context.invoked_subcommand}")
        return
    if not models:
        raise click.UsageError("give --model, or one of the commands " + ", ".join(tune.commands))

    import torch

    import flashloom as fl
    from flashloom import records
    from flashloom.target import Target
    from flashloom.tune.report import Report
    from flashloom.tune.tuner import Options, jobs_of, known, seconds_of

    here = Target.here().name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = "sm{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else None
    target = given["target"]
    if target is not None and target not in (here, gpu):
        raise click.ClickException(
            f"tuning measures on the machine at hand, which is {gpu or here}, not {target}; run it there and carry the "
            "records over with `flashloom tune export`"
        )
    if target == here:
        device = "cpu"
    if cache is not None and (problem := _no_folder(cache)):
        raise click.ClickException(f"--cache: {problem}")
    screen = console()
    report = Report()
    seconds_of(given["budget"])
    try:
        for model in models:
            work = list(_work(model, device, given))
            with fl.autotune(tune=False, cache=cache) as session:
                for attention, cases in work:
                    if given["dry_run"]:
                        for job in jobs_of(attention, cases):
                            found = known(job, session.scope, Options())
                            click.echo(f"{job.question.label}  {job.shapes[0]}: {'known' if found else 'to be tuned'}")
                        continue
                    done = fl.tune(
                        attention, cases, given["budget"], again=given["again"], isolate=given["isolate"], progress=None
                    )
                    screen.print(f"[bold]{model}[/bold]: {attention.variant}")
                    click.echo(done.table())
                    report.outcomes += done.outcomes
                    report.seconds += done.seconds
    finally:  # what is done is kept, whatever ended the rest
        if output is not None:
            output.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        if not given["dry_run"]:
            click.echo(f"records: {cache or records.default_root()}")


def _no_folder(place: Path) -> str | None:
    """Why records cannot lie there, or None; a folder that is not there yet will be made, one that cannot be written
    is read."""
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    return None if there.is_dir() else f"{there} is not a folder"


def _work(model: str, device: str, given: dict[str, Any]):
    """Attentions of a model's layers on the device, each with its workloads."""
    import torch

    import flashloom as fl
    from flashloom.bench.workloads import MODELS, decode, prefill, workloads
    from flashloom.serving import attentions, model_config

    dtype = getattr(torch, given["dtype"]) if given["dtype"] else None
    kv_dtype = getattr(torch, given["kv_dtype"]) if given["kv_dtype"] else None
    made = attentions(model_config(model), dtype=dtype, kv_dtype=kv_dtype, tensor_parallel=given["tensor_parallel"])
    for one in made:
        attention = fl.Attention(one.heads, variant=one.variant, dtype=one.dtype, kv_dtype=one.kv_dtype, device=device)
        if model in MODELS and given["tensor_parallel"] == 1:
            cases = workloads(model, given["phase"], page_size=given["page_size"])
        else:
            heads, size = one.heads, given["page_size"]
            found = [prefill(heads, s) for s in (1024, 2048, 4096)]
            found += [decode(heads, b, kv, size) for b in (1, 8, 32) for kv in (1024, 4096, 16384)]
            cases = [w for w in found if given["phase"] in (None, w.phase)]
        if device == "cpu":  # what takes minutes on one is left to those who ask for it through fl.tune
            cases = [w for w in cases if w.tokens * max(w.kv_lens) <= 1 << 22 and sum(w.kv_lens) <= 1 << 17]
        yield attention, cases


def _records(place: Path | None) -> list:
    from flashloom.records.bundle import read_any

    root = place or _root(None)
    if place is not None and not place.exists():
        raise click.ClickException(f"there is no {place}: name a folder of records, or a file that `export` wrote")
    return read_any(root)


def _root(cache: Path | None) -> Path:
    from flashloom import records

    root = cache or records.default_root()
    if root is None:
        raise click.ClickException("this user has no home folder; name the records with --cache")
    if problem := _no_folder(root):
        raise click.ClickException(problem)
    return root


def _short(record: Any) -> str:
    from flashloom.tune.report import short

    return short(record) if record.tuned else "default"


@tune.command(epilog=examples("flashloom tune ls", "flashloom tune ls --cache tuned"))
@CACHE
def ls(cache: Path | None) -> None:
    """List records: key, regret of the default, operator, shape, what won."""
    found = _records(cache)
    for one in sorted(found, key=lambda r: (r.machine, r.label, r.bucket)):
        more = "" if one.complete else "  (not finished)"
        shape = one.shapes[0] if one.shapes else str(dict(zip(one.sizes, one.bucket)))
        regret = f"{max(one.speedup - 1, 0):6.1%}"
        click.echo(f"{one.key.key[:12]} {regret}  {one.operator} {one.label}, {shape}: {_short(one)}{more}")
    tuned = sum(one.tuned for one in found)
    click.echo(f"{len(found)} records, {tuned} with another config than the default")


@tune.command(epilog=examples("flashloom tune verify"))
@CACHE
def verify(cache: Path | None) -> None:
    """Read every record; set aside those that are damaged or not of their key, and delete what dead writers left."""
    from flashloom import records
    from flashloom.records import Folder

    root = _root(cache)
    folder = Folder.at(root)
    whole = wrong = 0
    for path in list(folder.files()):
        try:
            folder.read_file(path)
            whole += 1
        except (records.Rejected, OSError) as error:
            wrong += 1
            folder.set_aside(path)
            click.echo(f"set aside: {path.name}: {error}")
    removed = folder.remove_old()
    click.echo(f"{root}: {whole} records whole, {wrong} set aside, {removed} old leftovers deleted")
    if wrong:
        raise SystemExit(1)


@tune.command(epilog=examples("flashloom tune export tuned.json"))
@click.argument("file", type=OutputFile())
@CACHE
def export(file: Path, cache: Path | None) -> None:
    """Write all records into one FILE."""
    from flashloom.records.bundle import to_bundle

    found = _records(cache)
    file.write_bytes(to_bundle(found))
    click.echo(f"{file}: {len(found)} records")


@tune.command("import", epilog=examples("flashloom tune import tuned.json"))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@CACHE
def import_(file: Path, cache: Path | None) -> None:
    """Take the records of a FILE that `export` wrote, over those of the same keys."""
    from flashloom.records import Folder

    found, root = _records(file), _root(cache)
    written = sum(Folder.at(root).publish(one) for one in found)
    click.echo(f"{root}: {written} of {len(found)} records written")
    if written < len(found):
        raise SystemExit(1)


@tune.command(epilog=examples("flashloom tune diff tuned.json other.json"))
@click.argument("one", type=click.Path(exists=True, path_type=Path))
@click.argument("other", type=click.Path(exists=True, path_type=Path))
def diff(one: Path, other: Path) -> None:
    """Compare two folders or exported files: keys that one of them lacks, and keys with other configs."""
    left, right = ({r.key.key: r for r in _records(place)} for place in (one, other))
    differ = 0
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key), right.get(key)
        if a is not None and b is not None and dict(a.config) == dict(b.config):
            continue
        differ += 1
        known = a or b
        name = f"{key[:12]}  {known.label}, {known.shapes[0] if known.shapes else known.bucket}"  # type: ignore[union-attr]
        said = [f"{place}: {'missing' if r is None else _short(r)}" for place, r in ((one, a), (other, b))]
        click.echo(f"{name}\n    {said[0]}\n    {said[1]}")
    click.echo(f"{len(left.keys() & right.keys())} keys in both, {differ} differ")
    if differ:
        raise SystemExit(1)
