"""The folder that a command works in: a copy of the user's own."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qdist.evaluate.result import RESULT_FILES

_FICLONE = 0x40049409
"""The request of ioctl_ficlone(2), which Python has no name for."""


def clone_or_copy(source: str, target: str) -> str:
    """Copy a file with its times and mode, sharing its blocks where the file system can.

    A reflink costs no data until one of the two is written; neither sees the other's changes.
    Raises `OSError`.
    """
    with open(source, "rb") as read, open(target, "wb") as written:
        try:
            fcntl.ioctl(written.fileno(), _FICLONE, read.fileno())
        except OSError:  # no reflinks here, or between these two file systems
            shutil.copyfileobj(read, written, 1 << 20)
    shutil.copystat(source, target)
    return target


def copy_folder(source: Path, work: Path, *, leave_out: Callable[[Path], bool]) -> None:
    """Copy ``source`` to ``work``, without results of earlier runs and what is to be left out.

    Files are reflinks where the file system has them. Links that lead out of it still do. Raises
    `OSError`.
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if leave_out(Path(folder, name))}

    shutil.copytree(source, work, symlinks=True, ignore=left_out, copy_function=clone_or_copy)
    _mend_copy(source, work)
    for name in RESULT_FILES:
        (work / name).unlink(missing_ok=True)


def _mend_copy(source: Path, work: Path) -> None:
    """Give the links in a copied folder their meaning back, and make its folders writable."""
    for folder, folders, files in os.walk(work):
        os.chmod(folder, os.stat(folder).st_mode | 0o700)
        for name in (*folders, *files):
            link = Path(folder, name)
            if not link.is_symlink():
                continue
            place = source / link.relative_to(work)
            target = Path(os.path.normpath(place.parent / os.readlink(place)))
            if target.is_relative_to(source):  # within the folder: to the copy
                target = work / target.relative_to(source)
            link.unlink()
            link.symlink_to(target)
