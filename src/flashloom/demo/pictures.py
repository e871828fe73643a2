"""What a variant masks and weighs, as pictures. The weights come from the kernels themselves: with the identity as
values, the
output of attention is the matrix of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import flashloom as fl

SIZE = 64  # tokens: rows and columns of a picture
DIM = 64


def weights(variant: fl.Variant, tokens: int = SIZE, *, random: bool = False) -> Tensor:
    """The weights of `tokens` queries over as many keys, float32 [tokens, tokens], of one head.

    random: queries and keys are random walks, so that nearby tokens are alike; otherwise all logits start out at 0, and
    the picture shows the variant alone.
    """
    if random:
        steps = torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(4))
        q = k = torch.nn.functional.normalize(steps.cumsum(0), dim=1)[:, None] * DIM**0.5
    else:
        q = k = torch.zeros(tokens, 1, DIM)
    return fl.attention(q, k, torch.eye(tokens)[:, None], variant=variant)[:, 0]


def examples() -> dict[str, tuple[fl.Variant, bool]]:
    """Title -> (variant for one head, whether on random tokens): what the demo and the gallery draw."""
    documents = torch.tensor([0] * 20 + [1] * 30 + [2] * 14)
    tree = torch.tril(torch.ones(SIZE, SIZE, dtype=torch.bool)) & (
        (torch.arange(SIZE) < 40) | (torch.arange(SIZE)[None] % 3 == torch.arange(SIZE)[:, None] % 3)
    )
    return {
        "full": (fl.full, True),
        "causal": (fl.causal, True),
        "causal & sliding_window(15)": (fl.causal & fl.sliding_window(15), True),
        "causal & softcap(6)": (fl.causal & fl.softcap(6.0), True),
        "causal & alibi": (fl.causal & fl.alibi(torch.tensor([0.15])), False),
        "causal & document_mask": (fl.causal & fl.document_mask(documents), True),
        "prefix_lm(24)": (fl.prefix_lm(torch.tensor([24])), True),
        "custom_mask (a tree)": (fl.custom_mask(tree), True),
    }


def draw(panels: Mapping[str, Tensor], path: Path, *, columns: int = 4, one_scale: bool = False) -> Path:
    """Write a PNG with one panel per matrix: white is masked (weight 0), darker is heavier, each row scaled to its
    maximum.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.45 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, matrix) in zip(axes, panels.items()):
        scaled = matrix / (matrix.amax() if one_scale else matrix.amax(1, keepdim=True)).clamp(min=1e-30)
        shown = torch.where(matrix > 0, 0.15 + 0.85 * scaled, torch.zeros(()))
        axis.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_xticks([]), axis.set_yticks([])
    axes[0].set_xlabel("key", fontsize=8)
    axes[0].set_ylabel("query", fontsize=8)
    figure.savefig(path, dpi=70)
    return path
