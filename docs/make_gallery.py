"""Writes docs/gallery.md, its pictures and the README's: python docs/make_gallery.py.

Each picture is the matrix of weights that the kernels compute: rows are queries, columns keys, white is masked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import torch

import flashloom as fl
from flashloom.demo import pictures

HERE = Path(__file__).parent
INTRODUCTION = """\
# Gallery of variants

Written by `python docs/make_gallery.py`; do not edit. Every picture shows the weights of one head over 64 tokens, as
the kernels compute them: rows are queries, columns keys, white is masked, darker is heavier. Each row is scaled to its
maximum, unless the text says otherwise. Queries and keys are a random walk, so that near tokens are alike, or all equal
where the variant alone is to be seen. Each block is a program that makes a variant, for
`fl.attention(q, k, v, variant=variant)`.
where the variant alone is to be seen. Kinds of fields and how each is indexed: [tutorial.md](tutorial.md#2-variants).
"""


@dataclass(frozen=True)
class Entry:
    """A variant: its code ends in an assignment to `variant`. `alike`: all queries and keys are equal. `one_scale`: for
    all rows."""

    title: str
    text: str
    code: str
    alike: bool = False
    one_scale: bool = False

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")

    def variant(self) -> fl.Variant:
        scope = {"fl": fl, "torch": torch}
        exec(dedent(self.code), scope)
        return scope["variant"]


ENTRIES = (
    Entry("Causal", "Bottom-right aligned: the last query sees every key.", "variant = fl.causal"),
    Entry(
        "Sliding window",
        "A window of 16 tokens, the query's own included (Mistral, Gemma). Tiles outside it are never read.",
        "variant = fl.causal & fl.sliding_window(15)",
    ),
    Entry(
        "Window and first tokens",
        "A variant of one's own: the window, and the first four tokens for ever (StreamingLLM).",
        """\
        class Streaming(fl.Variant):
            window: int
            first: int

            def logits_mask(self, at):
                return (at.q_pos - at.kv_pos < self.window) | (at.kv_pos < self.first)


        variant = fl.causal & Streaming(window=16, first=4)
        """,
    ),
    Entry("Soft cap", "Logits bounded by cap * tanh(logits / cap) (Gemma 2).", "variant = fl.causal & fl.softcap(6.0)"),
    Entry(
        "ALiBi",
        "A bias linear in the distance, with one slope per query head (Press et al. 2021).",
        "variant = fl.causal & fl.alibi(torch.tensor([0.15]))",
        alike=True,
    ),
    Entry(
        "Documents",
        "Packed sequences attend within their own document.",
        """\
        documents = torch.tensor([0] * 20 + [1] * 30 + [2] * 14)
        variant = fl.causal & fl.document_mask(documents)
        """,
    ),
    Entry(
        "Prefix",
        "The first 24 tokens see each other in both directions (prefix language model).",
        "variant = fl.prefix_lm(torch.tensor([24]))",
    ),
    Entry(
        "Tree",
        "Any bool mask: here three speculative continuations of one context, verified in a single step.",
        """\
        token = torch.arange(64)
        same_branch = (token < 40) | (token % 3 == token[:, None] % 3)
        variant = fl.custom_mask(same_branch & (token <= token[:, None]))
        """,
    ),
    Entry(
        "Chunks",
        "Attention within chunks of 16 tokens (Llama 4), as a function written for FlexAttention.",
        "variant = fl.from_flex(mask_mod=lambda b, h, q, kv: (kv <= q) & (kv // 16 == q // 16))",
    ),
    Entry(
        "Dilated",
        "Every fourth key, and the query's neighbourhood.",
        "variant = fl.from_flex(mask_mod=lambda b, h, q, kv: (kv <= q) & ((kv % 4 == 0) | (q - kv < 8)))",
    ),
    Entry(
        "Rotary embedding",
        "Queries and keys are rotated inside the kernel, so that the cache holds keys before rotation.",
        "variant = fl.rope(64) & fl.causal",
    ),
    Entry(
        "Sink",
        "One more logit per head takes probability and adds no value (GPT-OSS): a query without a good key attends to "
        "little. One scale for all rows.",
        "variant = fl.causal & fl.sink(torch.tensor([9.5]))",
        one_scale=True,
    ),
    Entry(
        "Temperature by length",
        "Logits grow with the logarithm of the position beyond the trained length.",
        "variant = fl.causal & fl.length_temperature(4)",
    ),
    Entry(
        "Sigmoid",
        "No softmax: each weight is sigmoid(logit + bias) (Ramapuram et al. 2024). One scale for all rows.",
        "variant = fl.causal & fl.sigmoid(-6.0)",
        one_scale=True,
    ),
)


def page() -> str:
    """The text of gallery.md."""
    parts = [INTRODUCTION]
    for entry in ENTRIES:
        code = dedent(entry.code).strip()
        torch_too = "import torch\n" if "torch" in code else ""
        gap = "\n\n" if code.startswith("class") else "\n"
        code = f"{torch_too}import flashloom as fl\n{gap}{code}"
        parts.append(f"## {entry.title}\n\n{entry.text}\n\n```python\n{code}\n```\n\n![](gallery/{entry.name}.png)\n")
    return "\n".join(parts)


def main() -> None:
    (HERE / "gallery").mkdir(exist_ok=True)
    for entry in ENTRIES:
        weights = pictures.weights(entry.variant(), random=not entry.alike)
        path = HERE / "gallery" / f"{entry.name}.png"
        pictures.draw({entry.title: weights}, path, columns=1, one_scale=entry.one_scale)
        print(path.relative_to(HERE.parent), f"{path.stat().st_size / 1024:.0f} KiB")
    panels = {title: pictures.weights(v, random=random) for title, (v, random) in pictures.examples().items()}
    pictures.draw(panels, HERE / "variants.png")
    (HERE / "gallery.md").write_text(page())


if __name__ == "__main__":
    main()
