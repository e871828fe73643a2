"""Random variants: hypothesis strategies that build hooks from every operator and every kind of field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import flashloom.variant as v
from flashloom.variant.expr import BOOL, FLOAT
from flashloom.variant.trace import OPS, Symbol

HEADS, KV_HEADS, MAX_LEN = 4, 2, 24


@dataclass(frozen=True)
class Case:
    """One request inside a batch, and values for every kind of field."""

    q_len: int
    kv_len: int
    q_start: int
    kv_start: int
    batch: int
    seed: int

    def values(self) -> dict[str, Any]:
        g = torch.Generator().manual_seed(self.seed)

        def ints(*shape: int, low: int = -6, high: int = 30, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=g, dtype=dtype)

        floats = torch.randn(HEADS, generator=g)
        table = torch.randn(5, 7, generator=g)
        if self.seed % 3 == 0:
            table[1, 2], table[3, 0] = float("nan"), float("inf")
        keys = torch.sort(ints(self.kv_start + self.kv_len + 3, high=5)).values
        return {
            "number": float(torch.randn((), generator=g) * 10),
            "width": int(ints(1)[0]),
            "slopes": floats,
            "kv_scale": torch.rand(KV_HEADS, generator=g).to(torch.float16),
            "prefix": ints(self.batch + 1, high=MAX_LEN),
            "query_ids": ints(self.q_start + self.q_len, high=5, dtype=torch.int64),
            "key_ids": keys,
            "mask": torch.rand(MAX_LEN, MAX_LEN, generator=g) < 0.7,
            "table": table,
            "bits": torch.randint(0, 256, (40,), generator=g, dtype=torch.uint8),
            "small": ints(6, dtype=torch.int8),
        }


class RandomFields(v.Variant):
    number: float
    width: int
    slopes: v.PerHead
    kv_scale: v.PerKVHead
    prefix: v.PerRequest
    query_ids: v.PerQueryToken
    key_ids: v.PerKeyToken
    mask: torch.Tensor
    table: torch.Tensor
    bits: v.Bits
    small: torch.Tensor


cases = st.builds(
    lambda q, extra, qs, ks, b, seed: Case(q, max(1, q + extra), qs, ks, b, seed),
    st.integers(1, MAX_LEN),
    st.integers(-4, 12),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 2),
    st.integers(0, 10**6),
)

# A recipe is a nested tuple; `build` turns it into a Symbol inside a hook, so that the shrunk example reads well.
_leaves = st.one_of(
    st.sampled_from(
        [
            "q_pos",
            "kv_pos",
            "q_head",
            "kv_head",
            "batch",
            "q_len",
            "kv_len",
            "number",
            "width",
            "slopes",
            "kv_scale",
            "prefix",
            "query_ids",
            "key_ids",
            "key_ids_q",
        ]
    ).map(lambda n: ("leaf", n)),
    st.integers(-5, 40).map(lambda n: ("const", n)),
    st.sampled_from([0.5, -1.25, 3.0, 1e30, 0.0]).map(lambda n: ("const", n)),
)
_BINARY = ("add", "sub", "mul", "div", "floordiv", "mod", "min", "max")
_UNARY = ("neg", "abs", "floor", "exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "rsqrt", "erf", "sin", "cos")


def _extend(children: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.tuples(st.sampled_from(_BINARY), children, children),
        st.tuples(st.sampled_from(_UNARY), children),
        st.tuples(st.just("where"), _conditions(children), children, children),
        st.tuples(st.sampled_from(["small", "mask", "table", "bits"]), children, children),
        st.tuples(st.sampled_from(["to_int", "to_float", "to_long"]), children),
        st.tuples(st.sampled_from(["bitand", "bitor", "bitxor"]), children, children),
    )


def _conditions(numbers: st.SearchStrategy) -> st.SearchStrategy:
    compare = st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), numbers, numbers)
    return st.recursive(
        compare,
        lambda c: st.one_of(st.tuples(st.sampled_from(["and", "or", "xor"]), c, c), st.tuples(st.just("not"), c)),
        max_leaves=4,
    )


numbers = st.recursive(_leaves, _extend, max_leaves=6)
conditions = _conditions(numbers)


def _inside(index: Any, size: int) -> Any:
    """An index that is a number, or folded to one, within an axis."""
    number = index._expr.attr if isinstance(index, Symbol) and index._expr.op == "const" else index
    return number % size if isinstance(number, int) else index


def _integer(x: Any) -> Any:
    return OPS["to"](x, torch.int32) if isinstance(x, Symbol) and x._expr.dtype in (FLOAT, BOOL) else x


def build(recipe: tuple, self: Any, at: Any) -> Any:
    name, *rest = recipe
    if name == "leaf":
        return _leaf(rest[0], self, at)
    if name == "const":
        return rest[0]
    args = [build(r, self, at) for r in rest]
    if all(not isinstance(a, Symbol) for a in args):
        args[0] = at.kv_pos * 0 + args[0]
    if name in ("small", "mask", "table", "bits"):
        i, j = (_integer(OPS["floor"](a) if isinstance(a, float) else a) for a in args)
        i, j = (int(x) if isinstance(x, float) else x for x in (i, j))
        if name != "bits":  # a constant outside is refused
            rows, columns = {"small": (6, 1), "mask": (MAX_LEN, MAX_LEN), "table": (5, 7)}[name]
            i, j = _inside(i, rows), _inside(j, columns)
        return {
            "small": lambda: self.small[i],
            "mask": lambda: OPS["to"](self.mask[i, j], torch.int32),
            "table": lambda: self.table[i, j],
            "bits": lambda: OPS["to"](self.bits[i], torch.int32),
        }[name]()
    if name in ("bitand", "bitor", "bitxor"):
        return OPS[name](*(int(min(a, 2e9)) if isinstance(a, float) else _integer(a) for a in args))
    if name in ("to_int", "to_float", "to_long"):
        return OPS["to"](args[0], {"to_int": torch.int32, "to_float": torch.float32, "to_long": torch.int64}[name])
    if name in ("and", "or", "xor", "not"):
        return OPS[{"and": "bitand", "or": "bitor", "xor": "bitxor", "not": "bitnot"}[name]](*args)
    args = [
        OPS["to"](a, torch.int32) if isinstance(a, Symbol) and a._expr.dtype == BOOL and name != "where" else a
        for a in args
    ]
    if name in ("neg", "abs", "floor") and not isinstance(args[0], Symbol):
        args[0] = at.kv_pos * 0 + args[0]
    return OPS[name](*args)


def _leaf(name: str, self: Any, at: Any) -> Any:
    if name in ("slopes", "kv_scale", "prefix", "query_ids", "key_ids"):
        index = {
            "slopes": "q_head",
            "kv_scale": "kv_head",
            "prefix": "batch",
            "query_ids": "q_pos",
            "key_ids": "kv_pos",
        }
        return getattr(self, name)[getattr(at, index[name])]
    if name == "key_ids_q":
        return self.key_ids[at.q_pos]
    return getattr(self, name) if name in ("number", "width") else getattr(at, name)


def variant_of(case: Case, mask: tuple | None = None, score: tuple | None = None) -> v.Variant:
    hooks: dict[str, Any] = {}
    if mask is not None:
        hooks["logits_mask"] = lambda self, at: build(mask, self, at)
    if score is not None:
        hooks["logits_transform"] = lambda self, logits, at: logits + build(score, self, at)
    return type("RandomVariant", (RandomFields,), hooks)(**case.values())


def tile_inputs(case: Case, tile: dict[str, int]) -> dict[str, torch.Tensor]:
    """Every (head, query, key) of a tile, as inputs of a hook that broadcast to [heads, queries, keys]."""

    def span(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.arange(tile[f"{name}_lo"], tile[f"{name}_hi"] + 1, dtype=torch.int32).view(shape)

    scalars = {
        k: torch.tensor(getattr(case, k), dtype=torch.int32)
        for k in ("q_len", "kv_len", "q_start", "kv_start", "batch")
    }
    heads = span("q_head", (-1, 1, 1))
    kv_head = torch.tensor(tile["kv_head"], dtype=torch.int32)
    return {
        **scalars,
        "kv_head": kv_head,
        "q_head": heads,
        "q_pos": span("q_pos", (1, -1, 1)),
        "kv_pos": span("kv_pos", (1, 1, -1)),
    }


@st.composite
def tiles(draw: st.DrawFn, case: Case) -> dict[str, int]:
    kv_head = draw(st.integers(0, KV_HEADS - 1))
    group = HEADS // KV_HEADS
    first = case.kv_len - case.q_len

    def pair(low: int, high: int) -> tuple[int, int]:
        a, b = draw(st.integers(low, high)), draw(st.integers(low, high))
        return min(a, b), max(a, b)

    heads, queries, keys = (
        pair(kv_head * group, kv_head * group + group - 1),
        pair(first, case.kv_len - 1),
        pair(0, case.kv_len - 1),
    )
    fixed = {k: getattr(case, k) for k in ("q_len", "kv_len", "q_start", "kv_start", "batch")}
    return {
        **fixed, "kv_head": kv_head, "q_head_lo": heads[0], "q_head_hi": heads[1], "q_pos_lo": queries[0],
        "q_pos_hi": queries[1], "kv_pos_lo": keys[0], "kv_pos_hi": keys[1],
    }  # fmt: skip
