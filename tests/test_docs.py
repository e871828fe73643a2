"""The documentation does what it says: its Python runs, the gallery is what its script writes, links lead somewhere."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import flashloom

ROOT = Path(flashloom.__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def load(name, path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses and variants look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md", "docs/batches.md"])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    # a variant's source is read from its file, as it is for a user's
    found = blocks(ROOT / name)
    assert found
    path = tmp_path / "blocks.py"
    path.write_text("\n".join(found))
    load("blocks", path, monkeypatch)


def test_gallery_is_what_its_script_writes(monkeypatch):
    script = load("make_gallery", DOCS / "make_gallery.py", monkeypatch)
    assert (DOCS / "gallery.md").read_text() == script.page(), "run python docs/make_gallery.py"
    for entry in script.ENTRIES:
        assert (DOCS / "gallery" / f"{entry.name}.png").stat().st_size < 60_000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
