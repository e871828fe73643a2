"""Settings come from the environment once, say what is wrong with a value, and can be replaced."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from flashloom import settings


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(settings, "_current", None)
    yield
    settings._set_log("warning")


def test_defaults():
    assert settings.from_environment({}) == settings.Settings()
    assert settings.from_environment({"FLASHLOOM_CACHE_SIZE": ""}) == settings.Settings()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("cache_dir", "/data/kernels", Path("/data/kernels")),
        ("cache_dir", "~/kernels", Path.home() / "kernels"),
        ("cache_dir", "kernels", Path.cwd() / "kernels"),
        ("cache_size", "500M", 500 << 20),
        ("cache_size", "2GiB", 2 << 30),
        ("cache_size", "1.5k", 1536),
        ("cache_size", "4096", 4096),
        ("resident", "64", 64),
        ("trusted", "/a:/b", (Path("/a"), Path("/b"))),
        ("target", "x86-avx2", "x86-avx2"),
        ("cxx", "clang++", "clang++"),
        ("jobs", "3", 3),
        ("sealed", "1", True),
        ("check", "off", False),
        ("log", "debug:/tmp/log", "debug:/tmp/log"),
        ("wait", "2.5", 2.5),
        ("store_timeout", "1", 1.0),
        ("commit", "0123456789ab", "0123456789ab"),
    ],
)
def test_every_variable(name, text, value):
    assert getattr(settings.from_environment({f"FLASHLOOM_{name.upper()}": text}), name) == value


def test_every_field_has_a_variable():
    assert set(settings._PARSERS) == {field.name for field in dataclasses.fields(settings.Settings)}


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("CACHE_SIZE", "big", "give bytes"),
        ("SEALED", "maybe", "give 1 or 0"),
        ("JOBS", "0", "above 0"),
        ("JOBS", "two", "give a whole number above 0"),
        ("WAIT", "-1", "above 0"),
        ("LOG", "loud", "give debug, info"),
    ],
)
def test_a_value_that_cannot_be_read_is_named(name, text, rule):
    with pytest.raises(ValueError, match=rf"FLASHLOOM_{name}='{text}' cannot be read: .*{rule}"):
        settings.from_environment({f"FLASHLOOM_{name}": text})


def test_a_misspelt_variable_warns():
    with pytest.warns(UserWarning, match="FLASHLOOM_CASHE_DIR is not a setting.*did you mean FLASHLOOM_CACHE_DIR"):
        settings.from_environment({"FLASHLOOM_CASHE_DIR": "/x"})


def test_the_environment_is_read_once(monkeypatch):
    monkeypatch.setenv("FLASHLOOM_JOBS", "3")
    assert settings.get().jobs == 3
    monkeypatch.setenv("FLASHLOOM_JOBS", "4")
    assert settings.get().jobs == 3


def test_configure_replaces_fields(monkeypatch):
    monkeypatch.setenv("FLASHLOOM_JOBS", "3")
    assert settings.configure(sealed=True, cache_size="1K").jobs == 3
    assert settings.get().sealed
    assert settings.get().cache_size == 1024
    with pytest.raises(TypeError, match="'job' is not a setting; the settings are cache_dir"):
        settings.configure(job=1)
    with pytest.raises(ValueError, match="jobs='x' cannot be read"):
        settings.configure(jobs="x")


def test_log_to_a_file(tmp_path):
    settings.configure(log=f"info:{tmp_path}/log")
    logging.getLogger("flashloom").info("built %s", "decode")
    logging.getLogger("flashloom").debug("quiet")
    text = (tmp_path / "log").read_text()
    assert "INFO built decode" in text
    assert "quiet" not in text


def test_log_to_stderr():
    code = (
        "from flashloom import settings; settings.get(); import logging; logging.getLogger('flashloom').info('built')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**_environment(), "FLASHLOOM_LOG": "info"}, capture_output=True, text=True
    )
    assert "INFO built" in done.stderr
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True)
    assert done.stderr == ""


def _environment():
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLASHLOOM_")}
    return kept | {"PYTHONPATH": str(Path(settings.__file__).parents[1])}


@pytest.mark.parametrize(("name", "rule"), [("jobs", "a whole number above 0"), ("wait", "a number above 0")])
def test_what_is_no_number_says_what_is_asked(name, rule):
    with pytest.raises(ValueError, match=f"{name}='many' cannot be read: give {rule}"):
        settings.configure(**{name: "many"})
