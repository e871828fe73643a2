"""What the kernels use of `gluon.language` and of Hopper's instructions, on an emulated machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tests.hopper.emulator.machine import Barrier, Broken, Dirty, Machine, NamedBarrier

MACHINE: list[Machine] = []  # the one of the launch that runs


def machine() -> Machine:
    return MACHINE[-1]


class Type:
    """An element type, and that of pointers to it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.torch, self.primitive_bitwidth = dtype, 8 * dtype.itemsize

    @property
    def element_ty(self) -> Type:
        return self


TYPES = {
    "fp16": Type(torch.float16), "bf16": Type(torch.bfloat16), "fp32": Type(torch.float32), "fp64": Type(torch.float64),
    "i1": Type(torch.bool), "i8": Type(torch.int8), "i16": Type(torch.int16), "i32": Type(torch.int32),
    "i64": Type(torch.int64), "u8": Type(torch.uint8), "fp8e4nv": Type(torch.float8_e4m3fn),
}  # fmt: skip


def raw(x: Any) -> Any:
    return x.x if isinstance(x, Block) else x


def tensor(x: Any) -> torch.Tensor:
    x = raw(x)
    if isinstance(x, torch.Tensor):
        return x
    kind = torch.bool if isinstance(x, bool) else torch.int32 if isinstance(x, int) else torch.float32
    return torch.tensor(x, dtype=torch.int64 if kind == torch.int32 and abs(x) >= 1 << 31 else kind)


def _pair(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands in their common type: a Python number takes that of the other, unless it is of a higher kind."""
    weak = [not isinstance(x, Block) for x in (a, b)]
    x, y = tensor(a), tensor(b)
    if weak[0] != weak[1]:
        number, other = (x, y) if weak[0] else (y, x)
        kind = other.dtype
        if number.is_floating_point() and not other.is_floating_point():
            kind = torch.float32
        elif other.dtype == torch.bool:
            kind = number.dtype
        return x.to(kind), y.to(kind)
    kind = torch.promote_types(x.dtype, y.dtype)
    return x.to(kind), y.to(kind)


class Block:
    """A scalar or a block of values. Integer division truncates."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape)

    @property
    def dtype(self) -> Type:
        return Type(self.x.dtype)

    def to(self, kind: Type) -> Block:
        return Block(self.x.to(kind.torch))

    def __getitem__(self, where: Any) -> Block:
        return Block(self.x[where])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __int__(self) -> int:
        return int(self.x)

    __index__ = __int__

    def __neg__(self) -> Block:
        return Block(-self.x)

    def __invert__(self) -> Block:
        return Block(~self.x)


def _operator(name: str, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def forward(self: Block, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointer) else Block(function(*_pair(self, other)))

    def backward(self: Block, other: Any) -> Any:
        return Block(function(*_pair(other, self)))

    setattr(Block, f"__{name}__", forward)
    setattr(Block, f"__r{name}__", backward)


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc")


for _name, _function in {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "truediv": torch.true_divide,
    "floordiv": _quotient, "mod": torch.fmod, "and": torch.bitwise_and, "or": torch.bitwise_or,
    "xor": torch.bitwise_xor, "lshift": torch.bitwise_left_shift, "rshift": torch.bitwise_right_shift,
}.items():  # fmt: skip
    _operator(_name, _function)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):  # Python turns what is backward into another of these
    _operator(_name, getattr(torch, _name))


class Pointer:
    """Addresses of elements."""

    def __init__(self, address: Any, dtype: Type) -> None:
        self.address, self.dtype = address, dtype

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.address + tensor(offset).to(torch.int64) * self.dtype.torch.itemsize, self.dtype)

    def __getitem__(self, where: Any) -> Pointer:
        return Pointer(self.address[where], self.dtype)


def _reach(pointer: Pointer, mask: Any, x: torch.Tensor, what: str) -> tuple[torch.Tensor, ...]:
    """(memory, index of each element in it, which elements are asked for, x), the last three of one shape."""
    address = torch.as_tensor(pointer.address, dtype=torch.int64)
    keep = torch.ones((), dtype=torch.bool) if mask is None else tensor(mask)
    address, keep, x = torch.broadcast_tensors(address, keep, x)
    kind, asked = pointer.dtype.torch, address[keep]
    if not len(asked):
        return torch.zeros(1, dtype=kind), torch.zeros_like(address), keep, x
    low, high = int(asked.min()), int(asked.max()) + kind.itemsize
    if bool((asked % kind.itemsize).any()):
        raise Broken(f"{what} is not aligned")
    memory = machine().memory.view(low, high, kind, what)
    return memory, torch.where(keep, (address - low) // kind.itemsize, 0), keep, x


def load(pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Block:
    rest = torch.zeros((), dtype=pointer.dtype.torch) if other is None else tensor(other).to(pointer.dtype.torch)
    memory, index, keep, rest = _reach(pointer, mask, rest, "a load")
    return Block(torch.where(keep, memory[index], rest))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    memory, index, keep, x = _reach(pointer, mask, tensor(value).to(pointer.dtype.torch), "a store")
    memory[index[keep]] = x[keep]


def atomic_add(pointer: Pointer, value: Any) -> Block:
    machine().pause()
    before = load(pointer)
    store(pointer, before + value)
    return before


class Shared:
    """Shared memory of a program, or a part of it."""

    def __init__(self, x: torch.Tensor, dtype: Type) -> None:
        self.x, self.dtype = x, dtype

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape)

    @property
    def range(self) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(self.x.shape, self.x.stride()))
        return self.x.data_ptr(), self.x.data_ptr() + (last + 1) * self.x.itemsize

    def index(self, i: Any) -> Shared:
        at = int(raw(i))
        if not 0 <= at < len(self.x):
            raise Broken(f"buffer {at} of {len(self.x)}")
        return Shared(self.x[at], self.dtype)

    def slice(self, start: int, size: int, dim: int) -> Shared:
        return Shared(self.x.narrow(dim, start, size), self.dtype)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.x.permute(order), self.dtype)

    def reinterpret(self, dtype: Type, shape: Sequence[int], layout: Any) -> Shared:
        x = self.x.view(dtype.torch)
        if layout is None:
            return Shared(x.view(*shape), dtype)
        return Gathered(x.view(-1), layout.places(shape), dtype)

    def load(self, _layout: Any) -> Block:
        return Block(self.x.clone())

    def store(self, value: Any) -> None:
        machine().pause()
        x = tensor(value).to(self.x.dtype)
        if not torch.equal(x.contiguous().view(torch.uint8), self.x.contiguous().view(torch.uint8)):
            machine().wrote(*self.range)  # two warpgroups may write the same, at any time
            self.x.copy_(x)

    def spoil(self) -> None:
        """Nobody may read it before what is under way has come."""
        self.x.view(torch.uint8).fill_(0x7F) if self.x.itemsize == 1 else self.x.fill_(float("nan"))


class Gathered(Shared):
    """Shared memory whose element i is at place[i] of `memory`; it is only read."""

    def __init__(self, memory: torch.Tensor, place: torch.Tensor, dtype: Type) -> None:
        self._memory, self._place, self.dtype = memory, place, dtype

    @property
    def x(self) -> torch.Tensor:  # type: ignore[override]
        return self._memory[self._place]

    @property
    def range(self) -> tuple[int, int]:
        return self._memory.data_ptr(), self._memory.data_ptr() + self._memory.numel() * self._memory.itemsize

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Gathered(self._memory, self._place.permute(order), self.dtype)


class SharedLinearLayout:
    """Which element is at which place, by the coordinates that each bit of the place adds. Swizzles are not modelled:
    of bits that change rows what they do to columns is left out."""

    def __init__(self, offset_bases: Sequence[Sequence[int]], _blocks: Sequence[Any], _alignment: int) -> None:
        self._bases = [[row, 0 if row else column] for row, column in offset_bases]

    def places(self, shape: Sequence[int]) -> torch.Tensor:
        at = torch.arange(1 << len(self._bases))
        row, column = (sum((at >> i & 1) * base[d] for i, base in enumerate(self._bases)) for d in (0, 1))
        place = torch.full(tuple(shape), -1)
        place[row, column] = at
        assert int(place.min()) == 0, "the layout leaves elements without a place"
        return place


reinterpret = Shared.reinterpret


class Barriers:
    def __init__(self, count: int) -> None:
        self._all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self._all[int(raw(i))]


def allocate_shared_memory(dtype: Type, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(shape[0])
    fill = float("nan") if dtype.torch.is_floating_point else -77777
    x = torch.full(tuple(shape), fill, dtype=torch.float32 if dtype.torch.itemsize == 1 else dtype.torch).to(
        dtype.torch
    )
    return Shared(x, dtype)


# --- barriers ---


def _wait(barrier: Barrier, phase: Any) -> None:
    parity = int(raw(phase))
    machine().pause(lambda: barrier.passed(parity), f"a barrier in phase {barrier.phase}, parity {parity}")


def _arrive(barrier: Barrier, count: int = 1) -> None:
    machine().pause()
    barrier.add(count)


def _expect(barrier: Barrier, size: int) -> None:
    barrier.bytes += int(size)
    barrier.add(1)


mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: "barriers", init=lambda barrier, count: barrier.init(count), wait=_wait, arrive=_arrive,
    expect=_expect,
)  # fmt: skip


def barrier() -> None:
    """The threads of one warpgroup, which move together here."""


def inline_asm_elementwise(text: str, _constraints: str, arguments: list[Any], **_: Any) -> Any:
    found = re.match(r"bar\.(sync|arrive) (\d+), (\d+);", text)
    if found is None:
        raise Broken(f"assembly that the emulator does not know: {text[:60]}")
    m = machine()
    which = m.named.setdefault((m.current.program, int(found[2])), NamedBarrier())
    turn = which.turn
    which.arrive(128, int(found[3]))
    if found[1] == "sync":
        m.pause(lambda: which.turn != turn, f"named barrier {found[2]}")
    return arguments[0]


# --- tensor maps and copies ---


class Map:
    """A tensor map: a tensor in memory, copied in boxes; what lies outside of it reads as zero and is not written."""

    def __init__(self, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], dtype: Type):
        self.address, self.sizes, self.strides = address, tuple(sizes), (*strides, 1)
        self.box, self.dtype = tuple(box), dtype
        self.block_type = SimpleNamespace(nbytes=torch.Size(box).numel() * dtype.torch.itemsize)
        if address % 16:
            raise Broken("the address of a tensor map is not a multiple of 16 bytes")
        for n, step in zip(sizes[:-1], strides):
            if n > 1 and (step * dtype.torch.itemsize) % 16:
                raise Broken("a stride of a tensor map is not a multiple of 16 bytes")

    def inside(self, where: Sequence[Any], what: str) -> tuple[torch.Tensor | None, tuple[slice, ...]]:
        """(the part of the tensor below a box, where in the box it is)."""
        corner = [int(raw(i)) for i in where]
        starts = [max(c, 0) for c in corner]
        stops = [min(c + n, size) for c, n, size in zip(corner, self.box, self.sizes)]
        if any(a >= b for a, b in zip(starts, stops)):
            return None, ()
        low = sum(a * s for a, s in zip(starts, self.strides))
        high = sum((b - 1) * s for b, s in zip(stops, self.strides)) + 1
        size = self.dtype.torch.itemsize
        memory = machine().memory.view(self.address + low * size, self.address + high * size, self.dtype.torch, what)
        part = memory.as_strided([b - a for a, b in zip(starts, stops)], self.strides)
        return part, tuple(slice(a - c, b - c) for a, b, c in zip(starts, stops, corner))


def tma_load(source: Map, where: Sequence[Any], full: Barrier, to: Shared) -> None:
    m = machine()
    m.pause()
    to.spoil()
    m.replaced(*to.range)
    where = [int(raw(i)) for i in where]

    def copy() -> None:
        box = torch.zeros(source.box, dtype=source.dtype.torch)
        part, at = source.inside(where, "a copy of a tensor map")
        if part is not None:
            box[at] = part
        to.x.copy_(box.reshape(to.x.shape))
        full.add(0, source.block_type.nbytes)

    m.jobs.append(copy)


def tma_store(target: Map, where: Sequence[Any], source: Shared) -> None:
    m = machine()
    m.reads(*source.range, "a copy to memory")
    where = [int(raw(i)) for i in where]

    def copy() -> None:
        part, at = target.inside(where, "a copy to memory")
        if part is not None:
            part.copy_(source.x.reshape(target.box)[at])

    m.current.stores.append(copy)


def tma_store_wait(_left: int) -> None:
    own = machine().current
    for copy in own.stores:
        copy()
    own.stores.clear()


def copy_rows(to: Shared, source: Pointer, mask: Any = None) -> None:
    """Comes at any time until it is waited for."""
    m = machine()
    m.pause()
    to.spoil()
    m.replaced(*to.range)
    own, left = m.current, [True]

    def copy() -> None:
        if left:
            left.clear()
            to.x.copy_(load(source, mask).x)
            m.dirty.append(Dirty(*to.range, own))

    own.copies.append(copy)
    m.jobs.append(copy)


def copy_rows_commit() -> None:
    own = machine().current
    own.groups.append(own.copies)
    own.copies = []


def copy_rows_wait(left: int) -> None:
    m = machine()
    m.pause()
    while len(m.current.groups) > left:
        for copy in m.current.groups.pop(0):
            copy()


def fence_async_shared() -> None:
    machine().fence()


# --- products ---


def warpgroup_mma(a: Any, b: Shared, acc: Block, *, use_acc: bool = True, is_async: bool = False) -> Block:
    """Runs now, or as late as it may; what it answers is not there before it was waited for."""
    m = machine()
    for x in (a, b):
        if isinstance(x, Shared):
            m.reads(*x.range, "a product")
    result = torch.full(tuple(acc.x.shape), float("nan"))

    def product() -> None:
        x = a.x.float() @ b.x.float()
        result.copy_(x + acc.x if use_acc else x)

    m.current.products.append(product)
    m.current.outstanding += 1
    if not is_async:
        warpgroup_mma_wait(0)
    elif m.random.random() < 0.5:
        _finish(0)
    m.pause()
    return Block(result)


def _finish(left: int) -> None:
    products = machine().current.products
    while len(products) > left:
        products.pop(0)()


def warpgroup_mma_wait(left: int, deps: Sequence[Block] = ()) -> Any:
    machine().pause()
    _finish(left)
    machine().current.outstanding = min(left, machine().current.outstanding)
    return deps[0] if len(deps) == 1 else tuple(deps)


def warpgroup_mma_init(x: Block) -> Block:
    return x


# --- the rest of the language ---


def constexpr(x: Any) -> Any:
    kinds = {int: _Int, str: _Text}
    return kinds[type(x)](x) if type(x) in kinds else x


class _Int(int):
    value = property(int)


class _Text(str):
    value = property(str)


def warp_specialize(parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    machine().start(parts)


def program_id(_axis: int) -> Block:
    return Block(torch.tensor(machine().current.program, dtype=torch.int32))


def _float_or_int(function: Callable[..., torch.Tensor], other: Callable[..., torch.Tensor]) -> Callable[..., Block]:
    def choose(a: Any, b: Any, propagate_nan: Any = None) -> Block:
        x, y = _pair(a, b) if isinstance(a, Block) or isinstance(b, Block) else (tensor(a), tensor(b))
        return Block(function(x, y) if propagate_nan or not x.is_floating_point() else other(x, y))

    return choose


def where(condition: Any, a: Any, b: Any) -> Block:
    x, y = _pair(a, b) if isinstance(a, Block) or isinstance(b, Block) else (tensor(a), tensor(b))
    return Block(torch.where(tensor(condition).bool(), x, y))


def cast(x: Any, kind: Type) -> Any:
    return x if isinstance(x, Pointer) else Block(tensor(x).to(kind.torch))


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Block]:
    return lambda x: Block(function(tensor(x)))


def _module() -> SimpleNamespace:
    dummy = lambda *_, **__: None  # noqa: E731
    gl = SimpleNamespace(
        constexpr=constexpr, static_range=range, load=load, store=store, atomic_add=atomic_add, where=where, cast=cast,
        allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize, barrier=barrier,
        inline_asm_elementwise=inline_asm_elementwise, program_id=program_id, num_warps=lambda: 1,
        num_programs=lambda _: Block(torch.tensor(machine().programs, dtype=torch.int32)),
        reshape=lambda x, shape: Block(x.x.reshape(tuple(shape))),
        permute=lambda x, order: Block(x.x.permute(tuple(order))), DistributedLinearLayout=dummy,
        BlockedLayout=dummy, SliceLayout=dummy, NVMMASharedLayout=dummy, NVMMADistributedLayout=dummy,
        DotOperandLayout=dummy, SwizzledSharedLayout=dummy, SharedLinearLayout=SharedLinearLayout,
        arange=lambda a, b, layout=None: Block(torch.arange(a, b, dtype=torch.int32)),
        full=lambda shape, x, kind, layout=None: Block(torch.full(tuple(shape), raw(x), dtype=kind.torch)),
        zeros=lambda shape, kind, layout=None: Block(torch.zeros(tuple(shape), dtype=kind.torch)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        maximum=_float_or_int(torch.maximum, torch.fmax), minimum=_float_or_int(torch.minimum, torch.fmin),
        max=lambda x, axis: Block(x.x.amax(axis)), min=lambda x, axis: Block(x.x.amin(axis)),
        sum=lambda x, axis: Block(x.x.sum(axis, dtype=x.x.dtype)), PropagateNan=SimpleNamespace(ALL=True),
    )  # fmt: skip
    for name in ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "erf", "floor"):
        setattr(gl, name, _unary(getattr(torch, name)))
    for name, kind in {
        "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "int1": "i1", "int8": "i8",
        "int16": "i16", "int32": "i32", "int64": "i64", "float8e4nv": "fp8e4nv",
    }.items():  # fmt: skip
        setattr(gl, name, TYPES[kind])
    return gl


gl = _module()


def jit(function: Any) -> Any:
    return function


constexpr_function = jit
