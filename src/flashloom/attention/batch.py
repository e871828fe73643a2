"""Which query tokens attend to which keys in one step: the requests of a batch, normalised to paged CSR.

A batch is numbers only (no heads, no dtypes), so one batch serves every layer. Positions are per request: query i of a
request sits at `kv_len - q_len + i`, and lengths include the tokens of this step."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from flashloom import settings
from flashloom.dataclass import dataclass
from flashloom.kv_cache.integers import (
    INT32_MAX,
    Integers,
    cumulative,
    integer,
    lengths,
    offsets,
    on_host,
    positive,
    to_int32,
)
from flashloom.kv_cache.pages import DenseKV, KVLayout


class BlockSparseKV(KVLayout):
    """Any KV description of which each block of queries sees only the listed blocks of keys.

    A request's queries of this step are cut into blocks of `block_q`, its keys into blocks of `block_kv` positions.
    Query blocks are numbered through all requests; block i sees the key blocks indices[indptr[i]:indptr[i + 1]]
    (numbers within its request, in any order, no repetition needed or forbidden). Positions stay what they are, so
    masks such as causal mean the same as without it."""

    def __init__(self, kv: KVLayout, indptr: Integers, indices: Integers, *, block_q: int, block_kv: int):
        if not isinstance(kv, KVLayout):
            raise TypeError(f"BlockSparseKV kv is {type(kv).__name__}: give a PageTable, RaggedKV or DenseKV")
        self.kv, self.ragged, self.page_size = kv, kv.ragged, kv.page_size
        self.kv_lens, self.page_indptr, self.pages = kv.kv_lens, kv.page_indptr, kv.pages
        self.block_q, self.block_kv = positive("block_q", block_q), positive("block_kv", block_kv)
        self.block_indptr = offsets("BlockSparseKV indptr", indptr)
        self.block_indices = to_int32("BlockSparseKV indices", indices)
        if not (self.host and on_host(self.block_indptr) and on_host(self.block_indices)):
            raise ValueError("BlockSparseKV takes its lengths and blocks on the host: pass lists or CPU tensors")
        if self.block_indptr[-1] > self.block_indices.numel():
            raise ValueError(
                f"BlockSparseKV indptr ends at {int(self.block_indptr[-1])} but there are {self.block_indices.numel()} "
                "indices"
            )

    def check_pages(self, limit: int) -> None:
        self.kv.check_pages(limit)

    def first_block(self, q_lens: np.ndarray) -> np.ndarray:
        """Number of each request's first query block, int64 [requests + 1]."""
        return np.concatenate([[0], np.cumsum(-(-q_lens.astype(np.int64) // self.block_q))])

    def check_blocks(self, q_lens: np.ndarray) -> None:
        """Raise ValueError unless the pattern fits these query lengths."""
        first = self.first_block(q_lens)
        indptr, indices = self.block_indptr.numpy(), self.block_indices.numpy()
        if indptr.size != first[-1] + 1:
            raise ValueError(
                f"BlockSparseKV indptr describes {indptr.size - 1} query blocks but the batch has {first[-1]} of "
                f"{self.block_q}: give one entry per "
                "query block and one more"
            )
        request = np.searchsorted(first, np.arange(indptr.size - 1), side="right") - 1
        limit = np.repeat(-(-self.kv_lens.numpy().astype(np.int64)[request] // self.block_kv), np.diff(indptr))
        used = indices[: indptr[-1]]
        wrong = (used < 0) | (used >= limit)
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"BlockSparseKV indices[{at}] = {used[at]}: that request has key blocks 0 to {limit[at] - 1}"
            )


@dataclass(frozen=True)
class Reserve:
    """How large a plan's batches may become through `update`: requests, query tokens, pages in use. None leaves that
    one open (its buffers may then move when they grow, which a captured graph cannot follow)."""

    requests: int | None = None
    tokens: int | None = None
    pages: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "pages"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, integer(f"Reserve {name}", value, 0))

    def fixed(self, batch: Batch) -> Reserve:
        """This reserve, with the batch's sizes where it leaves one open."""
        tokens = batch.max_q_len * batch.requests if batch.tokens is None else batch.tokens
        mine = {"requests": batch.requests, "tokens": tokens, "pages": batch.pages.numel()}
        return Reserve(**{name: mine[name] if (own := getattr(self, name)) is None else own for name in mine})

    def check(self, batch: Batch) -> None:
        """Raise ValueError if the batch exceeds the reserve, as far as the host can know it."""
        have: dict[str, int | None] = {"requests": batch.requests, "tokens": batch.tokens}
        if self.pages is not None and batch.host:
            have["pages"] = batch.kv.used_pages
        for name, number in have.items():
            limit = getattr(self, name)
            if number is not None and limit is not None and number > limit:
                raise ValueError(
                    f"the batch has {number} {name} but the plan reserves {limit}: plan with Reserve({name}={number}) "
                    "or more"
                )


class Batch:
    """The requests of one step: how many query tokens each has (`q_lens`, or `q_indptr` with their offsets) and where
    its keys lie.

    kv: PageTable, RaggedKV, DenseKV or BlockSparseKV. Lists, or int32/int64 tensors on host or device. When the query
    lengths are on a device, `max_q_len` (an upper bound) is required, because nothing there is read, and `tokens`
    (their sum) is needed by `slots()`. Device tensors in int32 are used as they are; what must be converted (int64,
    lengths to offsets) is computed here, so a captured graph that shall follow their contents makes its batch inside
    the capture. Normalised, all on `device`: q_indptr int32 [requests + 1], kv_lens int32 [requests], page_indptr
    int32 [requests + 1], pages int32 [entries], page_size int. `tokens` is None where only the device knows it."""

    def __init__(
        self,
        q_lens: Integers | None = None,
        *,
        kv: KVLayout,
        q_indptr: Integers | None = None,
        max_q_len: int | None = None,
        tokens: int | None = None,
    ):
        if (q_lens is None) == (q_indptr is None):
            raise ValueError(
                "Batch takes q_lens= (query tokens per request) or q_indptr= (their offsets): give exactly one of the "
                "two"
            )
        if not isinstance(kv, KVLayout):
            raise TypeError(f"Batch kv is {type(kv).__name__}: give a PageTable, RaggedKV, DenseKV or BlockSparseKV")
        if q_lens is not None:
            starts = cumulative(lengths("q_lens", q_lens))
        else:
            starts = offsets("q_indptr", q_indptr)  # type: ignore[arg-type]
        if starts.numel() - 1 != kv.requests:
            raise ValueError(
                f"the batch has {starts.numel() - 1} query lengths but kv describes {kv.requests} requests: give one "
                "length per request"
            )
        bound = None if max_q_len is None else integer("max_q_len", max_q_len, 0, INT32_MAX)
        if on_host(starts):
            q = starts.numpy()
            longest = int((q[1:] - q[:-1]).max()) if q.size > 1 else 0
            if bound is not None and bound < longest:
                raise ValueError(
                    f"max_q_len={bound} but a request has {longest} query tokens: give the largest length or leave it "
                    "out"
                )
            total = int(q[-1])
            if tokens is not None and tokens != total:
                raise ValueError(
                    f"tokens={tokens} but the query lengths sum to {total}: leave it out for lengths on the host"
                )
            self._set(kv, starts, longest if bound is None else bound, total)
        else:
            if bound is None:
                raise ValueError(
                    "the query lengths are on a device, where they are not read: pass max_q_len=, an upper bound of "
                    "them"
                )
            self._set(kv, starts, bound, None if tokens is None else integer("tokens", tokens, 0, INT32_MAX))
        if isinstance(kv, BlockSparseKV):
            if not self.host:
                raise ValueError("BlockSparseKV takes its lengths on the host: pass q_lens as a list or a CPU tensor")
            kv.check_blocks(np.diff(starts.numpy()))

    @classmethod
    def decode(cls, kv: KVLayout) -> Batch:
        """One query token per request, its last one."""
        if not isinstance(kv, KVLayout):
            raise TypeError(
                f"Batch.decode takes a PageTable, RaggedKV, DenseKV or BlockSparseKV, not {type(kv).__name__}"
            )
        n = kv.requests
        if kv.host:
            starts = torch.from_numpy(np.arange(n + 1, dtype=np.int32))
            if isinstance(kv, BlockSparseKV):
                return cls(q_indptr=starts, kv=kv)
        else:
            starts = torch.arange(n + 1, dtype=torch.int32, device=kv.device)
        batch = cls.__new__(cls)
        batch._set(kv, starts, 1, n)
        return batch

    def _set(self, kv: KVLayout, starts: torch.Tensor, max_q_len: int, tokens: int | None) -> None:
        if on_host(starts) != kv.host:
            # part of it lives on a device: so does the batch then (host contents have been checked by now)
            device = kv.device if on_host(starts) else starts.device
            starts, kv = starts.to(device), kv if not kv.host else _moved(kv, device)
        self.kv, self.q_indptr, self.max_q_len, self.tokens = kv, starts, max_q_len, tokens
        self.kv_lens, self.page_indptr, self.pages, self.page_size = kv.kv_lens, kv.page_indptr, kv.pages, kv.page_size
        self.requests, self.ragged, self.host, self.device = kv.requests, kv.ragged, kv.host, kv.device

    @cached_property
    def kind(self) -> str:
        """How keys lie: "paged", "ragged" or "dense"."""
        kv = self.kv.kv if isinstance(self.kv, BlockSparseKV) else self.kv
        return "ragged" if kv.ragged else "dense" if isinstance(kv, DenseKV) else "paged"

    @cached_property
    def form(self) -> tuple[str, int, torch.device, bool]:
        """What a plan's batches have in common: kind, page size (0 for dense keys), device, whether there is a block
        pattern."""
        return self.kind, 0 if self.kind == "dense" else self.page_size, self.device, self.blocks is not None

    @property
    def row(self) -> int:
        """Tokens of one page or row of keys, as the tensors have it."""
        kv = self.kv.kv if isinstance(self.kv, BlockSparseKV) else self.kv
        return kv.tokens if isinstance(kv, DenseKV) else self.page_size

    @property
    def blocks(self) -> BlockSparseKV | None:
        """The block pattern, where there is one."""
        return self.kv if isinstance(self.kv, BlockSparseKV) else None

    @cached_property
    def kv_indptr(self) -> torch.Tensor:
        """Offsets of the requests' keys in per-key-token fields, int32 [requests + 1]."""
        return cumulative(self.kv_lens)

    @cached_property
    def numbers(self) -> tuple[np.ndarray, ...]:
        """q_indptr, kv_lens, page_indptr and pages as arrays of the same memory; host only."""
        return tuple(x.numpy() for x in (self.q_indptr, self.kv_lens, self.page_indptr, self.pages))

    @cached_property
    def each(self) -> int | None:
        """Query tokens of every request, or None where they differ, where only the device knows them, or where there
        are no requests."""
        if not self.host or not self.requests:
            return None
        lens = np.diff(self.q_indptr.numpy())
        return int(lens[0]) if (lens == lens[0]).all() else None

    @cached_property
    def longest(self) -> tuple[int, int] | None:
        """Most query tokens, and most keys of those with query tokens, that a request has; None where only the device
        knows them."""
        if not self.host:
            return None
        q, kv = np.diff(self.q_indptr.numpy()), self.kv_lens.numpy()
        return (int(q.max()), int(kv[q > 0].max(initial=0))) if q.size else (0, 0)

    @cached_property
    def kv_tokens(self) -> int | None:
        """Key tokens of the batch; None where only the device knows it."""
        return int(self.kv_indptr[-1]) if self.host else None

    def slots(self) -> torch.Tensor:
        """Where this step's tokens go in the cache, int64 [tokens]: page * page_size + offset (for ragged KV the row),
        for `fl.append`. Lengths include this step's tokens: a request with more query tokens than its length is a
        ValueError. On the batch's device, without waiting for it; there such tokens get -1, which `append` skips."""
        if self.tokens is None:
            raise ValueError(
                "the query lengths are on a device, where they are not read: pass Batch(..., tokens=) to use slots()"
            )
        if self.host:
            q, lens = self.q_indptr.numpy(), self.kv_lens.numpy()
            new = q[1:] - q[:-1]
            if (new > lens).any():
                at = int((new > lens).argmax())
                raise ValueError(
                    f"request {at} has {new[at]} new tokens but a length of {lens[at]}: lengths include this step's "
                    f"tokens; give {new[at]} more than were in the cache before"
                )
            rows = np.repeat(np.arange(self.requests), new)
            return self.kv.slots(rows, np.arange(self.tokens) + (lens - q[1:])[rows])
        if settings.get().check:
            self.to_host().slots()  # raises for such a request
        token = torch.arange(self.tokens, dtype=torch.int32, device=self.device)
        request = torch.searchsorted(self.q_indptr, token, right=True) - 1
        request = request.clamp(max=max(self.requests - 1, 0))
        first = self.kv_lens - self.q_indptr[1:]  # position of a request's token = its number + first
        if self.requests == 0:
            return torch.full((self.tokens,), -1, dtype=torch.int64, device=self.device)
        slots = self.kv.slots_on_device(request, token.to(torch.int64) + first[request])
        return slots.masked_fill(token >= self.q_indptr[-1], -1)

    def to_host(self) -> Batch:
        """The same batch with its contents on the host, checked there. Waits for the device."""
        if self.host:
            return self
        kv = _moved(self.kv, torch.device("cpu"))
        offsets("q_indptr", self.q_indptr.cpu())
        kv.kv_lens = lengths("kv lengths", kv.kv_lens)
        kv._check()
        return Batch(q_indptr=self.q_indptr.cpu(), kv=kv, max_q_len=self.max_q_len)

    def __repr__(self) -> str:
        tokens = "?" if self.tokens is None else self.tokens
        return f"Batch({self.requests} requests, {tokens} query tokens, {type(self.kv).__name__} on {self.device})"


def _moved(kv: KVLayout, device: torch.device) -> KVLayout:
    new = object.__new__(type(kv))
    new.__dict__.update({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kv.__dict__.items()})
    return new
