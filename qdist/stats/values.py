"""The exact value -> count table of rows that have few distinct values.

Pixels, masks and plateaus have few; a row with more than the limit drops its table for good. That a
union overflows does not depend on how it was put together, so merging stays associative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdist.stats import entries as sparse
from qdist.stats.entries import Entries

SHIFT = 32
QUIET_NANS = (0x7FC00000, 0xFFC00000)
"""NaNs are told apart by sign alone: all count as these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTable:
    """Every distinct value of a tensor and how often it was seen.

    ``values`` float32[n] by ascending bits as unsigned integers: the positive ones ascending, then
    the negative ones descending; +0 and -0 are two, NaNs are quiet. ``counts`` uint64[n] > 0.
    """

    values: NDArray[np.float32]
    counts: NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueColumns:
    """``entries``: keys ``row << 32 | bits``. ``overflowed`` bool[n]: rows that dropped theirs.

    ``limit``: how many distinct values a row may have; with 0 every row has overflowed.
    """

    limit: int
    entries: Entries
    overflowed: NDArray[np.bool_]

    @classmethod
    def empty(cls, n_rows: int, limit: int) -> ValueColumns:
        """Rows without values."""
        overflowed = np.full(n_rows, limit == 0)
        return cls(limit=limit, entries=Entries.empty(), overflowed=overflowed)

    @classmethod
    def checked(cls, limit: int, entries: Entries, overflowed: NDArray[np.bool_]) -> ValueColumns:
        """Rows with more than ``limit`` distinct values, or said to have overflowed, lose them."""
        sizes = np.diff(entries.offsets(overflowed.size, SHIFT))
        overflowed = overflowed | (sizes > limit) | (limit == 0)
        kept = entries.keep_rows(~overflowed, SHIFT)
        return cls(limit=limit, entries=kept, overflowed=overflowed)

    def row(self, row: int) -> ValueTable | None:
        """The table of one row; None when it overflowed."""
        if self.overflowed[row]:
            return None
        found = self.entries.row(row, SHIFT)
        return ValueTable(values=found.keys.astype(np.uint32).view(np.float32), counts=found.counts)

    def merge(self, other: ValueColumns) -> ValueColumns:
        """Counts of equal values added; overflow is absorbing."""
        if self.limit != other.limit:
            raise ValueError(f"tables of {self.limit} and {other.limit} values do not merge")
        entries = self.entries.merge(other.entries)
        return ValueColumns.checked(self.limit, entries, self.overflowed | other.overflowed)

    def take(self, rows: Sequence[int]) -> ValueColumns:
        """Some rows, in the order given."""
        entries = self.entries.take(rows, self.overflowed.size, SHIFT)
        index = np.asarray(rows, np.intp)
        return ValueColumns(limit=self.limit, entries=entries, overflowed=self.overflowed[index])


def stacked(parts: Sequence[ValueColumns]) -> ValueColumns:
    """One set of rows after the other. Raises `ValueError` unless their limits agree."""
    limits = {part.limit for part in parts}
    if len(limits) != 1:
        raise ValueError(f"tables of {sorted(limits)} values do not join")
    overflowed = np.concatenate([part.overflowed for part in parts])
    entries = sparse.stacked(((part.entries, part.overflowed.size) for part in parts), SHIFT)
    return ValueColumns(limit=limits.pop(), entries=entries, overflowed=overflowed)
