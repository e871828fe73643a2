"""A store and records of its own for every test, and small records to put there."""

import pytest

from flashloom import records, settings
from flashloom.records import Question, Record, Tried
from flashloom.records import scope as scope_module


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Every test starts as a new process would, with its own folder of records; compiled kernels are shared."""
    monkeypatch.setattr(settings, "_current", settings.from_environment())
    monkeypatch.setattr(scope_module, "default_root", lambda: tmp_path / "default")
    monkeypatch.setattr(scope_module, "_added", {})
    records.forget()
    yield
    records.forget()


def read_config(config):
    """As an operator would: named parameters of the right type, and only values that it offers."""
    if set(config) != {"tile"} or type(config["tile"]) is not int or config["tile"] not in range(1000):
        raise ValueError(f"{config} is not offered")
    return config["tile"]


def make_question(operator="op", toolchain=None, **fields):
    return Question(operator, fields, toolchain or {"compiler": "c 1"}, ("rows", "keys"), read_config, "a label")


def make_record(question, bucket=(1, 1), tile=7, **more):
    return Record(
        question.operator, question.fields, question.toolchain, question.sizes, bucket, {"tile": tile}, {"tile": 1},
        1.25, 0.01, (Tried({"tile": 1}, "slower", 10.0, 0.02), Tried({"tile": 9}, "failed", note="no")),
        shapes=("1 of 1",), policy="eager, warm", label=question.label, **more,
    )  # fmt: skip


@pytest.fixture
def question():
    return make_question(dim=64)
