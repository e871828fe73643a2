"""`flashloom explain`: the generated source of a variant, built in or from a user's file."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import click


def find_variant(name: str):
    """The variant called `name`: "causal", "softcap(50.0)" or "causal & sliding_window(255)" from flashloom, or
    "file.py:attribute" / "package.module:attribute" from elsewhere.

    Raises:
        click.BadParameter: when there is no such file, attribute or variant.
    """
    import flashloom as fl

    if ":" in name:
        where, _, attribute = name.rpartition(":")
        scope = vars(_load(where))
        if attribute not in scope:
            raise click.BadParameter(
                f"{where} has no attribute {attribute!r}; it has {sorted(k for k in scope if k[0] != '_')}"
            )
        found = scope[attribute]
    else:
        try:  # an expression typed by the user at their own prompt, over flashloom's public names
            found = eval(name, {"__builtins__": {}}, {k: getattr(fl, k) for k in fl.__all__})
        except Exception as error:
            raise click.BadParameter(f"{name!r} is not a variant of flashloom: {error}") from error
    if not hasattr(found, "explain"):
        raise click.BadParameter(
            f"{name!r} is {type(found).__name__}, not a variant (an instance of flashloom.Variant)"
        )
    return found


def _load(where: str):
    path = Path(where)
    if path.suffix != ".py":
        return importlib.import_module(where)
    if not path.is_file():
        raise click.BadParameter(f"there is no file {where!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@click.command()
@click.argument("variant", default="causal")
@click.option("--language", "-l", type=click.Choice(["torch", "cpp", "triton"]), default="cpp", show_default=True)
def explain(variant: str, language: str) -> None:
    """Print what VARIANT compiles to.

    VARIANT is an expression over flashloom's names, such as "causal & softcap(50.0)", or FILE.py:NAME.
    """
    click.echo(find_variant(variant).explain(language))
