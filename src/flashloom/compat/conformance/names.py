"""`python -m flashloom.compat.conformance.names SOURCE`: the public names of FlashInfer, from the folder of its package
(nothing of it is imported), as the table of names that flashloom refuses by name.

Public are names that FlashInfer decorates as its API, wherever they are, and those that the package and its packages
offer. A line of the table is a module and its names: `name` for a function or, with a capital letter first, a class;
`Name()` and `name()` where that is the other way round; `Name!` an exception; `Name{A=1,B=2}` an enumeration;
`NAME=value` a constant."""

from __future__ import annotations

import argparse
import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

DECORATOR = "flashinfer_api"
#: Packages of FlashInfer's own machinery: only what is decorated in them is public.
INNER = {"aot", "cute_dsl", "cutile", "data", "experimental", "gdn_kernels", "jit", "kda_kernels", "megamoe",
         "prims_ts", "triton", "tuning_configs"}  # fmt: skip
#: Modules without decorated names whose functions programs call.
OPEN = ("api_logging", "compilation_context", "fi_trace", "green_ctx", "tllm_enums")
BUILDS = ("__new__", "__init__", "_missing_", "_generate_next_value_")
ENUMS = {"Enum", "IntEnum", "IntFlag", "Flag", "StrEnum"}


@dataclass
class Module:
    """What a file binds at its top."""

    name: str
    package: bool
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (module, name there)
    stars: list[str] = field(default_factory=list)
    listed: list[str] | None = None  # __all__
    lazy: list[str] = field(default_factory=list)


class Source:
    """A package's files, parsed when they are asked for."""

    def __init__(self, root: Path):
        self.root = root
        self.module = cache(self._module)

    def path(self, name: str) -> Path | None:
        base = self.root.joinpath(*name.split(".")) if name else self.root
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
        return None

    def _module(self, name: str) -> Module:
        path = self.path(name)
        assert path is not None, name
        module = Module(name, path.name == "__init__.py")
        for node in _statements(ast.parse(path.read_text())):
            self._take(module, node)
        return module

    def _take(self, module: Module, node: ast.stmt) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            module.defined[node.name] = node
            if node.name == "__getattr__":
                module.lazy += [name for x in ast.walk(node) if isinstance(x, ast.Compare) for name in _strings(x)]
        elif isinstance(node, ast.ImportFrom):
            origin = self._origin(module, node)
            for alias in node.names:
                if origin is None:
                    break
                if alias.name == "*":
                    module.stars.append(origin)
                else:
                    module.imported[alias.asname or alias.name] = origin, alias.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if not isinstance(target, ast.Name) or node.value is None:
                    continue
                if target.id == "__all__":
                    module.listed = [*(module.listed or []), *_strings(node.value)]
                elif target.id.endswith("_LAZY_EXPORTS"):
                    module.lazy += _strings(node.value)
                else:
                    module.defined.setdefault(target.id, node)

    def _origin(self, module: Module, node: ast.ImportFrom) -> str | None:
        """The module that an import is from, below the package; None for others."""
        if node.level == 0:
            first, _, rest = (node.module or "").partition(".")
            return rest if first == "flashinfer" else None
        parts = module.name.split(".") if module.name else []
        parts = parts[: len(parts) - (node.level - module.package)]
        return ".".join([*parts, *filter(None, [node.module])])

    def offers(self, name: str) -> set[str]:
        """The names that a module offers to `from module import *`, or would."""
        module = self.module(name)
        if module.listed:
            return set(module.listed) | set(module.lazy)
        found = (set(module.imported) if module.package else set()) | set(module.lazy)
        found |= {n for n, node in module.defined.items() if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for star in module.stars:
            own = star.partition(".")[0]  # of what a file imports, only what is of its own package
            found |= self.offers(star)
            found |= {n for n, (origin, _) in self.module(star).imported.items() if origin.partition(".")[0] == own}
        return {n for n in found if not self._is_module(name, n)}

    def _is_module(self, module: str, name: str) -> bool:
        origin, there = self.module(module).imported.get(name, (module, name))
        if self.path(origin) is not None and there in self.module(origin).defined:
            return False
        return self.path(f"{origin}.{there}".strip(".")) is not None

    def definition(self, module: str, name: str, depth: int = 0) -> tuple[str, str, ast.stmt] | None:
        """Where a name comes from in the end: a module, its name there, and the statement."""
        if self.path(module) is None or depth > 8:
            return None
        found = self.module(module)
        if name in found.defined:
            return module, name, found.defined[name]
        if name in found.imported:
            return self.definition(*found.imported[name], depth + 1)
        return next(filter(None, (self.definition(star, name, depth + 1) for star in found.stars)), None)


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """What runs at import, conditions and attempts included."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            waiting += [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            waiting += [line for handler in getattr(node, "handlers", []) for line in handler.body]


def _strings(node: ast.expr) -> list[str]:
    return [x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)]


def _decorated(node: ast.stmt) -> bool:
    if isinstance(node, ast.ClassDef):
        return any(map(_decorated, node.body)) or any(DECORATOR in ast.unparse(x) for x in node.decorator_list)
    return isinstance(node, ast.FunctionDef) and any(DECORATOR in ast.unparse(x) for x in node.decorator_list)


def collect(root: Path) -> dict[str, set[str]]:
    """Module -> its public names; the package itself is ""."""
    source, found = Source(root), {"": Source(root).offers("")}
    packages = {p.parent.name for p in root.glob("*/__init__.py")}
    for name in sorted({*packages, *OPEN}):
        if (
            source.path(name) is not None
            and name not in INNER
            and not name.startswith("_")
            and not name.endswith("_backend")
        ):
            found[name] = source.offers(name)
    for path in sorted(root.rglob("*.py")):
        if DECORATOR not in path.read_text():
            continue
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for defined, node in source.module(name).defined.items():
            if _decorated(node):
                found.setdefault(name, set()).add(defined)
    for module, names in list(found.items()):
        for name in names:  # also where it is defined: programs import it from there
            origin = source.definition(module, name)
            if origin is not None and not any(part.startswith("_") for part in origin[0].split(".")):
                found.setdefault(origin[0], set()).add(origin[1])
    return {name: {n for n in names if n.isidentifier() and n[0] != "_"} for name, names in found.items()}


def entry(source: Source, module: str, name: str) -> str:
    """A name as the table writes it."""
    found = source.definition(module, name)
    node = None if found is None else found[2]
    upper = name[0].isupper()
    if isinstance(node, ast.ClassDef):
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        members = _members(node) if bases & ENUMS or bases <= {"object"} else None
        if members:
            return f"{name}{{{','.join(members)}}}"
        if any(base.endswith(("Error", "Exception", "Warning")) for base in bases):
            return f"{name}!"
        return name if upper else f"{name}()"
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        try:
            value = ast.literal_eval(node.value)  # type: ignore[arg-type]
        except (ValueError, TypeError):
            return name
        return f"{name}={value}" if isinstance(value, (int, float)) else name
    return f"{name}()" if upper and isinstance(node, ast.FunctionDef) else name


def _members(node: ast.ClassDef) -> list[str] | None:
    """An enumeration's members with their values; None where code computes those."""
    found: list[str] = []
    if any(isinstance(line, ast.FunctionDef) and line.name in BUILDS for line in node.body):
        return None
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            if isinstance(line.value, ast.Call) and ast.unparse(line.value) in ("auto()", "enum.auto()"):
                value: object = len(found) + 1
            else:
                try:
                    value = ast.literal_eval(line.value)
                except ValueError:
                    return None
            value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            if not isinstance(value, (int, str)):
                return None
            found.append(f"{line.targets[0].id}={value}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flashloom.compat.conformance.names", description=__doc__)
    parser.add_argument("source", type=Path, help="folder of FlashInfer's package")
    root = parser.parse_args().source
    if not (root / "__init__.py").is_file():
        raise SystemExit(f"{root} is no package: give the folder that holds FlashInfer's __init__.py")
    source = Source(root)
    for module, names in sorted(collect(root).items()):
        line = f"{module or '.'}: {' '.join(entry(source, module, name) for name in sorted(names))}"
        if names:
            print(textwrap.fill(line, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    main()
