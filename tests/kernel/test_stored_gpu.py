"""GPU kernels that are stored: identified, found and made ready to launch on a host where Triton cannot be imported."""

import ast
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashloom as fl
from flashloom import dispatch, settings, store
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.kernels.hopper import asked as hopper
from flashloom.kernel import cuda, launch, source
from flashloom.kernel.resident import Resident
from flashloom.store import store as store_module
from flashloom.target import Target

BF16 = torch.bfloat16
HEADS = fl.HeadShape(4, 1, 64)
KERNEL_FILES = [f"flashloom.attention.kernels.{name}" for name in
                ("triton.attend", "triton.plan", "triton.append", "hopper.attend")]  # fmt: skip


def spec(variant=fl.causal) -> AttentionSpec:
    return AttentionSpec(HEADS, variant.program.specialise(64, 64), BF16, BF16)


@pytest.mark.parametrize("module", KERNEL_FILES)
def test_a_kernels_identity_covers_every_file_it_is_made_of(module):
    """The quick scan for imports finds what Python's own parser finds."""
    root, found, waiting = Path(fl.__file__).parents[1], set(), [module]
    while waiting:
        name = waiting.pop()
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if name in found or not name.startswith("flashloom.") or not path.is_file():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert set(source.files_of(module)) == found
    assert len(found) > 1 or module.endswith(("plan", "append"))


def test_a_changed_byte_of_any_file_is_another_kernel(monkeypatch):
    module, read = KERNEL_FILES[0], Path.read_bytes
    seen = {source._digest.__wrapped__(module)}
    for name in source.files_of(module):
        file = f"{name.rpartition('.')[2]}.py"
        monkeypatch.setattr(Path, "read_bytes", lambda path, file=file: read(path) + b" " * (path.name == file))
        seen.add(source._digest.__wrapped__(module))
    assert len(seen) == 1 + len(source.files_of(module))


def test_a_constant_without_an_identity_is_refused():
    kernel = dispatch.kernels(spec(), Target("sm90"), 1, 1, 16)[0]
    kernel.constants["ODD"] = object()
    with pytest.raises(TypeError, match="has no identity"):
        _ = kernel.fields


HOST = """
import contextlib, ctypes, struct, sys
sys.modules["triton"] = None  # import triton fails, as on a host without it
import torch
import flashloom as fl
from flashloom import dispatch, store
from flashloom.attention.executor import AttentionSpec
from flashloom.attention.triton_executor import TritonExecutor
from flashloom.attention.hopper_executor import HopperExecutor
from flashloom.kernel import cuda, launch
from flashloom.target import Target

class Driver:
    calls = []
    def __getattr__(self, name):
        def call(*arguments):
            Driver.calls.append(name)
            if name == "cuModuleLoadData":
                assert arguments[1][:4] == b"\\x7fELF"
            return 0
        return call

cuda._driver = lambda driver=Driver(): driver
cuda._use_context = lambda index: None
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.synchronize = lambda: None
torch.cuda.get_device_capability = lambda device=None: (9, 0)

device, heads = torch.device("cuda", 0), fl.HeadShape(4, 1, 64)
spec = AttentionSpec(heads, fl.causal.program.specialise(64, 64), torch.bfloat16, torch.bfloat16)
assert TritonExecutor.refuses(spec, device) is None and HopperExecutor.refuses(spec, device) is None
if sys.argv[1:]:
    fl.use(sys.argv[1], on_miss="error")
kernels = dispatch.kernels(spec, Target("sm90"), 1, 1, 16)
for kernel in kernels[:2]:
    made = launch.launcher(kernel, device)
    flat = [t for kind in kernel.signature.values() for t in (kind if isinstance(kind, tuple) else [kind])]
    made._pack(*[1] * len(flat), 0, 0)
assert Driver.calls.count("cuModuleLoadData") == 2
other = AttentionSpec(heads, fl.full.program.specialise(64, 64), torch.bfloat16, torch.bfloat16)
try:
    dispatch.kernels(other, Target("sm90"), 1, 1, 16)[1].entry()
except (fl.SealedError, store.NoToolchain) as error:
    print(type(error).__name__, error)
assert not any(name.startswith("triton.") for name in sys.modules)
assert "flashloom.attention.kernels.triton.attend" not in sys.modules
print("ready", store.counters().hits, store.counters().builds)
"""


def _host(folder: Path, *pack: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOST), *pack],
        env={**os.environ, "FLASHLOOM_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(fl.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_host_without_triton_takes_stored_and_packed_kernels(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(settings, "_current", settings.Settings(cache_dir=tmp_path / "store"))
    monkeypatch.setattr(store_module, "_state", store_module._State())
    kernels = dispatch.kernels(spec(), Target("sm90"), 1, 1, 16)[:2]
    store.write_pack(tmp_path / "a.loom", [kernel.entry() for kernel in kernels])
    packed = _host(tmp_path / "empty", str(tmp_path / "a.loom"))
    assert "ready 2 0" in packed
    assert "SealedError" in packed
    stored = _host(tmp_path / "store")
    assert "ready 2 0" in stored
    assert "NoToolchain Triton is not installed: install flashloom[gpu], or use a pack" in stored


def test_without_a_toolchain_the_next_backend_serves(monkeypatch):
    class Fails:
        name = "gpu-like"
        refuses = classmethod(lambda cls, spec, device: None)

        def __init__(self, spec, device):
            pass

        def plan(self, batch, reserve):
            raise store.NoToolchain("Triton is not installed")

    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(
        dispatch, "choose", lambda spec, device: [(Fails, None), (dispatch._find(dispatch.ATTENTION["cpu"][-1]), None)]
    )
    attention = fl.Attention(HEADS, dtype=torch.float32, device="cpu")
    with pytest.warns(RuntimeWarning, match="passes over its gpu-like kernels.*Triton is not installed"):
        plan = attention.plan(fl.Batch(q_lens=[3], kv=fl.RaggedKV([3])))
    assert "gpu-like: no compiler (Triton is not installed)" in plan.explain()


def test_hopper_kernels_are_identified_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tests.kernel.test_stored_gpu import hopper_fields; print(hopper_fields())"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{Path(fl.__file__).parents[1]}:{root}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hopper_fields()


def hopper_fields() -> str:
    chosen = hopper.choose(spec(), 1000, 16)
    return store.digest(hopper.attend_kernel(spec(), hopper.Form(BF16), chosen, 16, Target("sm90")).fields)


FIRST = """
import contextlib, sys, types
import torch
import flashloom as fl
settled = set(sys.modules)
attention = fl.Attention(fl.HeadShape(4, 1, 64), variant=fl.causal, dtype=torch.bfloat16, device="cpu")
batch = fl.Batch.decode(fl.PageTable.from_csr([0, 1], [0], [1], page_size=16))

from flashloom import dispatch, store
from flashloom.kernel import cuda, launch
from flashloom.target import Target

class Driver:
    def __getattr__(self, name):
        return lambda *arguments: 0

cuda._driver = lambda driver=Driver(): driver
cuda._use_context = lambda index: None
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.synchronize = lambda: None
torch.cuda.get_device_capability = lambda device=None: (9, 0)

gpu = types.SimpleNamespace(type="cuda", index=0)
executors = iter(dispatch.choose(attention.spec, gpu))
hopper, triton = next(executors)[0], next(executors)[0]
assert "queries are few" in hopper.declines(attention.spec, batch)
planner, *forms = triton.kernels(attention.spec, Target("sm90"), 1, 1, 16)[:3]
loaded, others = launch.launchers([planner, *forms[:1]], gpu, forms[1:])
assert len(loaded) == 2 and None not in others
assert store.counters() == store.Counters(hits=3)
print(*sorted(set(sys.modules) - settled))
"""


def test_a_first_decode_from_the_store_imports_nothing_that_builds(tmp_path, monkeypatch):
    """What is imported is most of the time of a first call."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(settings, "_current", settings.Settings(cache_dir=tmp_path))
    monkeypatch.setattr(store_module, "_state", store_module._State())
    for kernel in dispatch.kernels(spec(), Target("sm90"), 1, 1, 16)[:3]:
        kernel.entry()
    environment = {**os.environ, "FLASHLOOM_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(fl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert "flashloom.attention.triton_executor" in imported
    idle = (
        "attention.reference", "attention.cpu", "attention.blocks", "bench", "kernel.cpp", "kernel.gluon", "lower.cpp",
        "lower.gluon", "lower.torch", "store.evict", "store.jobs", "store.locks", "tune", "variant.flex",
    )  # fmt: skip
    heavy = {"triton", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "transformers", "platformdirs"}
    assert not imported & {*heavy, *(f"flashloom.{name}" for name in idle)}
    # 0.1 to 0.4 ms each; checks of variants, of what they index and of integers are twelve of them
    assert len([name for name in imported if name.startswith("flashloom.")]) <= 68


class Loaded:
    def __init__(self, entry, device):
        self.entry = entry


class Slow:
    """Kernels that are compiled when they are told to be."""

    def __init__(self, name: str, may: bool = True):
        self.name, self.may, self.fields, self.signature = name, may, {"name": name}, {}
        self.asked, self.go = [], threading.Event()

    def stored(self):
        return None

    def may_build(self):
        return self.may

    def build_meanwhile(self):
        store.meanwhile(self.entry)

    def entry(self):
        self.asked.append(threading.current_thread().name)
        assert self.go.wait(30)
        return SimpleNamespace(label=self.name)


def test_kernels_that_are_seldom_met_are_compiled_meanwhile(monkeypatch):
    monkeypatch.setattr(cuda, "_functions", Resident(lambda: 8))
    monkeypatch.setattr(cuda, "Function", Loaded)
    monkeypatch.setattr(cuda, "Launch", lambda function, types: function)
    monkeypatch.setattr(store_module, "_state", store_module._State())
    first, other = Slow("first"), Slow("other")
    first.go.set()
    gpu = SimpleNamespace(type="cuda", index=0)
    (made,), (later,) = launch.launchers([first], gpu, [other])
    assert made.entry.label == "first"
    assert later is None
    sealing = threading.Thread(target=store.seal)  # waits for what was begun
    sealing.start()
    sealing.join(0.2)
    assert sealing.is_alive()
    assert not store.is_sealed()
    other.go.set()
    sealing.join(30)
    assert store.is_sealed()
    assert other.asked == ["flashloom-meanwhile"]


def test_what_may_not_be_compiled_is_asked_for_at_once(monkeypatch):
    monkeypatch.setattr(cuda, "_functions", Resident(lambda: 8))

    class Refused(Slow):
        def entry(self):
            raise fl.SealedError(self.name)

    with pytest.raises(fl.SealedError, match="other"):
        launch.launchers([], SimpleNamespace(type="cuda", index=0), [Refused("other", may=False)])


def test_what_fails_meanwhile_is_told_to_who_asks(monkeypatch):
    monkeypatch.setattr(store_module, "_state", store_module._State())
    store.meanwhile(lambda: 1 / 0)
    store.finish()
    assert not store_module._state.later
