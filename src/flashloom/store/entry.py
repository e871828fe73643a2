"""One compiled kernel: named files with the fields that identify them, and the manifest that ties the two together.

request = digest of what was asked; key = digest of the request and of the toolchain that answered it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from flashloom.dataclass import dataclass
from flashloom.errors import FlashloomError

__all__ = ["FORMAT", "Corrupt", "Entry", "Key", "difference", "digest", "manifest_of", "parse_manifest"]

FORMAT = 1  # raised when entries written before can no longer be read; a part of every key


class Corrupt(FlashloomError):
    """Bytes of an entry that are not what its manifest says."""


def canonical(value: Any) -> bytes:
    """JSON text that depends on the value alone. Raises TypeError for what JSON cannot say, ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 as hex: of bytes or text as they are, of other values in canonical JSON."""
    if isinstance(value, str):
        value = value.encode()
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value)).hexdigest()


@dataclass(frozen=True)
class Key:
    """Where an entry lives: the digest of what is asked, then the digest of that and the toolchain."""

    request: str
    key: str

    @classmethod
    def of(cls, fields: Mapping[str, Any], toolchain: Mapping[str, Any]) -> Key:
        return cls.answering(digest({"format": FORMAT, "fields": fields}), toolchain)

    @classmethod
    def answering(cls, request: str, toolchain: Mapping[str, Any]) -> Key:
        """The key of what this toolchain makes of a request."""
        return cls(request, digest({"request": request, "toolchain": toolchain}))


@dataclass(frozen=True)
class Entry:
    """A kernel's files, read whole and verified; see the package's docstring."""

    key: Key
    label: str
    """For people, as `about`."""
    fields: Mapping[str, Any]
    toolchain: Mapping[str, Any]
    metadata: Mapping[str, Any]
    files: Mapping[str, bytes] = field(repr=False)
    seconds: float = 0.0
    """How long the build took."""
    origin: str = "built"
    """Where it came from: "built", "memory", or the path of the store or pack."""
    missed: str = ""
    """Why nothing was found when it was built."""
    about: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What it is for, by topic, in words: variant, heads, dtypes, phase. No part of the key."""
    on_reject: Callable[[Entry, str], None] = field(default=lambda entry, reason: None, repr=False, compare=False)

    def reject(self, reason: str) -> None:
        """Say that these files do not load here. They are set aside; asking for the kernel again builds it anew."""
        self.on_reject(self, reason)


def manifest_of(entry: Entry) -> bytes:
    """The text of entry.json: all but the files' bytes, for which it has sizes and digests, and its own digest in
    front.
    """
    body = canonical(
        {
            "format": FORMAT,
            "key": entry.key.key,
            "label": entry.label,
            "about": entry.about,
            "fields": entry.fields,
            "toolchain": entry.toolchain,
            "metadata": entry.metadata,
            "seconds": round(entry.seconds, 3),
            "missed": entry.missed,
            "files": {name: {"size": len(data), "sha256": digest(data)} for name, data in entry.files.items()},
        }
    )
    return digest(body).encode() + b"\n" + body + b"\n"


def parse_manifest(text: bytes, key: Key | None = None) -> dict[str, Any]:
    """The manifest as a dict. Raises Corrupt when a byte of it differs from what was written, or it is another
    key's.
    """
    head, _, body = text.partition(b"\n")
    body = body[:-1] if body.endswith(b"\n") else body
    if digest(body).encode() != head:
        raise Corrupt("entry.json does not have the digest that it states")
    manifest = json.loads(body)
    if manifest["format"] != FORMAT:
        raise Corrupt(f"entry.json has format {manifest['format']}, this flashloom reads {FORMAT}")
    found = Key.of(manifest["fields"], manifest["toolchain"])
    if found.key != manifest["key"] or (key is not None and found != key):
        raise Corrupt("entry.json is that of another kernel")
    return manifest


def read_entry(manifest: Mapping[str, Any], read: Callable[[str], bytes], origin: str) -> Entry:
    """An Entry from its manifest and a function that reads a file by name. Raises Corrupt when a file is not as
    listed.
    """
    files = {}
    for name, listed in manifest["files"].items():
        data = read(name)
        if len(data) != listed["size"] or digest(data) != listed["sha256"]:
            raise Corrupt(f"{name} has {len(data)} bytes that are not the {listed['size']} listed in entry.json")
        files[name] = data
    return Entry(
        key=Key.of(manifest["fields"], manifest["toolchain"]),
        label=manifest["label"],
        fields=manifest["fields"],
        toolchain=manifest["toolchain"],
        metadata=manifest["metadata"],
        files=files,
        seconds=manifest["seconds"],
        origin=origin,
        missed=manifest["missed"],
        about=manifest.get("about", {}),
    )


def difference(asked: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The fields in which two field sets differ, as sentences such as ``target: asked "x86", found "x86-amx"``."""
    left, right = flat(asked), flat(found)
    return [
        f"{name}: asked {_short(left.get(name))}, found {_short(right.get(name))}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields within fields by one name each, such as ``toolchain.compiler``."""
    flattened: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flattened |= flat(item, f"{prefix}{name}.")
        else:
            flattened[prefix + name] = item
    return flattened


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..." + text[-4:]
