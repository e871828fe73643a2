"""The documentation does what it says: its Python runs, the gallery is what its script writes, links lead somewhere."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import torch

import flashloom
import flashloom as fl
from flashloom import settings
from flashloom.cli import main

ROOT = Path(flashloom.__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
# pages that say that their blocks continue each other; elsewhere each is a program
IN_ORDER = [page.name for page in PAGES if ", in order, in the tests" in " ".join(page.read_text().split())]
MARKS = {"", "gpu", "raises"}


@dataclass(frozen=True)
class Block:
    """A Python block of a page: what stands after "python" at its fence, and the heading above it."""

    page: Path
    number: int
    mark: str
    code: str
    heading: str

    def __str__(self):
        return f"{self.page.name}-{self.number}"


def blocks(page):
    text, found = page.read_text(), []
    for match in re.finditer(r"^```python([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        prose = re.sub(r"^```.*?^```$", "", text[: match.start()], flags=re.MULTILINE | re.DOTALL)
        heading = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)[-1]
        found.append(Block(page, len(found) + 1, match[1].strip(), match[2], heading))
    return found


PROGRAMS = [block for page in PAGES if page.name not in (*IN_ORDER, "gallery.md") for block in blocks(page)]


def load(name, path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses and variants look their module up
    spec.loader.exec_module(module)
    return module


def run(code, folder):
    """A program in a folder and a process of its own, as the only rank of torch's launcher."""
    path = folder / "program.py"
    path.write_text(code)
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    source = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, **launcher, "PYTHONPATH": source}
    return subprocess.run(
        [sys.executable, str(path)], cwd=folder, capture_output=True, text=True, env=env, timeout=1200
    )


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_every_block_is_a_program(block, tmp_path):
    assert block.mark in MARKS
    if block.mark == "gpu" and not torch.cuda.is_available():
        compile(block.code, str(block), "exec")
        pytest.skip("no CUDA device")
    if "from transformers import" in block.code:
        pytest.importorskip("transformers")
    done = run(block.code, tmp_path)
    if block.mark == "raises":  # a page of errors: the heading is a part of the message
        [said] = re.findall(r"^`(.*)`$", block.heading)
        assert done.returncode != 0, done.stdout
        assert said in done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", IN_ORDER)
def test_blocks_of_a_lesson_run_in_order(name, tmp_path):
    found = blocks(DOCS / name)
    assert len(found) > 3
    done = run("\n".join(block.code for block in found), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_gallery_is_computed(tmp_path, monkeypatch):
    found = blocks(DOCS / "gallery.md")
    assert len(found) > 10
    q = k = torch.randn(64, 1, 64)
    for block in found:
        (tmp_path / f"entry{block.number}.py").write_text(block.code)
        module = load(f"entry{block.number}", tmp_path / f"entry{block.number}.py", monkeypatch)
        assert fl.attention(q, k, k, variant=module.variant).isfinite().all()


def test_the_gallery_is_what_its_script_writes(monkeypatch):
    script = load("make_gallery", DOCS / "make_gallery.py", monkeypatch)
    assert (DOCS / "gallery.md").read_text() == script.page(), "run python docs/make_gallery.py"
    for entry in script.ENTRIES:
        assert (DOCS / "gallery" / f"{entry.name}.png").stat().st_size < 60_000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(docs/([a-z_]+\.md)", (ROOT / "README.md").read_text()))
    assert {page.name for page in PAGES[1:]} <= linked


def test_every_setting_is_in_the_table_with_its_default():
    rows = re.findall(r"^\| `FLASHLOOM_(\w+)` \| (.*?) ?\| (.+) \|$", (DOCS / "settings.md").read_text(), re.MULTILINE)
    table = {name.lower(): default.strip("`") for name, default, _ in rows}
    fields = {field.name: field.default for field in dataclasses.fields(settings.Settings)}
    assert set(table) == set(fields)
    for name, default in fields.items():
        if default not in (None, ()):  # what is left open is said in words
            read = settings.from_environment({f"FLASHLOOM_{name.upper()}": table[name]})
            assert getattr(read, name) == default, name


def commands_shown():
    """Lines of the blocks without a language that call the command line."""
    for page in PAGES:
        for language, text in re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in text.splitlines() if not language else ():
                if re.match(r"(\$ )?(FLASHLOOM_\w+=\S+ )*flashloom ", line):
                    yield page.name, line


@pytest.mark.parametrize(("page", "line"), list(commands_shown()))
def test_commands_that_pages_show_exist(page, line):
    words = re.sub(r"  .*| #.*", "", line).removeprefix("$ ").split()
    words = words[next(i for i, word in enumerate(words) if word == "flashloom") + 1 :]
    for name in line.split(words[0], 1)[1].split("  #")[0].split("|") if "|" in line else [" ".join(words[1:2])]:
        command, context = main, click.Context(main)
        for word in [words[0], *name.split()[:1]]:
            if isinstance(command, click.Group) and not word.startswith("-"):
                command = command.get_command(context, word)
                assert command is not None, line
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= options, line
