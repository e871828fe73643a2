"""A class that says something no hook hears is refused, and what classes may say beside hooks stays free."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import pydoc
import typing
from typing import ClassVar

import numpy
import pytest
import torch

import flashloom
import flashloom.variant as v
from flashloom.variant.names import HOOK_ARGUMENTS


def define(name: str = "Mine", bases: tuple = (v.Variant,), fields: dict | None = None, **members: object) -> type:
    return type(name, bases, {"__annotations__": fields or {}, **members})


def scaled(self, logits, at):
    return logits * 2


def nothing(self, at):
    return at.kv_pos >= 0


def misspellings(name: str) -> list[str]:
    """One letter left out, doubled or swapped with its neighbour, at every place; other cases and no underscore."""
    slips = [name[:i] + name[i + 1 :] for i in range(1, len(name))]
    slips += [name[:i] + name[i] + name[i:] for i in range(len(name))]
    slips += [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)]
    slips += [name.title(), name.replace("_", ""), name + "s"]
    return [s for s in dict.fromkeys(slips) if s != name and not s.startswith("_")]


@pytest.mark.parametrize("hook", HOOK_ARGUMENTS)
@pytest.mark.parametrize("beside", [{}, {"logits_mask": nothing, "logits_transform": scaled}])
def test_a_misspelled_hook_names_the_hook(hook, beside) -> None:
    slips = misspellings(hook)
    assert len(slips) > 25
    for slip in slips:
        with pytest.raises(TypeError, match=rf"Mine\.{slip} .*did you mean '(\w+)'") as error:
            define(**beside, **{slip: lambda self, *arguments: arguments[0]})
        assert repr(hook) in str(error.value)


@pytest.mark.parametrize("value", [False, True])
def test_a_misspelled_softmax(value) -> None:
    for slip in ["sofmax", "soft_max", "softmaxx", "Softmax", "SOFTMAX", "sotfmax", "softmx", "use_softmax"]:
        with pytest.raises(TypeError, match=rf"{slip} .*did you mean 'softmax'"):
            define(logits_transform=scaled, **{slip: value})
        with pytest.raises(TypeError, match=rf"{slip} .*did you mean 'softmax'"):
            define(fields={slip: bool}, logits_transform=scaled, **{slip: value})
    with pytest.raises(TypeError, match="True or False"):
        define(logits_transform=scaled, softmax="no")


def test_unheard_names_are_refused_when_first_traced() -> None:
    def mask(self, at):
        return at.kv_pos > at.q_pos - self.width

    unheard = {
        "static is no hook": define(static=staticmethod(lambda at: at.kv_pos < 4), logits_mask=nothing),
        r"mask is no hook.*def logits_mask\(self, at\)": define(mask=mask, logits_transform=scaled),
        "score_mod is no hook.*logits_transform": define(score_mod=lambda self, s, b, h, i, j: s),
        "limit is no hook, and no hook calls it": define(limit=lambda self, at: at.kv_pos < 4, logits_mask=nothing),
        "window is read by no hook": define(window=128, logits_mask=nothing),
        "no hook and would be plain attention": define(),
        "widht is read by no hook.*did you mean 'width'": define(
            bases=(define(fields={"width": int}, width=3, logits_mask=mask),), widht=5
        ),
    }
    for words, cls in unheard.items():
        with pytest.raises(TypeError, match=words):
            _ = cls().program
        with pytest.raises(TypeError, match=words):
            _ = (v.causal & cls()).program
    with pytest.raises(TypeError, match="no hook"):
        _ = v.Variant().program
    for kind in (int, float, bool, v.Scalar, torch.Tensor, v.PerHead):
        unread = define(fields={"width": kind}, logits_mask=nothing)
        with pytest.raises(TypeError, match=r"Mine\.width is a field that no hook reads"):
            _ = unread(width=torch.ones(2) if kind in (torch.Tensor, v.PerHead) else 3).program


def test_a_name_without_self_reads_no_field() -> None:
    """The hook reads a global of the field's name, or a position."""
    scope = {"width": 3}
    exec("def logits_mask(self, at): return at.kv_pos > at.q_pos - width", scope)
    with pytest.raises(TypeError, match=r"Mine\.width is a field that no hook reads"):
        _ = define(fields={"width": int}, logits_mask=scope["logits_mask"])(width=5).program
    with pytest.raises(TypeError, match=r"Mine\.kv_len is a field that no hook reads"):
        _ = define(fields={"kv_len": int}, logits_mask=lambda self, at: at.kv_pos < at.kv_len)(kv_len=5).program
    right = define(fields={"kv_len": int}, logits_mask=lambda self, at: at.kv_pos < self.kv_len)(kv_len=5)
    assert right.values == (5,)


def outer(variant, at):
    return variant.reach + at.q_pos


def test_what_a_class_may_have_beside_hooks() -> None:
    class Distance(v.Variant):
        """A base without a hook, whose methods hooks of its heirs call."""

        width: int
        step: ClassVar[int] = 2
        _note = "of no concern"
        reach = 3

        def distance(self, at):
            return at.q_pos - at.kv_pos + self.offset

        offset = 0

        @property
        def wide(self):
            return self.width > 10

        @classmethod
        def of(cls, tokens):
            return cls(width=tokens - 1)

        def _describe(self):
            return "private"

        class Config:
            pass

    class Near(Distance):
        def logits_mask(self, at):
            return (self.distance(at) <= self.width) & (at.kv_pos % self.step == 0) & (outer(self, at) > 0)

    class Nearer(Near):
        offset = 1

        def logits_mask(self, at):
            return super().logits_mask(at) & (at.kv_pos > 0)

    class Other(Near):
        """Its own hook reads nothing of what its bases have."""

        def logits_mask(self, at):
            return at.kv_pos == 0

    class Looking(v.Variant):
        w0: float
        w1: float

        def logits_transform(self, logits, at):
            return logits * sum(getattr(self, f"w{i}") for i in range(2))

    class Mixin:
        def twice(self, x):
            return 2 * x

    class Mixed(Mixin, v.Variant):
        def logits_transform(self, logits, at):
            return self.twice(logits)

    class Decorated(v.Variant):
        gain: float

        @staticmethod
        def scale(x, gain):
            return x * gain

        def logits_transform(self, logits, at):
            return functools.reduce(lambda x, _: self.scale(x, self.gain), range(2), logits)

    class Linear(v.Variant):
        softmax = False

    class Aliased(v.Variant):
        """Texts, factories, another name of a hook, and hooks that are no plain functions."""

        title = "aliased"
        other = None

        @staticmethod
        def make(number):
            return Aliased()

        def keep(self, at):
            return at.kv_pos >= 0

        logits_mask = keep
        logits_transform = functools.partialmethod(lambda self, gain, x, at: x * gain, 3.0)

    for variant in (
        Near.of(9),
        Nearer(width=3),
        Other(width=1),
        Looking(w0=1.0, w1=2.0),
        Mixed(),
        Decorated(gain=2.0),
        Aliased(),
    ):
        assert variant.program.hooks
        assert (variant & v.causal & variant).program.hooks
    assert Near(width=30).wide
    assert Linear().program.softmax is False
    assert Nearer(width=3).program != Near(width=3).program


@pytest.mark.parametrize("hook", HOOK_ARGUMENTS)
def test_a_hook_of_another_signature(hook) -> None:
    arguments = ("self", *HOOK_ARGUMENTS[hook])
    right = rf"write def {hook}\({', '.join(arguments)}\)"
    body = "at" if hook == "logits_mask" else arguments[1]
    for names in (arguments[:-1], arguments[1:], (*arguments, "extra"), ()):
        scope: dict = {}
        exec(f"def {hook}({', '.join(names)}): return {body}", {}, scope)
        with pytest.raises(TypeError, match=right):
            define(**scope)
    for wrong in (3, None, torch.ones(2)):
        with pytest.raises(TypeError, match=right):
            define(**{hook: wrong})
    with pytest.raises(TypeError, match=f"{hook} is annotated as a field"):
        define(fields={hook: float})
    assert define(**{hook: lambda *everything: everything})
    assert define(**{hook: staticmethod(eval(f"lambda {', '.join(arguments[1:])}: {body}"))})


def test_hooks_of_other_classes() -> None:
    class Slip:
        def logit_mask(self, at):
            return at.kv_pos > 3

    class Mask:
        def logits_mask(self, at):
            return at.kv_pos > 3

        def describe(self):
            return "not for hooks, in a class that is no variant"

    with pytest.raises(TypeError, match=r"Slip\.logit_mask .*did you mean 'logits_mask'"):
        define(bases=(Slip, v.Variant), logits_transform=scaled)
    with pytest.raises(TypeError, match=r"write class Mine\(Mask, Variant\)"):
        define(bases=(v.Variant, Mask), logits_transform=scaled)
    assert define(bases=(Mask, v.Variant), logits_transform=scaled)().program.mask is not None


def test_a_base_may_hold_more_helpers_than_each_heir_uses() -> None:
    """And a constant may be one that a constructor alone reads."""

    class Distances(v.Variant):
        def ahead(self, at):
            return at.kv_pos - at.q_pos

        def far(self, at):
            return self.ahead(at) < -8

    class Causal(Distances):
        def logits_mask(self, at):
            return self.ahead(at) <= 0

    assert Causal().program == define(logits_mask=lambda self, at: at.kv_pos - at.q_pos <= 0)().program

    class Window(v.Variant):
        width: int
        WIDTH = 128

        @classmethod
        def usual(cls):
            return cls(width=cls.WIDTH)

        def logits_mask(self, at):
            return at.kv_pos > at.q_pos - self.width

    assert Window.usual().values == (128,)
    with pytest.raises(TypeError, match="score_mod is no hook, and no hook calls it"):
        _ = define(bases=(define(score_mod=scaled),), logits_mask=nothing)().program
    hidden = define(limit=lambda self, at: at.kv_pos < 4, logits_mask=nothing)
    with pytest.raises(TypeError, match="limit is no hook"):  # its class has a hook, which does not call it
        _ = define(bases=(hidden,), logits_transform=scaled)().program


def test_names_of_every_variant_are_taken() -> None:
    for name in ("program", "values", "explain"):
        with pytest.raises(TypeError, match=f"{name} hides"):
            define(fields={name: torch.Tensor}, logits_transform=scaled)
        with pytest.raises(TypeError, match=f"{name} hides"):
            define(**{name: 3})


def test_a_kind_is_an_annotation() -> None:
    with pytest.raises(TypeError, match="slopes: PerHead"):
        define(slopes=v.PerHead)
    with pytest.raises(TypeError, match="is an annotation"):
        v.PerHead(torch.ones(3))
    marked = define(
        fields={"slopes": typing.Annotated[v.PerHead, "of ALiBi"]},
        logits_transform=lambda s, x, at: x * s.slopes[at.q_head],
    )
    assert marked(slopes=torch.ones(3)).program.params[0].kind == "head"


@pytest.mark.parametrize(
    "kind", ["PerHead", "PerKVHead", "PerRequest", "PerQueryToken", "PerKeyToken", "Bits", "Scalar"]
)
def test_help_of_a_kind_is_one_paragraph(kind) -> None:
    text = pydoc.plain(pydoc.render_doc(getattr(v, kind)))
    assert len(text.splitlines()) < 25
    assert "Field of a variant" in text


class Top(v.Variant):
    w: int
    cap: float = 2.0

    def logits_mask(self, at):
        return at.kv_pos < self.w

    def logits_transform(self, logits, at):
        return logits * self.cap


def test_variants_are_equal_by_value() -> None:
    assert Top(w=3) == Top(w=3, cap=2.0) == Top(w=numpy.int64(3))
    assert len({Top(w=3), Top(w=3), Top(w=4), v.causal, v.causal & Top(w=3), v.causal & Top(w=3)}) == 4
    different = [Top(w=4), Top(w=3, cap=3.0), Top(w=3.0), Top(w=True), v.causal, v.full, v.causal & Top(w=3), 3, None]
    assert all(Top(w=3) != other for other in different)
    slopes = torch.ones(4)
    assert v.alibi(slopes) == v.alibi(slopes)
    assert (v.causal & v.alibi(slopes)) == (v.causal & v.alibi(slopes))
    assert v.alibi(slopes) != v.alibi(slopes.clone())  # another memory may change on its own
    assert hash(v.alibi(slopes)) == hash(v.alibi(slopes))
    assert v.sliding_window(3, 4) == v.sliding_window(3, 4) != v.sliding_window(4, 3)
    assert v.softcap(3.0) == v.softcap(3) != v.softcap(4)
    frequencies = v.rope_frequencies(64)
    assert v.rope(64, inv_freq=frequencies) == v.rope(64, inv_freq=frequencies)
    assert v.rope(64, inv_freq=frequencies) != v.rope(64, inv_freq=frequencies, interleaved=True)
    assert Top(w=3, cap=float("nan")) == Top(w=3, cap=float("nan"))
    assert pickle.loads(pickle.dumps(Top(w=3))) == Top(w=3)
    assert (v.full & v.causal) is v.causal
    assert (v.causal & v.full) is v.causal
    assert (v.full & v.full) is v.full

    def keep(b, h, i, j):
        return i >= j

    assert v.from_flex(mask_mod=keep) == v.from_flex(mask_mod=keep)
    assert v.from_flex(mask_mod=keep) != v.from_flex(mask_mod=keep, q_index="absolute")


def initialised(self, w):
    self.w = w


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: v.causal(), "instance .* already: leave out the ()"),
        (lambda: Top(w=3)(), "leave out the ()"),
        (lambda: v.causal & Top, r"make an instance: Top\(w=..., cap=...\)"),
        (lambda: Top & v.causal, r"make an instance: Top\(w=..., cap=...\)"),
        (lambda: torch.ones(2).bool() & v.causal, r"\.\.\. & Causal\(\): Tensor: give a Variant"),
        (lambda: v.causal & (lambda b, h, i, j: i >= j), "from_flex"),
        (lambda: (lambda b, h, i, j: i >= j) & v.causal, "from_flex"),
        (lambda: v.causal & torch.ones(3), "Tensor: give a Variant"),
        (lambda: v.causal & None, "NoneType: give a Variant"),
        (lambda: v.causal & v.alibi, r"call it: alibi\(...\)"),
        (lambda: v.causal | v.full, "one logits_mask"),
        (lambda: ~v.causal, "~condition"),
        (lambda: v.causal + v.alibi(3), "joined with &"),
        (lambda: v.causal and v.alibi(3), "not `and`"),
        (lambda: Top(3), r"by name: write Top\(w=..., cap=...\)"),
        (lambda: Top(weight=3), "no field 'weight'"),
        (lambda: Top(w=3, capp=3.0), "did you mean 'cap'"),
        (lambda: Top(), "needs the field 'w'"),
        (lambda: define(__init__=initialised, logits_mask=nothing)(3), "write `w: int` in the class, drop __init__"),
        (lambda: dataclasses.dataclass(define(fields={"w": int}, logits_mask=nothing))(3), "leave out @dataclass"),
        (lambda: define(fields={"w": int}, __init__=initialised, logits_mask=nothing)(3), "drop __init__"),
    ],
)  # fmt: skip
def test_what_people_write_gets_the_way_out(use, words) -> None:
    with pytest.raises((TypeError, AttributeError), match=words):
        use()


def test_what_is_given_for_a_variant() -> None:
    q = torch.randn(4, 2, 16)
    heads = flashloom.HeadShape(2, 2, 16)
    plan = flashloom.Attention(heads, variant=v.causal, dtype=q.dtype).plan(
        flashloom.Batch(q_lens=[4], kv=flashloom.RaggedKV([4]))
    )
    for given, words in (
        (Top, r"make an instance: Top\(w=..., cap=...\)"), (v.softcap, r"call it: softcap\(...\)"),
        (lambda b, h, i, j: i >= j, "from_flex"), ([v.causal, v.alibi(2)], "list: give a Variant"),
        ("causal", "str: give a Variant"),
    ):  # fmt: skip
        for use in (
            lambda x: flashloom.attention(q, q, q, variant=x),
            lambda x: flashloom.Attention(heads, variant=x, dtype=q.dtype),
            lambda x: plan.run(q, (q, q), variant=x),
        ):
            with pytest.raises(TypeError, match=words):
                use(given)


def test_a_misspelled_attribute_in_a_hook() -> None:
    mine = define(fields={"scale": float}, logits_transform=lambda self, x, at: x * self.scael + self.scale)
    with pytest.raises(v.TraceError, match="logits_transform: Mine has no attribute 'scael': did you mean 'scale'"):
        _ = mine(scale=2.0).program
    forgetful = define(fields={"w": int}, __init__=lambda self: None, logits_mask=lambda self, at: at.kv_pos < self.w)
    with pytest.raises(TypeError, match=r"super\(\).__init__\(w=...\)"):
        _ = forgetful().program


def test_a_constructor_that_sets_fields_stays_possible() -> None:
    def init(self, tokens):
        super(mine, self).__init__(left=tokens - 1)

    mine = define(fields={"left": int}, __init__=init, logits_mask=lambda s, at: at.kv_pos >= at.q_pos - s.left)
    assert mine(8).values == (7,)


def test_numpy_as_values() -> None:
    class Bias(v.Variant):
        rate: v.PerHead
        gain: float
        width: int
        on: bool

        def logits_transform(self, logits, at):
            return torch.where(self.on, logits + self.rate[at.q_head] * self.gain + self.width, logits)

    rate = numpy.arange(3, dtype=numpy.float32)
    made = Bias(rate=rate, gain=numpy.float32(0.5), width=numpy.int16(7), on=numpy.bool_(True))
    plain = Bias(rate=torch.arange(3.0), gain=0.5, width=7, on=True)
    assert made.program == plain.program
    assert [type(x) for x in made.values if not isinstance(x, torch.Tensor)] == [
        type(x) for x in plain.values if not isinstance(x, torch.Tensor)
    ]
    rate[1] = 9  # the array's memory, not a copy
    assert torch.equal(next(x for x in made.values if isinstance(x, torch.Tensor)), torch.tensor([0.0, 9.0, 2.0]))
    with pytest.raises(TypeError, match="numpy array that torch does not take"):
        Bias(rate=numpy.array(["a"]), gain=1.0, width=1, on=True)
    with pytest.raises(TypeError, match="takes a number"):
        Bias(rate=rate, gain="much", width=1, on=True)


def test_numpy_in_the_built_in_variants() -> None:
    n = numpy.int64
    assert v.sliding_window(n(3), n(4)) == v.sliding_window(3, 4)
    assert torch.equal(v.alibi(n(8)).values[0], v.alibi(8).values[0])
    assert v.softcap(numpy.float32(3)) == v.softcap(3.0)
    assert v.rope(n(64)).program == v.rope(64).program
    assert v.length_temperature(n(100)) == v.length_temperature(100)
    assert torch.equal(v.alibi(numpy.ones(4, dtype=numpy.float32)).values[0], torch.ones(4))
    assert v.sliding_window(tokens=n(4)) == v.sliding_window(3)
    for numbers in ([0, 0, 1], (0, 0, 1), numpy.array([0, 0, 1])):
        assert v.document_mask(numbers).values[0].tolist() == [0, 0, 1]
        assert v.prefix_lm(numbers).values[0].tolist() == [0, 0, 1]
    for make in (v.document_mask, v.prefix_lm):
        for wrong in ([0.0, 1.5], [True, False], torch.ones(2), numpy.ones(2), "ab", None):
            with pytest.raises(TypeError, match=r"integers|makes no tensor"):
                make(wrong)
    for wrong in (True, 2.5, n(-1), "3"):
        with pytest.raises(ValueError, match="width"):
            v.sliding_window(wrong)
    for wrong in (0, -3, True):
        with pytest.raises(ValueError, match="number of heads"):
            v.alibi(wrong)


@pytest.mark.parametrize("make", [v.softcap, v.sigmoid, v.length_temperature])
def test_numbers_of_the_built_in_variants(make) -> None:
    for wrong in ("7", None, [7.0], torch.ones(2)):
        with pytest.raises(TypeError, match=rf"{make.__name__}\(.*\): give a number"):
            make(wrong)
    for right in (7, 7.0, numpy.float32(7), numpy.int64(7), torch.tensor(7.0)):
        assert make(right) == make(7)


def test_what_makes_no_tensor_is_named() -> None:
    ragged = [[1], [1, 2]]
    for name, make in {
        "custom_mask": lambda: v.custom_mask(ragged),
        "packed_mask": lambda: v.packed_mask(ragged, [0, 1]),
        "indptr": lambda: v.packed_mask(torch.zeros(1, dtype=torch.uint8), None),
        "inv_freq": lambda: v.rope(8, inv_freq=ragged),
    }.items():
        with pytest.raises(TypeError, match=rf"{name} is \w+, which makes no tensor"):
            make()
    assert v.rope(4, inv_freq=[1.0, 0.5]).program == v.rope(4).program
    with pytest.raises(TypeError, match="give a number"):
        v.rope("8")
    for wrong in (7, 0, 8.5):
        with pytest.raises(ValueError, match=r"rotary dim .*: it must be even and positive"):
            v.rope(wrong)


def test_a_kernel_has_no_name_of_class_or_field_in_it() -> None:
    from flashloom.attention.cpu import source
    from flashloom.attention.executor import AttentionSpec

    def spec(variant: v.Variant) -> AttentionSpec:
        return flashloom.Attention(heads, variant=variant, dtype=torch.float32, device="cpu").spec

    heads = flashloom.HeadShape(2, 2, 32)
    other = define("Limit", fields={"most": float}, logits_transform=lambda s, x, at: s.most * torch.tanh(x / s.most))
    same = define("Bound", fields={"cap": float}, logits_transform=lambda s, x, at: s.cap * torch.tanh(x / s.cap))
    texts = {source(spec(v.causal & cls(**{name: 2.0}))) for cls, name in ((other, "most"), (same, "cap"))}
    assert len(texts) == 1
