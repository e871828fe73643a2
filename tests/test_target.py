"""A target is a name that means the same flags everywhere."""

import shutil
import subprocess

import pytest

from flashloom import settings, target
from flashloom.target import CPU_TARGETS, Target


def test_names_are_checked():
    for name in (*CPU_TARGETS, "sm80", "sm90", "sm100", "sm120", "gfx942", "gfx90a"):
        assert str(Target(name)) == name
    for name in ("native", "x86-sse", "sm9", "sm90a", "SM90", "cuda", ""):
        with pytest.raises(ValueError, match=f"Target '{name}' is unknown; give x86-amx"):
            Target(name)


def test_flags_are_explicit():
    for name in CPU_TARGETS:
        assert not [flag for flag in Target(name).flags if "march" in flag or "native" in flag]
    assert Target("x86").flags == ()
    assert Target("x86-avx2").flags == ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
    assert {"-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512vbmi"} <= set(Target("x86-amx").flags)
    with pytest.raises(ValueError, match="'sm90' is a GPU"):
        _ = Target("sm90").flags


@pytest.mark.parametrize("name", [name for name in CPU_TARGETS if name != "aarch64"])
def test_compilers_take_the_flags(name, tmp_path):
    macros = {"x86-amx": "__AMX_BF16__", "x86-avx512": "__AVX512VNNI__", "x86-avx2": "__FMA__", "x86": "__SSE2__"}
    (tmp_path / "a.cpp").write_text(f"#ifndef {macros[name]}\n#error missing\n#endif\n")
    compilers = [path for path in map(shutil.which, ("g++", "clang++")) if path]
    for compiler in compilers:
        subprocess.run([compiler, *Target(name).flags, "-c", "-o", "/dev/null", tmp_path / "a.cpp"], check=True)
    assert compilers


def test_the_best_supported_target_is_taken(monkeypatch):
    features = {feature for needs in CPU_TARGETS.values() for feature in needs}
    monkeypatch.setattr(target.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(target, "_amx_allowed", lambda: True)
    for missing, best in [(None, "x86-amx"), ("amx_tile", "x86-avx512"), ("avx512_vnni", "x86-avx2"), ("fma", "x86")]:
        features.discard(missing)
        monkeypatch.setattr(target, "cpu_features", lambda: frozenset(features))
        target._here.cache_clear()
        assert Target.here() == Target(best)
    monkeypatch.setattr(target.platform, "machine", lambda: "aarch64")
    target._here.cache_clear()
    assert Target.here() == Target("aarch64")
    monkeypatch.undo()
    target._here.cache_clear()


def test_without_the_kernels_permission_amx_is_not_taken(monkeypatch):
    monkeypatch.setattr(target.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset(CPU_TARGETS["x86-amx"]))
    monkeypatch.setattr(target, "_amx_allowed", lambda: False)
    target._here.cache_clear()
    assert Target.here() == Target("x86-avx512")
    monkeypatch.undo()
    target._here.cache_clear()


def test_the_setting_wins_and_is_checked(monkeypatch):
    monkeypatch.setattr(settings, "_current", settings.Settings(target=Target.here().name))
    assert Target.here().supported
    able = [name for name in CPU_TARGETS if Target(name).supported]
    unable = [name for name in CPU_TARGETS if name not in able]
    for name in able:
        settings.configure(target=name)
        assert Target.here() == Target(name)
    for name in unable:
        settings.configure(target=name)
        with pytest.raises(
            ValueError, match=f"FLASHLOOM_TARGET={name} cannot run on this machine; it runs {', '.join(able)}"
        ):
            Target.here()


def test_gpus_are_not_cpus():
    assert not Target("sm90").is_cpu
    assert not Target("sm90").supported
