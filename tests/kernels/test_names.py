"""What Triton's front end gets wrong, and no interpreter shows."""

import ast
from pathlib import Path

import pytest

import flashloom

KERNELS = sorted(Path(flashloom.__file__).parent.glob("attention/kernels/*/*.py"))


def _renamed(node: ast.AST) -> set[tuple[str, str]]:
    """(a, b) for every `a = b`."""
    lines = [n for n in ast.walk(node) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Name)]
    return {(t.id, n.value.id) for n in lines for t in n.targets if isinstance(t, ast.Name)}


def _assigned(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def aliases_in_loops(text: str) -> list[str]:
    """Names `a` that begin as `a = b` before a loop in which a becomes b, and b something else."""
    found = []
    for function in ast.walk(ast.parse(text)):
        for body in (getattr(function, name, None) for name in ("body", "orelse")):
            other: dict[str, str] = {}
            for line in body if isinstance(body, list) else ():
                if isinstance(line, ast.For | ast.While):
                    inside = _assigned(line)
                    again = [(a, b) for a, b in other.items() if b in inside and (a, b) in _renamed(line)]
                    found += [f"line {line.lineno}: {a} is {b}" for a, b in again]
                for name in _assigned(line):
                    other = {a: b for a, b in other.items() if name not in (a, b)}
                if isinstance(line, ast.Assign):
                    other |= dict(_renamed(line))
    return found


def test_the_search_finds_one():
    assert aliases_in_loops("a = f()\nb = a\nfor i in range(3):\n    b = a\n    a = f()\n") == ["line 3: b is a"]
    assert not aliases_in_loops("b = a\na = f()\nfor i in range(3):\n    b = a\n    a = f()\n")


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_name_is_carried_through_a_loop_that_begins_as_another(path):
    """It would keep its first value: Triton takes it for one that the loop does not change."""
    assert not aliases_in_loops(path.read_text())
