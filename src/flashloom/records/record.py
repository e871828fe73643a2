"""A record: the config that won for one key, what it was measured against, and what else was tried. JSON for people.

Reading believes nothing: not the JSON, not the types, not that the content belongs to the key it was found under.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from flashloom.dataclass import dataclass
from flashloom.errors import FlashloomError
from flashloom.store.entry import Key, digest

__all__ = ["FORMAT", "STATUSES", "Record", "Rejected", "Tried", "parse"]

FORMAT = 1  # raised when records written before can no longer be read
LARGEST = 1 << 20  # bytes of a file that is read at all
#: What became of a candidate. "wrong": its result is not the reference's. "killed": it ended its process.
STATUSES = ("won", "slower", "wrong", "failed", "memory", "killed", "skipped")
_TEXT = {"operator": str, "label": str, "machine": str, "date": str, "policy": str}
_PLAIN = (str, int, float, bool, type(None))


class Rejected(FlashloomError, ValueError):
    """A file that is no record of its key. `kind` is "corrupt", "foreign" (another key's) or "outdated" (another
    format's)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Tried:
    """One candidate: its config, what became of it, its time in microseconds (None where it was not timed) and the
    distance between the quartiles of its samples as a share of the median."""

    config: Mapping[str, Any]
    status: str
    median_us: float | None = None
    spread: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Record:
    """The answer to a question for one bucket of shapes.

    config: the winner, by named parameters; default: what would serve without the record. speedup: time of the default
    over the winner's, as medians of paired rounds (1 where the default stayed); noise: the share that two runs of the
    default differed by. complete: every candidate was tried. shapes: the batches that were timed, for people.
    policy: how it was measured. machine, date: where and when, for people; not part of the key.
    """

    operator: str
    fields: Mapping[str, Any]
    toolchain: Mapping[str, Any] | None
    sizes: tuple[str, ...]
    bucket: tuple[int, ...]
    config: Mapping[str, Any]
    default: Mapping[str, Any]
    speedup: float
    noise: float
    tried: tuple[Tried, ...] = ()
    complete: bool = True
    shapes: tuple[str, ...] = ()
    policy: str = ""
    label: str = ""
    machine: str = ""
    date: str = ""
    origin: str = field(default="", compare=False)

    @property
    def key(self) -> Key:
        question = digest({"operator": self.operator, "fields": self.fields, "sizes": sorted(self.sizes)})
        return Key.of({"question": question, "bucket": dict(zip(self.sizes, self.bucket))}, self.toolchain or {})

    @property
    def tuned(self) -> bool:
        """Whether another config than the default won."""
        return dict(self.config) != dict(self.default)

    def to_json(self) -> dict[str, Any]:
        """All but the digest, in the order in which people want to read it."""
        return {
            "format": FORMAT,
            "operator": self.operator,
            "label": self.label,
            "bucket": dict(zip(self.sizes, self.bucket)),
            "config": dict(self.config),
            "default": dict(self.default),
            "speedup": self.speedup,
            "noise": self.noise,
            "complete": self.complete,
            "policy": self.policy,
            "shapes": list(self.shapes),
            "machine": self.machine,
            "date": self.date,
            "tried": [
                {"config": dict(t.config), "status": t.status, "median_us": t.median_us, "spread": t.spread}
                | ({"note": t.note} if t.note else {})
                for t in self.tried
            ],
            "fields": dict(self.fields),
            "toolchain": None if self.toolchain is None else dict(self.toolchain),
        }

    def to_bytes(self) -> bytes:
        """The file's text: JSON that ends in the digest of the rest."""
        body = self.to_json()
        return json.dumps(body | {"sha256": digest(body)}, indent=1).encode() + b"\n"


def parse(text: bytes, key: Key | None = None, request: str | None = None, origin: str = "") -> Record:
    """A record from a file's bytes. key: the one it must have; request: that part of it alone. Raises Rejected."""
    if len(text) > LARGEST:
        raise Rejected("corrupt", f"{len(text)} bytes are no record")
    try:
        body = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
        if not isinstance(body, dict):
            raise Rejected("corrupt", "not a JSON object")
        stated = body.pop("sha256", None)
        if digest(body) != stated:
            raise Rejected("corrupt", "it does not have the digest that it states")
        if body.get("format") != FORMAT:
            raise Rejected("outdated", f"format {body.get('format')!r}, this flashloom reads {FORMAT}")
        record = _record(body, origin)
        found = record.key
    except Rejected:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise Rejected("corrupt", f"{type(error).__name__}: {error}") from None
    if (key is not None and found != key) or (request is not None and found.request != request):
        raise Rejected("foreign", "it is the record of another key")
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _record(body: Mapping[str, Any], origin: str) -> Record:
    for name, kind in _TEXT.items():
        _expect(type(body[name]) is kind, name)
    for name in ("config", "default"):
        _check_config(body[name], name)
    bucket = body["bucket"]
    _expect(type(bucket) is dict and all(type(n) is int and n >= 0 for n in bucket.values()), "bucket")
    _expect(type(body["complete"]) is bool, "complete")
    _expect(_number(body["speedup"]) and body["speedup"] > 0, "speedup")
    _expect(_number(body["noise"]) and body["noise"] >= 0, "noise")
    _expect(type(body["fields"]) is dict, "fields")
    _expect(body["toolchain"] is None or type(body["toolchain"]) is dict, "toolchain")
    _expect(type(body["shapes"]) is list and all(type(x) is str for x in body["shapes"]), "shapes")
    tried = []
    for one in body["tried"]:
        _check_config(one["config"], "tried")
        _expect(one["status"] in STATUSES, "status")
        for name in ("median_us", "spread"):
            _expect(one[name] is None or (_number(one[name]) and one[name] >= 0), name)
        note = one.get("note", "")
        _expect(type(note) is str, "note")
        tried.append(Tried(one["config"], one["status"], one["median_us"], one["spread"], note))
    return Record(
        operator=body["operator"], fields=body["fields"], toolchain=body["toolchain"], sizes=tuple(bucket),
        bucket=tuple(bucket.values()), config=body["config"], default=body["default"], speedup=float(body["speedup"]),
        noise=float(body["noise"]), tried=tuple(tried), complete=body["complete"], shapes=tuple(body["shapes"]),
        policy=body["policy"], label=body["label"], machine=body["machine"], date=body["date"], origin=origin,
    )  # fmt: skip


def _expect(right: bool, name: str) -> None:
    if not right:
        raise Rejected("corrupt", f"{name!r} is not of its kind")


def _number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _check_config(config: Any, name: str) -> None:
    plain = type(config) is dict and all(type(v) in _PLAIN for v in config.values())
    _expect(plain and bool(config), name)
