"""Pages of keys and values that are views of larger tensors, and what the Hopper kernel does with each: `check_views`
is called with the emulated GPU and with a real one."""

from __future__ import annotations

from collections.abc import Callable

import torch

import flashloom as fl
from flashloom import dispatch
from flashloom.attention.kernels.hopper.asked import Form
from flashloom.attention.reference import attention_reference

BF16 = torch.bfloat16
PAGES, PAGE, HEADS = 24, 16, fl.HeadShape(4, 2, 128)
Pages = tuple[torch.Tensor, torch.Tensor]


def _storage(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=BF16)


def _side_by_side(device: str) -> Pages:
    both = _storage(device, PAGES, 2, PAGE, 2, 128)
    return both[:, 0], both[:, 1]


def _heads_of_both(device: str) -> Pages:
    both = _storage(device, PAGES, PAGE, 4, 128)
    return both[:, :, :2], both[:, :, 2:]


def _wide_rows(device: str) -> Pages:
    both = _storage(device, PAGES, PAGE, 2, 256)
    return both[..., :128], both[..., 128:]


def _wide_rows_by_head(device: str) -> Pages:
    both = _storage(device, PAGES, 2, PAGE, 256).transpose(1, 2)
    return both[..., :128], both[..., 128:]


def _one_by_head(device: str) -> Pages:
    return _storage(device, PAGES, 3, PAGE, 128)[:, 1:].transpose(1, 2), _storage(device, PAGES, PAGE, 2, 128)


def _every_other_page(device: str) -> Pages:
    return _storage(device, 2 * PAGES, PAGE, 2, 128)[::2], _storage(device, 2 * PAGES, PAGE, 2, 128)[1::2]


def _one_wide(device: str) -> Pages:
    return _storage(device, PAGES, PAGE, 2, 256)[..., :128], _storage(device, PAGES, PAGE, 2, 128)


# a view -> whether one copy can bring all of a page's row, of keys and of values
VIEWS: dict[Callable[[str], Pages], bool] = {
    _side_by_side: True, _heads_of_both: True, _wide_rows: False, _wide_rows_by_head: True, _one_by_head: True,
    _every_other_page: True, _one_wide: False,
}  # fmt: skip


def check_views(device: str) -> None:
    """All of them in one plan, as an engine with several caches may ask."""
    q_lens = [70, 30]  # of 200 and 77 tokens
    pages = fl.PageTable.from_csr([0, 13, 18], torch.randperm(PAGES)[:18].int(), [8, 13], page_size=PAGE)
    with dispatch.only("hopper"):
        plan = fl.Attention(HEADS, variant=fl.causal, dtype=BF16, device=device).plan(fl.Batch(q_lens, kv=pages))
    q = _storage(device, sum(q_lens), 4, 128)
    for view, chunked in VIEWS.items():
        k, v = view(device)
        out = torch.full_like(q, float("nan"))
        plan.run(q, (k, v), out=out)
        want, _ = attention_reference(q, k, v, plan.batch.to_host(), fl.causal)
        assert float((out.double() - want).norm() / want.norm()) < 8e-3, view.__name__
        assert plan._executor._last is plan._executor._hopper[Form(BF16, chunked=chunked)], view.__name__
