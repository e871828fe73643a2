"""One way to check the Triton backend against the definition, for CPU tensors in the interpreter and for a GPU.

Inputs are drawn anew for every check; what must not be read (unused pages, padding, rows past a length) is NaN, and
outputs start as NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.reference import attention_reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, I8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
# largest ||out - reference|| / ||reference|| by the dtypes of queries and keys; float32 must not be computed in TF32
# (3e-4)
BOUND = {F32: 2e-6, F16: 1.5e-3, BF16: 8e-3, E4M3: 8e-3, E5M2: 8e-3}
ROUNDED = 3e-2  # of weights in float8_e4m3fn: 2.6e-2 is what four bits of each weight cost


class Scaled(fl.Variant):
    """A query transform with a partner element and an output hook that reads lse and per-token fields."""

    gain: fl.PerHead
    bias: fl.PerQueryToken

    def query_transform(self, q, at):
        return q * self.gain[at.q_head]

    def output_transform(self, out, lse, at):
        return out * torch.sigmoid(lse) + self.bias[at.q_pos]


class KeyBias(fl.Variant):
    bias: fl.PerKeyToken

    def logits_transform(self, logits, at):
        return logits + self.bias[at.kv_pos]


@dataclass
class Case:
    """q_lens and kv_lens per request; kind: paged, ragged or dense; variant: a function of (case, device)."""

    q_lens: list[int]
    kv_lens: list[int]
    heads: fl.HeadShape = field(default_factory=lambda: fl.HeadShape(4, 2, 32))
    dtype: torch.dtype = F32
    kv_dtype: torch.dtype | None = None
    kind: str = "paged"
    page_size: int = 4
    layout: str = "NHD"
    variant: Any = None
    scales: str | None = None
    invariant: bool = False
    on_device: bool = False
    odd_strides: bool = False
    split_values: bool = False
    partial: bool = False
    sm_scale: float | None = None
    by_request: bool = False  # also with rows [requests, tokens, heads, dim], in several strides

    def __str__(self) -> str:
        h = self.heads
        name = getattr(self.variant, "__name__", "full") if self.variant else "full"
        kv = self.kv_dtype or self.dtype
        more = f"{'-odd' if self.odd_strides else ''}{f'-{self.scales}' if self.scales else ''}"
        text = (
            f"{name}-q{self.q_lens}-kv{self.kv_lens}-{h.q_heads}x{h.kv_heads}x{h.dim}x{h.value_dim}-{self.dtype}-{kv}"
            f"-{self.kind}{self.page_size}-{self.layout}{more}{'-invariant' if self.invariant else ''}"
        )
        return text.replace("torch.", "").replace(" ", "")


def randn(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    x = torch.randn(*shape, device=device)
    if dtype == I8:
        return (x * 40).round().clamp(-127, 127).to(I8)
    return (x * 2 if dtype.itemsize == 1 else x).to(dtype)


def poison(x: torch.Tensor) -> None:
    x.view(torch.uint8).fill_(0x7F) if x.dtype.itemsize == 1 else x.fill_(float("nan"))


def check(case: Case, device: Any = "cpu", executor: str = "triton") -> tuple[float, float]:
    """Run the case; answers (relative error of out, largest error of lse) after asserting that both are within
    bounds."""
    device = torch.device(device)
    heads, kv_dtype = case.heads, case.kv_dtype or case.dtype
    requests, tokens = len(case.q_lens), sum(case.q_lens)
    rng = np.random.default_rng(0)
    if case.kind == "paged":
        needs = [-(-n // case.page_size) for n in case.kv_lens]
        width, pages = max([*needs, 1]) + 1, sum(needs) + 3
        order = rng.permutation(pages)
        table = np.full((requests, width), pages - 1, dtype=np.int32)  # entries past the last page: any page
        start = 0
        for b, n in enumerate(needs):
            table[b, :n] = order[start : start + n]
            start += n
        lens: Any = case.kv_lens
        if case.on_device:
            table, lens = (
                torch.from_numpy(table).to(device),
                torch.tensor(case.kv_lens, dtype=torch.int32, device=device),
            )
        kv: Any = fl.PageTable.from_block_table(table, lens, page_size=case.page_size)
        shape = (pages, case.page_size)
    elif case.kind == "ragged":
        kv, shape = fl.RaggedKV(case.kv_lens), (sum(case.kv_lens),)
    else:
        size = max(case.kv_lens) + 2
        kv, shape = fl.DenseKV(requests, size, case.kv_lens), (requests, size)

    def storage(width: int) -> torch.Tensor:
        pad = 3 if case.odd_strides else 0
        if case.layout == "HND" and case.kind != "ragged":
            x = torch.empty(shape[0], heads.kv_heads, shape[1], width + pad, dtype=kv_dtype, device=device)
        else:
            x = torch.empty(*shape, heads.kv_heads, width + pad, dtype=kv_dtype, device=device)
        poison(x)
        return x[..., :width]

    def fill(x: torch.Tensor) -> None:
        rows = x.transpose(1, 2) if case.layout == "HND" and case.kind != "ragged" else x
        if case.kind == "ragged":
            rows.copy_(randn(*rows.shape, dtype=kv_dtype, device=device))
            return
        for b, n in enumerate(case.kv_lens):
            for t in range(0, n, shape[1]):
                page = int(table[b][t // shape[1]]) if case.kind == "paged" else b
                m = min(shape[1], n - t)
                rows[page, :m].copy_(randn(m, heads.kv_heads, rows.shape[-1], dtype=kv_dtype, device=device))

    k = storage(heads.dim)
    fill(k)
    if heads.latent_value:
        v = k[..., : heads.value_dim]
    else:
        v = storage(heads.value_dim)
        fill(v)
    scale = None
    if case.scales:
        size = {"one": (1,), "head": (heads.kv_heads,), "page": (shape[0], heads.kv_heads)}[case.scales]
        scale = torch.rand(*size, device=device) * 0.5 + 0.25
    q_pad = 5 if case.odd_strides else 0
    q = randn(tokens, heads.q_heads, heads.dim + q_pad, dtype=case.dtype, device=device)[..., : heads.dim]
    q_lens: Any = case.q_lens
    more: dict[str, Any] = {}
    if case.on_device:
        q_lens = torch.tensor(case.q_lens, dtype=torch.int32, device=device)
        more = {"max_q_len": max(case.q_lens), "tokens": tokens}
    batch = fl.Batch(q_lens=q_lens, kv=kv, **more)
    variant = case.variant(case, device) if case.variant else fl.full
    with dispatch.only(executor):
        attn = fl.Attention(
            heads, variant=variant, dtype=case.dtype, kv_dtype=kv_dtype, layout=case.layout if case.kind != "ragged"
            else "NHD", sm_scale=case.sm_scale, batch_invariant=case.invariant, device=device,
        )  # fmt: skip
        plan = attn.plan(batch)
    out = torch.full(
        (tokens + 1, heads.q_heads, heads.value_dim), float("nan"), dtype=attn.spec.out_dtype, device=device
    )
    softmax = attn.spec.program.softmax
    lse = torch.full((tokens + 1, heads.q_heads), float("nan"), device=device) if softmax else None
    padded = (
        torch.cat([q, torch.zeros_like(q[:1])])
        if not case.odd_strides
        else torch.nn.functional.pad(q, (0, q_pad, 0, 0, 0, 1))[..., : heads.dim]
    )
    parts = (k, v) if scale is None else (k, v, scale, scale)
    plan.run(padded, parts, out=out, lse=lse, partial=case.partial)
    want, want_lse = attention_reference(
        q, k, v, batch.to_host(), variant, k_scale=scale, v_scale=scale, sm_scale=case.sm_scale, layout=attn.layout,
        **({"partial": True} if case.partial else {}),
    )  # fmt: skip
    assert out[tokens:].isnan().all(), "a row beyond the batch was written"
    got = out[:tokens].double()
    assert not got.isnan().any(), f"{case}: NaN in out (unwritten, or poison was read)"
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    bound = BOUND[case.dtype] * (1 if kv_dtype.itemsize > 1 else 2) if attn.spec.out_dtype != BF16 else BOUND[BF16]
    if executor == "hopper" and case.dtype == E4M3:
        bound = ROUNDED
    assert error <= bound or not want.any(), f"{case}: relative error {error:.2e}, allowed {bound:.0e}"
    lse_error = 0.0
    if lse is not None:
        assert want_lse is not None
        assert lse[tokens:].isnan().all()
        empty = want_lse == -torch.inf
        assert torch.equal(lse[:tokens] == -torch.inf, empty), f"{case}: rows without keys differ"
        assert (got[empty] == 0).all() or case.partial
        if not bool(empty.all()):
            lse_error = float((lse[:tokens].double() - want_lse)[~empty].abs().max())
        size = float(want_lse[~empty].abs().max()) if not bool(empty.all()) else 0.0
        assert lse_error <= (2e-6 if case.dtype == F32 else 4e-3) * (size + 3), f"{case}: lse error {lse_error:.2e}"
    if case.by_request:
        rows = q.view(requests, -1, *q.shape[1:])
        for layout in ("heads first", "padded", "other out"):
            lie = torch.empty_like(rows.transpose(1, 2), memory_format=torch.contiguous_format)
            if layout == "padded":
                lie = torch.full((*lie.shape[:2], lie.shape[2] + 3, lie.shape[3]), float("nan"), dtype=q.dtype).to(q)
                lie = lie[:, :, 1:-2]
            lie.copy_(rows.transpose(1, 2))
            own = {"out": out.new_full((*rows.shape[:-1], heads.value_dim), float("nan"))}
            if layout != "other out":
                own = {}
            result = plan.run(lie.transpose(1, 2), parts, partial=case.partial, return_lse=softmax, **own)
            result, result_lse = result if softmax else (result, None)
            assert torch.equal(result.flatten(0, 1), out[:tokens]), f"{case}: rows of requests, {layout}"
            assert lse is None or torch.equal(result_lse.flatten(0, 1), lse[:tokens])
    again = torch.full_like(out, float("nan"))
    plan.run(padded, parts, out=again, lse=lse, partial=case.partial)
    assert torch.equal(again[:tokens], out[:tokens]), f"{case}: two runs differ"
    return error, lse_error


# variants by name; each takes (case, device)
def causal(case, device):
    return fl.causal


def window(case, device):
    return fl.causal & fl.sliding_window(5)


def gemma(case, device):
    return fl.causal & fl.sliding_window(9) & fl.softcap(20.0)


def alibi(case, device):
    return fl.alibi(fl.alibi_slopes(case.heads.q_heads).to(device)) & fl.causal


def sinks(case, device):
    return fl.causal & fl.sink(torch.randn(case.heads.q_heads, device=device))


def rope(case, device):
    return fl.rope(case.heads.dim, inv_freq=fl.rope_frequencies(case.heads.dim).to(device)) & fl.causal


def sigmoid(case, device):
    return fl.sigmoid(-1.0) & fl.causal


def documents(case, device):
    return fl.causal & fl.document_mask((torch.arange(sum(case.kv_lens), device=device) // 6).to(torch.int32))


def prefix(case, device):
    return fl.prefix_lm(torch.full((len(case.q_lens),), 7, dtype=torch.int32, device=device))


def scaled(case, device):
    return (
        Scaled(
            gain=torch.rand(case.heads.q_heads, device=device) + 0.5, bias=torch.randn(sum(case.q_lens), device=device)
        )
        & fl.causal
    )


def key_bias(case, device):
    return KeyBias(bias=torch.randn(sum(case.kv_lens), device=device))


def holes(case, device):
    """Only keys whose 8-block is odd, and not the last one: tiles to skip within the range, rows without any key."""

    class Holes(fl.Variant):
        def logits_mask(self, at):
            return ((at.kv_pos // 8) % 2 == 1) & (at.q_pos > 8)

    return Holes()


H = fl.HeadShape
CASES = [
    Case([1, 1, 1], [5, 33, 1]),
    Case([1, 1], [300, 7], H(4, 1, 16), variant=causal, page_size=16),
    Case([3, 1, 9], [3, 40, 20], variant=causal, kind="ragged"),
    Case([70], [70], H(2, 2, 16), variant=window, kind="dense"),
    Case([1, 5], [0, 3], variant=causal),
    Case([6], [4], variant=sinks),
    Case([2, 1], [9, 50], H(6, 2, 24), variant=gemma, page_size=1, layout="HND"),
    Case([1, 2], [90, 6], H(5, 1, 72, 40), variant=alibi, page_size=3),
    Case([4], [18], H(2, 1, 32), variant=rope, page_size=64),
    Case([4, 1], [18, 80], variant=sigmoid),
    Case([8], [24], variant=documents, kind="ragged"),
    Case([5, 2], [12, 13], variant=prefix),
    Case([5, 2], [12, 13], variant=scaled),
    Case([5, 2], [12, 13], variant=scaled, partial=True),
    Case([5, 1], [12, 130], variant=key_bias),
    Case([40], [100], variant=holes),
    Case([1, 1], [20, 60], dtype=F16, variant=causal, odd_strides=True),
    Case([33, 1], [40, 90], H(4, 1, 16), variant=causal, dtype=F16, odd_strides=True),
    Case([1, 3], [20, 60], dtype=BF16, variant=causal),
    Case([1, 1], [20, 60], dtype=BF16, kv_dtype=E4M3, scales="one"),
    Case([2, 1], [20, 30], dtype=F16, kv_dtype=E5M2, scales="head"),
    Case([1, 2], [20, 30], dtype=BF16, kv_dtype=I8, scales="page"),
    Case([1, 2], [20, 30], dtype=F32, kv_dtype=I8, scales="head", variant=rope),
    Case([1, 2], [40, 30], H.mla(4, 32, 16), dtype=BF16),
    Case([1, 1, 4], [20, 60, 5], variant=causal, sm_scale=-0.3),
    Case([5, 5, 5], [5, 40, 20], variant=scaled, kind="dense", layout="HND", by_request=True),
    Case([1, 1], [300, 7], H(4, 1, 16), BF16, variant=causal, page_size=16, by_request=True),
    Case([3, 3], [40, 20], H(2, 2, 24), F16, variant=sinks, odd_strides=True, kind="ragged", by_request=True),
    Case([1, 1], [2100, 60], H(1, 1, 16), invariant=True, page_size=512),
]
