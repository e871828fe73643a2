"""Random cases in which keys or values hold NaN or infinities, mostly where a mask hides them, and a witness: float64,
row by row, over the keys that a row sees and no others."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch

import flashloom as fl
from flashloom import dispatch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BOUND = {F32: 1e-5, F16: 6e-3, BF16: 3e-2, E4M3: 8e-2}  # of a row's largest finite element
Pair = Callable[[int, int, int, int], bool]  # request, head, q_pos, kv_pos


class HeadWindow(fl.Variant):
    """Each head looks back so far."""

    width: fl.PerHead

    def logits_mask(self, at):
        return (at.kv_pos <= at.q_pos) & (at.kv_pos > at.q_pos - self.width[at.q_head])


class Every(fl.Variant):
    """Every so many keys, and the row's own."""

    step: int

    def logits_mask(self, at):
        return (at.kv_pos % self.step == 1) | (at.kv_pos == at.q_pos)


class KeyBias(fl.Variant):
    bias: fl.PerKeyToken

    def logits_transform(self, logits, at):
        return logits + self.bias[at.kv_pos]


class Fade(fl.Variant):
    """Keys by position."""

    def key_transform(self, k, at):
        return k * (1.0 + 0.001 * at.kv_pos)


class Shifted(fl.Variant):
    def output_transform(self, out, lse, at):
        return out * torch.sigmoid(lse) + 0.5


class Hidden:
    """One case, drawn from a seed. phases: of decode, append and prefill; types: pairs of the dtypes of queries and of
    keys; hooks: of logits and others; widths: of heads."""

    def __init__(
        self,
        seed: int,
        types: list[tuple[torch.dtype, torch.dtype]],
        *,
        masks: tuple[str, ...] = ("causal", "window", "band", "heads", "every", "documents", "custom", "blocks"),
        hooks: tuple[str, ...] = ("", "", "softcap", "alibi", "bias", "sigmoid", "key", "output"),
        phases: tuple[str, ...] = ("decode", "append", "prefill"),
        widths: tuple[int, ...] = (32, 64, 80, 128),
        pages: tuple[int, ...] = (0, 1, 4, 16, 64),
        longest: int = 900,
        rows: int = 70,
        group: tuple[int, ...] = (1, 2, 4),
        device: str = "cpu",
        scales: bool = True,
    ):
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.dtype, self.kv_dtype = r.choice(types)
        self.mask, self.hook, phase = r.choice(masks), r.choice(hooks), r.choice(phases)
        dim, kv_heads, self.page = r.choice(widths), r.choice((1, 2)), r.choice(pages)
        value_dim = r.choice((dim, dim, r.choice(widths)))
        self.heads = fl.HeadShape(kv_heads * r.choice(group), kv_heads, dim, value_dim)
        requests = r.choice((1, 2, 3))
        most = {"decode": 1, "append": 5, "prefill": rows}[phase]
        self.q_lens = [r.randint(1, most) for _ in range(requests)]
        top = longest if phase == "decode" else max(longest // 3, rows + 1)
        self.kv_lens = [max(n + r.randint(0, 40), r.randint(1, top)) for n in self.q_lens]
        self.layout = "HND" if self.page and r.random() < 0.3 else "NHD"
        self.partial = self.hook == "output" and r.random() < 0.3
        self.device = torch.device(device)
        self.variant, self.keep, self.logits, self.wrap = self._variant(r)
        self.k_scale = self.v_scale = None
        if self.kv_dtype.itemsize == 1 and scales and r.random() < 0.5:
            self.k_scale, self.v_scale = torch.rand(2, kv_heads, device=self.device) + 0.5

        tokens, keys = sum(self.q_lens), sum(self.kv_lens)
        self.q = torch.randn(tokens, self.heads.q_heads, dim).to(self.dtype)
        self.k = torch.randn(keys, kv_heads, dim).to(self.kv_dtype).float()
        self.v = torch.randn(keys, kv_heads, value_dim).to(self.kv_dtype).float()
        self._poison(r)
        self.text = (
            f"seed {seed}: {self.mask} {self.hook} {phase} q{self.q_lens} kv{self.kv_lens} {self.heads} {self.dtype} "
            f"{self.kv_dtype} page {self.page} {self.layout} {self.bad} partial={self.partial}"
        )

    def _variant(self, r: random.Random) -> tuple[fl.Variant, Pair, Any, Any]:
        heads, device = self.heads.q_heads, self.device
        starts = torch.tensor([0, *self.kv_lens]).cumsum(0).tolist()
        keep: Pair
        self.blocks: Any = None
        if self.mask == "causal":
            variant, keep = fl.causal, lambda b, h, i, j: j <= i
        elif self.mask == "window":
            left = r.choice((0, 5, 20, 100))
            variant, keep = fl.causal & fl.sliding_window(left), lambda b, h, i, j: i - left <= j <= i
        elif self.mask == "band":
            left, right = r.choice((3, 30)), r.choice((0, 7))
            variant, keep = fl.sliding_window(left, right), lambda b, h, i, j: i - left <= j <= i + right
        elif self.mask == "heads":
            width = torch.randint(1, 60, (heads,), dtype=torch.int32)
            w = width.tolist()
            variant, keep = HeadWindow(width=width.to(device)), lambda b, h, i, j: i - w[h] < j <= i
        elif self.mask == "every":
            step = r.choice((2, 3, 7))
            variant, keep = Every(step=step), lambda b, h, i, j: j % step == 1 or j == i
        elif self.mask == "documents":
            ids = torch.randint(0, 3, (starts[-1],)).sort().values.to(torch.int32)
            d = ids.tolist()
            variant = fl.document_mask(ids.to(device))
            keep = lambda b, h, i, j: d[starts[b] + i] == d[starts[b] + j]  # noqa: E731
        elif self.mask == "custom":
            shape = (len(self.q_lens), heads, max(self.q_lens), max(self.kv_lens))
            table = torch.rand(shape) < r.choice((0.1, 0.5, 0.9))
            offsets = [kv - q for q, kv in zip(self.q_lens, self.kv_lens, strict=True)]
            t = table.tolist()
            variant, keep = fl.custom_mask(table.to(device)), lambda b, h, i, j: t[b][h][i - offsets[b]][j]
        else:
            size_q, size_kv = r.choice((1, 8, 64)), r.choice((8, 32, 128))
            lists = [
                [
                    sorted(r.sample(range(-(-kv // size_kv)), r.randint(0, -(-kv // size_kv))))
                    for _ in range(0, q, size_q)
                ]
                for q, kv in zip(self.q_lens, self.kv_lens, strict=True)
            ]
            offsets = [kv - q for q, kv in zip(self.q_lens, self.kv_lens, strict=True)]
            flat = [one for each in lists for one in each]
            indptr = torch.tensor([0, *map(len, flat)]).cumsum(0).tolist()
            self.blocks = (indptr, [n for one in flat for n in one], size_q, size_kv)
            variant, keep = fl.full, lambda b, h, i, j: j // size_kv in lists[b][(i - offsets[b]) // size_q]
        logits, wrap = None, None
        if self.hook == "softcap":
            variant, logits = variant & fl.softcap(4.0), lambda x, b, h, i, j: 4.0 * torch.tanh(x / 4.0)
        elif self.hook == "alibi":
            slopes = torch.rand(heads) * 0.1
            s = slopes.double()
            variant = variant & fl.alibi(slopes.to(device))
            logits = lambda x, b, h, i, j: x + s[h] * (j - i)  # noqa: E731
        elif self.hook == "bias":
            bias = torch.randn(starts[-1])
            variant = variant & KeyBias(bias=bias.to(device))
            logits = lambda x, b, h, i, j: x + bias.double()[starts[b] + j]  # noqa: E731
        elif self.hook == "sigmoid":
            variant = variant & fl.sigmoid(-1.0)
            logits = lambda x, b, h, i, j: torch.sigmoid(x - 1.0)  # noqa: E731
        elif self.hook == "key":
            variant = variant & Fade()
        elif self.hook == "output":
            variant = variant & Shifted()
            wrap = None if self.partial else lambda out, lse: out * torch.sigmoid(lse) + 0.5
        return variant, keep, logits, wrap

    def _poison(self, r: random.Random) -> None:
        """Some keys, the later ones and the first ones rather, in keys or values or both, in part or whole."""
        kinds = {
            E4M3: [math.nan],
            E5M2: [math.nan, math.inf, -math.inf],
        }.get(self.kv_dtype, [math.nan, math.inf, -math.inf])
        self.bad = []
        start = 0
        for n in self.kv_lens:
            where = r.choice(("left", "right", "some", "one"))
            cut = r.randint(1, n)
            places = {"left": range(n - cut), "right": range(cut, n), "one": [r.randrange(n)]}.get(
                where, r.sample(range(n), min(n, 3))
            )
            what, value, part = r.choice(("k", "v", "v", "both")), r.choice(kinds), r.random() < 0.5
            if self.hook == "sigmoid" and what == "both":  # the kernels' sigmoid of -inf is tiny, which is not 0 to inf
                value = math.nan
            self.bad.append(f"{where} {len(places)} {what} {value}{' in part' if part else ''}")
            for j in places:
                head = r.randrange(self.heads.kv_heads) if part else slice(None)
                for name, x in (("k", self.k), ("v", self.v)):
                    if what in (name, "both"):
                        column = r.randrange(x.shape[-1]) if part else slice(None)
                        x[start + j, head, column] = value
            start += n

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out [tokens, heads, value_dim] and lse [tokens, heads]."""
        group, softmax = self.heads.q_heads // self.heads.kv_heads, self.hook != "sigmoid"
        k, v, q = self.k.double(), self.v.double(), self.q.double()
        if self.k_scale is not None:
            k, v = k * self.k_scale.cpu().double()[:, None], v * self.v_scale.cpu().double()[:, None]
        out = torch.zeros(q.shape[0], self.heads.q_heads, self.heads.value_dim, dtype=torch.float64)
        lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
        first_q = first_k = 0
        for b, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            for i in range(q_len):
                pos = kv_len - q_len + i
                for h in range(self.heads.q_heads):
                    seen = torch.tensor([j for j in range(kv_len) if self.keep(b, h, pos, j)], dtype=torch.long)
                    if not seen.numel():
                        continue
                    kk, vv = k[first_k + seen, h // group], v[first_k + seen, h // group]
                    if self.hook == "key":
                        kk = kk * (1.0 + 0.001 * seen)[:, None]
                    x = (kk * q[first_q + i, h]).sum(1) * self.heads.dim**-0.5
                    if self.logits is not None:
                        x = self.logits(x, b, h, pos, seen)
                    lse[first_q + i, h] = x.logsumexp(0)
                    if softmax and lse[first_q + i, h] == -math.inf:
                        continue  # by definition as a row without keys
                    row = ((x.softmax(0) if softmax else x)[:, None] * vv).sum(0)
                    out[first_q + i, h] = row if self.wrap is None else self.wrap(row, lse[first_q + i, h])
            first_q, first_k = first_q + q_len, first_k + kv_len
        return out, lse

    def tensors(self) -> tuple[fl.Batch, torch.Tensor, tuple[torch.Tensor, ...]]:
        """The batch, queries, and keys and values in shuffled pages whose other slots hold NaN."""
        k, v = self.k.to(self.kv_dtype), self.v.to(self.kv_dtype)
        if not self.page:
            kv: Any = fl.RaggedKV(self.kv_lens)
        else:
            needs = [-(-n // self.page) for n in self.kv_lens]
            order, used, start, rows = torch.randperm(sum(needs) + 2).tolist(), 0, 0, []
            stored = []
            for x in (k, v):
                pages = torch.empty(len(order), self.page, *x.shape[1:], dtype=self.kv_dtype)
                pages.view(torch.uint8).fill_(0x7F) if x.dtype.itemsize == 1 else pages.fill_(math.nan)
                stored.append(pages)
            for n, need in zip(self.kv_lens, needs, strict=True):
                rows.append(order[used : used + need])
                for t in range(n):
                    for pages, x in zip(stored, (k, v), strict=True):
                        to = pages[rows[-1][t // self.page], t % self.page]
                        to.view(torch.uint8).copy_(x[start + t].view(torch.uint8))
                used, start = used + need, start + n
            width = max(needs)
            table = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
            kv = fl.PageTable.from_block_table(table, self.kv_lens, page_size=self.page)
            k, v = stored
            if self.layout == "HND":
                k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        if self.blocks is not None:
            indptr, indices, size_q, size_kv = self.blocks
            kv = fl.BlockSparseKV(kv, indptr, indices, block_q=size_q, block_kv=size_kv)
        parts = (k.to(self.device), v.to(self.device))
        if self.k_scale is not None:
            parts += (self.k_scale, self.v_scale)
        return fl.Batch(q_lens=self.q_lens, kv=kv), self.q.to(self.device), parts

    def check(self, executor: str, bound: dict[torch.dtype, float] = BOUND) -> None:
        batch, q, kv = self.tensors()
        with dispatch.only(executor):
            plan = fl.Attention(
                self.heads, variant=self.variant, dtype=self.dtype, kv_dtype=self.kv_dtype, device=self.device,
                layout=self.layout if self.page else "NHD",
            ).plan(batch)  # fmt: skip
        softmax = self.hook != "sigmoid"
        got = plan.run(q, kv, return_lse=softmax, partial=self.partial)
        want, want_lse = self.expected()
        out, lse = got if softmax else (got, want_lse)
        self.compare(out.cpu().double(), want, bound[self.dtype])
        if softmax:
            lse = lse.cpu().double()
            real = want_lse < math.inf  # a sum with NaN is NaN, one with infinity is either
            assert not (lse[~real] < math.inf).any(), f"{self.text}: an lse hides a NaN"
            assert torch.equal(lse[real] == -math.inf, want_lse[real] == -math.inf), f"{self.text}: empty rows"
            real &= want_lse > -math.inf
            error = (lse - want_lse)[real].abs()
            assert not real.any() or error.max() < bound[self.dtype] * 2, f"{self.text}: lse {error.max()}"

    def compare(self, out: torch.Tensor, want: torch.Tensor, bound: float) -> None:
        for name in ("isnan", "isposinf", "isneginf"):
            a, b = getattr(torch, name)(out), getattr(torch, name)(want)
            assert torch.equal(a, b), (
                f"{self.text}: {name} {int((a & ~b).sum())} too many, {int((b & ~a).sum())} missing of {b.numel()}, "
                f"first at {(a != b).nonzero()[0].tolist()}"
            )
        fine = want.isfinite()
        size = torch.where(fine, want.abs(), 0).amax(-1, keepdim=True).clamp(min=0.1)
        error = torch.where(fine, (out - want).abs() / size, 0)
        assert error.max() < bound, f"{self.text}: error {float(error.max()):.2e} at {error.argmax()}"
