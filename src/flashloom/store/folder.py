"""Entries on disk: ``<root>/v1/<request>/<key>/`` holds entry.json and the files it lists.

An entry is written aside, synced and published by one rename, so that a reader sees all of it or nothing. A reader
goes down by
descriptors that follow no links, checks owner and mode of each step, and believes only bytes whose digest is listed.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flashloom.dataclass import dataclass
from flashloom.errors import FlashloomError
from flashloom.store.entry import FORMAT, Corrupt, Entry, Key, manifest_of, parse_manifest, read_entry

__all__ = ["Folder", "Refused"]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ASIDE_KEPT_S = 24 * 3600.0
_TOUCH_S = 3600.0
_SLICES = 20  # in which a store's time is waited for


class Refused(FlashloomError, OSError):
    """A folder or file that somebody else could have written."""


def step(name: str) -> None:
    """Called before each step of publishing; the fault tests replace it by something that dies."""


def check_owner(status: os.stat_result, what: str) -> None:
    """Raises Refused unless the user or root owns it and nobody else can write to it."""
    if status.st_uid not in (os.geteuid(), 0):
        raise Refused(errno.EPERM, f"{what} belongs to user {status.st_uid}")
    if status.st_mode & 0o022:
        raise Refused(errno.EPERM, f"{what} can be written by others (mode {stat.S_IMODE(status.st_mode):o})")


@dataclass(frozen=True)
class Folder:
    """A store at ``root``. ``trusted``: the operator vouches for all who can write to it, so owners and modes are not
    checked.
    """

    root: Path
    trusted: bool = False

    @property
    def entries(self) -> Path:
        """The folder that holds the entries of this format."""
        return self.root / f"v{FORMAT}"

    def path(self, key: Key) -> Path:
        """Where the entry of this key lives."""
        return self.entries / key.request / key.key

    # Reading

    def read(self, key: Key) -> Entry | None:
        """The entry, verified, or None. Raises Corrupt when it is there and not what it should be, Refused, or
        OSError.
        """
        for _ in range(10):
            with self._descend(key.request, key.key) as folder:
                if folder is None:
                    return None
                status = os.fstat(folder)
                try:
                    entry = self._read_at(folder, key)
                except (FileNotFoundError, Corrupt, Refused, ValueError, KeyError, TypeError) as error:
                    with suppress(FileNotFoundError):
                        if os.path.samestat(status, self.path(key).lstat()):
                            raise Corrupt(f"{self.path(key)}: {error}") from error
                    continue  # evicted under our eyes, and maybe published anew
                with suppress(OSError):  # mark as used, seldom; a store that others own keeps its times
                    if time.time() - status.st_mtime > _TOUCH_S:
                        os.utime(folder)
                return entry
        return None

    def keys(self, request: str) -> list[Key]:
        """Keys of all entries that answer this request, whatever toolchain built them."""
        with self._descend(request) as folder:
            return (
                [] if folder is None else [Key(request, name) for name in sorted(os.listdir(folder)) if _is_key(name)]
            )

    def all_keys(self) -> Iterator[Key]:
        """Keys of all entries. Folders that come or go meanwhile are seen or not, what is no entry's is left out."""
        with self._descend() as folder:
            requests = [] if folder is None else sorted(filter(_is_key, os.listdir(folder)))
        for request in requests:
            with suppress(OSError, Corrupt):
                yield from self.keys(request)

    @contextmanager
    def _descend(self, *names: str) -> Iterator[int | None]:
        """A descriptor of the folder below the entries' folder, or None where it does not exist."""
        descriptors: list[int] = []
        try:
            try:
                descriptors.append(os.open(self.root, _DIRECTORY))
                self._check(descriptors[-1], str(self.root))
                for name in (self.entries.name, *names):
                    descriptors.append(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptors[-1]))
                    self._check(descriptors[-1], f"{name} in {self.root}")
            except FileNotFoundError:
                yield None
            except NotADirectoryError as error:  # a link, or a file, in a folder's place
                if not descriptors:
                    raise
                raise Corrupt(f"{'/'.join(names)} in {self.root} is not a folder") from error
            else:
                yield descriptors[-1]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def read_note(self, name: str) -> bytes | None:
        """A note beside the entries (see notes.py), or None. Raises Corrupt, Refused (the folder) or OSError."""
        with self._descend() as folder:
            if folder is None:
                return None
            try:
                return self._read_file(folder, name)
            except FileNotFoundError:
                return None
            except Refused as error:
                raise Corrupt(str(error)) from error

    def _read_at(self, folder: int, key: Key) -> Entry:
        def read(name: str) -> bytes:
            return self._read_file(folder, name)

        return read_entry(parse_manifest(read("entry.json"), key), read, str(self.root))

    def _read_file(self, folder: int, name: str) -> bytes:
        if "/" in name or name in ("", ".", ".."):
            raise Corrupt(f"{name!r} is not the name of a file of an entry")
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Corrupt(f"{name} is a link") from error
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Corrupt(f"{name} is not a plain file")
            self._check(descriptor, name)
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)

    def _check(self, descriptor: int, what: str) -> None:
        if not self.trusted:
            check_owner(os.fstat(descriptor), what)

    # Writing

    def publish(self, entry: Entry) -> bool:
        """Write the entry; False when another one is there already. Raises OSError or Refused, and then leaves
        nothing that counts.
        """
        step("folders")
        mode = self._make_root()
        aside = self._aside(mode)
        try:
            step("write")
            for name, data in {**entry.files, "entry.json": manifest_of(entry)}.items():
                step(f"write {name}")
                _write(aside / name, data, mode & 0o666)
            step("sync")
            sync(aside)
            return self._rename(aside, self.path(entry.key), mode)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def write_note(self, name: str, data: bytes) -> None:
        """Put a note beside the entries, in place of the one that is there. Raises OSError or Refused."""
        mode = self._make_root()
        aside = self._aside(mode)
        try:
            _write(aside / name, data, mode & 0o666)
            _mkdir(self.entries, mode)
            os.rename(aside / name, self.entries / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def set_aside(self, key: Key) -> None:
        """Take an entry out of sight, whatever it is; it is kept for a day for those who want to know. Raises
        OSError.
        """
        mode = stat.S_IMODE(self.root.stat().st_mode)
        place = self._aside(mode)
        path = self.path(key)
        if path.parent.is_symlink() or not path.parent.is_dir():
            path = path.parent
        with suppress(FileNotFoundError):
            os.rename(path, place / "entry")

    def remove(self, key: Key) -> None:
        """Delete an entry: out of sight in one step, then file by file. One that is gone already is no error."""
        with suppress(FileNotFoundError):
            place = self._aside(0o700)
            try:
                os.rename(self.path(key), place / "entry")
            finally:
                shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # not empty: another toolchain's entry lives there
                os.rmdir(self.path(key).parent)

    def remove_old(self, seconds: float = _ASIDE_KEPT_S) -> None:
        """Delete what dead writers left and what was set aside, once it is this old."""
        with suppress(FileNotFoundError):
            for item in list(os.scandir(self.root / "aside")):
                with suppress(OSError):
                    if time.time() - item.stat(follow_symlinks=False).st_mtime > seconds:
                        shutil.rmtree(item.path, ignore_errors=True)

    def _make_root(self) -> int:
        """Make the store's folder where there is none; its permissions."""
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open_folder(self.root) as root:
            self._check(root, str(self.root))
            return stat.S_IMODE(os.fstat(root).st_mode)

    def _aside(self, mode: int) -> Path:
        """A new folder beside the entries, on the same file system; its name is no key, so nothing looks into it."""
        _mkdir(self.root / "aside", mode)
        path = self.root / "aside" / f"{int(time.time())}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        _mkdir(path, mode)
        return path

    def _rename(self, aside: Path, final: Path, mode: int) -> bool:
        for _ in range(10):
            step("request folder")
            _mkdir(self.entries, mode)
            try:
                _mkdir(final.parent, mode)
                step("rename")
                os.rename(aside, final)
            except FileNotFoundError:  # an eviction removed the empty request folder in between
                continue
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    return False
                raise
            step("sync folder")
            with suppress(FileNotFoundError):  # evicted already
                sync(final.parent)
            return True
        raise OSError(errno.EBUSY, "the folder vanished ten times while the entry was published", str(final.parent))


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """A descriptor of a folder, closed at the end."""
    descriptor = os.open(path, _DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a folder's list of names to the disk."""
    with open_folder(path) as folder:
        os.fsync(folder)


def _mkdir(path: Path, mode: int) -> None:
    """Make a folder with exactly these permissions, so that the umask of one user does not lock out the others of a
    shared store.
    """
    with suppress(FileExistsError):
        path.mkdir()
        path.chmod(mode)


def _write(path: Path, data: bytes, mode: int) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def _is_key(name: str) -> bool:
    return len(name) == 64 and not name.strip("0123456789abcdef")


def bounded(seconds: float, work: Callable[[], object]) -> object:
    """Run ``work`` in a thread of its own for at most ``seconds``. Raises TimeoutError when it takes longer, else
    what it raised. Time in which this whole process stands still counts as a part of one slice only.
    """
    result: list[object] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="flashloom-store", daemon=True)
    thread.start()
    for _ in range(_SLICES):
        thread.join(seconds / _SLICES)
        if not thread.is_alive():
            break
    else:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s")
    if failure:
        raise failure[0]
    return result[0]
