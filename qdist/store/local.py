"""A store's bytes in a local folder, or in one that a network shares."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from qdist.store import failures
from qdist.store.place import PARTIAL, Entry

_T = TypeVar("_T")

_GONE = (errno.ENOENT, errno.ENOTDIR)
_AWAY = {
    getattr(errno, name)
    for name in ("ESTALE", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ETIMEDOUT", "ENODEV", "ENXIO")
    if hasattr(errno, name)
}
"""What network file systems and pulled disks answer."""


class LocalPlace:
    """`Place` in a folder.

    An object is written to a ``.partial`` file beside it, synced to the disk, and then renamed, or
    linked where it must not exist yet: both are atomic. The folder itself is made by `make` alone,
    so that a store that was taken away is not begun anew by whoever writes next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.folder)

    def make(self) -> None:
        """Make the folder. Raises QD404, and QD405 for a file or a folder with other files."""
        if self.folder.is_file():
            raise failures.foreign(self.where, "a file")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.folder)
        except OSError as error:
            raise failures.unwritable(self.where, _reason(error)) from error
        # What a process leaves that dies while it makes the store, or that makes it right now.
        if any(not name.endswith((PARTIAL, "zarr.json")) for name in names):
            raise failures.foreign(self.where, "a folder with other files in it")

    def get(self, key: str) -> bytes | None:
        """The object; None where there is none. Raises QD403, QD404, QD408."""
        try:
            return (self.folder / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            if error.errno in _AWAY:
                raise failures.unreachable(self.where, _reason(error)) from error
            if isinstance(error, PermissionError):
                raise failures.unwritable(str(self.folder / key), _reason(error)) from error
            raise failures.damaged(str(self.folder / key), _reason(error)) from error

    def put(self, key: str, data: bytes) -> None:
        """Write the object, in place of any other. Raises QD404, QD408."""
        self.put_in_order([(key, data)])

    def create(self, key: str, data: bytes) -> bool:
        """Write the object only if there is none. Raises QD404, QD408."""
        return self.put_in_order([(key, data)], create_last=True)

    def put_in_order(
        self, objects: Sequence[tuple[str, bytes]], *, create_last: bool = False
    ) -> bool:
        """Write objects one after the other; False where the last was there already.

        They are synced side by side, which takes as long as one of them does. Raises QD404, QD408.
        """
        with self._complete(objects) as partials:
            places = [
                (partial, self.folder / key)
                for partial, (key, _) in zip(partials, objects, strict=True)
            ]
            last = places.pop() if create_last else None
            for partial, path in places:
                os.replace(partial, path)
            if last is not None:
                try:
                    os.link(*last)
                except FileExistsError:
                    return False
        return True

    def delete(self, key: str) -> None:
        """Remove the object, if there is one. Raises QD404, QD408."""
        with self._writing(), suppress(FileNotFoundError):
            os.unlink(self.folder / key)

    def entries(self, folder: str) -> list[Entry]:
        """All objects of a folder, unfinished ones too. Raises QD404, QD408."""
        found = []
        with self._writing(), suppress(FileNotFoundError), os.scandir(self.folder / folder) as all_:
            for entry in all_:
                # One that another process has removed meanwhile is none.
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        told = entry.stat()
                        found.append(
                            Entry(
                                name=entry.name,
                                n_bytes=told.st_size,
                                modified_s=told.st_mtime,
                            )
                        )
        return found

    def now_s(self) -> float:
        """By the clock that stamps the folder's files, which need not be this machine's."""
        with self._complete([("now", b"")]) as (partial,):
            return partial.stat().st_mtime

    @contextmanager
    def _complete(self, objects: Sequence[tuple[str, bytes]]) -> Iterator[list[Path]]:
        """Complete, synced files beside the keys of ``objects``, removed afterwards where they
        still are. What became of their names is synced at the end, too."""
        parents = [(self.folder / key).parent for key, _ in objects]
        partials = [parent / f"{uuid.uuid4().hex}{PARTIAL}" for parent in parents]
        with self._writing():
            try:
                with ExitStack() as files:
                    descriptors = []
                    for parent, partial, (_, data) in zip(parents, partials, objects, strict=True):
                        if parent != self.folder:
                            _make_folder(parent)
                        file = files.enter_context(partial.open("xb"))
                        file.write(data)
                        file.flush()
                        descriptors.append(file.fileno())
                    _all_at_once(os.fsync, descriptors)
                yield partials
                _all_at_once(_sync_folder, dict.fromkeys(parents))
            finally:
                for partial in partials:
                    with suppress(OSError):
                        partial.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _AWAY:
                raise failures.unreachable(self.where, _reason(error)) from error
            if error.errno in _GONE:
                raise failures.unreachable(self.where, "the folder is gone") from error
            raise failures.unwritable(self.where, _reason(error)) from error


def _make_folder(folder: Path) -> None:
    """Make the folder where it is missing, in one that is there."""
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:
        if os.path.lexists(folder) and not folder.is_dir():
            raise
        # It was there, and was taken away before `mkdir` could look at it: where all of the store
        # was, this says so.
        folder.mkdir(exist_ok=True)


def _all_at_once(sync: Callable[[_T], None], each: Collection[_T]) -> None:
    """Waiting for the disk once rather than one after the other. Raises the first `OSError`."""
    if len(each) < 2:
        for one in each:
            sync(one)
        return
    with ThreadPoolExecutor(len(each)) as threads:
        for done in [threads.submit(sync, one) for one in each]:
            done.result()


def _sync_folder(folder: Path) -> None:
    """Let new names outlast a power cut, where the file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
