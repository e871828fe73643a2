"""C++ kernels: found, built, loaded and called; their keys; and what happens when any of that fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashloom
from flashloom import settings, store
from flashloom.kernel import CompileError, NoCompiler, cpp
from flashloom.kernel import load as load_module
from flashloom.kernel.cpp import CppKernel
from flashloom.store import store as store_module
from flashloom.target import Target

CPU = Path(flashloom.__file__).parent / "attention" / "kernels" / "cpu"
SOURCE = r"""
#include "threads.h"
#include "number.h"
extern "C" __attribute__((visibility("default"))) int64_t flashloom_sum(int64_t threads, int64_t chunks) {
  int64_t sum = 0;
  int most = 0;
  flashloom::for_chunks((int)threads, chunks, [&](int thread, int64_t chunk) {
    __atomic_fetch_add(&sum, chunk * NUMBER, __ATOMIC_RELAXED);
    if (thread >= threads) __atomic_store_n(&most, 1, __ATOMIC_RELAXED);
  });
  return most ? -1 : sum;
}
"""

FAKE = '#!/bin/sh\n[ "$1" = -v ] && printf "Target: x86_64-none\\ngcc version 99.1\\n" >&2 && exit\n'


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "_current", settings.Settings(cache_dir=tmp_path / "store"))
    monkeypatch.setattr(store_module, "_state", store_module._State())
    monkeypatch.setattr(cpp, "_loaded", {})
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "number.h").write_text("#define NUMBER SCALE\n")


@pytest.fixture
def kernel(tmp_path):
    def make(source=SOURCE, target=None, **defines) -> CppKernel:
        folders = (tmp_path / "include", CPU)
        return CppKernel("sum", source, folders, target or Target.here(), {"SCALE": 1} | defines)

    return make


def build(kernel: CppKernel):
    module = cpp.build(kernel.source, kernel.include_dirs, kernel.target, kernel.defines, kernel.name)
    return module.get_function("sum", 2)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_kernel_is_built_and_called(threads, kernel):
    assert build(kernel(SCALE=3))(threads, 1000) == 3 * 499500


def test_kernels_of_one_process_do_not_mix(kernel):
    """Descriptors are used again for the next kernel; the loader must not take it for the one before."""
    functions = [build(kernel(SCALE=scale)) for scale in range(1, 6)]
    assert [function(2, 10) for function in functions] == [45 * scale for scale in range(1, 6)]


def test_it_is_loaded_once(kernel):
    build(kernel())
    build(kernel())
    assert (store.counters().builds, store.counters().hits) == (1, 0)


def test_one_openmp_runtime(kernel):
    """With torch's own threads at work too, in a process that has nothing else."""
    code = f"""
import torch
from pathlib import Path
from flashloom import settings
from flashloom.kernel import cpp
from flashloom.target import Target
settings.configure(cache_dir={str(settings.get().cache_dir)!r})
x = torch.randn(500, 500) @ torch.randn(500, 500)
folders = [Path({str(kernel().include_dirs[0])!r}), Path({str(CPU)!r})]
function = cpp.build({SOURCE!r}, folders, Target.here(), dict(SCALE=1), "sum").get_function("sum", 2)
assert function(2, 1000) == 499500
x.exp().sum()
print({{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert len(re.findall("lib[^/']*omp", done.stdout)) == 1, done.stdout


def environment(**changes) -> dict:
    return {**os.environ, "PYTHONPATH": str(Path(flashloom.__file__).parents[1]), **changes}


def test_no_library_is_needed_but_the_c_library(kernel, tmp_path):
    (tmp_path / "kernel.so").write_bytes(kernel().entry().files["kernel.so"])
    needed = subprocess.run(
        ["readelf", "-d", tmp_path / "kernel.so"], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"NEEDED.*\[(.*)\]", needed)) <= {"libc.so.6", "libm.so.6"}


def test_nothing_but_the_entries_is_visible(kernel, tmp_path):
    """Kernels of one process have functions of equal names within."""
    source = SOURCE + "template <class T> struct Held { static int value; };\n"
    source += "template <class T> int Held<T>::value = 1;\n"
    source += "template <class T> int shown() { return Held<T>::value; } template int shown<long>();\n"
    (tmp_path / "kernel.so").write_bytes(kernel(source=source).entry().files["kernel.so"])
    command = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", tmp_path / "kernel.so"]
    assert subprocess.check_output(command, text=True).split() == ["flashloom_sum"]


@pytest.mark.parametrize("target", ["x86", "x86-avx2", "x86-avx512", "x86-amx"])
def test_every_target_is_compiled_here(target, kernel):
    if not Target("x86").supported:
        pytest.skip("this machine's compiler makes no x86 code")
    assert kernel(target=Target(target)).entry().files["kernel.so"][:4] == b"\x7fELF"


@pytest.mark.parametrize("name", ["clang++", "clang++-19", "g++"])
def test_either_compiler(name, kernel):
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    settings.configure(cxx=name)
    assert build(kernel())(2, 1000) == 499500


# Keys


def test_the_key_is_of_the_content_alone(kernel, tmp_path):
    """Another process, folder, PATH, home and file time, and the package's headers in another place: the same key."""
    first = kernel()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "include", elsewhere / "include")
    shutil.copytree(CPU, elsewhere / "cpu")
    for path in elsewhere.rglob("*.h"):
        os.utime(path, (1e9, 1e9))
    code = f"""
import sys
from pathlib import Path
from flashloom.kernel.cpp import CppKernel, find_compiler
from flashloom.store.entry import Key
from flashloom.target import Target
folders = (Path("include"), Path("cpu"))
kernel = CppKernel("other name", {SOURCE!r}, folders, Target({first.target.name!r}), dict(SCALE=1))
print(Key.of(kernel.fields, find_compiler().identity).key)
"""
    changes = {"PATH": f"/nowhere:{os.environ['PATH']}", "HOME": "/nowhere", "PYTHONHASHSEED": "7", "LANG": "C"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment(**changes), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == first.entry().key.key


def test_every_change_of_the_content_changes_the_key(kernel, tmp_path):
    requests = [store.digest(kernel().fields)]

    def changed(kernel):
        requests.append(store.digest(kernel.fields))

    changed(kernel(source=SOURCE + " "))
    changed(kernel(SCALE=2))
    changed(kernel(MORE=1))
    changed(kernel(target=Target("x86" if Target.here().name != "x86" else "x86-avx2")))
    header = tmp_path / "include" / "number.h"
    status = header.stat()
    header.write_text("#define NUMBER SCALE/")  # a byte changed, size and time kept
    os.utime(header, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert header.stat().st_size == status.st_size
    changed(kernel())
    header.write_text('#include "inner.h"\n')
    (tmp_path / "include" / "inner.h").write_text("#define NUMBER 1\n")
    changed(kernel())
    (tmp_path / "include" / "inner.h").write_text("#define NUMBER 2\n")
    changed(kernel())
    assert len(set(requests)) == len(requests)


def test_flags_are_in_the_key(kernel, monkeypatch):
    before = kernel().fields
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-g"))
    assert kernel().fields != before


def test_headers_are_in_the_key(kernel):
    assert {"threads.h", "number.h"} == set(kernel().fields["includes"])


def test_the_compiler_is_in_the_key(kernel, tmp_path):
    wrapper = tmp_path / "g++-99"
    wrapper.write_text(FAKE + f'exec {shutil.which("g++")} "$@"\n')
    wrapper.chmod(0o755)
    first = kernel().entry()
    settings.configure(cxx=str(wrapper))
    second = kernel().entry()
    assert first.key.request == second.key.request
    assert first.key.key != second.key.key
    assert second.toolchain["compiler"] == "gcc version 99.1"


def test_builds_are_reproducible(kernel, monkeypatch, tmp_path):
    first = kernel().entry()
    settings.configure(cache_dir=tmp_path / "another")
    monkeypatch.setattr(store_module, "_state", store_module._State())
    assert kernel().entry().files == first.files
    assert store.counters().builds == 1


def test_the_environment_does_not_reach_the_compiler(kernel, monkeypatch, tmp_path):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "stdint.h").write_text("#error planted")
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(tmp_path / "planted"))
    monkeypatch.setenv("CPATH", str(tmp_path / "planted"))
    assert kernel().entry().files


# Failures


def test_a_compile_error_ends_with_its_cause_first(kernel):
    source = SOURCE.replace("int64_t chunks", "int65_t chunks")
    with pytest.raises(CompileError) as caught:
        kernel(source=source).entry()
    lines = str(caught.value).splitlines()
    assert "error:" in lines[0]
    place, log = (Path(line.split(":", 1)[1].strip()) for line in lines[-2:])
    assert place.read_text() == source
    assert "int65_t" in log.read_text()
    assert store.counters().failures == 1
    shutil.rmtree(place.parent)


def test_a_killed_compiler_is_said_to_want_memory(kernel, tmp_path):
    wrapper = tmp_path / "g++"
    wrapper.write_text(FAKE + "kill -9 $$\n")
    wrapper.chmod(0o755)
    settings.configure(cxx=str(wrapper))
    with pytest.raises(CompileError, match="FLASHLOOM_JOBS=1"):
        kernel().entry()
    assert store.counters().builds == 0


def test_a_compiler_for_another_machine_is_refused(kernel):
    with pytest.raises(NoCompiler, match=r"compiles for x86_64.*not for aarch64.*aarch64-linux-gnu-g\+\+"):
        kernel(target=Target("aarch64")).entry()


def test_something_that_is_no_compiler_is_refused(kernel):
    settings.configure(cxx="true")
    with pytest.raises(NoCompiler, match="true -v` does not answer"):
        kernel().entry()


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("g++: error: unrecognized command-line option '-mamx-tile'", "FLASHLOOM_TARGET"),
        ("fatal error: error writing to /tmp/x.s: No space left on device", "TMPDIR"),
    ],
)
def test_known_causes_have_a_hint(message, hint, kernel, tmp_path):
    wrapper = tmp_path / "g++"
    wrapper.write_text(FAKE + f'echo "{message}" >&2\nexit 1\n')
    wrapper.chmod(0o755)
    settings.configure(cxx=str(wrapper))
    with pytest.raises(CompileError) as caught:
        kernel().entry()
    lines = str(caught.value).splitlines()
    assert lines[0] == message
    assert hint in lines[1]


def test_cxx_is_a_wish_and_flashloom_cxx_an_order(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")  # no program of that name
    assert cpp.find_compiler().path == shutil.which("g++")
    monkeypatch.setenv("CXX", "c++")
    assert cpp.find_compiler().path == shutil.which("c++")


def test_a_missing_header_is_named(kernel):
    with pytest.raises(CompileError, match=r'#include "absent\.h" is in none of'):
        _ = kernel(source='#include "absent.h"\n').fields


def test_no_compiler_says_what_to_do(kernel, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoCompiler, match="apt install g"):
        kernel().entry()
    settings.configure(cxx="g++-77")
    with pytest.raises(NoCompiler, match=r"'g\+\+-77' that FLASHLOOM_CXX names"):
        kernel().entry()


def test_no_compiler_and_a_warm_store(kernel, monkeypatch):
    build(kernel())
    monkeypatch.setattr(cpp, "_loaded", {})
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert build(kernel())(2, 1000) == 499500
    assert store.counters().builds == 1


@pytest.mark.parametrize("damage", ["another architecture", "no library"])
def test_an_entry_that_does_not_load_is_built_anew(damage, kernel, monkeypatch):
    """Its digests are right, so that only the system's loader can tell."""
    good = kernel().entry()
    folder = store.default_folder()
    folder.remove(good.key)
    data = bytearray(good.files["kernel.so"])
    if damage == "no library":
        data = bytearray(b"not a library")
    else:
        data[18] ^= 0xFF  # e_machine
    object.__setattr__(good, "files", {**good.files, "kernel.so": bytes(data)})
    assert folder.publish(good)
    monkeypatch.setattr(store_module, "_state", store_module._State())
    assert build(kernel())(2, 1000) == 499500
    assert (store.counters().corrupt, store.counters().builds) == (1, 1)


def test_without_memfd_a_temporary_file_serves(kernel, monkeypatch):
    def forbidden(*args):
        raise OSError(1, "forbidden")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert build(kernel(SCALE=7))(1, 10) == 45 * 7


def test_gpu_targets_are_refused():
    with pytest.raises(ValueError, match="'sum' is C\\+\\+ and its target sm90 a GPU"):
        CppKernel("sum", "", (), Target("sm90"))


def test_the_runtime_is_torchs():
    import torch

    assert load_module.openmp_runtime().startswith(str(Path(torch.__file__).parent.parent))
