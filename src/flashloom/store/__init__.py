"""The kernel store: what was compiled once is found again, by content, by every process, or it is built and shared.

How a toolchain (C++, Triton, Gluon) goes through it::

    entry = store.get_or_build(
        fields,                # dict of JSON values: all that is asked. Digests of sources and of what they include,
        config, dtypes,
                               # target, ABI. Never a path, a time, a name or an environment string.
        build,                 # build(folder: Path) -> dict | None: compile into plain files in this empty folder;
        what it returns
                               # (JSON) is kept as entry.metadata. An exception means nothing is kept.
        toolchain=identity,    # callable -> dict of JSON values: compiler and its version. It is part of the key, but
        is asked only when
                               # no pack has the kernel; let it raise NoToolchain when the host has no compiler.
        label="decode bf16",   # for people: logs, listings and errors. Not part of the key.
        about={"variant": "causal", "phase": "decode"},  # the same by topic, for `why-miss`. Not part of the key.
    )
    entry.files["kernel.so"]   # bytes, whole and verified; files that build() wrote, by name
    entry.metadata             # what build() returned
    entry.reject("why")        # call this when the files cannot be loaded here (wrong architecture): they are set
    aside, so that asking
                               # again builds them anew

Threads and processes may ask for the same kernel at the same time: it is built once. After ``seal()`` a kernel that
is missing
is a SealedError that names the field that differs from the nearest entry.
"""

from flashloom.store.entry import Corrupt, Entry, digest
from flashloom.store.folder import Refused
from flashloom.store.pack import PackFile, use, write_pack
from flashloom.store.store import (
    Counters,
    NoToolchain,
    SealedError,
    counters,
    default_folder,
    find,
    finish,
    get_or_build,
    is_sealed,
    may_build,
    meanwhile,
    seal,
)

__all__ = [
    "Corrupt",
    "Counters",
    "Entry",
    "NoToolchain",
    "PackFile",
    "Refused",
    "SealedError",
    "counters",
    "default_folder",
    "digest",
    "find",
    "finish",
    "get_or_build",
    "is_sealed",
    "may_build",
    "meanwhile",
    "seal",
    "use",
    "write_pack",
]
