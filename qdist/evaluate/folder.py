"""The folder that a command works in: a copy of the user's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qdist.evaluate.result import RESULT_FILES


def copy_folder(source: Path, work: Path, *, leave_out: Callable[[Path], bool]) -> None:
    """Copy ``source`` to ``work``, without results of earlier runs and what is to be left out.

    Links that lead out of it still do. Raises `OSError`.
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if leave_out(Path(folder, name))}

    shutil.copytree(source, work, symlinks=True, ignore=left_out)
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
