"""Where an engine keeps the records of a rank: two configurations never meet, two ranks never write one file."""

import itertools
import re

import pytest
import torch
from tests.tune.conftest import make_record

import flashloom as fl
from flashloom.records import Folder

USUAL = {"model": "meta/llama", "dtype": "bfloat16", "quantization": None, "backend": "flashloom"}


def path(**options):
    return fl.tune_cache_path(**{**USUAL, "root": "/root", **options})


def test_the_layout():
    found = path(tp=(3, 8), pp=(1, 2), dp=(0, 4), ep=(5, 8))
    assert found.name == "rank_tp3_pp1_dp0.json"
    version, architecture, digits = found.relative_to("/root").parts[:-1]
    assert version
    assert re.fullmatch(r"sm\d+|x86[-\w]*|aarch64", architecture)
    assert re.fullmatch(r"[0-9a-f]{16}", digits)


def test_configurations_never_meet():
    changes = {
        "model": ["meta/other", "meta"],
        "dtype": ["float16", "llama"],
        "quantization": ["fp8", "flashloom"],
        "backend": [None, "triton"],
        "tp": [(0, 2), (0, 4)],
        "pp": [(0, 2)],
        "dp": [(0, 2)],
        "ep": [(0, 2)],
        "config": ["LlamaConfig"],
    }
    folders = [path().parent]
    for name, values in changes.items():
        folders += [path(**{name: value}).parent for value in values]
    for one, other in itertools.combinations(changes, 2):
        folders.append(path(**{one: changes[one][0], other: changes[other][0]}).parent)
    assert len(set(folders)) == len(folders)


def test_ranks_have_files_of_their_own():
    places = itertools.product(range(2), range(2), range(2))
    found = {path(tp=(t, 2), pp=(p, 2), dp=(d, 2)) for t, p, d in places}
    assert len(found) == 8
    assert len({one.parent for one in found}) == 1
    assert path(ep=(0, 4)) == path(ep=(3, 4)), "experts are split within the other ranks"


def test_equal_names_of_a_dtype_and_of_a_class():
    class Config:
        pass

    assert path(dtype=torch.bfloat16) == path()
    assert path(config=Config) != path()


@pytest.mark.parametrize("place", [(2, 2), (-1, 2), (0, 0)])
def test_ranks_outside_their_size(place):
    with pytest.raises(ValueError, match="rank must be"):
        path(tp=place)


@pytest.mark.parametrize("place", [3, (0,), (0, 1.0), "01", [0, 1]])
def test_places_that_are_none(place):
    with pytest.raises(TypeError, match="two ints"):
        path(pp=place)


def test_it_serves_as_a_cache(tmp_path, question):
    place = path(root=tmp_path)
    with fl.autotune(tune=False, cache=place) as session:
        session.scope.publish(make_record(question))
    assert [file.parent.parent.parent for file in Folder.at(place).files()] == [place.with_suffix("")]
    with fl.autotune(tune=False, cache=str(place)) as session:
        assert session.scope.find(question, (1, 1)) == 7


def test_the_default_root_is_in_the_users_cache(monkeypatch, tmp_path):
    fl.configure(cache_dir=tmp_path)
    assert path(root=None).is_relative_to(tmp_path / "autotune")
