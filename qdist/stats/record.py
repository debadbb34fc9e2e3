"""Histograms of many tensors as one mergeable value.

Laws (tested in ``tests/laws``): merging is associative and commutative, `CalibrationRecord.empty`
is its identity, and the record of a concatenation is the merge of the records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qdist.digest import canonical_json, digest_bytes
from qdist.stats import grid
from qdist.stats.histogram import Histogram
from qdist.stats.kernels import merge_sorted

_ROW_SHIFT = 16


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """Sparse histograms and extrema of ``n`` tensors over some samples.

    ``tensors``: names of the rows. ``keys`` int64[m], ascending and unique: row * 65536 + bin.
    ``counts`` uint64[m]. ``extrema`` float32[n, 2]: exact finite minimum and maximum
    (``[inf, -inf]`` for a row without finite values). ``n_samples``: samples measured.
    """

    tensors: tuple[str, ...]
    keys: NDArray[np.int64]
    counts: NDArray[np.uint64]
    extrema: NDArray[np.float32]
    n_samples: int
    _rows: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = len(self.tensors)
        if self.extrema.shape != (n, 2) or self.keys.shape != self.counts.shape:
            raise ValueError(
                f"{n} tensors, extrema {self.extrema.shape}, keys {self.keys.shape}, "
                f"counts {self.counts.shape} do not fit together"
            )
        object.__setattr__(self, "_rows", {name: i for i, name in enumerate(self.tensors)})

    @classmethod
    def empty(cls, tensors: Iterable[str]) -> CalibrationRecord:
        """The record of no samples: the identity of `merge`."""
        names = tuple(tensors)
        extrema = np.tile(np.array([np.inf, -np.inf], np.float32), (len(names), 1))
        return cls(
            tensors=names,
            keys=np.zeros(0, np.int64),
            counts=np.zeros(0, np.uint64),
            extrema=extrema,
            n_samples=0,
        )

    @classmethod
    def from_dense(
        cls,
        tensors: Iterable[str],
        tables: Iterable[NDArray[np.uint64]],
        extrema: NDArray[np.float32],
        n_samples: int,
    ) -> CalibrationRecord:
        """From one ``uint64[65536]`` table per tensor, in the order of ``tensors``."""
        names = tuple(tensors)
        keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for row, table in enumerate(tables):
            hit = np.flatnonzero(table)
            keys.append(hit.astype(np.int64) + (row << _ROW_SHIFT))
            counts.append(table[hit])
        return cls(
            tensors=names,
            keys=np.concatenate(keys),
            counts=np.concatenate(counts),
            extrema=extrema.astype(np.float32, copy=True),
            n_samples=n_samples,
        )

    def merge(self, other: CalibrationRecord) -> CalibrationRecord:
        """The record of both sets of samples. Raises `ValueError` for other tensors."""
        if self.tensors != other.tensors:
            raise ValueError("records of different tensors do not merge")
        keys, counts = merge_sorted(self.keys, self.counts, other.keys, other.counts)
        extrema = np.stack(
            [
                np.minimum(self.extrema[:, 0], other.extrema[:, 0]),
                np.maximum(self.extrema[:, 1], other.extrema[:, 1]),
            ],
            axis=1,
        )
        return CalibrationRecord(
            tensors=self.tensors,
            keys=keys,
            counts=counts,
            extrema=extrema,
            n_samples=self.n_samples + other.n_samples,
        )

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._rows

    def histogram(self, tensor: str) -> Histogram:
        """The histogram of one row. Raises `KeyError` for a tensor that is not a row."""
        row = self._rows[tensor]
        first = np.searchsorted(self.keys, row << _ROW_SHIFT)
        last = np.searchsorted(self.keys, (row + 1) << _ROW_SHIFT)
        return Histogram(
            bins=(self.keys[first:last] & 0xFFFF).astype(np.uint16),
            counts=self.counts[first:last],
            minimum=float(self.extrema[row, 0]),
            maximum=float(self.extrema[row, 1]),
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over names, counts, extrema and sample count: equal records, equal digest."""
        return digest_bytes(
            canonical_json(list(self.tensors)).encode(),
            str((grid.VERSION, self.n_samples)).encode(),
            self.keys.tobytes(),
            self.counts.tobytes(),
            # Adding zero turns -0 into +0, so that bits agree whenever values do.
            (self.extrema + np.float32(0)).tobytes(),
        )


def merge_all(records: Iterable[CalibrationRecord], tensors: Iterable[str]) -> CalibrationRecord:
    """Merge any number of records as a balanced tree; none gives the empty record.

    Takes the records one at a time and holds as many as their number has binary digits.
    """
    subtrees: list[tuple[int, CalibrationRecord]] = []
    for record in records:
        size = 1
        while subtrees and subtrees[-1][0] == size:
            record = subtrees.pop()[1].merge(record)
            size *= 2
        subtrees.append((size, record))
    if not subtrees:
        return CalibrationRecord.empty(tensors)
    merged = subtrees.pop()[1]
    while subtrees:
        merged = subtrees.pop()[1].merge(merged)
    return merged
