"""transformers' masks as descriptions: a pattern of positions and a padding interval per sequence, instead of [T, S]
bools.

transformers builds a mask from nested functions (causal and window and padding ...). Those made by its own factories
are
recognised by their code object and become a variant; any other function is evaluated to a dense mask, which is right
too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import masking_utils as hf

import flashloom as fl
from flashloom.integrations.transformers_plans import UNMASKED, VARIANTS, Layout, Posed

# Models in which a bidirectional mask over as many keys as queries can only be self-attention, so that a padded key
# is a
# padded query too. Elsewhere it may be cross-attention, whose queries are all real.
ENCODERS = {
    "albert", "bert", "camembert", "distilbert", "electra", "ernie", "eurobert", "modernbert", "mpnet", "nomic_bert",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


class FirstKey(fl.Variant):
    """Drops the keys before each request's first real one (left padding)."""

    first: fl.PerRequest

    def logits_mask(self, at):
        return at.kv_pos >= self.first[at.batch]


class LastKey(fl.Variant):
    """Drops the keys after each request's last real one (right padding)."""

    stop: fl.PerRequest

    def logits_mask(self, at):
        return at.kv_pos < self.stop[at.batch]


class KeptKeys(fl.Variant):
    """Keeps the keys marked in a [requests, keys] bool tensor (padding with gaps)."""

    keep: torch.Tensor

    def logits_mask(self, at):
        return self.keep[at.batch, at.kv_pos]


class SameChunk(fl.Variant):
    """Attention within chunks of `size` tokens, counted from each request's `start` (Llama 4)."""

    size: int
    start: fl.PerRequest

    def logits_mask(self, at):
        start = torch.clamp(self.start[at.batch], -(2**29), 2**29)  # so that differences fit 32 bits
        return (at.kv_pos - start) // self.size == (at.q_pos - start) // self.size


class SameDocument(fl.Variant):
    """Attention within packed documents, numbered in a [requests, tokens] integer tensor."""

    documents: torch.Tensor

    def logits_mask(self, at):
        return self.documents[at.batch, at.kv_pos] == self.documents[at.batch, at.q_pos]


class Bias(fl.Variant):
    """Adds a [requests, q_heads, q_length, kv_length] tensor to the logits; row i is query token i of the step."""

    bias: torch.Tensor

    def logits_transform(self, logits, at):
        return logits + self.bias[at.batch, at.q_head, at.q_pos - (at.kv_len - at.q_len), at.kv_pos]


@dataclass(frozen=True)
class Pattern:
    """What a mask function of transformers says, without padding: positions kept relative to the query's."""

    causal: bool = False
    left: int | None = None  # keys kept before the query
    right: int | None = None  # keys kept after it
    chunk: tuple[int, Tensor] | None = None  # size, left padding [batch]
    documents: Tensor | None = None  # [batch, tokens]

    @property
    def positional(self) -> bool:
        """Whether it matters where a query stands relative to the keys."""
        return self.causal or any(x is not None for x in (self.left, self.right, self.chunk, self.documents))


def read_pattern(function: Callable) -> Pattern | None:
    """The pattern of a mask function made by transformers' factories; None for any other function."""
    if function is hf.causal_mask_function:
        return Pattern(causal=True)
    if function is hf.bidirectional_mask_function:
        return Pattern()
    inside = _captured(function)
    code = getattr(function, "__code__", None)
    if code is _code(hf.and_masks()):
        pattern = Pattern()
        for part in map(read_pattern, inside["mask_functions"]):
            if part is None or not _disjoint(pattern, part):
                return None
            pattern = replace(pattern, **{k: v for k, v in vars(part).items() if v is not None and v is not False})
        return pattern
    if code is _code(hf.sliding_window_overlay(1)):
        return Pattern(left=inside["sliding_window"] - 1)
    if code is _code(hf.sliding_window_bidirectional_overlay(1)):
        return Pattern(left=inside["sliding_window"], right=inside["sliding_window"])
    if code is _code(hf.chunked_overlay(1, torch.zeros(1))):
        return Pattern(chunk=(inside["chunk_size"], inside["left_padding"]))
    if code is _code(hf.packed_sequence_mask_function(torch.zeros(1))):
        return Pattern(documents=inside["packed_sequence_mask"])
    return None


class Mask(torch.Tensor):
    """A bool mask [batch, 1, q_length, kv_length], True keeps, that is formed only if some torch operation asks for
    it."""

    form: Callable[[], Tensor]
    rules: Rules
    _layouts: dict[tuple[int, int], Layout]  # by keys and thread

    @staticmethod
    def __new__(cls, rules: Rules, form: Callable[[], Tensor], device: torch.device) -> Mask:
        size = (rules.requests, 1, rules.q_length, rules.kv_length)
        mask = torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.bool, device=device)
        mask.rules, mask.form, mask._layouts = rules, form, {}
        return mask

    def posed(self, keys: int) -> Layout:
        """The batch and variant for this mask over `keys` cached keys; the same object for every layer of a forward
        pass in one thread."""
        if keys != self.rules.kv_length:
            raise ValueError(
                f"the mask describes {self.rules.kv_length} keys, the layer has {keys}: use one of transformers' caches"
            )
        at = keys, threading.get_ident()
        if at not in self._layouts:
            self._layouts[at] = self.rules.layout()
        return self._layouts[at]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map_only(Mask, lambda mask: mask.form(), (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, **options: object) -> str:  # type: ignore[override]
        return f"Mask({self.rules})"


@dataclass(frozen=True)
class Rules:
    """A pattern, the padding of each sequence, and where the queries stand among the keys.

    Query row i stands at key slot `first_row + i`. `keep` is bool [requests, kv_length], None when nothing is padded.
    `skip_padding`: rows of padding are not computed, as nobody reads them. `device`: that of the model.
    """

    pattern: Pattern
    requests: int
    q_length: int
    kv_length: int
    first_row: int
    kv_offset: int
    keep: np.ndarray | None
    skip_padding: bool
    device: torch.device

    def layout(self) -> Layout:
        """The batch and the variant that mean the same as this mask; the same object for every mask that keeps
        everything, of one size."""
        if self.keep is None and not self.pattern.positional:
            return _whole_layout(self.requests, self.q_length, self.kv_length, False, None)
        pattern, frontier = self.pattern, self.first_row + self.q_length
        # Keys past the newest query are not written yet (static caches). Without a rule of position all keys count.
        end = min(frontier, self.kv_length) if pattern.causal else self.kv_length
        if pattern.positional and end != frontier:
            raise ValueError(
                f"{self.q_length} queries at slots {self.first_row} to {frontier - 1} of {self.kv_length} keys with "
                f"{pattern}: flashloom cannot place them; use attn_implementation='sdpa'"
            )
        if self.keep is None:
            return self._alike(end)
        keep = self.keep[:, :end]
        real = _intervals(keep)
        if real is None:
            return self._alike(end, kept=KeptKeys(keep=torch.from_numpy(keep.copy()).to(self.device)))
        first, stop = real
        if pattern.causal and (stop == end).all() and (first <= self.first_row).all():  # padded on the left, decoding
            return self._alike(end, first.tolist() if first.any() else None)
        owner, rows, keys, first, stop = self._pieces(*real, end)
        own = None if owner.size == self.requests else owner  # otherwise each sequence is one piece
        kv = fl.DenseKV(owner.size, self.kv_length, keys, rows=own)
        batch = fl.Batch.decode(kv) if (rows == 1).all() else fl.Batch(rows, kv=kv)
        firsts = first.tolist() if first.any() else None
        stops = stop.tolist() if (stop < keys).any() else None
        return Layout(batch, self._posed(owner, firsts, stops))

    def _alike(self, end: int, firsts: list[int] | None = None, kept: fl.Variant | None = None) -> Layout:
        """Each sequence is one request, with `end` keys."""
        n = self.requests
        kv = fl.DenseKV(n, self.kv_length, np.full(n, end))
        batch = fl.Batch.decode(kv) if self.q_length == 1 else fl.Batch([self.q_length] * n, kv=kv)
        return Layout(batch, self._posed(range(n), firsts, None, kept))

    def _pieces(self, first: np.ndarray, stop: np.ndarray, end: int) -> tuple[np.ndarray, ...]:
        """Sequences whose real keys are first:stop, cut into pieces: the sequence, the query rows, the keys that these
        may meet, and the real ones of these, first:stop. Rows that see no key are a piece without keys."""
        n, length = self.requests, self.q_length
        if self.skip_padding:  # rows before, within and after the real ones
            rows, at, keys = np.stack([first, stop - first, length - stop], 1), 1, stop
        elif self.pattern.positional:  # rows before the first real key, and the others
            blind = np.clip(first - self.first_row, 0, length) if self.pattern.causal else np.zeros_like(first)
            blind = np.where(first < stop, blind, length)
            rows, at, keys = np.stack([blind, length - blind], 1), 1, np.full(n, end)
        else:
            rows, at, keys = np.full((n, 1), length), 0, stop
        kept = rows > 0
        numbers = np.zeros((3, *rows.shape), dtype=np.int32)
        numbers[:, :, at] = keys, first, stop
        return np.nonzero(kept)[0].astype(np.int32), rows[kept].astype(np.int32), *numbers[:, kept]

    def _posed(
        self, owner: Sequence[int] | np.ndarray, firsts: list[int] | None, stops: list[int] | None,
        kept: fl.Variant | None = None,
    ) -> Posed:  # fmt: skip
        """The variant of requests that are pieces of these sequences, of which only keys from `firsts` to `stops` are
        real. One of those that were made for the same numbers, where the pattern is nothing but numbers."""
        pattern = self.pattern
        start = None
        if pattern.chunk is not None:
            padding = pattern.chunk[1].tolist()
            start = (pattern.chunk[0], *(padding[sequence] - self.kv_offset for sequence in owner))

        def posed() -> Posed:
            variant: fl.Variant = fl.causal if pattern.causal else fl.full
            if pattern.left is not None or pattern.right is not None:
                variant = variant & fl.sliding_window(pattern.left, pattern.right)
            if start is not None:
                variant = variant & SameChunk(size=start[0], start=self._integers(start[1:]))
            if pattern.documents is not None:
                documents = pattern.documents.to(self.device)[self._integers(list(owner))].int()
                variant = variant & SameDocument(documents=documents)
            if firsts is not None:
                variant = variant & FirstKey(first=self._integers(firsts))
            if stops is not None:
                variant = variant & LastKey(stop=self._integers(stops))
            return Posed(variant if kept is None else variant & kept)

        if kept is not None or pattern.documents is not None:
            return posed()
        key = (pattern.causal, pattern.left, pattern.right, start, *(x and tuple(x) for x in (firsts, stops)))
        return VARIANTS.get((*key, self.device), posed)

    def _integers(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)


def flashloom_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = hf.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: object = None,
    **kwargs: object,
) -> Tensor:
    """transformers' mask interface: a Mask where the pattern is known, else a dense bool [batch, 1, q_length,
    kv_length]."""

    q_offset = q_offset if torch.compiler.is_compiling() else int(q_offset)  # a static cache moves its tensor on later

    def form() -> Tensor:
        return hf.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=bool(kwargs.get("use_vmap", False)), device=device,
        )  # fmt: skip

    pattern = None if torch.compiler.is_compiling() else read_pattern(mask_function)
    if pattern is None or isinstance(q_offset, Tensor) or (pattern.documents is not None and (q_offset or kv_offset)):
        return form()
    keep = None
    if attention_mask is not None:
        padded = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        keep = padded[:, kv_offset : kv_offset + kv_length].bool().cpu().numpy()
        keep = None if keep.all() else keep
    encoder = getattr(config, "model_type", None) in ENCODERS and not getattr(config, "add_cross_attention", False)
    skip = encoder and not pattern.causal and q_length == kv_length and q_offset == 0
    device = torch.device(device)
    rules = Rules(pattern, batch_size, q_length, kv_length, q_offset - kv_offset, kv_offset, keep, skip, device)
    return Mask(rules, form, device)


def unmasked_layout(query: Tensor, key: Tensor, causal: bool, window: int | None) -> Layout:
    """No mask was made: causal (from the first key, as torch's SDPA) when asked and there is more than one query,
    else all keys."""
    batch, _, q_length, _ = query.shape
    keys = key.shape[2]
    causal = causal and q_length > 1
    if causal and keys < q_length:
        raise ValueError(f"causal attention of {q_length} queries over {keys} keys needs a mask: pass attention_mask")
    return _whole_layout(batch, q_length, keys, causal, window if causal else None)


def _whole_layout(batch: int, q_length: int, keys: int, causal: bool, window: int | None) -> Layout:
    """Sequences without padding, kept from one forward pass to the next with its plans."""

    def make() -> Layout:
        variant: fl.Variant = fl.causal if causal else fl.full
        posed = VARIANTS.get((causal, window), lambda: Posed(_windowed(variant, window)))
        kv = fl.DenseKV(batch, keys, lens=[q_length if causal else keys] * batch)
        return Layout(fl.Batch(q_lens=[q_length] * batch, kv=kv), posed)

    return UNMASKED.get((batch, q_length, keys, causal, window), make)


def _windowed(variant: fl.Variant, window: int | None) -> fl.Variant:
    return variant if window is None else variant & fl.sliding_window(window - 1)


def dense_layout(mask: Tensor, query: Tensor, key: Tensor) -> Layout:
    """A mask given as numbers: bool (True keeps) or float (added to the logits)."""
    batch, heads, q_length, _ = query.shape
    keys = key.shape[2]
    if mask.dim() != 4 or mask.shape[2] not in (1, q_length) or mask.shape[3] < keys:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: it must be [batch or 1, heads or 1, {q_length}, {keys}]"
        )
    mask = mask[..., :keys].expand(batch, heads, q_length, keys)
    if mask.dtype == torch.bool:
        variant = fl.custom_mask(mask)
    else:
        variant = Bias(bias=mask.detach())
    return Layout(fl.Batch(q_lens=[q_length] * batch, kv=fl.DenseKV(batch, keys)), Posed(variant))


def _intervals(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last + 1 of the kept slots of each row, 0 and 0 for none; None when a row has gaps."""
    count, first = keep.sum(1), keep.argmax(1)
    last = np.where(count, keep.shape[1] - keep[:, ::-1].argmax(1), 0)
    return None if (last - first != count).any() else (first, last)


def _captured(function: Callable) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return dict(zip(code.co_freevars, (c.cell_contents for c in cells))) if code is not None and cells else {}


def _code(function: Callable) -> object:
    return function.__code__


def _disjoint(a: Pattern, b: Pattern) -> bool:
    """Whether no rule of position is in both, so that merging loses none (causal twice is causal)."""
    return not any(
        getattr(a, k) is not None and getattr(b, k) is not None for k in ("left", "right", "chunk", "documents")
    )
