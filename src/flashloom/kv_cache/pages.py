"""Where each request's keys and values lie: page tables, normalised to one form.

Every description of KV becomes "paged CSR": request b has `kv_lens[b]` tokens, and token t lies in page
`pages[page_indptr[b] + t // page_size]` at offset `t % page_size`.
"""

from __future__ import annotations

import numpy as np
import torch

from flashloom.kv_cache.integers import (
    Integers,
    cumulative,
    integer,
    lengths,
    offsets,
    on_host,
    positive,
    to_int32,
)


class KVLayout:
    """The normalised form that every description of KV has.

    kv_lens: int32 [requests]; page_indptr: int32 [requests + 1]; pages: int32 [entries]; page_size: int. All on one
    device. `ragged`: pages hold first tokens and a request is one page of unbounded size. `row`: entries of each
    request, where all have as many. Entries past a request's last page are never read."""

    ragged = False
    row: int | None = None
    kv_lens: torch.Tensor
    page_indptr: torch.Tensor
    pages: torch.Tensor
    page_size: int

    @property
    def requests(self) -> int:
        return self.kv_lens.numel()

    @property
    def device(self) -> torch.device:
        return self.kv_lens.device

    @property
    def host(self) -> bool:
        """Whether the contents may be read without waiting for a device."""
        return on_host(self.kv_lens)

    @property
    def used_pages(self) -> int:
        """Pages that the lengths need; host only."""
        return int(((self.kv_lens.numpy().astype(np.int64) + (self.page_size - 1)) // self.page_size).sum())

    def __repr__(self) -> str:
        tokens = f", {int(self.kv_lens.sum())} tokens" if self.host else ""
        return f"{type(self).__name__}({self.requests} requests{tokens}{self._form()}, on {self.device})"

    def _form(self) -> str:
        return f", {self.pages.numel()} entries, page_size={self.page_size}"

    def check_pages(self, limit: int) -> None:
        """Raise ValueError unless every page number in use is below `limit`; host only."""
        pages = self.pages.numpy()
        if pages.size and pages.max() >= limit:
            self._report((pages >= limit), f"the cache has {limit} pages, numbered 0 to {limit - 1}")

    def _check(self) -> None:
        """Host values: the table is long enough, and no page number in use is negative."""
        lens, indptr, pages = self.kv_lens.numpy(), self.page_indptr.numpy(), self.pages.numpy()
        if lens.size == 0:
            return
        have = indptr[1:] - indptr[:-1]
        short = lens > have.astype(np.int64) * self.page_size
        if short.any():
            at = int(short.argmax())
            raise ValueError(
                f"request {at} has {lens[at]} tokens but {have[at]} pages of {self.page_size}: the page table is "
                "shorter than the length says; "
                "allocate pages before planning"
            )
        if pages.size and pages.min() < 0:
            self._report(pages < 0, "pages are numbered from 0")

    def _report(self, wrong: np.ndarray, rule: str) -> None:
        """Raise for the first wrong entry that is in use."""
        lens, indptr = self.kv_lens.numpy().astype(np.int64), self.page_indptr.numpy()
        used = -(-lens // self.page_size)
        entry = np.flatnonzero(wrong)
        request = np.searchsorted(indptr, entry, side="right") - 1
        inside = (request < lens.size) & (entry - indptr[request] < used[np.minimum(request, lens.size - 1)])
        if inside.any():
            at = int(inside.argmax())
            raise ValueError(
                f"request {request[at]}'s page table entry {entry[at] - indptr[request[at]]} is page "
                f"{self.pages.numpy()[entry[at]]}: {rule}"
            )

    def slots(self, request: np.ndarray, position: np.ndarray) -> torch.Tensor:
        """The slot (page * page_size + offset) of tokens at `position` of `request`, int64; -1 for a negative position.
        Host only."""
        kept, pages = np.maximum(position, 0), self.pages.numpy()
        if self.ragged:
            slot = pages[request] + kept
        else:
            entry = self.page_indptr.numpy()[request] + kept // self.page_size
            if (position < 0).any():  # such a request may have no page at all
                entry = np.minimum(entry, pages.size - 1)
                pages = pages if pages.size else np.zeros(1, dtype=np.int32)
            slot = pages[entry] * np.int64(self.page_size) + kept % self.page_size
        return torch.from_numpy(np.where(position < 0, -1, slot).astype(np.int64, copy=False))

    def slots_on_device(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The slot (page * page_size + offset) of tokens at `position` of `request`, int64; -1 for a negative
        position."""
        kept = position.clamp(min=0)
        if self.ragged:
            slot = self.pages[request] + kept
        else:
            entry = (self.page_indptr[request] + kept // self.page_size).clamp(max=max(self.pages.numel() - 1, 0))
            page = self.pages[entry] if self.pages.numel() else entry
            slot = page.to(torch.int64) * self.page_size + kept % self.page_size
        return slot.masked_fill(position < 0, -1)  # torch.where would copy its number from the host, and wait


class PageTable(KVLayout):
    """Paged KV: which pages of a cache hold each request's tokens. Lengths include the tokens of this step.

    kv_lens: tokens of each request; its pages are pages[page_indptr[b]:page_indptr[b + 1]], as many as it needs or
    more. `from_block_table` and `from_csr` take the forms that engines have."""

    def __init__(self, kv_lens: Integers, page_indptr: Integers, pages: Integers, page_size: int):
        lens, indptr = lengths("kv_lens", kv_lens), offsets("page_indptr", page_indptr)
        if indptr.numel() != lens.numel() + 1:
            raise ValueError(
                f"page_indptr has {indptr.numel()} entries and kv_lens {lens.numel()}: page_indptr must have one more"
            )
        entries = to_int32("pages", pages)
        if on_host(indptr) and indptr[-1] > entries.numel():
            raise ValueError(f"page_indptr ends at {int(indptr[-1])} but there are {entries.numel()} pages: give all")
        self._take(lens, indptr, entries, positive("page_size", page_size))

    @classmethod
    def _of(cls, kv_lens: torch.Tensor, page_indptr: torch.Tensor, pages: torch.Tensor, page_size: int) -> PageTable:
        """From parts in their form."""
        made = cls.__new__(cls)
        made._take(kv_lens, page_indptr, pages, page_size)
        return made

    def _take(self, kv_lens: torch.Tensor, page_indptr: torch.Tensor, pages: torch.Tensor, page_size: int) -> None:
        self.kv_lens, self.page_indptr, self.pages, self.page_size = kv_lens, page_indptr, pages, page_size
        if not kv_lens.device == page_indptr.device == pages.device:
            raise ValueError(
                f"the page table is on {pages.device} and the lengths on {kv_lens.device}: put both on one device, or "
                "both on the host"
            )
        if self.host:
            self._check()

    @classmethod
    def from_block_table(cls, table: Integers, seq_lens: Integers, *, page_size: int) -> PageTable:
        """From a rectangular table [requests, width] of page numbers and lengths [requests]; entries past a request's
        last page are never read. Raises ValueError for a table narrower than a length needs or a negative page or
        length."""
        page_size = positive("page_size", page_size)
        lens = lengths("seq_lens", seq_lens)
        if isinstance(table, (list, tuple)) and not table:
            table = np.zeros((0, 0), dtype=np.int32)
        pages = to_int32("block_table", table, rank=2)
        requests, width = pages.shape
        if requests != lens.numel():
            raise ValueError(
                f"block_table has {requests} rows and seq_lens {lens.numel()} entries: there must be one row per "
                "request"
            )
        if requests * width > 2**31 - 1:
            raise ValueError(
                f"block_table has {requests * width} entries: must be fewer than 2**31; drop unused columns"
            )
        if on_host(lens):
            indptr = torch.from_numpy(
                np.arange(0, requests * width + 1, width, dtype=np.int32) if width else np.zeros(requests + 1, np.int32)
            )
        else:
            indptr = torch.arange(requests + 1, dtype=torch.int32, device=lens.device) * width
        made = cls._of(lens, indptr, pages.reshape(-1), page_size)
        made.row = width
        return made

    @classmethod
    def from_csr(cls, indptr: Integers, indices: Integers, last_page_len: Integers, *, page_size: int) -> PageTable:
        """From page numbers `indices`, those of request b at indptr[b]:indptr[b + 1], and the tokens in each request's
        last page (1 to page_size; 0 for a request without pages)."""
        page_size = positive("page_size", page_size)
        starts, last = offsets("indptr", indptr), lengths("last_page_len", last_page_len)
        pages = to_int32("indices", indices)
        if starts.numel() != last.numel() + 1:
            raise ValueError(
                f"indptr has {starts.numel()} entries and last_page_len {last.numel()}: indptr must have one more"
            )
        if not on_host(starts) or not on_host(last):
            count = starts[1:] - starts[:-1]
            return cls._of((count - 1).clamp(min=0) * page_size + last, starts, pages, page_size)
        if starts[-1] > pages.numel():
            raise ValueError(
                f"indptr ends at {int(starts[-1])} but there are {pages.numel()} indices: the page table is shorter "
                "than indptr says"
            )
        have, tail = np.diff(starts.numpy()).astype(np.int64), last.numpy()
        wrong = (tail > page_size) | ((tail > 0) != (have > 0))
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"last_page_len[{at}] = {tail[at]} with {have[at]} pages of {page_size}: the last page holds 1 to "
                "page_size tokens, and a request "
                "without pages has 0"
            )
        return cls._of(lengths("kv lengths", np.maximum(have - 1, 0) * page_size + tail), starts, pages, page_size)


class RaggedKV(KVLayout):
    """Keys and values of all requests one after another, [tokens, kv_heads, dim]; `lens` gives each request's number
    of tokens."""

    ragged = True
    row = 1
    page_size = 2**30

    def __init__(self, lens: Integers | None = None, *, indptr: Integers | None = None):
        if (lens is None) == (indptr is None):
            raise ValueError(
                "RaggedKV takes the requests' lengths, or indptr= with their offsets: give exactly one of the two"
            )
        if lens is not None:
            self.kv_lens = lengths("RaggedKV lens", lens)
            self.kv_indptr = cumulative(self.kv_lens)
        else:
            self.kv_indptr = offsets("RaggedKV indptr", indptr)  # type: ignore[arg-type]
            self.kv_lens = self.kv_indptr[1:] - self.kv_indptr[:-1]
        self.pages = self.kv_indptr[:-1]
        if self.host:
            self.page_indptr = torch.from_numpy(np.arange(self.requests + 1, dtype=np.int32))
            if self.requests and self.kv_lens.numpy().max() > self.page_size:
                raise ValueError(
                    f"RaggedKV has a request of {self.kv_lens.max()} tokens: at most 2**30; use pages for longer ones"
                )
        else:
            self.page_indptr = torch.arange(self.requests + 1, dtype=torch.int32, device=self.device)

    def _form(self) -> str:
        return ""

    def check_pages(self, limit: int) -> None:
        if self.kv_indptr[-1] > limit:
            raise ValueError(
                f"the requests have {int(self.kv_indptr[-1])} tokens but the keys {limit} rows: pass one row per token"
            )


class DenseKV(KVLayout):
    """One equally long row of tokens per request, [requests, tokens, kv_heads, dim] (in "HND" [requests, kv_heads,
    tokens, dim]); `lens` says how many are valid, all of them unless given. `rows`: the row of each request, where that
    is not its number; several requests may share one. A plan's `update` may change `tokens`."""

    row = 1

    def __init__(self, requests: int, tokens: int, lens: Integers | None = None, *, rows: Integers | None = None):
        requests, self.tokens = integer("DenseKV requests", requests, 0), integer("DenseKV tokens", tokens, 0)
        self.page_size = max(self.tokens, 1)
        if lens is None:
            lens = torch.from_numpy(np.full(requests, tokens, dtype=np.int32))
        self.kv_lens = lengths("DenseKV lens", lens)
        if self.kv_lens.numel() != requests:
            raise ValueError(
                f"DenseKV lens has {self.kv_lens.numel()} entries for {requests} requests: give one per request"
            )
        if self.host:  # the quicker way
            self.page_indptr = torch.from_numpy(np.arange(requests + 1, dtype=np.int32))
        else:
            self.page_indptr = torch.arange(requests + 1, dtype=torch.int32, device=self.device)
        self.pages = self.page_indptr[:-1] if rows is None else to_int32("DenseKV rows", rows)
        if self.pages.numel() != requests or self.pages.device != self.device:
            raise ValueError(
                f"DenseKV rows has {self.pages.numel()} entries on {self.pages.device} for {requests} requests on "
                f"{self.device}: give one per request, beside the lengths"
            )
        if self.host:
            self._check()

    def _form(self) -> str:
        return f" of rows of {self.tokens}"

    def _check(self) -> None:
        lens, rows = self.kv_lens.numpy(), self.pages.numpy()
        if lens.size and lens.max() > self.tokens:
            raise ValueError(
                f"DenseKV lens[{int(lens.argmax())}] = {lens.max()}, but a row has {self.tokens} tokens: a "
                "length is at most tokens="
            )
        if lens.size and rows.min() < 0:
            raise ValueError(f"DenseKV rows[{int(rows.argmin())}] = {rows.min()}: rows are numbered from 0")
