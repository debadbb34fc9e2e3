"""The largest |x| of every row, exactly, signs kept.

Values are ordered by their magnitude's bits, then by sign, the negative one first: the order of
``rotate_left(bits, 1)``, descending. It is total, so the K largest of a union are the K largest of
the parts' K largest, whatever the parts: merging is associative and commutative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdist.stats.kernels import merge_largest

FIRST_SPECIAL = 0xFF000000
"""Keys from here on are infinities and NaNs, which are not kept."""


def keys_of(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """uint32 keys whose order is that of the values' magnitudes."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits << np.uint32(1)) | (bits >> np.uint32(31))


def values_of(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The float32 of each key."""
    return ((keys >> np.uint32(1)) | (keys << np.uint32(31))).view(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LargestColumns:
    """``keys`` uint32, each row's descending; row ``i`` is ``keys[offsets[i]:offsets[i + 1]]``.

    ``limit``: how many a row keeps at most.
    """

    limit: int
    keys: NDArray[np.uint32]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        sizes = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != self.keys.size or (sizes < 0).any():
            raise ValueError("offsets do not fit the largest values")
        if sizes.size and int(sizes.max()) > max(self.limit, 0):
            raise ValueError(f"{sizes.max()} largest values in a row of at most {self.limit}")

    @classmethod
    def empty(cls, n_rows: int, limit: int) -> LargestColumns:
        """Rows without values."""
        offsets = np.zeros(n_rows + 1, np.int64)
        return cls(limit=limit, keys=np.zeros(0, np.uint32), offsets=offsets)

    @classmethod
    def of(cls, parts: Sequence[NDArray[np.uint32]], limit: int) -> LargestColumns:
        """From each row's keys, descending."""
        sizes = np.array([part.size for part in parts], np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
        keys = np.concatenate([np.zeros(0, np.uint32), *parts])
        return cls(limit=limit, keys=keys, offsets=offsets)

    def row(self, row: int) -> NDArray[np.uint32]:
        """The keys of one row, descending."""
        return self.keys[self.offsets[row] : self.offsets[row + 1]]

    def merge(self, other: LargestColumns) -> LargestColumns:
        """The largest of both, row by row."""
        if self.limit != other.limit:
            raise ValueError(f"{self.limit} and {other.limit} largest values do not merge")
        merged = merge_largest(self.keys, self.offsets, other.keys, other.offsets, self.limit)
        return LargestColumns(limit=self.limit, keys=merged[0], offsets=merged[1])

    def take(self, rows: Sequence[int]) -> LargestColumns:
        """Some rows, in the order given."""
        return LargestColumns.of([self.row(row) for row in rows], self.limit)


def stacked(parts: Sequence[LargestColumns]) -> LargestColumns:
    """One set of rows after the other. Raises `ValueError` unless their limits agree."""
    limits = {part.limit for part in parts}
    if len(limits) != 1:
        raise ValueError(f"rows of {sorted(limits)} largest values do not join")
    rows = [part.row(row) for part in parts for row in range(part.offsets.size - 1)]
    return LargestColumns.of(rows, limits.pop())
