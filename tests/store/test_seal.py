"""No surprises: after sealing a miss is an error that says what missed; all that happens is counted and logged."""

import pytest

from flashloom import settings, store

FIELDS = {"kind": "test", "target": "x86", "config": {"block": 64}}


def test_a_sealed_process_compiles_nothing(builder, restart):
    store.get_or_build(FIELDS, builder(), label="decode")
    restart()
    store.seal()
    assert store.is_sealed()
    assert store.get_or_build(FIELDS, builder(), label="decode").files
    build = builder()
    with pytest.raises(store.SealedError, match=r"'decode'.*config\.block: asked 128, found 64.*fl\.prepare\(\)"):
        store.get_or_build({**FIELDS, "config": {"block": 128}}, build, label="decode")
    with pytest.raises(store.SealedError, match=r"toolchain\.compiler: asked"):
        store.get_or_build(FIELDS, build, toolchain=lambda: {"compiler": "g++ 13"}, label="decode")
    with pytest.raises(store.SealedError, match="nothing of this kind is stored"):
        store.get_or_build(FIELDS | {"kind": "other"}, build, label="prefill")
    assert build.calls == 0


def test_sealed_by_the_environment(builder):
    settings.configure(sealed=settings.from_environment({"FLASHLOOM_SEALED": "1"}).sealed)
    with pytest.raises(store.SealedError, match="FLASHLOOM_SEALED"):
        store.get_or_build(FIELDS, builder())


def no_compiler():
    raise store.NoToolchain("no C++ compiler was found")


def test_without_a_compiler_the_store_serves_what_it_has(builder, restart):
    store.get_or_build(FIELDS, builder(), toolchain=lambda: {"compiler": "g++ 12"})
    restart()
    assert store.get_or_build(FIELDS, builder(), toolchain=no_compiler).toolchain == {"compiler": "g++ 12"}
    with pytest.raises(store.NoToolchain, match="no C"):
        store.get_or_build({"kind": "other"}, builder(), toolchain=no_compiler)


def test_sealed_without_a_compiler_is_an_error_too(builder):
    store.seal()
    with pytest.raises(store.SealedError, match="there is no compiler, and nothing that one built is stored"):
        store.get_or_build(FIELDS, builder(), toolchain=no_compiler)


def test_the_miss_is_explained_in_the_entry(builder, restart):
    store.get_or_build(FIELDS, builder(), label="decode")
    restart()
    other = store.get_or_build({**FIELDS, "target": "x86-amx"}, builder(), label="decode")
    assert other.missed == 'target: asked "x86-amx", found "x86"'
    restart()
    assert store.get_or_build({**FIELDS, "target": "x86-amx"}, builder()).missed == other.missed


def test_counters_and_log(builder, restart, caplog):
    with caplog.at_level("DEBUG", "flashloom"):
        store.get_or_build(FIELDS, builder(), label="decode")
        store.get_or_build(FIELDS, builder(), label="decode")
    counters = store.counters()
    assert (counters.misses, counters.builds, counters.hits) == (1, 1, 1)
    assert counters.build_seconds > 0
    assert "miss decode" in caplog.text
    assert "built decode" in caplog.text
    assert "hit decode" in caplog.text
