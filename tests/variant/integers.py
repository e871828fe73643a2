"""Random mask functions as Python text, which torch and the tracer both run: what torch computes for int64 indices and
tensors of every type is the truth, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import flashloom.variant as v

KEYS, HEADS = 24, 4
EDGES = (2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**40, 2654435761, 255, 256, -129, 32768, -1, 2**62)
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")


def tables(seed: int) -> dict[str, torch.Tensor]:
    """One tensor per type, of a size of its own, with the type's edges among its values."""
    g = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for n, name in enumerate(INTEGERS):
        info = torch.iinfo(getattr(torch, name))
        x = torch.randint(-20, 100, (KEYS + 2 * n,), generator=g).clamp(info.min, info.max).to(getattr(torch, name))
        x[torch.randint(0, len(x), (4,), generator=g)] = torch.tensor(
            [info.min, info.max, info.min + 1, info.max - 1], dtype=x.dtype
        )
        found[name] = x
    found["flags"] = torch.rand(KEYS, generator=g) < 0.5
    found["times"] = 1.7e9 + torch.arange(KEYS + 8, dtype=torch.float64) * 7.0
    found["single"] = torch.tensor(3, dtype=torch.int32)
    return found


class Writer:
    """Writes expressions: `number` an integer, `condition` a bool."""

    def __init__(self, seed: int, sizes: dict[str, int]):
        self.random, self.sizes = random.Random(seed), sizes

    def constant(self) -> str:
        r = self.random
        return str(r.choice(EDGES) if r.random() < 0.3 else r.randint(-9, 40))

    def index(self, size: int, depth: int) -> str:
        """An index within -size ... size - 1, as torch asks for."""
        kind = self.random.randrange(6)
        if kind == 0:
            return str(self.random.randint(-size, size - 1))
        if kind < 3:
            return self.random.choice(("i", "j"))
        if kind == 3:
            return "i - j"
        if kind == 4:
            return f"({self.number(depth - 1)}).to(torch.int64) % -{size}"
        return f"({self.number(depth - 1)}).to(torch.int64) % {size}"

    def load(self, depth: int) -> str:
        name = self.random.choice((*INTEGERS, "single"))
        return "single" if name == "single" else f"{name}[{self.index(self.sizes[name], depth)}]"

    def number(self, depth: int) -> str:
        r = self.random
        if depth <= 0:
            return r.choice(("i", "j", "i", "j", "h", "b", self.load(0), self.load(0), self.load(0)))
        a = self.number(depth - 1)
        kind = r.randrange(14)
        if kind < 5:
            b = self.number(depth - 1) if r.random() < 0.6 else self.constant()
            a, b = (b, a) if r.random() < 0.3 else (a, b)
            return f"({a}) {r.choice('+-*&|^')} ({b})"
        if kind < 8:
            divisor = r.choice(("3", "7", "-2", "-5", "1", "-1", "16", "(2**31 - 1)", "2**33", "-(2**31)"))
            if "2**" in divisor:  # 0 in a smaller type
                a = f"({a}).to(torch.int64)"
            if divisor == "-1":  # the machine's division of the smallest number by -1 ends torch
                a = f"({a}) % 1000"
            if r.random() < 0.3:
                divisor = f"(uint8[{self.index(self.sizes['uint8'], depth)}] % 5 + 1)"
            return f"({a}) {r.choice(('//', '%'))} {divisor}"
        if kind == 8:
            count = r.choice(("0", "1", "3", "7", "31", "33", "64", "-1", "(i & 15)"))
            return f"({a}) {r.choice(('<<', '>>'))} {count}"
        if kind == 9:
            return r.choice((f"-({a})", f"~({a})", f"abs({a})"))
        if kind == 10:
            return f"torch.where({self.condition(depth - 1)}, {a}, {self.number(depth - 1)})"
        if kind == 11:
            low, high = sorted((r.randint(0, 50), r.randint(0, 50)))
            return f"torch.clamp({a}, {low}, {high})"
        if kind == 12:
            return f"torch.{r.choice(('minimum', 'maximum'))}({a}, {self.number(depth - 1)})"
        return f"({a}).to(torch.{r.choice(INTEGERS)})"

    def condition(self, depth: int) -> str:
        r = self.random
        kind = r.randrange(10)
        if depth > 1 and kind < 3:
            return f"({self.condition(depth - 1)}) {r.choice('&|^')} ({self.condition(depth - 1)})"
        if kind == 3:
            return f"~({self.condition(depth - 1)})"
        if kind == 4:
            return f"flags[{self.index(self.sizes['flags'], depth)}]"
        compare = r.choice(("<", "<=", ">", ">=", "==", "!="))
        if kind == 5:
            one, two = (self.index(self.sizes["times"], 0) for _ in range(2))
            return f"(times[{one}] - times[{two}]).abs() {compare} {r.choice((0.5, 14.0, 60.0, 100))}"
        if kind == 6:
            return f"({self.number(depth)}).to(torch.float32) {compare} ({self.number(depth - 1)}) / 4"
        other = self.number(depth - 1) if r.random() < 0.6 else self.constant()
        return f"({self.number(depth)}) {compare} ({other})"


def mask_of(seed: int) -> tuple[str, Callable[..., Any]]:
    """(text, function of b, h, i, j) of a random mask over captured tensors."""
    found = tables(seed)
    text = Writer(seed, {k: x.numel() for k, x in found.items()}).condition(3)
    text = f"({text}) | (i == j) & (i + j < -1)"  # reads both
    return text, eval(f"lambda b, h, i, j: {text}", {"torch": torch, **found})


def score_of(seed: int) -> tuple[str, Callable[..., Any]]:
    """The same of a score, bounded and with what float64 has beyond float32."""
    found = tables(seed)
    writer = Writer(seed, {k: x.numel() for k, x in found.items()})
    numbers = f"({writer.number(2)}) % 31 + torch.clamp({writer.number(2)}, -9, 9) / 8"
    one, two = (writer.index(writer.sizes["times"], 0) for _ in range(2))
    function = writer.random.choice(("{}", "torch.exp({} * -0.01)", "({}) % 86400.0", "{} // 60.0", "torch.tanh({})"))
    text = f"s + {numbers} + {function.format(f'(times[{one}] - times[{two}]).abs()')} * 0.1 + (i + j)"
    return text, eval(f"lambda s, b, h, i, j: {text}", {"torch": torch, **found})


def truth(function: Callable[..., Any], batch: int, logits: torch.Tensor | None = None) -> torch.Tensor:
    """What eager FlexAttention computes of a mask, or of a score with logits [rows, keys]: [heads, rows, keys]."""
    for place, scored in ((3, 0), (2, 0), (1, None), (0, None)):
        at = tuple(0 if n == place else None for n in range(4))
        function = torch.vmap(function, in_dims=at if logits is None else (scored, *at))
    indices = tuple(torch.arange(n) for n in (batch + 1, HEADS, KEYS, KEYS))
    with TransformGetItemToIndex():
        return (function(*indices) if logits is None else function(logits, *indices))[batch]


class Widths(v.Variant):
    """Positions beside numbers of the variant, in every way that could leave 32 bits."""

    n: int
    shift: v.PerRequest

    def logits_mask(self, at):
        a = at.kv_pos <= at.q_pos + self.n
        b = at.kv_pos - self.n < at.q_pos * 3
        c = at.kv_pos + self.shift[at.batch] >= at.q_pos - self.n
        return (a & b) ^ (c | (abs(at.q_pos - self.n) > self.shift[at.batch]))


def widths() -> list[v.Variant]:
    """Of a batch of two requests: numbers within 32 bits, at their edge and beyond."""
    shift = torch.tensor([5, -(2**31)], dtype=torch.int32)
    return [Widths(n=n, shift=shift) for n in (5, 2**31 - 1, 2**40, -(2**62))]
