"""Sparse counters: ascending integer keys, each with a count. Merging adds counts of equal keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdist.stats.kernels import merge_sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """``keys`` int64[m], ascending, unique, not negative; ``counts`` uint64[m], positive.

    A key begins with the row that it belongs to: ``row << shift | rest``.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.uint64]

    def __post_init__(self) -> None:
        if self.keys.shape != self.counts.shape or self.keys.ndim != 1:
            raise ValueError(f"{self.keys.shape} keys but {self.counts.shape} counts")

    @classmethod
    def empty(cls) -> Entries:
        """No entries: the identity of `merge`."""
        return cls(keys=np.zeros(0, np.int64), counts=np.zeros(0, np.uint64))

    def merge(self, other: Entries) -> Entries:
        """The union, with the counts of equal keys added. Linear in both."""
        if not self.keys.size:
            return other
        if not other.keys.size:
            return self
        keys, counts = merge_sorted(self.keys, self.counts, other.keys, other.counts)
        return Entries(keys=keys, counts=counts)

    def offsets(self, n_rows: int, shift: int) -> NDArray[np.int64]:
        """int64[n_rows + 1]: where each row's entries begin."""
        return np.searchsorted(self.keys, np.arange(n_rows + 1, dtype=np.int64) << shift)

    def row(self, row: int, shift: int) -> Entries:
        """The entries of one row, keys without the row."""
        first, last = np.searchsorted(self.keys, np.array([row, row + 1], np.int64) << shift)
        return Entries(keys=self.keys[first:last] - (row << shift), counts=self.counts[first:last])

    def take(self, rows: Iterable[int], n_rows: int, shift: int) -> Entries:
        """The entries of some of ``n_rows`` rows, numbered anew in the order given."""
        starts = self.offsets(n_rows, shift)
        keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for new, old in enumerate(rows):
            part = slice(int(starts[old]), int(starts[old + 1]))
            keys.append(self.keys[part] + ((new - old) << shift))
            counts.append(self.counts[part])
        return Entries(keys=np.concatenate(keys), counts=np.concatenate(counts))

    def keep_rows(self, wanted: NDArray[np.bool_], shift: int) -> Entries:
        """Without the rows that are not ``wanted``; the others keep their numbers."""
        if wanted.all():
            return self
        keep = wanted[self.keys >> shift]
        return Entries(keys=self.keys[keep], counts=self.counts[keep])


def stacked(parts: Iterable[tuple[Entries, int]], shift: int) -> Entries:
    """Entries of several sets of rows, one set after the other; each comes with its row count."""
    keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    first = 0
    for entries, n_rows in parts:
        keys.append(entries.keys + (first << shift))
        counts.append(entries.counts)
        first += n_rows
    return Entries(keys=np.concatenate(keys), counts=np.concatenate(counts))
