"""`flashloom store`: look into the user's kernel store, check it, and make room."""

from __future__ import annotations

import time

import click


@click.group()
def store() -> None:
    """Look into the kernel store, check it, make room."""


def _folder():
    from flashloom.store import default_folder

    try:
        return default_folder()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None


def _manifests():
    from flashloom.store.evict import manifests

    return list(manifests(_folder()))


@store.command()
def ls() -> None:
    """List kernels: key, size, time since last use, target, name."""
    from flashloom.store import evict

    folder = _folder()
    used = {item.key.key: item for item in evict.usage(folder)}
    for found in _manifests():
        item = used.get(found["key"])
        if item is not None:
            days = (time.time() - item.used) / 86400
            target = found["fields"].get("target", "")
            click.echo(f"{found['key'][:12]}  {item.bytes:>9,}  {days:6.1f} d  {target:<10}  {found['label']}")
    click.echo(f"{folder.root}: {len(used)} kernels, {sum(item.bytes for item in used.values()) / 1e6:.2f} MB")


@store.command()
def verify() -> None:
    """Read every kernel and compare it with its digest; set aside those that are damaged."""
    from flashloom.store import Corrupt, Refused

    folder = _folder()
    whole = damaged = 0
    for key in list(folder.all_keys()):
        try:
            whole += folder.read(key) is not None
        except Refused as error:
            raise click.ClickException(str(error.strerror)) from None
        except Corrupt as error:
            damaged += 1
            folder.set_aside(key)
            click.echo(f"damaged, set aside: {error}")
    click.echo(f"{folder.root}: {whole} kernels whole, {damaged} damaged")
    if damaged:
        raise SystemExit(1)


@store.command()
@click.option("--size", help="What the store may hold, such as 500M; FLASHLOOM_CACHE_SIZE unless given.")
def prune(size: str | None) -> None:
    """Remove the least recently used kernels beyond the size, and what dead processes left."""
    from flashloom import settings
    from flashloom.store import evict

    try:
        limit = (settings.configure(cache_size=size) if size else settings.get()).cache_size
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    removed = evict.prune(_folder(), limit)
    click.echo(f"removed {len(removed)} kernels, {sum(item.bytes for item in removed) / 1e6:.2f} MB")


@store.command()
def clear() -> None:
    """Remove all kernels."""
    from flashloom.store import evict

    folder = _folder()
    folder.remove_old(seconds=0)
    click.echo(f"{folder.root}: removed {len(evict.prune(folder, 0))} kernels")


@store.command("why-miss")
@click.argument("name", default="")
def why_miss(name: str) -> None:
    """Say of each kernel whose name or key holds NAME what differed from the nearest one when it had to be built."""
    found = [item for item in _manifests() if name in item["label"] or item["key"].startswith(name)]
    if not found:
        raise click.ClickException(f"no kernel's name holds {name!r}; `flashloom store ls` lists them")
    for item in found:
        click.echo(f"{item['key'][:12]}  {item['label']}, built in {item['seconds']:.2f} s\n    {item['missed']}")
