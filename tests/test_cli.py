"""The flashloom command: quick help, and a doctor that works where nothing else does."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from flashloom import cli, doctor, settings
from flashloom.commands import OutputFile
from flashloom.commands.errors import sentence

SRC = Path(doctor.__file__).resolve().parents[1]


def run(*arguments, path=(), **environment):
    paths = os.pathsep.join([*map(str, path), str(SRC)])
    env = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=1200)


def test_help_lists_commands_without_importing_torch():
    code = "import sys, flashloom.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = run("-c", code)
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def commands(command=cli.main, path=()):
    """Every command with the words that lead to it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), (*path, name))


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run a command here and answer its result; exceptions that the command line would show as a traceback are
    raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHLOOM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(settings, "_current", None)
    yield lambda *words: CliRunner().invoke(cli.main, list(words), prog_name="flashloom", catch_exceptions=False)
    settings._set_log("warning")


def refused(done):
    """What a command said that did not do its work: a sentence or two, after the usage where that was wrong."""
    assert done.exit_code in (1, 2), done.output
    assert "Traceback" not in done.output
    said = done.stderr.partition("Error: ")[2].strip()
    assert said, done.output
    assert len(said.splitlines()) <= 2
    return said


EVERY = dict(commands())


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_every_help_has_examples_that_can_be_typed(path, call, tmp_path):
    done = call(*path, "--help")
    assert done.exit_code == 0
    lines = done.output.partition("Examples:\n")[2].splitlines()
    assert lines, "no examples"
    for name in ("llama.loom", "tuned.json", "other.json", "config.json"):
        (tmp_path / name).touch()
    for line in lines:
        words = shlex.split(line.partition(">")[0])
        words = words[next(i for i, word in enumerate(words) if word.lstrip("$(").startswith("flashloom")) + 1 :]
        words = [word.rstrip(")") if "(" not in word else word for word in words]
        command, context = cli.main, click.Context(cli.main, info_name="flashloom")
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(context, words.pop(0))
            assert command is not None, line
        try:
            command.make_context(command.name, list(words), parent=context)
        except click.exceptions.Exit as done:  # --help
            assert done.exit_code == 0  # noqa: PT017


def test_a_misspelled_command_is_told_what_it_may_have_meant(call):
    assert "there is no command 'nosuch'" in refused(call("nosuch"))
    assert "did you mean 'explain'?" in refused(call("explian"))
    assert "did you mean 'verify'?" in refused(call("store", "verfy"))
    assert "did you mean 'export'?" in refused(call("tune", "exprot"))


# What a person can get wrong


CONFIGS = {
    "cut.json": '{"num_attention_heads": 8',
    "list.json": "[1, 2]",
    "text.json": '"llama"',
    "words.json": '{"num_attention_heads": "many", "head_dim": 64}',
    "none.json": '{"num_attention_heads": 0, "hidden_size": 64}',
    "dtype.json": '{"num_attention_heads": 8, "head_dim": 64, "dtype": "float99"}',
    "no_heads.json": "{}",
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("words", ["pack build --target x86 -o x.loom --model", "tune --dry-run --model"])
def test_a_model_that_is_none(call, tmp_path, name, words):
    (tmp_path / name).write_text(CONFIGS[name])
    said = refused(call(*words.split(), name))
    assert name in said or "configuration" in said
    assert not (tmp_path / "x.loom").exists()


def test_damaged_files_are_named(call, tmp_path):
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty").touch()
    (tmp_path / "other.json").write_text('{"x": 1}')
    for name in ("bytes", "empty", "other.json"):
        for words in ("pack verify", "pack ls", "tune import", "tune ls --cache", f"tune diff {name}"):
            assert name in refused(call(*words.split(), name))
    assert "bytes" in refused(call("pack", "build", "--target", "x86", "--model", "bytes", "-o", "x.loom"))


def test_what_is_not_there_is_named(call, tmp_path):
    for words in ("pack verify", "pack ls", "tune import", "tune ls --cache", "tune diff here", "explain"):
        name = "nofile.py" if words == "explain" else "nofile"
        (tmp_path / "here").touch()
        assert name in refused(call(*words.split(), name))
    for words in ("pack verify", "pack ls", "tune import", "tune export"):
        assert str(tmp_path) in refused(call(*words.split(), str(tmp_path)))


@pytest.mark.parametrize("words", [
    "pack build --target x86 --model llama-3-8b -o", "tune --model llama-3-8b -o", "tune export",
    "bench attention --json", "bench attention -o", "bench article --output", "demo -o",
])  # fmt: skip
def test_outputs_are_looked_at_before_any_work(call, tmp_path, words, monkeypatch):
    def work(*_, **__):
        raise AssertionError("work was begun")

    for name in ("bench.suites:tasks", "bench.article:articles", "pack:Pack", "tune.tuner:jobs_of", "demo.run:Demo"):
        module, _, attribute = name.partition(":")
        monkeypatch.setattr(importlib.import_module(f"flashloom.{module}"), attribute, work)
    (tmp_path / "file").touch()
    assert "file" in refused(call(*words.split(), "file/x"))  # a file in a folder's place
    if words.startswith(("demo", "bench attention -o", "bench article")):
        assert "file" in refused(call(*words.split(), "file"))
    else:
        assert "no folder" in refused(call(*words.split(), "none/x"))
        assert str(tmp_path) in refused(call(*words.split(), str(tmp_path)))
    if Path("/proc/self").exists():  # a folder that takes no files, also from root
        assert "/proc" in refused(call(*words.split(), "/proc/x"))


def test_a_link_to_an_output_stays(tmp_path):
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    made = OutputFile(replaced=True).convert(str(tmp_path / "link"), None, None)
    assert made == (tmp_path / "there").resolve()


def test_a_gpu_that_is_not_there(call, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for suite in ("attention", "article"):
        assert "torch finds no GPU" in refused(call("bench", suite, "--device", "cuda"))


def test_a_store_that_is_a_file(call, tmp_path):
    (tmp_path / "cache").touch()
    for words in ("ls", "ls --json", "verify", "prune", "clear", "why-miss", "dir"):
        assert "is a file" in refused(call("store", *words.split()))
    for words in ("ls", "verify", "export x.json"):
        assert "is not a folder" in refused(call("tune", *words.split()))


def test_settings_and_options_are_named_as_they_were_typed(call, monkeypatch):
    assert "'lots'" in refused(call("store", "prune", "--size", "lots"))
    assert "--size" in call("store", "prune", "--size", "lots").stderr
    monkeypatch.setenv("FLASHLOOM_TARGET", "nonsense")
    monkeypatch.setattr(settings, "_current", None)
    assert refused(call("config")).startswith("FLASHLOOM_TARGET='nonsense' cannot be read: give a CPU target")


USERS = """
import flashloom as fl

class Twice(fl.Variant):
    def logits_transform(self, logits, at):
        return logits * 2.0

class Fails(fl.Variant):
    def logits_transform(self, logits, at):
        return {}["missing"]

variant = Twice() & fl.causal
fails = Fails()
number = 3
"""


def test_explain_takes_what_users_have_in_files(call, tmp_path):
    (tmp_path / "mine.py").write_text(USERS)
    assert "2.0" in call("explain", "mine.py:variant", "-l", "torch").output
    for language in ("cpp", "triton", "gluon"):
        assert call("explain", "mine.py:variant", "-l", language).exit_code == 0
    assert "Twice is a class: name an instance" in refused(call("explain", "mine.py:Twice"))
    assert "mine.py:variant, mine.py:fails" in refused(call("explain", "mine.py"))
    assert "it has variant, fails" in refused(call("explain", "mine.py:nothing"))
    assert "number" in refused(call("explain", "mine.py:number"))
    line = USERS.splitlines().index('        return {}["missing"]') + 1
    assert f"mine.py, line {line}: KeyError" in refused(call("explain", "mine.py:fails"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (", "line 1: '(' was never closed"),
        ("\nimport nosuchmodule", "line 2: ModuleNotFoundError"),
        ("\n\nraise RuntimeError('boom')", "line 3: RuntimeError: boom"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        ("1 / 0", "line 1: ZeroDivisionError"),
        ("x = 1\0", "null bytes"),
    ],
)
def test_a_users_file_that_fails_is_named_with_its_line(call, tmp_path, text, said):
    (tmp_path / "broken.py").write_text(text)
    found = refused(call("explain", "broken.py:variant"))
    assert "broken.py" in found
    assert said in found


@pytest.mark.parametrize("name", ["causl", "causal &", "softcap()", "1", "nosuch:x", ":x", "os.path:join", ""])
def test_explain_of_what_is_no_variant(call, name):
    assert repr(name) in refused(call("explain", name)) or name.partition(":")[0] in refused(call("explain", name))


def test_explain_has_a_hint_for_a_name_that_is_near(call):
    assert "did you mean 'causal'?" in refused(call("explain", "causl"))


def test_every_exception_is_a_sentence():
    class Own(Exception):
        """Of nobody."""

    for error in (
        ValueError("give 3"), OSError(28, "No space left on device"), FileNotFoundError(2, "No such file", "a.txt"),
        KeyError("x"), RuntimeError(), MemoryError(), Own("thing"), ImportError("no torch"), RecursionError("deep"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), AssertionError(), json.JSONDecodeError("bad", "", 0),
    ):  # fmt: skip
        said = sentence(error)
        assert said.strip()
        assert str(error).strip("'") in said or isinstance(error, OSError)
    assert sentence(FileNotFoundError(2, "No such file", "a.txt")) == "a.txt: No such file"
    assert sentence(ValueError("give 3")) == "give 3"
    assert "Own: thing" in sentence(Own("thing"))
    assert "doctor" in sentence(ImportError("no torch"))


def test_a_bug_shows_its_traceback_to_those_who_ask(call, monkeypatch, tmp_path):
    def fail():
        raise KeyError("gone")

    monkeypatch.setattr(settings, "origins", fail)
    assert "KeyError: 'gone'\n`flashloom --debug" in refused(call("config"))
    with pytest.raises(KeyError):
        call("--debug", "config")
    monkeypatch.setenv("FLASHLOOM_DEBUG", "1")
    with pytest.raises(KeyError):
        call("config")


# Where the output goes


def test_nobody_reads_on():
    """`flashloom ... | head`: no complaint, whether the output is flushed before or as Python ends."""
    for command in ("--help", "explain causal", "doctor --json", "config", "config --json"):
        read, write = os.pipe()
        os.close(read)
        env = {**os.environ, "PYTHONPATH": str(SRC)}
        words = [sys.executable, "-m", "flashloom", *command.split()]
        done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, env=env, timeout=600)
        os.close(write)
        assert done.stderr == "", command
        assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_room_for_the_output():
    for command in ("explain causal", "doctor"):
        env = {**os.environ, "PYTHONPATH": str(SRC)}
        with open("/dev/full", "w") as full:
            words = [sys.executable, "-m", "flashloom", *command.split()]
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=env, timeout=600)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert len(done.stderr.splitlines()) == 1


INTERRUPTED = """
import sys, time
from flashloom import cli
from flashloom.bench import suites
from flashloom.bench.report import OWN, Row
from flashloom.bench.timing import Timing

def done():
    return [Row("s", "first row", "f32", {OWN: Timing((1.0,)), "sdpa": Timing((2.0,))}, errors={OWN: 1e-6})]

def wait():
    print("READY", file=sys.stderr, flush=True)
    time.sleep(600)

def fail():
    raise ArithmeticError("the error against float64 is 9e+00, above 2e-05")

second = {"wait": wait, "fail": fail}[sys.argv.pop(1)]
suites.SUITES["decode"] = lambda full, options: [suites.Task("first", done), suites.Task("second", second)]
cli.main(sys.argv[1:])
"""


def bench_that_ends_early(how, *words, folder):
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, how, "bench", "attention", "decode", *words], cwd=folder, text=True,
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    errors = []
    if how == "wait":
        for line in child.stderr:
            errors.append(line)
            if "READY" in line:
                child.send_signal(signal.SIGINT)
                break
    out, more = child.communicate(timeout=600)
    return child.returncode, out, "".join(errors) + more


@pytest.mark.parametrize("how", ["wait", "fail"])
def test_rows_that_are_done_survive_ctrl_c_and_errors(tmp_path, how):
    code, out, errors = bench_that_ends_early(how, "--output", "results", folder=tmp_path)
    assert code == 1
    assert "first row" in out
    assert "2.00" in out
    assert "Traceback" not in errors
    assert "Aborted!" in errors if how == "wait" else "Error: the error against float64" in errors
    [row] = json.loads((tmp_path / "results" / "attention-decode.json").read_text())["rows"]
    assert row["name"] == "first row"


def test_bench_leaves_no_files_unasked_and_writes_json_to_stdout(tmp_path):
    _, out, errors = bench_that_ends_early("fail", folder=tmp_path)
    assert "first row" in out
    assert list(tmp_path.iterdir()) == []
    _, out, errors = bench_that_ends_early("fail", "--json", "-", folder=tmp_path)
    assert json.loads(out)["rows"][0]["times_faster"] == {"sdpa": 2.0}
    assert "first row" in errors  # the table
    assert list(tmp_path.iterdir()) == []


# flashloom config


def test_config_says_what_is_in_force_and_why(call, monkeypatch):
    monkeypatch.setenv("FLASHLOOM_KERNEL_CACHE_SIZE", "2G")
    monkeypatch.setenv("FLASHLOOM_JOBS", "3")
    monkeypatch.setenv("FLASHINFER_LOG_LEVEL", "ERROR")
    monkeypatch.setattr(settings, "_current", None)
    found = json.loads(call("config", "--json").output)
    assert set(found) == set(settings._PARSERS)
    assert found["cache_size"]["value"] == 2 << 30
    assert found["cache_size"]["origin"] == "environment: FLASHLOOM_KERNEL_CACHE_SIZE"
    assert found["log"]["origin"] == "environment: FLASHINFER_LOG_LEVEL"
    assert found["wait"] == {"value": 60.0, "origin": "default", "here": None}
    settings.configure(jobs=2)
    assert settings.origins()["jobs"] == settings.Origin(2, "configure")
    lines = dict(line.split(None, 1) for line in call("config").output.splitlines())
    assert set(lines) == set(found)
    assert lines["jobs"].split() == ["2", "configure"]
    assert lines["cache_size"].startswith("2G ")
    assert call("config", "kernel_cache_size").output.startswith("cache_size  2G")
    assert "did you mean 'threads'?" in refused(call("config", "thread"))


def test_doctor_works_with_broken_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    for command in (["-m", "flashloom", "doctor"], ["-m", "flashloom.doctor"]):
        done = run(*command, path=[tmp_path])
        assert done.returncode == 1, done.stdout + done.stderr
        assert "libtorch_cpu.so" in done.stdout
        assert "reinstall torch" in done.stdout


def test_doctor_json_names_a_fix_for_every_problem(tmp_path):
    done = run("-m", "flashloom.doctor", "--json", PATH=str(tmp_path), CXX="", FLASHLOOM_CXX="")
    findings = json.loads(done.stdout)
    compiler = next(f for f in findings if f["topic"] == "compiler")
    assert compiler["level"] == "problem"
    assert "g++" in compiler["fix"]
    assert all(f["fix"] for f in findings if f["level"] == "problem")


def test_doctor_survives_a_failing_check(monkeypatch):
    def check_moon():
        raise RuntimeError("no moon")

    monkeypatch.setattr(doctor, "CHECKS", (check_moon, doctor.check_python))
    findings = doctor.examine()
    assert [f.topic for f in findings] == ["moon", "python"]
    assert "no moon" in findings[0].found


def test_doctor_cache_open_to_others(monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("FLASHLOOM_CACHE_DIR", str(tmp_path))
    [finding] = doctor.check_cache()
    assert finding.level == "problem"
    assert "chmod 700" in finding.fix


def test_doctor_cpu_flags():
    assert doctor.cpu_flags("processor: 0\nflags\t\t: fpu avx2 fma f16c\n") == {"fpu", "avx2", "fma", "f16c"}
    assert doctor.cpu_flags("") == set()
