"""Extrema of channels while they are counted: one stretch of two shared arrays for each tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.sweep import NO_HIGH, NO_LOW

_FIRST_SIZE = 4096


class LaneExtrema:
    """Lowest and highest order keys of each lane of each tensor. One thread at a time.

    ``low`` and ``high`` int32 hold those of tensor ``i`` from ``starts[i]`` on. Both are other
    arrays once more room was needed.
    """

    def __init__(self, n_rows: int) -> None:
        self.starts: NDArray[np.int64] = np.zeros(n_rows, np.int64)
        self._sizes = [0] * n_rows
        self.low: NDArray[np.int32] = np.empty(_FIRST_SIZE, np.int32)
        self.high: NDArray[np.int32] = np.empty(_FIRST_SIZE, np.int32)
        self._used = 0

    def clear(self) -> None:
        """Forget all tensors' lanes; keeps the memory."""
        self._sizes = [0] * len(self._sizes)
        self._used = 0

    def make(self, row: int, size: int) -> None:
        """``size`` lanes for a tensor, of which nothing was seen. Forgets what it had before."""
        start, self._used = self._used, self._used + size
        if self._used > self.low.size:
            more = max(self._used, 2 * self.low.size) - start
            self.low = np.concatenate([self.low[:start], np.empty(more, np.int32)])
            self.high = np.concatenate([self.high[:start], np.empty(more, np.int32)])
        self.low[start : self._used] = NO_LOW
        self.high[start : self._used] = NO_HIGH
        self.starts[row] = start
        self._sizes[row] = size

    def size(self, row: int) -> int:
        """How many lanes a tensor has."""
        return self._sizes[row]

    def of(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Views of a tensor's lows and highs."""
        lanes = slice(int(self.starts[row]), int(self.starts[row]) + self._sizes[row])
        return self.low[lanes], self.high[lanes]
