"""Look up, or build once between all who ask: memory, packs, the user's folder, then the toolchain.

Nothing here decides by a lock, and nothing on disk is needed: where the folder cannot be used, kernels stay in
memory, after one
warning.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flashloom import settings
from flashloom.dataclass import dataclass
from flashloom.errors import FlashloomError, warn
from flashloom.store.entry import Corrupt, Entry, Key, difference, digest, flat
from flashloom.store.folder import Folder, Refused, bounded

if TYPE_CHECKING:
    from flashloom.store.locks import Busy

__all__ = ["Counters", "NoToolchain", "SealedError", "counters", "default_folder", "get_or_build", "is_sealed", "seal"]

log = logging.getLogger("flashloom")
_T = TypeVar("_T")
listeners: list[Callable[[Entry], None]] = []  # called with each entry that this process has built
_POLL_S = 0.01  # between two looks at first; ten times as much later
_NOTICE_S = 5.0
_LOOKED_AT = 128  # entries, for why one was missed


class NoToolchain(FlashloomError, RuntimeError):
    """There is no compiler on this host for what is asked; the message says what to install."""


class SealedError(FlashloomError, RuntimeError):
    """A kernel is missing and nothing may be compiled now; the message says which field of the key missed."""


@dataclass()
class Counters:
    """What the store did in this process."""

    hits: int = 0
    """Kernels found: in a pack, the folder or memory."""
    misses: int = 0
    """Kernels not found when they were asked for."""
    builds: int = 0
    """Misses that this process built."""
    shared: int = 0
    """Misses that another process built meanwhile."""
    failures: int = 0
    """Builds that raised."""
    corrupt: int = 0
    """Entries set aside, since they were damaged or would not load."""
    unpublished: int = 0
    """Builds that could not be written to the folder and are kept in memory."""
    waits: int = 0
    """Times this process waited for another one's build."""
    build_seconds: float = 0.0
    wait_seconds: float = 0.0


class _State:
    """All that this process remembers; a forked child gets fresh locks."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.sealed = False
        self.memory: dict[Key, Entry] = {}
        self.layers: dict[str, Callable[[str], Entry | None]] = {}  # packs by path, the last used first
        self.on_miss_error: str | None = None  # the pack that was used with on_miss="error"
        self.broken: set[Path] = set()  # folders that did not answer in time
        self.warned: set[str] = set()
        self.reset_locks()

    def reset_locks(self) -> None:
        self.later: set[threading.Thread] = set()
        self.lock = threading.RLock()
        self.building: dict[Key, threading.RLock] = {}


_state = _State()
os.register_at_fork(after_in_child=lambda: _state.reset_locks())


def counters() -> Counters:
    """A copy of this process' counters."""
    with _state.lock:
        return dataclasses.replace(_state.counters)


def seal() -> None:
    """From now on a kernel that would have to be compiled is a SealedError instead, for the rest of the process. Waits
    for what is being built meanwhile."""
    finish()
    _state.sealed = True


def is_sealed() -> bool:
    """Whether compiling is off, by ``seal()`` or ``FLASHLOOM_SEALED=1``."""
    return _state.sealed or settings.get().sealed


def default_folder() -> Folder:
    """The user's store: ``FLASHLOOM_CACHE_DIR``, or ``flashloom`` in the user's cache folder.

    Raises RuntimeError when there is no such folder.
    """
    root = settings.get().cache_dir
    if root is None:
        import platformdirs

        root = Path(platformdirs.user_cache_dir("flashloom", appauthor=False))
    if not root.is_absolute():
        raise RuntimeError("this user has no home folder; FLASHLOOM_CACHE_DIR names another place")
    return Folder(root, trusted=is_trusted(root))


def is_trusted(path: Path) -> bool:
    """Whether the operator named this path, or a folder above it, in ``FLASHLOOM_TRUSTED``."""
    trusted = settings.get().trusted
    return bool(trusted) and any(path.resolve().is_relative_to(one.resolve()) for one in trusted)


def get_or_build(
    fields: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any] | None],
    *,
    toolchain: Callable[[], Mapping[str, Any]] = dict,
    label: str = "kernel",
    about: Mapping[str, str] | None = None,
) -> Entry:
    """The entry for what ``fields`` ask, found or built; the package's docstring explains the arguments.

    Raises SealedError when it is missing and nothing may be compiled, NoToolchain when there is no compiler, and what
    ``build``
    raises. Problems with the folder never raise.
    """
    found = find(fields, toolchain)
    if found is not None:
        return found
    try:
        tools = toolchain()
    except NoToolchain:
        _refuse_if_sealed(label, "there is no compiler, and nothing that one built is stored")
        raise
    key = Key.of(fields, tools)
    with _alone(key):
        found = _state.memory.get(key) or _read(key)  # another thread may have built it since
        if found is not None:
            return _hit(found)
        why = _why_missed(fields, tools, about or {})
        _refuse_if_sealed(label, why)
        _count(misses=1)
        log.info("miss %s (%s): %s", label, key.key[:12], why)
        return _build_or_share(
            key, Entry(key, label, fields, tools, {}, {}, missed=why, about=about or {}, on_reject=_reject), build
        )


def find(fields: Mapping[str, Any], toolchain: Callable[[], Mapping[str, Any]] = dict) -> Entry | None:
    """The entry for what ``fields`` ask if there is one; nothing is built and nobody waited for."""
    request = Key.of(fields, {}).request
    for layer in list(_state.layers.values()):
        found = layer(request)
        if found is not None:
            return _hit(found)
    try:
        key = Key.answering(request, toolchain())
    except NoToolchain:
        found = _of_any_toolchain(request)
    else:
        found = _state.memory.get(key) or _read(key)
    return None if found is None else _hit(found)


def may_build(toolchain: Callable[[], Mapping[str, Any]]) -> bool:
    """Whether a kernel that is missing would be built: there is a compiler, and nothing forbids it."""
    try:
        toolchain()
    except NoToolchain:
        return False
    return not (is_sealed() or _state.on_miss_error)


def meanwhile(ask: Callable[[], Entry]) -> None:
    """Ask for an entry in a thread of its own, since it will be wanted later. Whoever asks for it before it is there
    waits for it; where building fails, that is who learns why."""

    def work() -> None:
        try:
            ask()
        except Exception as error:
            log.info("what was built meanwhile failed: %s", error)
        finally:
            _state.later.discard(thread)

    thread = threading.Thread(target=work, name="flashloom-meanwhile")
    _state.later.add(thread)
    try:
        thread.start()
    except RuntimeError:  # there are no more threads to be had: who needs it builds it
        _state.later.discard(thread)


def finish() -> None:
    """Wait for all that is built meanwhile."""
    for thread in list(_state.later):
        thread.join()


def _refuse_if_sealed(label: str, why: str) -> None:
    if is_sealed():
        reason = "fl.seal() or FLASHLOOM_SEALED"
    elif _state.on_miss_error:
        reason = f'fl.use({_state.on_miss_error!r}, on_miss="error")'
    else:
        return
    raise SealedError(
        f"kernel {label!r} is not in the store, and {reason} forbids to compile it: {why}. Build it before with "
        "fl.prepare(), or add it to the pack"
    )


def _hit(entry: Entry) -> Entry:
    _count(hits=1)
    log.debug("hit %s (%s) in %s", entry.label, entry.key.key[:12], entry.origin)
    return entry


def _of_any_toolchain(request: str) -> Entry | None:
    """On a host without the compiler, what any compiler made of the same request serves."""
    keys = on_disk("reading", lambda folder: folder.keys(request)) or []
    return next((found for found in map(_read, keys) if found is not None), None)


def add_layer(name: str, find: Callable[[str], Entry | None], required: bool) -> None:
    """Ask ``find`` (request -> entry) before the folder; with ``required`` a miss is an error from now on."""
    with _state.lock:
        _state.layers = {name: find, **{other: layer for other, layer in _state.layers.items() if other != name}}
        if required:
            _state.on_miss_error = name


# Building


def _build_or_share(key: Key, blank: Entry, build: Callable[[Path], Mapping[str, Any] | None]) -> Entry:
    """Build it, or let another process that already does finish. A place for a compiler first, so that locks are held
    briefly.
    """
    patience = settings.get().wait
    from flashloom.store.jobs import job_slot  # where all is stored, nothing of building is imported
    from flashloom.store.locks import Busy, Lock, take

    # who cannot publish has nothing to share, and waits for nobody
    path = None if _state.counters.unpublished else _lock_path(key)
    while True:
        with job_slot(lambda: _is_published(key)):
            answer = take(path)
            if not isinstance(answer, Busy) or patience <= 0 or answer.age > settings.get().wait:
                if isinstance(answer, Busy):
                    log.warning(
                        "%s has been building %r for %.0f s; building it here as well",
                        answer.holder,
                        blank.label,
                        answer.age,
                    )
                try:
                    found = _read(key)  # published since we looked
                    if found is not None:
                        _count(shared=1)
                        return found
                    return _build(blank, build)
                finally:
                    if isinstance(answer, Lock):
                        answer.release()
        patience -= _wait(key, path, answer, blank.label, patience)


def _lock_path(key: Key) -> Path | None:
    from flashloom.store.locks import local_folder

    folder = local_folder()
    if folder is None:
        return None
    with suppress(OSError):
        (folder / "locks").mkdir(mode=0o700, exist_ok=True)
    store = on_disk("locking", lambda folder: str(folder.root))
    return folder / "locks" / digest([store, key.key])[:40]


def _wait(key: Key, path: Path | None, busy: Busy, label: str, patience: float) -> float:
    """Wait until the entry is published, its builder is gone, or patience ends. Returns the seconds waited."""
    from flashloom.store.locks import Busy, Lock, take

    _count(waits=1)
    log.info("waiting for %s, which is building %r", busy.holder, label)
    start = time.monotonic()
    notice = start + _NOTICE_S
    for round in range(1 << 62):
        waited = time.monotonic() - start
        if waited >= patience or _is_published(key):
            break
        if round % 5 == 4:
            answer = take(path)
            if isinstance(answer, Lock):
                answer.release()
            if not isinstance(answer, Busy):
                break
        if time.monotonic() > notice:
            log.warning(
                "still waiting for %s, which is building %r; it is built here as well in %.0f s",
                busy.holder,
                label,
                patience - waited,
            )
            notice += _NOTICE_S
        time.sleep(min(_POLL_S * (round + 1), 0.1))
    waited = time.monotonic() - start
    _count(wait_seconds=waited)
    return max(waited, 1e-3)


def _build(blank: Entry, build: Callable[[Path], Mapping[str, Any] | None]) -> Entry:
    """Build in a folder of its own on local disk, then publish; a store that fails costs nothing but its copy."""
    import shutil
    import tempfile

    from flashloom.store.locks import local_folder

    folder = Path(tempfile.mkdtemp(prefix="build-", dir=local_folder()))
    start = time.monotonic()
    try:
        metadata = build(folder) or {}
        files = {item.name: item.read_bytes() for item in sorted(folder.iterdir())}
        if not files or "entry.json" in files:
            raise ValueError(
                f"the build of {blank.label!r} left {sorted(files)}; it must leave files, none named entry.json"
            )
    except BaseException:
        _count(failures=1)
        raise  # the folder stays: the error names the source and the log in it
    shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - start
    entry = dataclasses.replace(blank, metadata=dict(metadata), files=files, seconds=seconds)
    _count(builds=1, build_seconds=seconds)
    log.info("built %s (%s) in %.2f s", entry.label, entry.key.key[:12], seconds)
    for listener in list(listeners):
        listener(entry)
    return _publish(entry)


def _publish(entry: Entry) -> Entry:
    """Put it into the folder. Where somebody was faster, theirs is used by all; where it cannot be, it stays in
    memory.
    """
    from flashloom.store import evict

    written = on_disk("writing", lambda folder: folder.publish(entry))
    if written:
        on_disk("pruning", evict.after_publish)
        return entry
    if written is False:
        found = _read(entry.key)
        if found is not None:
            return found
        written = on_disk(
            "writing", lambda folder: folder.publish(entry)
        )  # what was there was damaged, and is set aside now
    if not written:
        _count(unpublished=1)
        _state.memory[entry.key] = dataclasses.replace(entry, origin="memory")
    return entry


# The folder


def _read(key: Key) -> Entry | None:
    """The folder's entry, or None; a damaged one is set aside."""
    try:
        entry = on_disk("reading", lambda folder: folder.read(key))
    except Corrupt as error:
        _set_aside(key, str(error))
        return None
    return None if entry is None else dataclasses.replace(entry, on_reject=_reject)


def _reject(entry: Entry, reason: str) -> None:
    """A loader could not use the entry."""
    _state.memory.pop(entry.key, None)
    _set_aside(entry.key, f"{entry.label!r} from {entry.origin} does not load: {reason}")


def note_damage(reason: str) -> None:
    """Count and log an entry that is damaged or does not load."""
    _count(corrupt=1)
    log.warning("a stored kernel is not used: %s", reason)


def _is_published(key: Key) -> bool:
    return bool(on_disk("reading", lambda folder: folder.path(key).exists()))


def _set_aside(key: Key, reason: str) -> None:
    note_damage(reason)
    on_disk("setting aside", lambda folder: folder.set_aside(key))


def on_disk(doing: str, work: Callable[[Folder], _T]) -> _T | None:
    """Do something with the user's folder, within its time. None, after one warning, when it cannot be done."""
    try:
        folder = default_folder()
        if folder.root in _state.broken:
            return None
        return bounded(settings.get().store_timeout, lambda: work(folder))  # type: ignore[return-value]
    except TimeoutError:
        _state.broken.add(folder.root)
        _warn(
            "slow", f"the kernel store {folder.root} did not answer within {settings.get().store_timeout:g} s ({doing})"
        )
    except Refused as error:
        _warn(
            "refused", f"the kernel store is not used: {error.strerror}; correct that, or name it in FLASHLOOM_TRUSTED"
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        _warn("failed", f"{doing} the kernel store failed: {error}")
    return None


def _warn(topic: str, message: str) -> None:
    if topic not in _state.warned:
        _state.warned.add(topic)
        warn(f"{message}. Kernels are kept in memory: results are right, start-up is slow")
        log.info("%s", message)  # the warning has said it once


def _why_missed(fields: Mapping[str, Any], toolchain: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """What is different in the nearest entry, in words where the two say what they are for. Looks at some of them: the
    compiler waits for this."""
    from flashloom.store import evict

    asked = {**fields, "toolchain": toolchain}
    ours = flat(asked) | flat(about, "about.")
    best, fewest, words = None, 1 << 62, []
    for found in on_disk("listing", lambda folder: list(evict.manifests(folder, limit=_LOOKED_AT))) or ():
        other = {**found["fields"], "toolchain": found["toolchain"]}
        if other.get("kind") == fields.get("kind"):
            theirs = flat(other) | flat(found.get("about", {}), "about.")
            differs = sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())
            if 0 < differs < fewest:
                best, fewest = other, differs
                words = difference(about, found.get("about", {}))
    if best is None:
        return "nothing of this kind is stored"
    told = difference(asked, best)
    if words:  # then the many constants of a GPU kernel say nothing more
        told = [one for one in told if not one.startswith(("constants.", "signature:"))]
    return "; ".join([*words, *told])


@contextmanager
def _alone(key: Key) -> Iterator[None]:
    """One thread of this process at a time for one key."""
    with _state.lock:
        lock = _state.building.setdefault(key, threading.RLock())
    with lock:
        yield


def _count(**add: float) -> None:
    with _state.lock:
        for name, amount in add.items():
            setattr(_state.counters, name, getattr(_state.counters, name) + amount)
