"""`flashloom explain`: the generated source of a variant, built in or from a user's file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import click

from flashloom.commands import examples
from flashloom.commands.errors import in_file


def find_variant(name: str):
    """The variant called `name`: "causal", "softcap(50.0)" or "causal & sliding_window(255)" from flashloom, or
    "file.py:attribute" / "package.module:attribute" from elsewhere.

    Raises:
        click.BadParameter: when there is no such file, attribute or variant.
    """
    import flashloom as fl

    if name.endswith(".py"):
        variants = [f"{name}:{key}" for key, value in _load(name).items() if _is_variant(value)]
        hint = f"name one of its variants: {', '.join(variants)}" if variants else "it holds no variant"
        raise click.BadParameter(f"{name} is a file: {hint}. A variant is an instance, such as variant = Mine(...)")
    if ":" in name:
        where, _, attribute = name.rpartition(":")
        scope = _load(where)
        if attribute not in scope:
            names = [key for key, value in scope.items() if _is_variant(value)] or [k for k in scope if k[0] != "_"]
            raise click.BadParameter(f"{where} has no {attribute!r}; it has {', '.join(names) or 'nothing'}")
        found = scope[attribute]
    else:
        try:  # an expression typed by the user at their own prompt, over flashloom's public names
            found = eval(name, {"__builtins__": {}}, {k: getattr(fl, k) for k in fl.__all__})
        except Exception as error:
            message = error.msg if isinstance(error, SyntaxError) else str(error)
            near = difflib.get_close_matches(error.name or "", fl.__all__, 1) if isinstance(error, NameError) else ()
            message += f", did you mean {near[0]!r}?" if near else ""
            raise click.BadParameter(
                f"{name!r} is not a variant of flashloom: {message}; a variant of your own is FILE.py:NAME"
            ) from error
    if isinstance(found, type) and issubclass(found, fl.Variant):
        raise click.BadParameter(
            f"{name} is a class: name an instance, such as variant = {found.__name__}(...), with its fields"
        )
    if not _is_variant(found):
        raise click.BadParameter(
            f"{name!r} is {type(found).__name__}, not a variant (an instance of flashloom.Variant)"
        )
    return found


def _is_variant(value: Any) -> bool:
    import flashloom as fl

    return isinstance(value, fl.Variant)


def _load(where: str) -> dict[str, Any]:
    """The names of a file or module. Raises click.BadParameter for one that is not there, and click.ClickException for
    one that fails, with its line."""
    path = Path(where)
    if path.suffix == ".py":
        if not path.is_file():
            raise click.BadParameter(f"there is no file {where!r}")
        loader = SourceFileLoader(path.stem, str(path))
        spec = importlib.util.spec_from_loader(path.stem, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # dataclasses and annotations look their module up

        def load() -> Any:
            loader.exec_module(module)
            return module
    else:
        if not where or importlib.util.find_spec(where.partition(".")[0]) is None:
            raise click.BadParameter(f"there is no module {where!r}; a file's name ends in .py")

        def load() -> Any:
            return importlib.import_module(where)

    try:
        return vars(load())
    except (Exception, SystemExit) as error:
        raise click.ClickException(in_file(error, path)) from error


@click.command(
    epilog=examples(
        "flashloom explain causal",
        'flashloom explain "causal & softcap(50.0)" -l triton',
        "flashloom explain alibi.py:variant",
    )
)
@click.argument("variant", default="causal")
@click.option(
    "--language", "-l", type=click.Choice(["torch", "cpp", "triton", "gluon"]), default="cpp", show_default=True
)
def explain(variant: str, language: str) -> None:
    """Print the source that VARIANT compiles to: what is generated for its hooks, to stand within a kernel.

    VARIANT is an expression over flashloom's names, such as "causal & softcap(50.0)", or FILE.py:NAME. Which kernel
    serves a batch depends on the batch: print(plan.explain()) says it.
    """
    found = find_variant(variant)
    try:
        text = found.explain(language)
    except Exception as error:  # a hook of the user's that raises something of its own
        where = Path(variant.rpartition(":")[0])
        if where.suffix != ".py" or type(error).__module__.startswith("flashloom"):
            raise
        raise click.ClickException(in_file(error, where)) from error
    click.echo(text)
