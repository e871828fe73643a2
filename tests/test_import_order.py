"""Imports point one way, also those inside functions: variant <- lower <- store <- records <- kernel <- attention ...
<- integrations, cli.
"""

import ast
from pathlib import Path

import pytest

import flashloom

ROOT = Path(flashloom.__file__).parent
LAYERS = [
    {"dataclass", "errors", "forked", "settings", "target", "doctor"},
    {"variant"},
    {"lower"},
    {"store"},
    {"records"},
    {"kernel"},
    {"attention", "kv_cache", "dispatch"},
    {"tune", "bench", "monitor", "pack", "serving"},
    {"integrations", "compat", "cli", "commands", "testing", "demo", "__main__", "_public"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ALLOWED = {("variant/variant.py", "lower")}  # Variant.explain() shows what the lowerings write
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(path: Path) -> set[str]:
    """Names directly below flashloom that a module imports, except for type checking alone."""
    names: set[str] = set()
    package = ("flashloom", *path.relative_to(ROOT).parts[:-1])
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            full = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        names |= {name.split(".")[1] for name in full if name.startswith("flashloom.")}
    return names


def home(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert home(path) in RANK, f"give {home(path)} its place in LAYERS"
    rank = RANK[home(path)]
    place = str(path.relative_to(ROOT))
    wrong = {name for name in imported(path) if RANK.get(name, rank) > rank and (place, name) not in ALLOWED}
    assert not wrong, f"{place} imports {sorted(wrong)}, which are built on {home(path)}"
