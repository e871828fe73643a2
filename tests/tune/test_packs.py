"""Tuning records travel in packs, with the kernels of their configs; and the command line that looks into records."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from tests.tune.conftest import make_question, make_record
from tests.tune.test_attention import HEADS, decode, record_of

import flashloom as fl
from flashloom import records, settings
from flashloom.attention.kernels.cpu.config import Config
from flashloom.cli import main
from flashloom.records import Folder, Rejected, Scope, entered
from flashloom.records.bundle import Bundle, read_any, to_bundle
from flashloom.store import pack as pack_module
from flashloom.store import store as store_module

compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.fixture
def no_packs(monkeypatch):
    monkeypatch.setattr(store_module, "_state", store_module._State())
    monkeypatch.setattr(pack_module, "USED", [])


@compiler
def test_a_pack_carries_records_and_the_kernels_they_name(tmp_path, monkeypatch, no_packs):
    attention = fl.Attention(HEADS, variant=fl.causal, dtype=torch.float32, device="cpu")
    batch = decode()
    with fl.autotune(tune=False, cache=tmp_path / "cache") as session:
        session.scope.publish(record_of(attention, batch, decode_keys=64, pieces=16))
        pack = fl.Pack(targets=[fl.Target.here()]).add(attention, [batch])
        assert len(pack) == 2, "the default's kernel and the tuned one"
        pack.build(tmp_path / "tuned.loom")
    plain = fl.Pack(targets=[fl.Target.here()]).add(attention, [batch])
    assert len(plain) == 1
    built = plain.build(tmp_path / "plain.loom")
    assert built.records == []

    monkeypatch.setattr(settings, "_current", settings.Settings(cache_dir=tmp_path / "empty"))
    monkeypatch.setattr(store_module, "_state", store_module._State())
    from flashloom.attention import cpu
    from flashloom.kernel import cpp

    monkeypatch.setattr(cpp, "_loaded", {})
    cpu._functions.cache_clear()
    assert attention.plan  # nothing is compiled from here on
    fl.use(tmp_path / "tuned.loom", on_miss="error")
    plan = attention.plan(batch)
    assert plan._executor.config == Config(decode_keys=64, pieces=16)
    with fl.autotune(tune=False, cache=tmp_path / "above") as session:
        session.scope.publish(record_of(attention, batch, pieces=2))
        assert attention.plan(batch)._executor.config == Config(pieces=2), "a context lies above packs"
    cpu._functions.cache_clear()


def test_a_damaged_record_in_a_pack_is_left_out(tmp_path, no_packs, question):
    good, bad = make_record(question), json.loads(make_record(question, (2, 2)).to_bytes())
    bad["speedup"] = 9.0
    pack_module.write_pack(tmp_path / "p.loom", [], [json.loads(good.to_bytes()), bad])
    fl.use(tmp_path / "p.loom")
    assert records.find(question, (1, 1)) == 7
    assert records.find(question, (2, 2)) is None
    assert records.find(make_question(dim=64, toolchain={"compiler": "another"}), (1, 1)) == 7


def test_bundles_are_read_as_written(tmp_path, question):
    some = [make_record(question, (i, 1), tile=i) for i in range(5)]
    text = to_bundle(reversed(some))
    assert text == to_bundle(some)
    (tmp_path / "some.json").write_bytes(text)
    assert sorted(r.bucket for r in read_any(tmp_path / "some.json")) == [(i, 1) for i in range(5)]
    with entered(Scope((Bundle(some, "a bundle"),))):
        assert records.find(question, (3, 1)) == 3
    for wrong in (b"", b"[]", b"{}", text.replace(b'"speedup": 1.25', b'"speedup": 1.26', 1)):
        (tmp_path / "wrong.json").write_bytes(wrong)
        with pytest.raises(Rejected):
            read_any(tmp_path / "wrong.json")


def run(*words):
    done = CliRunner().invoke(main, ["tune", *map(str, words)])
    return done.exit_code, done.output


def test_the_commands(tmp_path, question):
    a, b = tmp_path / "a", tmp_path / "b"
    for i in range(3):
        Folder.at(a).publish(make_record(question, (i, 1), tile=i))
        Folder.at(b).publish(make_record(question, (i + 1, 1), tile=2))
    code, said = run("ls", "--cache", a)
    assert code == 0
    assert "3 records, 2 with another config" in said
    assert "25.0%  op a label, 1 of 1: tile=2" in said
    assert run("verify", "--cache", a)[0] == 0
    code, said = run("diff", a, b)
    assert code == 1
    assert "2 keys in both, 3 differ" in said
    assert "missing" in said
    assert run("export", tmp_path / "all.json", "--cache", a)[0] == 0
    assert run("import", tmp_path / "all.json", "--cache", tmp_path / "c")[0] == 0
    assert run("diff", a, tmp_path / "c")[0] == run("diff", a, tmp_path / "all.json")[0] == 0
    path = next(Folder.at(a).files())
    path.write_bytes(path.read_bytes()[:-20])
    code, said = run("verify", "--cache", a)
    assert code == 1
    assert "set aside" in said
    assert run("verify", "--cache", a)[0] == 0
    assert "2 records" in run("ls", "--cache", a)[1]
    (tmp_path / "text").write_text("hello")
    assert "no tuning records" in run("ls", "--cache", tmp_path / "text")[1]


def test_the_command_says_what_it_cannot_do(tmp_path):
    assert "give --model" in run()[1]
    assert "measures on the machine at hand" in run("--model", "llama-3-8b", "--target", "sm121")[1]
    assert "neither a config.json" in run("--model", "nosuch")[1]
    assert "budget='soon'" in run("--model", "nosuch", "--budget", "soon")[1]


@compiler
def test_a_dry_run_tells_what_would_be_tuned(tmp_path):
    code, said = run("--model", "qwen2.5-0.5b", "--phase", "decode", "--dry-run", "--cache", tmp_path / "c")
    assert code == 0, said
    assert "to be tuned" in said
    assert not (tmp_path / "c").exists()
