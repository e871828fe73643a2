"""Continuous batching over a paged KV cache with one flashloom plan.

Every step runs one batch in which some requests decode one token and others read a piece of their prompt; requests join
when pages are free and leave when they are finished. The plan is made once, with a reserve, and updated each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import flashloom as fl
from flashloom.demo.decoder import Decoder


@dataclass
class Request:
    """A prompt and what became of it; times are seconds on time.perf_counter's clock."""

    prompt: list[int]
    new_tokens: int
    arrives: int = 0  # the step from which it may be served
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    done: int = 0  # tokens already in the cache
    arrived_at: float = 0.0
    token_times: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.new_tokens

    def pending(self) -> list[int]:
        """Tokens not yet in the cache: what is left of the prompt, then the newest token."""
        return (self.prompt + self.tokens)[self.done :]


@dataclass(frozen=True)
class Step:
    """What one step ran: how many requests decoded, how many read prompt, and how many tokens in all."""

    decoding: int
    prefilling: int
    tokens: int


class Engine:
    """Serves requests with greedy decoding.

    Args:
        decoder: the model.
        pages, page_size: size of the KV cache.
        max_requests: requests served at once.
        max_tokens: tokens per step; prompts longer than what is left of it are read in pieces.
    """

    def __init__(
        self, decoder: Decoder, *, pages: int = 256, page_size: int = 16, max_requests: int = 8, max_tokens: int = 128
    ) -> None:
        s = decoder.shape
        heads = fl.HeadShape(q_heads=s.q_heads, kv_heads=s.kv_heads, dim=s.dim)
        dtype = decoder.head.dtype
        self.decoder, self.page_size, self.max_requests, self.max_tokens = decoder, page_size, max_requests, max_tokens
        self.cache = fl.PagedKVCache(
            layers=s.layers, pages=pages, page_size=page_size, heads=heads, dtype=dtype, device="cpu"
        )
        self.free = list(range(pages))
        self.running: list[Request] = []
        self.reserve = fl.Reserve(requests=max_requests, tokens=max_tokens, pages=pages)
        self.attention = fl.Attention(heads, variant=fl.causal, dtype=dtype)
        self.plan: fl.Plan | None = None
        self.steps: list[Step] = []

    def serve(self, requests: list[Request], on_step: Callable[[Step], object] | None = None) -> None:
        """Serve all requests to the end, in order of arrival."""
        waiting = sorted(requests, key=lambda r: r.arrives)
        step = 0
        while waiting or self.running:
            now = time.perf_counter()
            for request in waiting:
                if request.arrives <= step and not request.arrived_at:
                    request.arrived_at = now
            while waiting and waiting[0].arrives <= step and self._admit(waiting[0]):
                self.running.append(waiting.pop(0))
            if self.running:
                self._step()
                if on_step is not None:
                    on_step(self.steps[-1])
            step += 1

    def _admit(self, request: Request) -> bool:
        """Give the request the pages that it will need at most, if they are free."""
        needed = -(-(len(request.prompt) + request.new_tokens) // self.page_size)
        if len(self.running) == self.max_requests or needed > len(self.free):
            if not self.running:
                raise ValueError(f"a request needs {needed} pages but the cache has {len(self.free)}: make it larger")
            return False
        request.pages = [self.free.pop() for _ in range(needed)]
        return True

    def _step(self) -> None:
        chunks: list[tuple[Request, list[int]]] = []
        left = self.max_tokens
        for request in sorted(self.running, key=lambda r: len(r.pending())):  # decode first, then prompts
            if left > 0:
                chunks.append((request, request.pending()[:left]))
                left -= len(chunks[-1][1])
        batch = self._batch(chunks)
        if self.plan is None:
            self.plan = self.attention.plan(batch, reserve=self.reserve)
        else:
            self.plan.update(batch)
        tokens = torch.tensor([t for _, chunk in chunks for t in chunk])
        positions = torch.cat([torch.arange(r.done, r.done + len(chunk)) for r, chunk in chunks])
        rows = torch.tensor([len(chunk) for _, chunk in chunks]).cumsum(0) - 1
        slots, plan = batch.slots(), self.plan

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fl.append(self.cache[layer], k, v, slots)
            return plan.run(q, self.cache[layer])

        best = self.decoder.logits(tokens, positions, rows, attend).argmax(-1).tolist()
        self._account(chunks, best)

    def _batch(self, chunks: list[tuple[Request, list[int]]]) -> fl.Batch:
        width = max(len(r.pages) for r, _ in chunks)
        table = torch.tensor([r.pages + [0] * (width - len(r.pages)) for r, _ in chunks], dtype=torch.int32)
        lengths = torch.tensor([r.done + len(chunk) for r, chunk in chunks], dtype=torch.int32)
        pages = fl.PageTable.from_block_table(table, lengths, page_size=self.page_size)
        return fl.Batch(q_lens=[len(chunk) for _, chunk in chunks], kv=pages)

    def _account(self, chunks: list[tuple[Request, list[int]]], best: list[int]) -> None:
        now = time.perf_counter()
        decoding = sum(bool(r.tokens) for r, _ in chunks)
        self.steps.append(Step(decoding, len(chunks) - decoding, sum(len(chunk) for _, chunk in chunks)))
        for (request, chunk), token in zip(chunks, best):
            request.done += len(chunk)
            if request.done < len(request.prompt):
                continue  # more of the prompt is to be read
            request.tokens.append(token)
            request.token_times.append(now)
            if request.finished:
                self.free += request.pages
                self.running.remove(request)


def latencies(requests: list[Request]) -> dict[str, float]:
    """Tokens per second over all requests, and time to first token and inter-token latency in seconds at P50 and
    P99."""
    first = torch.tensor([r.token_times[0] - r.arrived_at for r in requests], dtype=torch.float64)
    gaps = torch.tensor(
        [b - a for r in requests for a, b in zip(r.token_times, r.token_times[1:])], dtype=torch.float64
    )
    elapsed = max(r.token_times[-1] for r in requests) - min(r.arrived_at for r in requests)
    return {
        "tokens_per_s": sum(len(r.tokens) for r in requests) / elapsed,
        "ttft_p50_s": float(first.quantile(0.5)),
        "ttft_p99_s": float(first.quantile(0.99)),
        "itl_p50_s": float(gaps.quantile(0.5)) if len(gaps) else float("nan"),
        "itl_p99_s": float(gaps.quantile(0.99)) if len(gaps) else float("nan"),
    }
