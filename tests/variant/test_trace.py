"""What a hook may do, what is refused and how the refusal reads."""

from __future__ import annotations

import math
import threading
import weakref

import pytest
import torch

import flashloom.variant as v
from flashloom.variant import expr
from flashloom.variant.expr import const, make, topological


def traced(hook, **fields):
    cls = type(
        "Mine", (v.Variant,), {"logits_transform": hook, "__annotations__": {k: type(x) for k, x in fields.items()}}
    )
    return cls(**fields).program.logits


def text(hook, **fields) -> str:
    return repr(traced(hook, **fields))


def test_torch_functions_methods_and_operators_are_one() -> None:
    spellings = [
        lambda s, x, at: torch.tanh(x) * torch.minimum(x, at.kv_pos / at.kv_len),
        lambda s, x, at: x.tanh() * x.minimum(torch.div(at.kv_pos, at.kv_len)),
        lambda s, x, at: torch.mul(torch.tanh(x), torch.min(x, torch.true_divide(at.kv_pos, at.kv_len))),
    ]
    first, *others = [traced(f) for f in spellings]
    assert all(other is first for other in others)


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (lambda s, x, at: x + at.kv_pos, "add(logits, cast(kv_pos))"),
        (lambda s, x, at: x + (at.kv_pos + 1) // 2, "add(logits, cast(floordiv(add(kv_pos, 1), 2)))"),
        (lambda s, x, at: x * 1 + 0 * (3 - 3), "add(logits, 0.0)"),
        (lambda s, x, at: x + torch.where(at.kv_pos > 2, 1.5, 0), "add(logits, where(gt(kv_pos, 2), 1.5, 0.0))"),
        (lambda s, x, at: x + (at.kv_pos > 2), "add(logits, cast(gt(kv_pos, 2)))"),
        (lambda s, x, at: 2 ** 3 * x, "mul(8.0, logits)"),
        (lambda s, x, at: x**2, "mul(logits, logits)"),
        (lambda s, x, at: x + math.pi - math.pi, "sub(add(logits, 3.141592653589793), 3.141592653589793)"),
        (lambda s, x, at: torch.clamp(at.q_pos - at.kv_pos, 0, 5), "cast(min(max(sub(q_pos, kv_pos), 0), 5))"),
        (lambda s, x, at: x - -x, "sub(logits, neg(logits))"),
    ],
)  # fmt: skip
def test_promotion_and_folding(hook, expected) -> None:
    assert text(hook) == expected


def test_promotion_agrees_with_torch() -> None:
    """Type by type, against what torch answers for tensors."""
    kinds = ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64")
    tensors = {t: torch.tensor(3, dtype=getattr(torch, t)) for t in kinds}
    operators = {"add": torch.add, "mul": torch.mul, "div": torch.true_divide, "maximum": torch.maximum}
    from flashloom.variant.expr import inp
    from flashloom.variant.trace import METHODS, Symbol

    def symbol(kind: str) -> Symbol:
        return Symbol(
            make("cast", kind, (inp("kv_pos"),)) if kind != "bool" else make("lt", "bool", (inp("kv_pos"), const(3)))
        )

    for name, function in operators.items():
        for a, ta in tensors.items():
            for b, tb in [*tensors.items(), (True, True), (2, 2), (0.5, 0.5)]:
                if name == "maximum" and not isinstance(tb, torch.Tensor):
                    continue
                right = symbol(b) if isinstance(b, str) else b
                expected = str(function(ta, tb).dtype).removeprefix("torch.")
                got = METHODS[name](symbol(a), right)._expr.dtype
                assert got == expected, (name, a, b)


def test_common_subexpressions_are_one_node() -> None:
    root = traced(lambda s, x, at: x + torch.exp(at.kv_pos - at.q_pos) * torch.exp(at.kv_pos - at.q_pos))
    assert sum(n.op == "exp" for n in topological(root)) == 1


def branching(s, x, at):
    return x if at.kv_pos > at.q_pos else -x


REFUSED = {
    "branch": (branching, "torch.where"),
    "chain": (lambda s, x, at: x * (0 < at.kv_pos < 4), "torch.where"),
    "math": (lambda s, x, at: x + math.exp(at.kv_pos), "torch functions"),
    "builtin max": (lambda s, x, at: max(x, 0), "torch.maximum"),
    "item": (lambda s, x, at: x + at.kv_pos.item(), "torch.where"),
    "reduction": (lambda s, x, at: x.sum(), "one element"),
    "unknown function": (lambda s, x, at: torch.lgamma(x), "torch.lgamma cannot be traced"),
    "tensor constant": (lambda s, x, at: x + torch.ones(3), "make it a field"),
    "power": (lambda s, x, at: x**x, "torch.exp2"),
    "index a value": (lambda s, x, at: x[0], "cannot be indexed"),
    "range": (lambda s, x, at: x + sum(range(at.kv_pos)), "Python number"),
    "no return": (lambda s, x, at: None, "returns None"),
    "bool": (lambda s, x, at: x > 0, "logits_mask"),
    "numpy": (lambda s, x, at: __import__("numpy").exp(x), "write torch.exp"),
    "misspelled": (lambda s, x, at: x + at.kv_poz, "did you mean 'kv_pos'"),
    "missing": (lambda s, x, at: x + at.dim, "does not exist in logits_transform"),
    "assign": (lambda s, x, at: setattr(at, "kv_pos", 3), "bind the new value"),
    "bool minus bool": (lambda s, x, at: x + ((at.kv_pos > 1) - (at.kv_pos > 2)), "not defined in torch"),
    "convert": (lambda s, x, at: x.to(torch.float16), "float16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_write(name) -> None:
    hook, words = REFUSED[name]
    with pytest.raises(TypeError, match=words) as error:
        traced(hook)
    assert "Mine.logits_transform" in str(error.value)


class Table(v.Variant):
    slopes: v.PerHead
    table: torch.Tensor
    x: v.PerQueryToken


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (lambda s, x, at: x + s.slopes, "index it"),
        (lambda s, x, at: (s.slopes.__setitem__(0, 1), x)[1], "is changed in a hook"),
        (lambda s, x, at: x * s.slopes[at.q_head, 0], "1 dimensions and is indexed with 2"),
        (lambda s, x, at: x * s.table[at.q_head], "2 dimensions and is indexed with 1"),
        (lambda s, x, at: x * s.slopes[x], "use integers"),
        (lambda s, x, at: x * s.x[at.kv_pos], "at.q_pos alone"),
        (lambda s, x, at: torch.exp(s.slopes), "index it"),
    ],
)
def test_fields_are_indexed(hook, words) -> None:
    mine = type("Mine", (Table,), {"logits_transform": hook})
    with pytest.raises(TypeError, match=words):
        _ = mine(slopes=torch.ones(2), table=torch.ones(2, 2), x=torch.ones(3)).program


@pytest.mark.parametrize(
    ("make_variant", "error", "words"),
    [
        (lambda: Table(slopes=torch.ones(2)), TypeError, "needs the field 'table'"),
        (lambda: Table(slopes=torch.ones(2), table=torch.ones(1), x=torch.ones(1), y=1), TypeError, "no field 'y'"),
        (lambda: Table(slopes=torch.ones(2, 2), table=torch.ones(1), x=torch.ones(1)), ValueError, r"shape \(2, 2\)"),
        (lambda: Table(slopes=3.0, table=torch.ones(1), x=torch.ones(1)), TypeError, "give a tensor"),
        (lambda: v.alibi(torch.ones(2, dtype=torch.complex64)), TypeError, "complex64"),
        (lambda: v.alibi(torch.ones(2, requires_grad=True)), RuntimeError, "grad"),
        (lambda: v.softcap(0.0), ValueError, "above 0"),
        (lambda: v.sliding_window(-1), ValueError, "0 or more"),
        (lambda: v.rope(7), ValueError, "even"),
        (lambda: v.rope(8, scaling={"rope_type": "yarn"}), ValueError, "yarn"),
        (lambda: v.custom_mask(torch.ones(2, 2)), TypeError, "give bool"),
        (lambda: v.custom_mask(torch.ones(2, dtype=torch.bool)), ValueError, "shape"),
        (lambda: v.packed_mask(torch.ones(2, dtype=torch.bool), torch.tensor([0, 2])), TypeError, "uint8"),
        (lambda: v.from_flex(3), TypeError, "function"),
        (lambda: v.from_flex(q_index="global"), ValueError, "'local'"),
        (lambda: setattr(v.causal, "x", 1), AttributeError, "does not change"),
        (lambda: (v.sigmoid() & v.sink(torch.ones(2))).program, ValueError, "lse"),
        (lambda: type("Bad", (v.Variant,), {"__annotations__": {"x": list}}), TypeError, "PerHead"),
        (lambda: v.causal.explain("fortran"), ValueError, "fortran"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(make_variant, error, words) -> None:
    with pytest.raises(error, match=words):
        make_variant()


def test_sizes_of_fields_are_constants() -> None:
    class Sized(v.Variant):
        table: torch.Tensor
        slopes: v.PerHead

        def logits_transform(self, logits, at):
            rows, columns = self.table.shape
            assert (self.table.ndim, self.table.dim(), self.slopes.ndim) == (2, 2, 1)
            assert self.table.dtype is torch.float16
            assert self.table.size() == self.table.shape
            assert self.table.size(-1) == columns
            assert self.table.numel() == rows * columns
            return (
                logits
                + self.table[at.q_head % len(self.table), at.kv_pos % columns] * self.slopes[len(self.slopes) - 1]
            )

    def program(rows, columns, heads):
        return Sized(table=torch.ones(rows, columns).half(), slopes=torch.ones(heads)).program

    assert "mod(kv_pos, 7)" in repr(program(3, 7, 4).logits)
    assert program(3, 7, 4) == program(3, 7, 4)
    assert len({program(*sizes) for sizes in ((3, 7, 4), (4, 7, 4), (3, 8, 4), (3, 7, 5))}) == 4
    for kind, words in ((v.PerRequest, "requests"), (v.PerKeyToken, "key tokens"), (v.PerQueryToken, "query tokens")):
        mine = type(
            "Mine", (v.Variant,), {"__annotations__": {"x": kind}, "logits_mask": lambda s, at: at.kv_pos < len(s.x)}
        )
        with pytest.raises(TypeError, match=words):
            _ = mine(x=torch.ones(3)).program


def test_class_is_code_and_instance_is_numbers() -> None:
    assert v.softcap(3.0).program == v.softcap(4.0).program
    assert v.softcap(3.0).values == (3.0,)
    assert v.alibi(torch.ones(4)).program != v.alibi(torch.ones(4, dtype=torch.float16)).program

    class Renamed(v.Variant):
        limit: float

        def logits_transform(self, x, where):
            return self.limit * torch.tanh(x * (1.0 / self.limit))

    assert Renamed(limit=2.0).program == v.softcap(3.0).program

    class Literal(v.Variant):
        def logits_transform(self, x, at):
            return 2.0 * torch.tanh(x * (1.0 / 2.0))

    assert Literal().program != v.softcap(2.0).program


def test_composition_chains_left_to_right_and_scopes_names() -> None:
    class Scale(v.Variant):
        cap: float

        def logits_transform(self, x, at):
            return x * self.cap

    program = (v.softcap(2.0) & Scale(cap=3.0) & v.causal & v.sliding_window(4)).program
    assert [p.name for p in program.params] == ["SoftCap.cap", "Scale.cap", "LeftWindow.left"]
    assert repr(program.logits).startswith("mul(mul(param(SoftCap.cap), tanh(")
    assert repr(program.mask) == "and(le(kv_pos, q_pos), ge(kv_pos, sub(q_pos, param(LeftWindow.left))))"
    assert (v.full & v.causal).program == v.causal.program


def test_vector_hooks_read_other_elements() -> None:
    class Swap(v.Variant):
        def query_transform(self, q, at):
            return q[(at.dim + at.head_dim // 2) % at.head_dim]

    once, twice = Swap().program.specialise(8, 8), (Swap() & Swap()).program.specialise(8, 8)
    assert repr(once.query) == "element(query, mod(add(dim, 4), 8))"
    assert repr(twice.query) == "element(query, mod(add(mod(add(dim, 4), 8), 4), 8))"


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (lambda at: at.dim + 1, "0..7"),
        (lambda at: at.dim // 2, "neither a permutation"),
        (lambda at: at.q_pos, "may use only at.dim"),
    ],
)
def test_illegal_element_indices(index, words) -> None:
    cls = type("Bad", (v.Variant,), {"query_transform": lambda self, q, at: q[index(at)]})
    with pytest.raises(ValueError, match=words):
        cls().program.specialise(8, 8)


def test_threads_that_write_one_expression_get_one_object(monkeypatch) -> None:
    """The other thread asks for it after this one has looked and before it has written."""
    found = []
    other = threading.Thread(target=lambda: found.append(expr._node("new", expr.FLOAT)))

    class Interned(weakref.WeakValueDictionary):
        def setdefault(self, key, default):
            known = self.get(key)
            if known is None and other.ident is None:
                other.start()
                other.join(0.1)
            if known is None:
                self[key] = known = default
            return known

    monkeypatch.setattr(expr, "_interned", Interned())
    mine = expr._node("new", expr.FLOAT)
    other.join(60)
    assert found[0] is mine


POSITIONS = ("batch", "q_head", "kv_head", "q_pos", "kv_pos", "q_len", "kv_len")


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        (v.PerHead, {"q_head"}),
        (v.PerKVHead, {"kv_head"}),
        (v.PerRequest, {"batch"}),
        (v.PerQueryToken, {"q_pos"}),
        (v.PerKeyToken, {"q_pos", "kv_pos"}),
        (torch.Tensor, set(POSITIONS)),
    ],
)
def test_a_field_is_indexed_with_its_own_position(kind, allowed) -> None:
    """Every kind of field with every position as it stands, also converted; other expressions are clamped."""
    for name in POSITIONS:
        for convert in (lambda i: i, lambda i: i.to(torch.int64)):
            hook = lambda self, x, at, name=name, convert=convert: x + self.bias[convert(getattr(at, name))]  # noqa: E731
            cls = type("Biased", (v.Variant,), {"logits_transform": hook, "__annotations__": {"bias": kind}})
            variant = cls(bias=torch.ones(3))
            if name in allowed:
                assert variant.program.logits is not None
            else:
                with pytest.raises(v.TraceError, match=r"the field 'bias' h.*one value per") as error:
                    assert variant.program
                assert all(f"at.{other}" in str(error.value) for other in allowed)
