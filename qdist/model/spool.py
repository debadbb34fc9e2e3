"""Tensors that wait between two segments of a model: in memory, and beyond a bound on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.errors import ArtifactError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filed:
    """An array on disk: its raw bytes, C order."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Spool:
    """Arrays by key, at most ``limit_bytes`` of them in memory (None: all).

    A context manager: its files lie in a scratch folder of their own below ``folder`` (None: the
    system's), which goes with the spool, after errors too. Files are read whole with plain reads,
    so that no page of them counts as this process's memory. Not for sharing between threads.
    """

    def __init__(self, limit_bytes: int | None = None, folder: Path | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._parent = folder
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._held: dict[Hashable, NDArray[Any]] = {}
        self._filed: dict[Hashable, _Filed] = {}
        self._n_files = 0
        self.n_held_bytes = 0
        """Bytes in memory now."""
        self.n_written_bytes = 0
        """Bytes written to disk so far."""
        self.n_read_bytes = 0
        """Bytes read from disk so far."""

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._held or key in self._filed

    def __len__(self) -> int:
        return len(self._held) + len(self._filed)

    def put(self, key: Hashable, array: NDArray[Any]) -> None:
        """Keep an array; the spool may hold on to it, so leave it as it is from here on.

        Raises `ArtifactError` QD603 when the disk cannot take it, `ValueError` for a key in use.
        """
        if key in self:
            raise ValueError(f"{key!r} is in the spool already")
        fits = self._limit_bytes is None or self.n_held_bytes + array.nbytes <= self._limit_bytes
        # Objects (strings) have no raw bytes.
        if fits or array.dtype.hasobject:
            self._held[key] = array
            self.n_held_bytes += array.nbytes
        else:
            self._filed[key] = self._write(array)

    def get(self, key: Hashable) -> NDArray[Any]:
        """The array of a key, which stays. Raises `KeyError`."""
        if key in self._held:
            return self._held[key]
        place = self._filed[key]
        flat = np.fromfile(place.path, place.dtype)
        self.n_read_bytes += flat.nbytes
        return flat.reshape(place.shape)

    def drop(self, key: Hashable) -> None:
        """Forget a key. Raises `KeyError`."""
        if key in self._held:
            self.n_held_bytes -= self._held.pop(key).nbytes
        else:
            self._filed.pop(key).path.unlink()

    def close(self) -> None:
        """Forget everything and remove the scratch folder."""
        self._held.clear()
        self._filed.clear()
        self.n_held_bytes = 0
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _write(self, array: NDArray[Any]) -> _Filed:
        try:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="qdist-", dir=self._parent)
            path = Path(self._scratch.name) / str(self._n_files)
            self._n_files += 1
            with path.open("wb") as file:
                np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)
        except OSError as error:
            raise ArtifactError(
                "QD603",
                where=str(self._parent or tempfile.gettempdir()),
                got=error.strerror or str(error),
                expected=f"room for the {array.nbytes} bytes that wait between two segments",
                mend="free some space, point TMPDIR to a larger disk, or use smaller shards",
            ) from error
        self.n_written_bytes += array.nbytes
        return _Filed(path=path, dtype=array.dtype, shape=array.shape)
