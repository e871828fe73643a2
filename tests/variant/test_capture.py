"""FlexAttention functions give what they give on plain tensors, one pair of positions at a time, or are refused."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import random
import types

import numpy
import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import and_masks, create_block_mask, noop_mask, or_masks

import flashloom
import flashloom.variant as v
from flashloom.lower.torch import evaluate

BATCH, HEADS, N = 2, 3, 7


def one_by_one(function, *, mask: bool) -> torch.Tensor:
    """The function on 0-dim tensors, pair by pair: [batch, heads, n, n]."""
    found = []
    for b, h, i, j in itertools.product(range(BATCH), range(HEADS), range(N), range(N)):
        where = [torch.tensor(x) for x in (b, h, i, j)]
        found.append(function(*where) if mask else function(torch.tensor(0.25), *where))
    return torch.stack([torch.as_tensor(x) for x in found]).view(BATCH, HEADS, N, N)


def by_flashloom(variant: v.Variant, hook: str) -> torch.Tensor:
    def number(x: int) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.int32)

    found = torch.empty(BATCH, HEADS, N, N, dtype=torch.bool if hook == "mask" else torch.float32)
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        inputs = {
            "batch": number(b), "q_head": number(h), "kv_head": number(h), "q_len": number(N), "kv_len": number(N),
            "q_start": number(b * N), "kv_start": number(b * N), "logits": torch.full((N, N), 0.25),
            "q_pos": torch.arange(N, dtype=torch.int32).view(-1, 1),
            "kv_pos": torch.arange(N, dtype=torch.int32).view(1, -1),
        }  # fmt: skip
        if hook in variant.program.hooks:
            found[b, h] = evaluate(variant.program, hook, inputs, variant.values)
        else:  # it changes nothing
            found[b, h] = True if hook == "mask" else inputs["logits"]
    return found


def agrees(score=None, mask=None) -> v.Variant:
    variant = v.from_flex(score, mask)
    for joined, name in ((variant, "alone"), (v.full & variant & v.softcap(5.0), "joined")):
        if mask is not None:
            assert torch.equal(by_flashloom(joined, "mask"), one_by_one(mask, mask=True)), name
    if score is not None:
        torch.testing.assert_close(by_flashloom(variant, "logits"), one_by_one(score, mask=False).float())
    return variant


DOC = torch.tensor([0, 0, 1, 1, 1, 2, 2])
Pair = collections.namedtuple("Pair", "doc other")


@dataclasses.dataclass
class Held:
    doc: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    doc: torch.Tensor


class Plain:
    of_class = DOC

    def __init__(self, doc: torch.Tensor):
        self.doc = doc
        self.inner = types.SimpleNamespace(deeper=[{"doc": doc}])

    @property
    def computed(self) -> torch.Tensor:
        return self.doc

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.doc

    def closure(self):
        return lambda b, h, i, j: self.doc[i] == self.doc[j]

    def method(self, b, h, i, j):
        return self.doc[i] == self.doc[j]

    @classmethod
    def of(cls, b, h, i, j):
        return cls.of_class[i] == cls.of_class[j]

    @staticmethod
    def static(b, h, i, j):
        return DOC[i] == DOC[j]


class Slots:
    __slots__ = ("doc",)

    def __init__(self, doc: torch.Tensor):
        self.doc = doc

    def __call__(self, b, h, i, j):
        return self.doc[i] == self.doc[j]


class Module(torch.nn.Module):
    def __init__(self, doc: torch.Tensor):
        super().__init__()
        self.register_buffer("doc", doc)

    def forward(self, b, h, i, j):
        return self.doc[i] == self.doc[j]


class Global:
    def __call__(self, b, h, i, j):
        return DOC[i] == DOC[j]


def nested(doc):
    def outer(b, h, i, j):
        def same(x, y):
            return (lambda: doc[x] == doc[y])()

        return same(i, j)

    return outer


def generated(doc):
    def same(b, h, i, j):
        return functools.reduce(lambda x, y: x & y, (d[i] == d[j] for d in [doc, doc + 1]))

    later = doc + 1  # of the size and dtype, but another tensor
    return lambda b, h, i, j: functools.reduce(lambda x, y: x & y, [d[i] == d[j] for d in (doc, later)])


module = types.ModuleType("masks")
module.doc = DOC  # type: ignore[attr-defined]


def reaching(get):
    return lambda b, h, i, j: get()[i] == get()[j]


def ways(doc: torch.Tensor) -> dict:
    table = {"doc": doc, 3: [doc, (doc,)]}
    ordered, default = collections.OrderedDict(doc=doc), collections.defaultdict(list, doc=doc)
    frozen = types.MappingProxyType({"doc": doc})
    queue = collections.deque([doc])
    plain, held, frozen_held, pair = Plain(doc), Held(doc), Frozen(doc), Pair(doc, 3)
    return {
        "closure": reaching(lambda: doc), "namespace": reaching(lambda: types.SimpleNamespace(doc=doc).doc),
        "dataclass": reaching(lambda: held.doc), "slots dataclass": reaching(lambda: frozen_held.doc),
        "namedtuple": reaching(lambda: pair.doc), "tuple": reaching(lambda p=(1, [doc]): p[1][0]),
        "dict": reaching(lambda: table["doc"]), "dict of lists": reaching(lambda: table[3][1][0]),
        "ordered": reaching(lambda: ordered["doc"]), "defaultdict": reaching(lambda: default["doc"]),
        "proxy": reaching(lambda: frozen["doc"]), "deque": reaching(lambda: queue[0]),
        "module": reaching(lambda: module.doc), "self": plain.closure(), "method": plain.method,
        "deep": reaching(lambda: plain.inner.deeper[0]["doc"]), "property": reaching(lambda: plain.computed),
        "getitem": reaching(lambda: plain["doc"]), "class attribute": Plain.of, "static": Plain.static,
        "slots": Slots(doc), "nn.Module": Module(doc), "global in __call__": Global(),
        "partial": functools.partial(lambda d, b, h, i, j: d[i] == d[j], doc),
        "partial by name": functools.partial(lambda b, h, i, j, d: d[i] == d[j], d=doc),
        "default": lambda b, h, i, j, d=doc: d[i] == d[j], "keyword": lambda b, h, i, j, *, d=doc: d[i] == d[j],
        "nested": nested(doc), "list": generated(doc), "lambda of lambda": (lambda f: lambda *a: f(*a))(nested(doc)),
        "cached": functools.lru_cache(lambda: doc) and reaching(functools.lru_cache(lambda: doc)),
    }  # fmt: skip


@pytest.mark.parametrize("way", ways(DOC))
def test_a_tensor_is_found_however_it_is_reached(way) -> None:
    mask = ways(DOC)[way]
    variant = agrees(mask=mask)
    assert variant.program.params
    assert all(any(x is y for y in (DOC, *variant.values)) for x in variant.values)
    assert v.from_flex(mask_mod=mask).program == variant.program


def test_a_change_in_place_is_seen_and_another_tensor_shares_the_kernel() -> None:
    table = torch.randn(HEADS, N)

    def score(s, b, h, i, j):
        return s + table[h, j] + table[0, -1] + table[1][2] + table.T[i, h]

    variant = v.from_flex(score)
    before = by_flashloom(variant, "logits")
    table.mul_(3)
    assert not torch.equal(before, by_flashloom(variant, "logits"))
    expected = one_by_one(
        lambda s, b, h, i, j: s + table[h, j] + table[0, -1] + table[1][2] + table.T[i, h], mask=False
    )
    torch.testing.assert_close(by_flashloom(variant, "logits"), expected)
    programs = {v.from_flex(reaching(lambda t=t: t) and (lambda s, b, h, i, j, t=t: s + t[j])).program.digest
                for t in (torch.randn(5), torch.randn(9), torch.randn(4, 4)[1], torch.randn(8)[::2])}  # fmt: skip
    assert len(programs) == 1


T2, T3 = torch.randn(HEADS, 2 * N), torch.randn(BATCH, HEADS, N)
GAIN, COUNT, FLAG = torch.tensor(1.5), torch.tensor(3), torch.tensor(True)
INDEX = torch.tensor([3, 0, 5, 1, 2, 6, 4])
SCORES = {
    "shape": lambda s, b, h, i, j: s + T2[h, i - j + T2.shape[1] // 2],
    "size": lambda s, b, h, i, j: s + T2[h, i - j + T2.size(-1) // 2] * T2.size()[0],
    "len": lambda s, b, h, i, j: s + T3[b, h, j] * len(T3) * len(T3[0]) * len(T3[b]),
    "facts": lambda s, b, h, i, j: s + T2.ndim + T2.dim() + T2.numel() + T2.element_size() + T2.stride(0) + T2.nbytes,
    "dtype": lambda s, b, h, i, j: s + T2[h, j] if T2.dtype == torch.float32 and T2.is_floating_point() else s,
    "device": lambda s, b, h, i, j: s + T2[h, j] if T2.device == torch.device("cpu") and not T2.is_cuda else s,
    "unpack": lambda s, b, h, i, j: s + (lambda n, m: n * 100 + m)(*T2.shape),
    "0-dim": lambda s, b, h, i, j: s * GAIN + COUNT - GAIN,
    "0-dim on the left": lambda s, b, h, i, j: GAIN - s / GAIN,
    "0-dim alone": lambda s, b, h, i, j: s + (2 - GAIN) * (GAIN + COUNT) / 4 + 3 // COUNT + COUNT % 2 + 7 % COUNT,
    "0-dim functions": lambda s, b, h, i, j: s + torch.exp(GAIN) + GAIN.sigmoid() - torch.maximum(GAIN, COUNT).float(),
    "0-dim where": lambda s, b, h, i, j: torch.where(FLAG & (COUNT > 2), s * 2, s) + torch.where(i > j, GAIN, 0.0),
    "0-dim negated": lambda s, b, h, i, j: -GAIN + abs(-COUNT) + s + GAIN**2,
    "0-dim as index": lambda s, b, h, i, j: s + T2[h, COUNT] + T2[COUNT - 1, j],
    "rows": lambda s, b, h, i, j: s + T3[b][h][j] + T3[b, h][j] + T3[b][h, j] + T3[:, h][b][j] + T3[..., j][b, h],
    "slices": lambda s, b, h, i, j: s + T2[:-1][h // 2, j] + T2[:, 2:][h, j] + T2[:, ::2][h, j] + T2[h, 1:9:2][i % 4],
    "new axis": lambda s, b, h, i, j: s + T2[None, h, j][0] + T2[h, None, j][0] + T2[h][None][0, j],
    "constants": lambda s, b, h, i, j: s + T2[0, 1] + T2[-1, -2] + T2[h, -1] + T2[-1, j] + T2[2][-3],
    "views": lambda s, b, h, i, j: s + T2.T[j, h] + T2.view(-1)[j] + T2.reshape(HEADS, 2, N)[h, 1, j] + T2.mT[j, h],
    "more views": lambda s, b, h, i, j: s + T2.unsqueeze(1)[h, 0, j] + T2.narrow(1, 2, N)[h, j] + T2.mT[j][h],
    "expanded": lambda s, b, h, i, j: s + T2[0].expand(BATCH, 2 * N)[b, j] + GAIN.expand(4)[h] + GAIN.view(1, 1)[0, 0],
    "unbind": lambda s, b, h, i, j: s + sum(row[j] for row in T2) + T2.unbind(0)[1][i] + T2.split(1)[2][0, j],
    "iterated rows": lambda s, b, h, i, j: s + sum(x for x in T3[b, h]) + sum(T3[b, k, j] for k in range(HEADS)),
    "indirect": lambda s, b, h, i, j: s + T2[h, INDEX[INDEX[j]]] * INDEX[i],
    "no-op conversions": lambda s, b, h, i, j: s + T2.float()[h, j] + T2.contiguous()[h, i] + T2.detach().cpu()[h, j],
    "to the batch's device": lambda s, b, h, i, j: s + T2.to(s.device)[h, j] + T2.to(device=b.device)[h, i],
    "made inside": lambda s, b, h, i, j: s + torch.tensor(2.5) * torch.ones(()) + torch.arange(N).float()[j],
    "made inside and changed": lambda s, b, h, i, j: s + torch.tensor([1.0, 4, 9]).flip(0).sqrt()[h],
    "made inside by number": lambda s, b, h, i, j: s + torch.tensor([1.0, 2.0]).sum().item() + torch.tensor(3).item(),
    "masked_fill": lambda s, b, h, i, j: s.masked_fill(i < j, -1e4).masked_fill(i == 3, GAIN) + j.masked_fill(i > j, 2),
    "like": lambda s, b, h, i, j: s + torch.ones_like(s) + torch.zeros_like(s) + torch.full_like(s, 3) + s.new_ones(()),
    "symbols are 0-dim": lambda s, b, h, i, j: s + b.dim() + b.ndim + len(b.shape) + s.numel() + len(s.size()),
    "numpy": lambda s, b, h, i, j: s * numpy.float32(0.5) + numpy.float64(2) * s - numpy.int64(3) + numpy.int8(2),
    "finfo": lambda s, b, h, i, j: torch.where(i < j, s, torch.finfo(T2.dtype).eps) + torch.iinfo(INDEX.dtype).bits,
    "half": lambda s, b, h, i, j: s + T2.half()[h, j] if T2.dtype == torch.half else s,
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_what_may_be_done_with_a_tensor(name) -> None:
    agrees(SCORES[name])


@pytest.mark.parametrize("seed", range(12))
def test_functions_of_functions(seed) -> None:
    """Several of them on each other's results, over tensors of random types, layouts and ways to reach them."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    chain = [SCORES[name] for name in draw.sample(sorted(SCORES), 3)]
    dtype = draw.choice([torch.float32, torch.float16, torch.int64, torch.uint8, torch.float64])
    whole = torch.randint(0, 5, (N + 1, 2, N + 2), dtype=torch.int32).to(dtype)
    table = draw.choice([whole[:, 0], whole[:, 1].T, whole[1:, :, ::1].select(1, 0), whole[0, 0, :1].expand(N, N)])
    held = types.SimpleNamespace(x=[table])
    reach = draw.choice([lambda: table, lambda: held.x[0]])
    rows, columns = table.shape

    def score(s, b, h, i, j):
        s = functools.reduce(lambda s, f: f(s, b, h, i, j), chain, s)
        return s / 64 + reach()[i % rows, j % reach().shape[1]] * 0.5 - reach()[-1, j % columns]

    def mask(b, h, i, j):
        return (reach()[i % rows, j % columns] <= reach()[j % rows][i % columns]) | (i == j)

    variant = v.from_flex(score, mask)
    assert torch.equal(by_flashloom(variant, "mask"), one_by_one(mask, mask=True))
    expected = one_by_one(score, mask=False).float()
    torch.testing.assert_close(by_flashloom(variant, "logits"), expected, rtol=1e-4, atol=1e-4)


WINDOW = numpy.int64(4)
MASKS = {
    "numpy integer": lambda b, h, i, j: (i - j).abs() < WINDOW,
    "numpy on the left": lambda b, h, i, j: (i - j < WINDOW) & (numpy.int32(2) <= i + j) & (numpy.uint8(1) + i > j),
    "noop": noop_mask,
    "and noop": and_masks(noop_mask, lambda b, h, i, j: i >= j),
    "or": or_masks(lambda b, h, i, j: i < j, and_masks(noop_mask, lambda b, h, i, j: DOC[i] == DOC[j])),
    "new_ones of a shape": lambda b, h, i, j: b.new_ones(b.shape, dtype=torch.bool, device=b.device) & (i >= j),
    "ones": lambda b, h, i, j: torch.ones((), dtype=torch.bool, device=b.device) & (i >= j),
    "0-dim flag": lambda b, h, i, j: FLAG & (i >= j),
    "negated flag": lambda b, h, i, j: ~FLAG | (i >= j),
    "0-dim result": lambda b, h, i, j: FLAG,
    "bool table": lambda b, h, i, j: (T3 > 0)[b, h, j] if False else (DOC[i] > 0) ^ (DOC[j] > 1),
    "last": lambda b, h, i, j: j < DOC[-1] + COUNT,
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name) -> None:
    agrees(mask=MASKS[name])


ARRAY, COMPLEX, FLOAT8 = numpy.arange(9), torch.ones(3, dtype=torch.complex64), torch.ones(3).to(torch.float8_e4m3fn)
REFUSED = {
    "copies": (lambda s, b, h, i, j: s + (T2 * 2)[h, j], "T2.*before from_flex"),
    "converts": (lambda s, b, h, i, j: s + T2.half()[h, j], "before from_flex"),
    "reduces": (lambda s, b, h, i, j: s + T2.sum(), "before from_flex"),
    "reads": (lambda s, b, h, i, j: s + COUNT.item(), "COUNT.*before from_flex"),
    "branches": (lambda s, b, h, i, j: s + 1 if FLAG else s, "FLAG"),
    "int": (lambda s, b, h, i, j: s + int(COUNT), "COUNT"),
    "range": (lambda s, b, h, i, j: s + sum(range(COUNT)), "Python number"),
    "list": (lambda s, b, h, i, j: s + DOC.tolist()[0], "DOC"),
    "to numpy": (lambda s, b, h, i, j: s + DOC.numpy()[0], "DOC"),
    "contains": (lambda s, b, h, i, j: s + (3 in DOC), "DOC"),
    "whole": (lambda s, b, h, i, j: s + T2, "T2 of shape .*index it"),
    "a row": (lambda s, b, h, i, j: s + T2[h], "T2 of shape"),
    "a row's sum": (lambda s, b, h, i, j: s + T2[h].sum(), "T2 of shape"),
    "torch.sum of a row": (lambda s, b, h, i, j: s + torch.sum(T2[h]), "T2 of shape"),
    "changes": (lambda s, b, h, i, j: (DOC.add_(1), s)[1], "in place"),
    "assigns": (lambda s, b, h, i, j: (DOC.__setitem__(0, 5), s)[1], "in place"),
    "augments": (lambda s, b, h, i, j: s + (lambda x: x.__iadd__(1))(COUNT), "in place"),
    "out": (lambda s, b, h, i, j: s + torch.add(COUNT, 1, out=COUNT), "in place"),
    "draws": (lambda s, b, h, i, j: s + torch.rand(()), "draws"),
    "too many": (lambda s, b, h, i, j: s + DOC[i, j], "DOC of shape .* 2 indices"),
    "beyond": (lambda s, b, h, i, j: s + DOC[N], "DOC has 7 entries .* indexed with 7"),
    "before": (lambda s, b, h, i, j: s + T2[h, -15], "indexed with -15"),
    "float index": (lambda s, b, h, i, j: s + DOC[1.0], "integers"),
    "bool index": (lambda s, b, h, i, j: s + DOC[i > j], "bool"),
    "several": (lambda s, b, h, i, j: s + T2[h, INDEX], "one integer for each dimension|one integer for each"),
    "float symbol": (lambda s, b, h, i, j: s + DOC[s], "integers"),
    "numpy array": (lambda s, b, h, i, j: s + ARRAY, "numpy ndarray.*tensor"),
    "numpy array by a position": (lambda s, b, h, i, j: s + ARRAY[i], "numpy array"),
    "numpy function": (lambda s, b, h, i, j: numpy.tanh(s), "torch.tanh"),
    "dict": (lambda s, b, h, i, j: s + {0: 1.0, 1: 2.0}[h], "key of a dict"),
    "product": (lambda s, b, h, i, j: s @ T2, "sees one"),
    "gather": (lambda s, b, h, i, j: s + T2.gather(0, i), "table"),
    "no result": (lambda s, b, h, i, j: None, "returns None"),
    "a mask": (lambda s, b, h, i, j: i >= j, "mask_mod="),
    "complex": (lambda s, b, h, i, j: s + COMPLEX[h], "complex64"),
    "float8": (lambda s, b, h, i, j: s + FLOAT8[h], "float8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name) -> None:
    score, words = REFUSED[name]
    before = DOC.clone(), COUNT.clone()
    with pytest.raises(TypeError, match=words):
        v.from_flex(score)
    assert torch.equal(DOC, before[0])
    assert torch.equal(COUNT, before[1])


def test_gradients_are_refused_where_they_would_be_expected() -> None:
    bias = torch.nn.Parameter(torch.randn(HEADS))
    with pytest.raises(RuntimeError, match=r"bias.*requires grad"):
        v.from_flex(lambda s, b, h, i, j: s + bias[h])
    with torch.no_grad():
        variant = agrees(lambda s, b, h, i, j: s + bias[h] + bias[1])
    assert variant.values[0] is bias


def test_tensors_are_named_in_messages() -> None:
    q = torch.randn(1, HEADS, N, 16)
    held = Held(torch.ones(HEADS, device="meta"))
    with pytest.raises(ValueError, match=r"held\.doc is on meta"):
        flashloom.attention(q, q, q, variant=v.from_flex(lambda s, b, h, i, j: s + held.doc[h]))
    with pytest.raises(ValueError, match=r"Alibi\.slopes has 5 entries"):
        flashloom.attention(q, q, q, variant=v.causal & v.alibi(5))


def eager(*args, **kwargs) -> torch.Tensor:
    """FlexAttention's definition, without compiling."""
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        return flex.flex_attention(*args, **kwargs)
    finally:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = False


@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "strided", "expanded", "part", "reversed axes", "0-dim"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8])
def test_kernels_read_captured_tensors_of_every_layout(layout, dtype) -> None:
    """Against eager FlexAttention, which indexes the tensor itself."""
    draw = torch.Generator().manual_seed(len(layout))
    whole = torch.randint(0, 9, (4, 5, 40, 40), generator=draw).to(dtype)
    table = {
        "contiguous": whole[0, 0].clone(), "transposed": whole[0, 1].T, "strided": whole[1, 1, ::2, ::3],
        "expanded": whole[1, 2, :1].expand(40, 40), "part": whole[2, 2, 3:30, 5:30],
        "reversed axes": whole.permute(3, 2, 1, 0)[:, :, 1, 2],
        "0-dim": whole[1, 2, 3, 4],
    }[layout]  # fmt: skip
    q, k, x = torch.randn(3, 1, 2, 24, 16, generator=draw).unbind()

    if layout == "0-dim":

        def score(s, b, h, i, j):
            return s + table * 0.25 * (j - i)

    else:

        def score(s, b, h, i, j):
            return s + 0.25 * table[i % table.shape[0], j % table.shape[1]]

    expected = eager(q.double(), k.double(), x.double(), score_mod=score).float()
    got = flashloom.attention(q, k, x, variant=v.from_flex(score))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_whole_way_of_flex_attention() -> None:
    """A block mask's function and a score function together."""
    q, k, x = torch.randn(3, 2, 4, 33, 16).unbind()
    ends = torch.tensor([0, 12, 33])
    slopes = torch.rand(4)

    def keep(b, h, i, j):
        return (j < ends[-1] - b) & (torch.bucketize is not None) & (i >= j)

    def score(s, b, h, i, j):
        return s + slopes[h] * (j - i)

    block_mask = create_block_mask(keep, 2, 4, 33, 33, device="cpu")
    expected = eager(q, k, x, score_mod=score, block_mask=block_mask)
    got = flashloom.attention(q, k, x, variant=v.from_flex(score, block_mask.mask_mod))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def blocks(keep):
    return create_block_mask(keep, None, None, 8, 8, device="cpu")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda keep: v.from_flex(keep), "did you mean mask_mod="),
        (lambda keep: v.from_flex(mask_mod=lambda s, b, h, i, j: s), "did you mean score_mod="),
        (
            lambda keep: v.from_flex(mask_mod=create_block_mask(keep, None, None, 8, 8, device="cpu")),
            "block_mask.mask_mod",
        ),
        (lambda keep: v.from_flex(create_block_mask(keep, None, None, 8, 8, device="cpu")), "block_mask.mask_mod"),
        (lambda keep: v.from_flex(lambda s: s), r"called with 5 arguments, \(score, b, h, q_idx, kv_idx\)"),
        (lambda keep: v.from_flex(mask_mod=lambda: True), "called with 4 arguments"),
        (lambda keep: v.from_flex(v.causal), "variant already"),
        (lambda keep: v.from_flex(mask_mod=v.causal), "variant already"),
        (lambda keep: v.from_flex(block_mask=blocks(keep)), "mask_mod=block_mask.mask_mod"),
        (lambda keep: v.from_flex(mask_fn=keep), "did you mean 'mask_mod'"),
        (lambda keep: v.from_flex(None, keep, "absolute"), "by place.*q_index="),
        (lambda keep: v.from_flex(torch.ones(3)), "give a function"),
        (lambda keep: v.from_flex(mask_mod=torch.ones(3, 3, dtype=torch.bool)), "give a function"),
        (lambda keep: v.from_flex(mask_mod=lambda b, h, i, j: i - j), "must return a bool"),
    ],
)
def test_what_is_given_to_from_flex(make, words) -> None:
    with pytest.raises(TypeError, match=words):
        make(lambda b, h, i, j: i >= j)


def test_composition_renames_what_was_captured() -> None:
    """Two functions that call different tensors by one name, and one that follows another's logits."""

    def biased(bias):
        return v.from_flex(lambda s, b, h, i, j: s * 2 + bias[j])

    one, two = torch.randn(N), torch.randn(N)
    joined = biased(one) & biased(two) & v.from_flex(mask_mod=lambda b, h, i, j: one[i] > one[j]) & biased(one)
    expected = ((0.25 * 2 + one) * 2 + two) * 2 + one
    torch.testing.assert_close(by_flashloom(joined, "logits"), expected.expand(BATCH, HEADS, N, N))
    assert torch.equal(by_flashloom(joined, "mask"), (one[:, None] > one).expand(BATCH, HEADS, N, N))


class Closed(v.Variant):
    gain: float

    def logits_transform(self, logits, at):
        return logits * self.gain + T2[at.q_head, at.kv_pos]


def test_a_tensor_around_a_class_is_to_be_a_field() -> None:
    bias = torch.ones(3)

    class Local(v.Variant):
        def logits_transform(self, logits, at):
            return logits + bias[at.q_head]

    class Added(v.Variant):
        def logits_transform(self, logits, at):
            return logits + GAIN

    class Attribute(v.Variant):
        table = torch.ones(3)

        def logits_transform(self, logits, at):
            return logits + self.table[at.q_head]

    class Product(v.Variant):
        def query_transform(self, q, at):
            return q @ T2

    class Taken(v.Variant):
        def logits_transform(self, logits, at):
            return logits + torch.take(bias, at.q_head) + {}.get(0, 0)

    class Keyed(v.Variant):
        def logits_transform(self, logits, at):
            return logits + {0: 1.0}[at.q_head]

    for variant, words in (
        (Taken(), "write `bias: torch.Tensor`"), (Keyed(), "key of a dict"), (Product(), "sees one"),
        (Closed(gain=1.0), "write `T2: torch.Tensor`"), (Local(), "write `bias: torch.Tensor`"),
        (Added(), "write `GAIN: torch.Tensor`"), (Attribute(), "write `table: torch.Tensor`"),
    ):  # fmt: skip
        with pytest.raises(v.TraceError, match=words):
            _ = variant.program
