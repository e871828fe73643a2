"""The launch path without a GPU: a driver that notes what it is asked to launch, under the real plan and packing."""

import contextlib
import ctypes
import struct
from collections import deque
from types import SimpleNamespace

import pytest
import torch

import flashloom as fl
from flashloom import dispatch
from flashloom.attention import triton_buffers
from flashloom.attention.kernels.triton import asked
from flashloom.attention.kernels.triton.config import choose
from flashloom.attention.triton_executor import TritonExecutor, guard
from flashloom.kernel import cuda, gluon, launch
from flashloom.target import Target

BF16, HEADS = torch.bfloat16, fl.HeadShape(8, 2, 64)
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class Driver:
    """Notes (grid, block, shared bytes, stream) and the first 8-byte argument words of every launch."""

    def __init__(self):
        self.launches, self.code, self.cuLaunchKernelEx = [], 0, LAUNCH(self._launch)

    def _launch(self, config, function, parameters, extra):
        gx, gy, gz, bx, by, bz, shared, stream, attributes, number = struct.unpack(
            "=7I4xQQI4x", ctypes.string_at(config, 56)
        )
        assert (gy, gz, by, bz, attributes, number, extra) == (1, 1, 1, 1, 0, 0, None)
        places = (ctypes.c_void_p * 7).from_address(parameters)
        words = tuple(ctypes.c_int64.from_address(place).value for place in places)
        self.launches.append((gx, bx, shared, stream, words))
        return self.code


class OnDriver(TritonExecutor):
    """The Triton executor whose kernels are never compiled or launched."""

    refuses = classmethod(lambda cls, spec, device: None)

    def plan(self, batch, reserve):
        self._gpu, self._paged, self._ragged, self._table_page = True, True, False, batch.page_size
        self._reserve, self.target = reserve or fl.Reserve(), Target("sm90")
        self.config, self._programs = choose(asked.need(self.spec, 1, 1, 16, 90, batch.requests)), 132
        self._fixed, self._merge_ratio = 0, 1.0
        self._kernels = {form: _launch(self._asked(form)) for form in self._forms(self.spec)}
        self._planner = _launch(asked.plan_kernel(self.spec, self.config, True, self.target))
        self._ones = torch.ones(1)
        self._one = self._ones.data_ptr()
        self._staging = SimpleNamespace(copy=lambda batch, capacity: (1, 2, 3, 4), errors=[], capacity=0)
        self._grow(batch)
        self.update(batch)


def _launch(kernel):
    types = [t for kind in kernel.signature.values() for t in (kind if isinstance(kind, tuple) else [kind])]
    entry = SimpleNamespace(label="noted")
    function = SimpleNamespace(
        device=torch.device("cuda", 0), handle=ctypes.c_void_p(7), threads=128, shared=64, entry=entry
    )
    return cuda.Launch(function, types)


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(cuda, "raw_stream", lambda index: 5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "choose", lambda spec, device: [(OnDriver, None)])
    return made


def _plan(requests=3, variant=fl.causal, **more):
    table = torch.arange(requests * 4, dtype=torch.int32).view(requests, 4)
    kv = fl.PageTable.from_block_table(table, [64] * requests, page_size=16)
    attention = fl.Attention(HEADS, variant=variant, dtype=BF16, device="cpu", **more)
    return attention.plan(fl.Batch.decode(kv))


def _tensors(requests=3):
    cache = [torch.zeros(2, requests * 4, 16, 2, 64, dtype=BF16) for _ in range(2)]
    q = torch.zeros(requests, 8, 64, dtype=BF16)
    return q, cache, torch.empty_like(q)


def _addresses(*tensors):
    return tuple(x.data_ptr() for x in tensors)


def test_a_repeated_run_rewrites_addresses_alone(driver):
    plan, (q, cache, out) = _plan(), _tensors()
    driver.launches.clear()
    for layer in (*cache, *cache):
        plan.run(q, (layer[0], layer[1]), out=out)
    assert [x[4][:4] for x in driver.launches] == [_addresses(q, c[0], c[1], out) for c in (*cache, *cache)]
    assert len({(*x[:4], x[4][4:]) for x in driver.launches}) == 1
    assert plan._repeat is not None
    other = torch.zeros_like(q)
    given = plan.run(other, (cache[0][0], cache[0][1]))
    assert driver.launches[-1][4][:4] == _addresses(other, *cache[0], given)
    assert given.shape == q.shape


def test_whatever_else_differs_is_looked_at(driver):
    plan, (q, cache, out) = _plan(), _tensors()
    kv = (cache[0][0], cache[0][1])

    def quick():
        plan.run(q, kv, out=out)
        assert plan._repeat is not None

    quick()
    with pytest.raises(TypeError, match="q has dtype"):
        plan.run(q.float(), kv, out=out)
    with pytest.raises(ValueError, match="q has 2 tokens"):
        plan.run(q[:2], kv, out=out)
    with pytest.raises(ValueError, match="inner stride"):
        plan.run(q, kv, out=torch.empty(3, 8, 128, dtype=BF16)[..., ::2])
    with pytest.raises(TypeError, match="q is list"):
        plan.run([q], kv, out=out)
    with pytest.raises(TypeError, match="k is NoneType"):
        plan.run(q, (None, kv[1]), out=out)
    with pytest.raises(ValueError, match="k is"):
        plan.run(q, (kv[0][:, :8], kv[1]), out=out)
    with pytest.raises(RuntimeError, match="q requires grad"):
        plan.run(q.clone().requires_grad_(), kv, out=out)
    wide = torch.zeros(3, 16, 64, dtype=BF16)[:, :8]
    plan.run(wide, kv, out=out)  # other strides
    assert driver.launches[-1][4][0] == wide.data_ptr()
    odd = torch.zeros(3 * 8 * 64 + 1, dtype=BF16)[1:].view(3, 8, 64)  # rows that are not aligned
    quick()
    grid = driver.launches[-1][0]
    plan.run(odd, kv, out=out)
    assert driver.launches[-1][4][0] == odd.data_ptr()
    assert plan._executor._last is not plan._executor._kernels[asked.Form(BF16)]
    lse = torch.empty(3, 8)
    quick()
    plan.run(q, kv, out=out, lse=lse)
    assert driver.launches[-1][4][4] == lse.data_ptr()
    assert plan._repeat is None
    plan.run(q, kv, out=out)
    assert driver.launches[-1][4][4] == 0
    assert driver.launches[-1][0] == grid


def test_an_update_is_followed_by_a_full_look(driver):
    plan, (q, cache, out) = _plan(), _tensors()
    kv = (cache[0][0], cache[0][1])
    plan.run(q, kv, out=out)
    table = torch.full((3, 4), 99, dtype=torch.int32)
    plan.update(fl.Batch.decode(fl.PageTable.from_block_table(table, [64] * 3, page_size=16)))
    assert plan._repeat is None
    with pytest.raises(ValueError, match="page 99"):
        plan.run(q, kv, out=out)


def test_scales_of_another_layer_are_taken(driver):
    plan, (q, cache, out) = _plan(kv_dtype=torch.int8), _tensors()
    k, v = cache[0][0].to(torch.int8), cache[0][1].to(torch.int8)
    scales = [torch.ones(1) for _ in range(3)]
    for scale in (scales[0], scales[1], scales[1], scales[2]):
        plan.run(q, (k, v, scale, scale), out=out)
        assert driver.launches[-1][4][5:7] == (scale.data_ptr(),) * 2


def test_another_instance_is_not_repeated(driver):
    table = [torch.zeros(8), torch.ones(8)]
    plan, (q, cache, out) = _plan(variant=fl.causal & fl.sink(table[0])), _tensors()
    kv = (cache[0][0], cache[0][1])
    plan.run(q, kv, out=out)
    plan.run(q, kv, out=out, variant=fl.causal & fl.sink(table[1]))
    assert plan._repeat is None
    plan.run(q, kv, out=out)
    assert plan._executor._values[0] is table[0]


def test_a_reported_error_is_raised_by_the_next_run(driver):
    plan, (q, cache, out) = _plan(), _tensors()
    kv = (cache[0][0], cache[0][1])
    plan.run(q, kv, out=out)
    plan._executor._buffers.error[:] = torch.tensor([3, 0, 50, 12])
    with pytest.raises(ValueError, match="50 pages"):
        plan.run(q, kv, out=out)


def test_a_refused_launch_is_named(driver, monkeypatch):
    plan, (q, cache, out) = _plan(), _tensors()
    driver.code = 700
    driver.cuGetErrorString = lambda code, text: 0
    with pytest.raises(cuda.CudaError, match="launching noted failed with CUDA error 700"):
        plan.run(q, (cache[0][0], cache[0][1]), out=out)


def test_a_launch_on_another_device_changes_to_it(driver, monkeypatch):
    plan, (q, cache, out) = _plan(), _tensors()
    current = [1]

    @contextlib.contextmanager
    def use(device):
        current.append(0 if device in (0, torch.device("cuda", 0)) else 1)
        yield
        current.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", use)
    seen = []
    noted = LAUNCH(lambda *args: seen.append(current[-1]) or 0)
    monkeypatch.setattr(driver, "cuLaunchKernelEx", noted)
    plan = _plan()
    plan.run(q, (cache[0][0], cache[0][1]), out=out)
    plan.run(q, (cache[0][0], cache[0][1]), out=out)
    assert seen == [0, 0, 0]
    assert current == [1]


def test_the_guard_sees_sizes_strides_dtypes_and_gradients():
    x = torch.zeros(4, 6, 8)
    same = guard(x, x.clone())
    assert same is not None
    assert same(torch.ones(4, 6, 8), x)
    for other in (x[:3], x.double(), x.transpose(0, 1), torch.zeros(4, 6, 16)[..., :8], None, 3, x.requires_grad_()):
        assert not same(other, torch.ones(4, 6, 8))
    assert guard(x, torch.ones(4, 6, 8)) is None


def test_what_leaves_stays_until_it_is_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_buffers, "_leaving", leaving := deque())

    def event(done):
        def query():
            leaving.append((None, ["of a plan that goes while the others are looked at"]))
            return done

        return SimpleNamespace(query=query)

    pending = event(False)
    leaving.extend([(event(True), ["done"]), (pending, ["pending"]), (None, ["captured"])])
    triton_buffers._sweep()
    assert [buffers[0].split()[0] for _, buffers in leaving] == ["of", "of", "pending", "captured"]
    assert leaving[2][0] is pending


def test_tensor_maps_are_encoded_as_the_driver_wants_them(driver):
    """Innermost dimension first, strides in bytes without the innermost, boxes no wider than the swizzle."""
    seen, encode_types = (
        [],
        [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *[ctypes.c_void_p] * 5, *[ctypes.c_int] * 4],
    )
    codes = [0, 0, 1, 2]

    def encode(place, kind, rank, address, sizes, strides, box, steps, *modes):
        longs = [list((ctypes.c_uint64 * n).from_address(at)) for at, n in ((sizes, rank), (strides, rank - 1))]
        ints = [list((ctypes.c_uint32 * rank).from_address(at)) for at in (box, steps)]
        seen.append((place % 64, kind, address, *longs, *ints, modes))
        return codes.pop(0)

    driver.cuTensorMapEncodeTiled = ctypes.CFUNCTYPE(ctypes.c_int, *encode_types)(encode)
    driver.cuGetErrorString = lambda code, text: 0
    maps = gluon.TensorMaps((16, 4, 128), BF16).of((1000, 32, 128), (128, 40960))
    first = maps(4096)
    assert maps(4096) is first
    assert len(first) == 128
    assert seen == [(0, 9, 4096, [128, 32, 1000], [81920, 256], [64, 4, 16], [1, 1, 1], (0, 3, 2, 0))]
    gluon.TensorMaps((64, 1, 64), BF16).of((7, 1, 64), (64, 3))(8192)  # the stride of one head says nothing
    assert seen[1][3:5] == ([64, 1, 7], [16, 128])
    with pytest.raises(cuda.NoMap, match=r"sizes \(1000, 32, 128\), strides \(128, 40960\) elements at 0x2000"):
        maps(8192)
    with pytest.raises(cuda.CudaError, match="CUDA error 2") as other:
        maps(8192)
    assert not isinstance(other.value, cuda.NoMap)


def test_a_plan_knows_all_memory_of_its_own_that_a_launch_reads(driver):
    """Another stream must be done with it before somebody else gets it."""
    plan, (q, cache, out) = _plan(variant=fl.causal & fl.sink(sinks := torch.zeros(8))), _tensors()
    plan.run(q, (cache[0][0], cache[0][1]), out=out)
    executor = plan._executor
    types = [t for kind in executor._asked(asked.Form(BF16)).signature.values() for t in (
        kind if isinstance(kind, tuple) else [kind])]  # fmt: skip
    words = struct.unpack(f"={len(types) + 2}q", executor._last._buffer.raw[: 8 * (len(types) + 2)])
    places = [word for word, kind in zip(words, types) if kind[0] == "*"]
    assert len(places) == 13
    known = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (q, cache[0], out, sinks, *executor.buffers())]
    assert all(not place or any(low <= place < high for low, high in known) for place in places)


def test_a_captured_plan_keeps_its_buffers(driver):
    plan, (q, cache, out) = _plan(), _tensors(6)
    memory, batch = plan._executor._buffers.memory, plan.batch
    plan._captured = True
    smaller, larger = (fl.PageTable.from_block_table(torch.zeros(n, 4).int(), [64] * n, page_size=16) for n in (2, 6))
    plan.update(fl.Batch.decode(smaller))
    with pytest.raises(ValueError, match="CUDA graph in which the plan was captured would go on with the former"):
        plan.update(fl.Batch.decode(larger))
    assert plan.batch.requests == 2
    assert plan._executor._buffers.memory is memory
    plan.update(batch)
    plan.run(q[:3], (cache[0][0], cache[0][1]), out=out[:3])
    plan._captured = False
    plan.update(fl.Batch.decode(larger))
    assert plan._executor._buffers.memory is not memory


@pytest.mark.parametrize(("page", "kind"), [(2**34 - 8, "i32"), (2**34, "i64")])
def test_strides_beyond_32_bits_take_a_kernel_of_their_own(driver, monkeypatch, page, kind):
    """Strides count vectors of 16 bytes, which are 8 numbers here."""
    seen = []

    def launcher(kernel, device):
        seen.append({kernel.signature[name] for name in asked.STRIDES})
        return kernel

    monkeypatch.setattr(launch, "launcher", launcher)
    executor = _plan()._executor
    executor._kernels = {}
    k = torch.empty(1, dtype=BF16, device="meta").as_strided((12, 16, 2, 64), (page, 128, 64, 1))
    q = torch.empty(3, 8, 64, dtype=BF16)
    executor._prepared(q, SimpleNamespace(k=k, v=k, k_scale=None, v_scale=None), q, None, 0.1, False, 0)
    assert seen == [{kind}]
