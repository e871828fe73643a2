"""The built-in variants, written with the public API: each is also an example of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch

from flashloom.variant.fields import Bits, PerHead, PerKeyToken, PerRequest
from flashloom.variant.variant import Variant


class Full(Variant):
    """Every query attends to every key."""

    def _parts(self) -> list[Variant]:
        return [] if type(self) is Full else [self]  # nothing to trace, and nothing to join


class Causal(Variant):
    """A query attends to keys at its own position and before (bottom-right aligned)."""

    def logits_mask(self, at):
        return at.kv_pos <= at.q_pos


full, causal = Full(), Causal()


class LeftWindow(Variant):
    left: int

    def logits_mask(self, at):
        return at.kv_pos >= at.q_pos - self.left


class RightWindow(Variant):
    right: int

    def logits_mask(self, at):
        return at.kv_pos <= at.q_pos + self.right


_NOTHING: Any = object()


def sliding_window(left: int | None = _NOTHING, right: int | None = None, *, tokens: int | None = None) -> Variant:
    """Keep keys with kv_pos >= q_pos - left and, if right is given, kv_pos <= q_pos + right (tokens; Beltagy et al.
    2020). None leaves that side open. A model's window of W tokens, the query's own included, is `tokens=W`, which is
    left = W - 1. Raises ValueError for a negative width, or for tokens below 1 or beside left."""
    if tokens is not None:
        if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 1:
            raise ValueError(f"sliding_window(tokens={tokens!r}): a window holds 1 token or more, the query's own")
        if left is not _NOTHING:
            raise ValueError(f"sliding_window(left={left!r}, tokens={tokens}): give one of them; left is tokens - 1")
        left = tokens - 1
    elif left is _NOTHING:
        raise TypeError("sliding_window() needs a width: left= (tokens before the query's own) or tokens= (left + 1)")
    for name, width in (("left", left), ("right", right)):
        if width is not None and (isinstance(width, bool) or not isinstance(width, Integral) or width < 0):
            raise ValueError(
                f"sliding_window({name}={width!r}): a width is a number of tokens, 0 or more; None leaves the side open"
            )
    # positions stay below 2**30: a wider window has no limit, and in this form no kernel of its own
    sides = ([LeftWindow(left=min(left, 2**30))] if left is not None else []) + (
        [RightWindow(right=min(right, 2**30))] if right is not None else []
    )
    return full if not sides else sides[0] if len(sides) == 1 else sides[0] & sides[1]


def _number(call: str, value: Any) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{call}({value!r}): give a number")


def _tensor(name: str, values: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {type(values).__name__}, which makes no tensor ({error})") from None


class SoftCap(Variant):
    cap: float

    def logits_transform(self, logits, at):
        return self.cap * torch.tanh(logits * (1.0 / self.cap))  # one division per row, not one per logit


def softcap(cap: float) -> Variant:
    """Bound the logits smoothly: cap * tanh(logits / cap) (Gemma 2, Grok). Raises ValueError unless cap > 0."""
    number = _number("softcap", cap)
    if not number > 0 or math.isinf(number):
        raise ValueError(f"softcap({cap!r}): the cap must be a finite number above 0")
    return SoftCap(cap=number)


class Alibi(Variant):
    slopes: PerHead

    def logits_transform(self, logits, at):
        return logits + self.slopes[at.q_head] * (at.kv_pos - at.q_pos)


def alibi_slopes(heads: int) -> torch.Tensor:
    """The geometric slopes of Press et al. (2021) for any number of heads, float32 [heads]."""
    if isinstance(heads, bool) or not isinstance(heads, Integral) or heads < 1:
        raise ValueError(f"alibi slopes for {heads!r} heads: give the number of heads, 1 or more")
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi(slopes: torch.Tensor | int) -> Variant:
    """Linear position bias, slope * (kv_pos - q_pos) (Press et al. 2021). `slopes` is a tensor [q_heads] or the number
    of heads (standard slopes)."""
    return Alibi(slopes=alibi_slopes(slopes) if isinstance(slopes, (int, Integral)) else slopes)


class RopeHalf(Variant):
    """Element i is rotated together with i + rotary_dim / 2 (llama's rotate-half); elements from rotary_dim on pass
    unchanged."""

    inv_freq: torch.Tensor
    _dim: ClassVar[int]

    def _rotate(self, x, pos, at):
        r, half = self._dim, self._dim // 2
        angle = pos.to(torch.float32) * self.inv_freq[at.dim % half]
        other = torch.where(at.dim < half, -1.0, 1.0) * x[torch.where(at.dim < r, (at.dim + half) % r, at.dim)]
        return torch.where(at.dim < r, x * torch.cos(angle) + other * torch.sin(angle), x)

    def query_transform(self, q, at):
        return self._rotate(q, at.q_pos, at)

    def key_transform(self, k, at):
        return self._rotate(k, at.kv_pos, at)


class RopeInterleaved(RopeHalf):
    """Elements 2i and 2i + 1 are rotated together (GPT-J, the original RoFormer)."""

    def _rotate(self, x, pos, at):
        r = self._dim
        angle = pos.to(torch.float32) * self.inv_freq[(at.dim % r) // 2]
        other = (
            torch.where(at.dim % 2 == 0, -1.0, 1.0) * x[torch.where(at.dim < r, at.dim + 1 - 2 * (at.dim % 2), at.dim)]
        )
        return torch.where(at.dim < r, x * torch.cos(angle) + other * torch.sin(angle), x)


def rope_frequencies(
    rotary_dim: int, theta: float = 10000.0, scaling: float | Mapping[str, Any] | None = None
) -> torch.Tensor:
    """Inverse frequencies theta ** (-2i / rotary_dim), float32 [rotary_dim / 2] (Su et al. 2021), computed in float64.

    `scaling` is a factor (linear position interpolation, Chen et al. 2023: frequencies divided by it) or a model
    configuration's mapping with rope_type "default", "linear" (factor) or "llama3" (factor, low_freq_factor,
    high_freq_factor, original_max_position_embeddings).
    """
    if not _number("rope", rotary_dim) > 0 or rotary_dim % 2:
        raise ValueError(f"rotary dim {rotary_dim!r}: it must be even and positive")
    inv_freq = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    options: dict[str, Any] = (
        {"rope_type": "linear", "factor": scaling} if isinstance(scaling, (int, float)) else dict(scaling or {})
    )
    kind = options.get("rope_type", options.get("type", "default"))
    if kind == "linear":
        inv_freq = inv_freq / options["factor"]
    elif kind == "llama3":
        factor, low, high = options["factor"], options["low_freq_factor"], options["high_freq_factor"]
        turns = options["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = inv_freq * (blend + (1 - blend) / factor)
    elif kind != "default":
        raise ValueError(f"rope scaling {kind!r} is not known: use 'default', 'linear' or 'llama3', or pass inv_freq=")
    return inv_freq.to(torch.float32)


def rope(
    dim: int,
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    scaling: float | Mapping[str, Any] | None = None,
    inv_freq: torch.Tensor | None = None,
) -> Variant:
    """Rotary position embedding of queries and keys inside the kernel (Su et al. 2021), so that the cache holds keys
    before rotation.

    `dim` is the number of rotated elements (the head dim, or less: the rest passes unchanged), `interleaved=False`
    rotates element i with i + dim / 2 as llama does, True rotates 2i with 2i + 1. `scaling` as for `rope_frequencies`;
    `inv_freq` [dim / 2] replaces theta and scaling.
    """
    table = rope_frequencies(dim, theta, scaling) if inv_freq is None else _tensor("inv_freq", inv_freq)
    if table.dim() != 1 or table.numel() * 2 != dim:
        raise ValueError(
            f"inv_freq has shape {tuple(table.shape)}: for {dim} rotated elements it must be ({dim // 2},)"
        )
    return _rope_class(int(dim), interleaved)(inv_freq=table)


@functools.lru_cache  # rope(64) is of one class however often it is called
def _rope_class(dim: int, interleaved: bool) -> type[Variant]:
    base = RopeInterleaved if interleaved else RopeHalf
    return type(base.__name__, (base,), {"_dim": dim, "__module__": __name__})


class Sink(Variant):
    sinks: PerHead

    def output_transform(self, out, lse, at):
        return out * torch.sigmoid(lse - self.sinks[at.q_head])


def sink(sinks: torch.Tensor) -> Variant:
    """Attention sink: one more logit per query head that takes probability and adds no value (GPT-OSS; Xiao et al.
    2023). `sinks` is [q_heads]."""
    return Sink(sinks=sinks)


def _integers(name: str, values: Any, rule: str) -> torch.Tensor:
    found = _tensor(name, values)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise TypeError(f"{name} has dtype {found.dtype}: {rule}")
    return found


class DocumentMask(Variant):
    documents: PerKeyToken

    def logits_mask(self, at):
        return self.documents[at.kv_pos] == self.documents[at.q_pos]


def document_mask(documents: torch.Tensor) -> Variant:
    """Tokens attend within their own document. `documents` is an integer tensor [key tokens of the batch]: the document
    of every token, queries included (self-attention). Compose with `causal` for packed training-style sequences."""
    return DocumentMask(documents=_integers("documents", documents, "document numbers are integers"))


class PrefixLM(Variant):
    prefix_lens: PerRequest

    def logits_mask(self, at):
        return (at.kv_pos < self.prefix_lens[at.batch]) | (at.kv_pos <= at.q_pos)


def prefix_lm(prefix_lens: torch.Tensor) -> Variant:
    """Causal, but the first prefix_lens[request] keys are seen by all (Raffel et al. 2020). `prefix_lens` is an integer
    tensor [requests]."""
    return PrefixLM(prefix_lens=_integers("prefix_lens", prefix_lens, "lengths are integers"))


class DenseMask(Variant):
    mask: torch.Tensor
    _rank: ClassVar[int]
    _sized = ("mask",)

    def logits_mask(self, at):
        row = at.q_pos - (at.kv_len - at.q_len)
        leading = {2: (), 3: (at.batch,), 4: (at.batch, at.q_head)}[self._rank]
        return self.mask[(*leading, row, at.kv_pos)]

    def _check_batch(self, batch, heads):
        shape = tuple(self.mask.shape)
        want = ((batch.requests, "requests"), (heads.q_heads, "query heads"))[: self._rank - 2]
        for axis, (size, name) in enumerate(want):
            if shape[axis] not in (1, size):
                raise ValueError(
                    f"custom_mask has shape {list(shape)}, {shape[axis]} {name}, but there are {size}: a mask is "
                    f"{_MASK_FORMS}, with {size} {name} or 1 for all"
                )
        if batch.longest is None:
            return
        q, kv = batch.longest  # of requests with queries; a mask may also have the keys of those without
        if shape[-2] != q or shape[-1] not in (kv, int(batch.kv_lens.max())):
            raise ValueError(
                f"custom_mask has shape {list(shape)}, {shape[-2]} queries and {shape[-1]} keys, but the longest "
                f"request has {q} and {kv}: a mask is {_MASK_FORMS} of just these sizes; cut a larger one with "
                f"mask[..., :{q}, :{kv}], which copies nothing"
            )


_MASK_FORMS = "[q, kv], [requests, q, kv] or [requests, q_heads, q, kv]"


class RaggedMask(Variant):
    mask: torch.Tensor
    indptr: PerRequest
    _sized = ("mask",)

    def logits_mask(self, at):
        row = at.q_pos - (at.kv_len - at.q_len)
        return self.mask[torch.clamp(self.indptr[at.batch] + row * at.kv_len, 0, 2**62) + at.kv_pos]

    def _check_batch(self, batch, heads):
        _check_segments("custom_mask", "elements", self, self.mask.numel(), batch, 1)


class PackedMask(Variant):
    bits: Bits
    indptr: PerRequest
    _sized = ("bits",)

    def logits_mask(self, at):
        row = at.q_pos - (at.kv_len - at.q_len)
        start = self.indptr[at.batch].to(torch.int64) * 8 + row * at.kv_len
        return self.bits[torch.clamp(start, 0, 2**62) + at.kv_pos]

    def _check_batch(self, batch, heads):
        _check_segments("packed_mask", "bytes", self, self.bits.numel(), batch, 8)


def _check_segments(name: str, unit: str, mask: Any, have: int, batch: Any, each: int) -> None:
    """A flat mask against a batch: each request's segment by its offsets where the host may read them, else their
    sum."""
    if not batch.host:
        return
    q_lens, kv_lens = batch.q_indptr.diff().to(torch.int64), batch.kv_lens.to(torch.int64)
    need = (q_lens * kv_lens + (each - 1)) // each
    starts, ends = mask.indptr, mask.__dict__["_ends"]
    if starts.device.type != "cpu":
        if have < int(need.sum()):
            raise ValueError(
                f"{name} has {have} {unit} but the batch needs {int(need.sum())}: give q_len * kv_len "
                f"{'bits, rounded up to bytes,' if each > 1 else 'elements'} for each request"
            )
        return
    listed = (ends - starts)[: need.numel()].to(torch.int64)
    wrong = listed != need[: listed.numel()]
    if bool(wrong.any()):
        at = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"{name}: request {at} has {int(listed[at])} {unit} by indptr, but {int(q_lens[at])} queries of "
            f"{int(kv_lens[at])} keys need {int(need[at])}: give each request's [q_len, kv_len] mask in row-major order"
        )
    begin = int(starts[: listed.numel()].min()) if listed.numel() else 0
    if begin < 0:
        raise ValueError(f"{name}: indptr begins a request at {begin}: offsets are 0 or more")
    end = int(ends[: listed.numel()].max()) if listed.numel() else 0
    if have < end:
        raise ValueError(f"{name} has {have} {unit} but indptr ends at {end}: give all of them")


def _starts(indptr: torch.Tensor | Sequence[int]) -> torch.Tensor:
    indptr = _tensor("indptr", indptr)
    if indptr.dim() != 1 or indptr.numel() < 1 or indptr.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indptr is {indptr.dtype} {tuple(indptr.shape)}: give int32 or int64 [requests + 1]")
    return indptr


def _flat(kind: type[Variant], indptr: torch.Tensor | Sequence[int], **field: torch.Tensor) -> Variant:
    offsets = _starts(indptr)
    made = kind(indptr=offsets[:-1], **field)
    made.__dict__["_ends"] = offsets[1:]
    return made


def custom_mask(mask: torch.Tensor, indptr: torch.Tensor | None = None) -> Variant:
    """An arbitrary bool mask, True keeps. Row i is query token i of the step, column j the key at position j.

    `mask` is [q, kv], [requests, q, kv] or [requests, q_heads, q, kv], where q and kv are the query tokens and keys of
    the longest request (shorter ones use the upper left part) and a leading size of 1 stands for all. With `indptr`
    [requests + 1] it is flat: request b's [q_len, kv_len] mask in row-major order lies at indptr[b]:indptr[b + 1].
    Where the host knows the batch's lengths, planning, `update` and `run(variant=)` raise ValueError for any other
    size: cut a larger mask with mask[..., :q, :kv]. Lengths on a device are not read, and the mask's q and kv then not
    compared.
    """
    mask = _tensor("custom_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"custom_mask has dtype {mask.dtype}: give bool (True keeps the key); for additive scores write a "
            "logits_transform"
        )
    if indptr is not None:
        if mask.dim() != 1:
            raise ValueError(f"custom_mask has shape {tuple(mask.shape)}: with indptr it is flat, of one dimension")
        return _flat(RaggedMask, indptr, mask=mask)
    if mask.dim() not in (2, 3, 4):
        raise ValueError(
            f"custom_mask has shape {tuple(mask.shape)}: give [q, kv], [requests, q, kv], [requests, q_heads, q, "
            "kv], or flat with indptr"
        )
    return _mask_class(mask.dim())(mask=mask)


@functools.lru_cache
def _mask_class(rank: int) -> type[Variant]:
    return type("DenseMask", (DenseMask,), {"_rank": rank, "__module__": __name__})


def packed_mask(bits: torch.Tensor, indptr: torch.Tensor) -> Variant:
    """A bool mask packed 8 to a byte, little bit order, uint8. Request b's [q_len, kv_len] mask in row-major order lies
    at bytes indptr[b]:indptr[b + 1], the last byte filled up. Sizes are compared with the batch as those of
    `custom_mask` are."""
    return _flat(PackedMask, indptr, bits=_tensor("packed_mask", bits))


class LengthTemperature(Variant):
    inv_log_length: float

    def logits_transform(self, logits, at):
        seen = torch.clamp(at.q_pos + 1, min=1)  # positions can be negative
        return logits * torch.clamp(torch.log(seen.to(torch.float32)) * self.inv_log_length, min=1.0)


def length_temperature(train_length: int) -> Variant:
    """Sharpen attention beyond the trained length: logits * max(1, log(q_pos + 1) / log(train_length)) (Su 2021, log-n
    scaling)."""
    if not _number("length_temperature", train_length) >= 2:
        raise ValueError(f"length_temperature({train_length}): the trained length must be at least 2 tokens")
    return LengthTemperature(inv_log_length=1 / math.log(train_length))


class Sigmoid(Variant):
    softmax = False
    bias: float

    def logits_transform(self, logits, at):
        return torch.sigmoid(logits + self.bias)


def sigmoid(bias: float = 0.0) -> Variant:
    """Sigmoid attention: the weights are sigmoid(logits + bias), without normalisation (Ramapuram et al. 2024)."""
    return Sigmoid(bias=_number("sigmoid", bias))
