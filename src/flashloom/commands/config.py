"""`flashloom config`: the settings in force."""

from __future__ import annotations

import json
from typing import Any

import click

from flashloom.commands import examples


@click.command(
    epilog=examples(
        "flashloom config", "FLASHLOOM_CACHE_SIZE=2G flashloom config cache_size", "flashloom config --json"
    )
)
@click.argument("names", nargs=-1, metavar="[SETTING]...")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def config(names: tuple[str, ...], as_json: bool) -> None:
    """Show the settings in force, and where each comes from: the default, or a variable of the environment.

    In a program, fl.configure(...) replaces either. In brackets stands what a setting that is left open comes to here.
    """
    from flashloom import settings

    found = settings.origins()
    for name in names:
        settings.check_name(name)
    names = tuple(settings.ALIASES.get(name, name) for name in names)
    shown = {name: found[name] for name in names} or found
    if as_json:
        content = {n: {"value": _plain(one.value), "origin": one.origin, "here": _here(n)} for n, one in shown.items()}
        click.echo(json.dumps(content, indent=1))
        return
    texts = {name: _text(name, one.value) for name, one in shown.items()}
    width, text_width = max(map(len, shown)), min(max(map(len, texts.values())), 60)
    for name, one in shown.items():
        click.echo(f"{name:{width}}  {texts[name]:{text_width}}  {one.origin}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _text(name: str, value: Any) -> str:
    if name in ("cache_size", "memory_pool_size") and value is not None:
        return _bytes(value)
    if value is None or value == ():
        here = _here(name)
        return f"({here})" if here else "-"
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _bytes(size: int) -> str:
    unit, letter = next(
        (u, x) for u, x in ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"), (1, "")) if size >= u
    )
    return f"{size / unit:g}{letter}" if size % unit == 0 else str(size)


def _here(name: str) -> str | None:
    """What a setting that may be left open comes to on this machine, or None."""
    if name == "cache_dir":
        from flashloom.doctor import cache_folder

        return str(cache_folder())
    if name == "target":
        from flashloom.target import Target

        return Target.here().name
    if name == "cxx":
        from flashloom.doctor import find_compilers

        return next((path for path, _ in find_compilers()), "no C++ compiler found")
    if name == "jobs":
        from flashloom.store.jobs import job_limit

        return str(job_limit())
    return {"threads": "as many as torch uses", "memory_pool_size": "no bound"}.get(name)
