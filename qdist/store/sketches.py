"""A folder of sketches, so that samples are sketched once however often a choice is made.

Below ``folder`` lies one folder for every identity (model, preprocessing, execution fingerprint,
taps), and in it ``identity.json`` and ``ID.npz`` files of some samples each, named by what is in
them. A file is complete or not there; a sample that two files hold counts once; a damaged file is
removed, and its samples are sketched again.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qdist.digest import digest_json
from qdist.files import make_folder, replacing, write_json
from qdist.stats.sketch import SketchTable

_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
"""What NumPy raises on a file that is cut short or altered."""


class SketchStore:
    """Sketches of one identity. One process writes; any number may read."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """``identity``: JSON of everything that can change a sketch. Raises QD603."""
        self.folder = make_folder(folder / digest_json(identity)[:32])
        path = self.folder / "identity.json"
        if not path.exists():
            write_json(path, identity)

    def put(self, table: SketchTable) -> None:
        """Keep a table. Putting it again changes nothing. Raises QD603."""
        path = self.folder / f"{digest_json(list(table.ids))}.npz"
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                ids=np.array(table.ids, dtype=np.str_),
                counts=table.counts,
                maxima=table.maxima,
                digest=np.array(table.digest),
            )

    def held(self, n_tensors: int) -> frozenset[str]:
        """Ids of the samples that are kept, by files that are sound; removes the others."""
        found: set[str] = set()
        for path in self._paths():
            table = _read(path)
            if table is None or table.maxima.shape[1] != n_tensors:
                path.unlink(missing_ok=True)
            else:
                found.update(table.ids)
        return frozenset(found)

    def tables(self, ids: Collection[str]) -> Iterator[SketchTable]:
        """Every kept table with a sample among ``ids``, in the order of file names."""
        wanted = set(ids)
        for path in self._paths():
            table = _read(path)
            if table is not None and not wanted.isdisjoint(table.ids):
                yield table

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[!.]*.npz"))


def _read(path: Path) -> SketchTable | None:
    """The table, or None where the file is damaged or gone."""
    try:
        with np.load(path, allow_pickle=False) as members:
            table = SketchTable(
                ids=tuple(str(id) for id in members["ids"]),
                counts=members["counts"],
                maxima=members["maxima"],
            )
            return table if table.digest == str(members["digest"]) else None
    except _DAMAGE:
        return None
