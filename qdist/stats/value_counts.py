"""Value tables while they are counted: hash tables for the tensors that have few values so far."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats import sweep
from qdist.stats.counters import PagedCounters
from qdist.stats.entries import Entries
from qdist.stats.values import SHIFT, ValueColumns

_NO_TABLE = -1
_OVERFLOWED = -2


class ValueCounts:
    """One table per tensor that has not overflowed, made when it is first seen.

    Tables of tensors that overflow are used again, so that there are about as many as tensors with
    few values.
    """

    def __init__(self, n_rows: int, limit: int) -> None:
        self._limit = limit
        size = 1
        while size < 4 * limit:
            size *= 2
        self._size = size
        self._table_of = [_NO_TABLE] * n_rows
        self._keys = np.zeros((0, size), np.uint32)
        self._counts = np.zeros((0, 2 * size), np.uint64)
        self._n_distinct = np.zeros(0, np.int64)
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        state = _NO_TABLE if self._limit else _OVERFLOWED
        self._table_of = [state] * len(self._table_of)
        self._free = list(range(len(self._keys)))[::-1]

    def is_open(self, row: int) -> bool:
        """Whether the row is still counted by value, or was never seen."""
        return self._table_of[row] != _OVERFLOWED

    def add(self, row: int, bits: NDArray[np.uint32]) -> int:
        """Count a flat tensor by value; returns how many elements fit. 0 once it overflowed, and
        where the row's first tensor has too many values, which is then to be counted anew.

        When it returns less than there are, call `spill`.
        """
        table = self._table_of[row]
        if table == _OVERFLOWED:
            return 0
        is_first = table == _NO_TABLE
        if is_first:
            table = self._table_of[row] = self._new_table()
        n = sweep.count_values(bits, table, self._keys, self._counts, self._n_distinct, self._limit)
        if is_first and n < bits.size:
            self._close(row)
            return 0
        return n

    def spill(
        self,
        row: int,
        states: NDArray[np.int64],
        tops: NDArray[np.uint32],
        n_largest: int,
        counters: PagedCounters,
    ) -> None:
        """Move what was counted by value to the counters and largest values, for good.

        Without a table, as after the first time, there is nothing to do.
        """
        table = self._table_of[row]
        if table == _OVERFLOWED:
            return
        keys, counts = self._keys[table], self._counts[table]
        pages = counters.page_of, counters.pool, counters.used
        sweep.spill_values(keys, counts, row, states, tops, n_largest, *pages)
        self._close(row)

    def _close(self, row: int) -> None:
        """Have no table for a row any more."""
        self._free.append(self._table_of[row])
        self._table_of[row] = _OVERFLOWED

    def _new_table(self) -> int:
        if not self._free:
            n = len(self._keys)
            more = max(4, n)
            self._keys = np.concatenate([self._keys, np.zeros((more, self._size), np.uint32)])
            counts = np.zeros((more, 2 * self._size), np.uint64)
            self._counts = np.concatenate([self._counts, counts])
            self._n_distinct = np.concatenate([self._n_distinct, np.zeros(more, np.int64)])
            self._free = list(range(n, n + more))[::-1]
        table = self._free.pop()
        self._keys[table] = sweep.NO_VALUE
        self._counts[table] = 0
        self._n_distinct[table] = 0
        return table

    def columns(self) -> ValueColumns:
        """The tables, sorted."""
        keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for row, table in enumerate(self._table_of):
            if table < 0:
                continue
            seen = self._counts[table, ::2] + self._counts[table, 1::2]
            slots = np.flatnonzero(seen)
            order = slots[np.argsort(self._keys[table, slots])]
            keys.append(self._keys[table, order].astype(np.int64) + (row << SHIFT))
            counts.append(seen[order])
        return ValueColumns(
            limit=self._limit,
            entries=Entries(keys=np.concatenate(keys), counts=np.concatenate(counts)),
            overflowed=np.array([state == _OVERFLOWED for state in self._table_of], np.bool_),
        )
