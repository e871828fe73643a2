"""`flashloom store`: look into the user's kernel store, check it, and make room."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from flashloom.commands import Group, examples


@click.group(
    cls=Group,
    epilog=examples(
        "flashloom store ls",
        "flashloom store why-miss decode",
        "flashloom store prune --size 500M",
        "flashloom store dir",
    ),
)
def store() -> None:
    """Look into the kernel store, check it, make room."""


def _folder():
    from flashloom.store import default_folder

    folder = default_folder()
    if folder.root.exists() and not folder.root.is_dir():
        raise click.ClickException(
            f"the kernel store {folder.root} is a file, not a folder: remove it, or set FLASHLOOM_CACHE_DIR"
        )
    return folder


def _listed() -> list[dict[str, Any]]:
    """The manifests of all kernels, with their size and time of last use, by name."""
    from flashloom.store import evict

    folder = _folder()
    used = {item.key.key: item for item in evict.usage(folder)}
    found = [
        {**one, "bytes": used[one["key"]].bytes, "used": used[one["key"]].used}
        for one in evict.manifests(folder)
        if one["key"] in used
    ]
    return sorted(found, key=lambda one: (one["fields"].get("target", ""), one["label"], one["key"]))


@store.command("dir", epilog=examples("du -sh $(flashloom store dir)"))
def dir_() -> None:
    """Print the store's folder."""
    click.echo(_folder().root)


@store.command(epilog=examples("flashloom store ls", "flashloom store ls softcap", "flashloom store ls --json"))
@click.argument("name", default="")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON, with the fields that identify them.")
def ls(name: str, as_json: bool) -> None:
    """List kernels whose name or key holds NAME, or all: key, size, time since last use, target, name.

    A name says variant, heads (query/kv, or the number of query heads for each kv head, x width), dtypes and phase.
    """
    found = [one for one in _listed() if _named(one, name)]
    if as_json:
        kept = ("key", "label", "about", "fields", "toolchain", "seconds", "missed", "bytes", "used")
        click.echo(json.dumps([{topic: one.get(topic) for topic in kept} for one in found], indent=1))
        return
    for one in found:
        days, target = (time.time() - one["used"]) / 86400, one["fields"].get("target", "")
        click.echo(f"{one['key'][:12]}  {one['bytes']:>9,}  {days:6.1f} d  {target:<10}  {one['label']}")
    click.echo(f"{_folder().root}: {len(found)} kernels, {sum(one['bytes'] for one in found) / 1e6:.2f} MB")


def _named(one: dict[str, Any], name: str) -> bool:
    return name in one["label"] or one["key"].startswith(name)


@store.command(epilog=examples("flashloom store verify"))
def verify() -> None:
    """Read every kernel and compare it with its digest; set aside those that are damaged."""
    from flashloom.store import Corrupt

    folder = _folder()
    whole = damaged = 0
    for key in list(folder.all_keys()):
        try:
            whole += folder.read(key) is not None
        except Corrupt as error:
            damaged += 1
            folder.set_aside(key)
            click.echo(f"damaged, set aside: {error}")
    click.echo(f"{folder.root}: {whole} kernels whole, {damaged} damaged")
    if damaged:
        raise SystemExit(1)


class Size(click.ParamType):
    """Bytes, such as 500M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from flashloom import settings

        try:
            return settings.parse_bytes(str(value))
        except ValueError as error:
            self.fail(f"{value!r} cannot be read: {error}", param, ctx)


@store.command(epilog=examples("flashloom store prune", "flashloom store prune --size 500M"))
@click.option("--size", type=Size(), help="What the store may hold, such as 500M; FLASHLOOM_CACHE_SIZE unless given.")
def prune(size: int | None) -> None:
    """Remove the least recently used kernels beyond the size, and what dead processes left."""
    from flashloom import settings
    from flashloom.store import evict

    removed = evict.prune(_folder(), settings.get().cache_size if size is None else size)
    click.echo(f"removed {len(removed)} kernels, {sum(item.bytes for item in removed) / 1e6:.2f} MB")


@store.command(epilog=examples("flashloom store clear"))
def clear() -> None:
    """Remove all kernels."""
    from flashloom.store import evict

    folder = _folder()
    folder.remove_old(seconds=0)
    removed = evict.prune(folder, 0)
    left = len(list(folder.all_keys()))
    click.echo(f"{folder.root}: removed {len(removed)} kernels" + (f", {left} could not be removed" if left else ""))
    if left:
        raise SystemExit(1)


@store.command("why-miss", epilog=examples("flashloom store why-miss decode", 'flashloom store why-miss "& softcap"'))
@click.argument("name", default="")
def why_miss(name: str) -> None:
    """Say of each kernel whose name or key holds NAME what differed from the nearest one when it had to be built."""
    every = _listed()
    found = [one for one in every if _named(one, name)]
    if not found:
        raise click.ClickException(
            f"no kernel's name holds {name!r}; `flashloom store ls` lists the {len(every)} kernels of {_folder().root}"
        )
    for one in found:
        target = one["fields"].get("target", "")
        click.echo(f"{one['key'][:12]}  {one['label']}, {target}, built in {one['seconds']:.2f} s\n    {one['missed']}")
