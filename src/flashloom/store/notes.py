"""Answers that take a while to find, kept for the next process: a small file beside the entries, checked as they are.

A note is never needed. Where it is missing, damaged or cannot be written, one asks again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from flashloom.store.entry import Corrupt, canonical, digest
from flashloom.store.folder import Folder
from flashloom.store.store import on_disk

__all__ = ["recall", "remember"]

log = logging.getLogger("flashloom")
_KEPT = 64  # answers in one file; the oldest ones go


def recall(topic: str, question: Mapping[str, Any]) -> Any:
    """What was remembered for just this question (JSON), or None."""
    noted = on_disk("reading", lambda folder: _read(folder, topic)) or []
    return dict(noted).get(digest(question))


def remember(topic: str, question: Mapping[str, Any], answer: Any) -> None:
    """Keep an answer (JSON). Two processes that do so at once keep one of the two."""
    asked = digest(question)

    def write(folder: Folder) -> None:
        with suppress(OSError):  # a store that can only be read serves all the same
            others = [pair for pair in _read(folder, topic) if pair[0] != asked]
            body = canonical([*others, (asked, answer)][-_KEPT:])
            folder.write_note(f"{topic}.json", digest(body).encode() + b"\n" + body)

    on_disk("writing", write)


def _read(folder: Folder, topic: str) -> list[tuple[str, Any]]:
    """Digests of questions and their answers, the oldest first."""
    try:
        head, _, body = (folder.read_note(f"{topic}.json") or b"").partition(b"\n")
    except Corrupt as error:
        log.info("what was noted of %s is not used: %s", topic, error)
        return []
    return json.loads(body) if digest(body).encode() == head else []
