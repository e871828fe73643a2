"""A pack: one file with a manifest and many entries, read-only; the same entries give the same bytes.

    flashloom pack 1 <newline> SHA-256 of the manifest <newline> its length <newline> manifest (JSON, zlib) | files
    (zlib)

The manifest names every entry's files by digest and size, and where each digest lies, so equal files are kept once.
It is checked
when the pack is opened, a file when it is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashloom.store import store
from flashloom.store.entry import FORMAT, Corrupt, Entry, canonical, digest, read_entry
from flashloom.store.folder import check_owner

__all__ = ["PackFile", "use", "write_pack"]

_MAGIC = b"flashloom pack 1\n"
#: Packs in use, the last used last, and who wants to know of others.
USED: list[PackFile] = []
on_use: list[Callable[[PackFile], None]] = []


def write_pack(path: Path, entries: Iterable[Entry], records: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a pack, whole or not at all. records: what travels with the kernels, as JSON. Order, build times and what
    was in the store before leave no trace in it."""
    listed, blobs, offset = [], {}, 0
    data: list[bytes] = []
    for entry in sorted(entries, key=lambda entry: (entry.key.request, entry.key.key)):
        files = {}
        for name, content in sorted(entry.files.items()):
            sha = digest(content)
            files[name] = {"size": len(content), "sha256": sha}
            if sha not in blobs:
                data.append(zlib.compress(content, 9))
                blobs[sha] = [offset, len(data[-1])]
                offset += len(data[-1])
        listed.append(
            {
                "request": entry.key.request,
                "key": entry.key.key,
                "label": entry.label,
                "about": entry.about,
                "fields": entry.fields,
                "toolchain": entry.toolchain,
                "metadata": entry.metadata,
                "files": files,
            }
        )
    body = {"format": FORMAT, "entries": listed, "blobs": blobs, "bytes": offset}
    manifest = zlib.compress(canonical(body | ({"records": list(records)} if records else {})), 9)
    head = _MAGIC + digest(manifest).encode() + b"\n" + str(len(manifest)).encode() + b"\n"
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with open(aside, "wb") as file:
            file.writelines([head, manifest, *data])
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class PackFile:
    """An open pack. Raises Corrupt when its manifest or length is wrong, Refused when others could have written it,
    or OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = open(self.path, "rb")  # noqa: SIM115 - stays open as long as the pack is used
        self._descriptor = self._file.fileno()
        status = os.fstat(self._descriptor)
        if not store.is_trusted(self.path):
            check_owner(status, f"the pack {self.path}")
        manifest = self._manifest(status.st_size)
        self.size = status.st_size
        self.entries: list[dict[str, Any]] = manifest["entries"]
        self.records: list[dict[str, Any]] = manifest.get("records", [])
        self._blobs: dict[str, list[int]] = manifest["blobs"]
        self._requests = {listed["request"]: listed for listed in reversed(self.entries)}

    def _manifest(self, size: int) -> dict[str, Any]:
        head = os.pread(self._descriptor, 200, 0)
        if not head.startswith(_MAGIC):
            raise Corrupt(
                f"{self.path} is no pack that this flashloom reads; build it anew with `flashloom pack build`"
            )
        try:
            sha, length = head[len(_MAGIC) :].split(b"\n")[:2]
            start = len(_MAGIC) + len(sha) + len(length) + 2
            packed = os.pread(self._descriptor, int(length), start)
        except ValueError:
            raise Corrupt(f"{self.path}: the head is damaged") from None
        if digest(packed).encode() != sha:
            raise Corrupt(f"{self.path}: the manifest does not have the digest stated in the head")
        manifest = json.loads(zlib.decompress(packed))
        self._start = start + len(packed)
        if manifest["format"] != FORMAT:
            raise Corrupt(f"{self.path} has entries of format {manifest['format']}, this flashloom reads {FORMAT}")
        if size != self._start + manifest["bytes"]:
            raise Corrupt(f"{self.path} has {size} bytes and should have {self._start + manifest['bytes']}")
        return manifest

    def find(self, request: str) -> Entry | None:
        """The entry that answers a request, read and verified, or None. Raises Corrupt when its bytes are damaged."""
        listed = self._requests.get(request)
        return None if listed is None else self._read(listed)

    def read_all(self) -> Iterator[Entry]:
        """All entries, verified. Raises Corrupt at the first whose bytes are damaged."""
        yield from map(self._read, self.entries)

    def _read(self, listed: dict[str, Any]) -> Entry:
        def read(name: str) -> bytes:
            offset, length = self._blobs[listed["files"][name]["sha256"]]
            try:
                return zlib.decompress(os.pread(self._descriptor, length, self._start + offset))
            except zlib.error as error:
                raise Corrupt(f"{name}: {error}") from None

        try:
            entry = read_entry({"seconds": 0.0, "missed": "", **listed}, read, str(self.path))
        except (Corrupt, KeyError) as error:
            raise Corrupt(f"{self.path}: {listed['label']!r}: {error}") from error
        if (entry.key.request, entry.key.key) != (listed["request"], listed["key"]):
            raise Corrupt(f"{self.path}: {listed['label']!r} is listed under another kernel's key")
        return entry


class _Layer:
    """A pack in use: entries that are damaged or do not load here count as missing."""

    def __init__(self, pack: PackFile) -> None:
        self.pack = pack
        self._rejected: set[str] = set()

    def find(self, request: str) -> Entry | None:
        if request in self._rejected:
            return None
        try:
            entry = self.pack.find(request)
        except (Corrupt, OSError) as error:
            self._rejected.add(request)
            store.note_damage(str(error))
            return None
        return None if entry is None else dataclasses.replace(entry, on_reject=self._reject)

    def _reject(self, entry: Entry, reason: str) -> None:
        self._rejected.add(entry.key.request)
        store.note_damage(f"{entry.label!r} from {entry.origin} does not load: {reason}")


def use(path: str | os.PathLike[str], on_miss: str = "build") -> PackFile:
    """Take kernels from this pack, before those of the user's store; it is never written to.

    on_miss: what becomes of a kernel that neither has: "build" compiles it, "error" raises SealedError.
    Of several packs the last used is asked first. Raises Corrupt, Refused (a pack that others can write) or OSError.
    """
    if on_miss not in ("build", "error"):
        raise ValueError(f'on_miss={on_miss!r} is unknown; give "build" or "error"')
    pack = PackFile(path)
    store.add_layer(str(pack.path.resolve()), _Layer(pack).find, required=on_miss == "error")
    USED.append(pack)
    for take in on_use:
        take(pack)
    return pack
