"""Records in one file, for people and for other machines: a JSON list of what the single files hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from flashloom.records.folder import Folder
from flashloom.records.question import Question
from flashloom.records.record import Record, Rejected, parse

__all__ = ["Bundle", "read_any", "read_bundle", "to_bundle"]

HEAD = "flashloom tuning records"


def to_bundle(records: Iterable[Record]) -> bytes:
    """The records as one JSON text; the same records give the same bytes."""
    ordered = sorted(records, key=lambda record: record.key.key)
    return json.dumps({HEAD: [json.loads(record.to_bytes()) for record in ordered]}, indent=1).encode() + b"\n"


def read_bundle(text: bytes, origin: str = "") -> list[Record]:
    """The records of `to_bundle`. Raises Rejected for a text that is none, or in which one is damaged."""
    try:
        listed = json.loads(text)[HEAD]
        texts = [json.dumps(one).encode() for one in listed]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Rejected("corrupt", f"{origin} holds no tuning records") from None
    return [parse(one, origin=origin) for one in texts]


def read_any(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a folder or of a bundle. Raises Rejected or OSError."""
    place = Path(path)
    if place.is_file():
        return read_bundle(place.read_bytes(), str(place))
    return list(Folder.at(place).records())


class Bundle:
    """Records that are only read, such as those of a pack. They serve whatever toolchain asks: a pack's kernels are
    those that were tuned."""

    def __init__(self, records: Iterable[Record], name: str) -> None:
        self.name = name
        self.all = list(records)
        self._by_request = {(record.operator, record.key.request): record for record in self.all}

    def find(self, question: Question, bucket: tuple[int, ...]) -> Record | None:
        """The record of a key, or None."""
        return self._by_request.get((question.operator, question.key(bucket).request))

    def has(self, operator: str) -> bool:
        """Whether there is any record of this operator."""
        return any(name == operator for name, _ in self._by_request)

    def refresh(self) -> None:
        """It does not change."""
