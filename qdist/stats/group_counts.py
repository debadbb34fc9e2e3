"""Group histograms while they are counted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qdist.stats.channels import UNSEEN, VARIED
from qdist.stats.counters import PAGE_BINS, PagedCounters, count_groups
from qdist.stats.entries import Entries
from qdist.stats.groups import GROUP_SHIFT, MAX_CHANNELS, GroupColumns, Grouping, stack_groupings
from qdist.stats.spec import GroupRequest

_SOME_PAGES = 4096


class GroupCounts:
    """Paged counters for every group of every tensor that a request matches.

    ``wanted``: pairs of a tensor's row and a request, by row. The counters of a tensor are made
    when the size of its axis is first seen.
    """

    def __init__(self, wanted: tuple[tuple[int, GroupRequest], ...]) -> None:
        self._blank = [Grouping.of(row, request) for row, request in wanted]
        self._of_row: dict[int, list[int]] = {}
        for place, grouping in enumerate(self._blank):
            self._of_row.setdefault(grouping.row, []).append(place)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._groupings = list(self._blank)
        self._counters = [PagedCounters() for _ in self._blank]

    def wants(self, row: int) -> bool:
        """Whether a request matches the row."""
        return row in self._of_row

    @property
    def n_bytes(self) -> int:
        """Bytes of the counters in use."""
        return sum(counters.n_bytes for counters in self._counters)

    def add(
        self,
        row: int,
        bits: NDArray[np.uint32],
        shape: tuple[int, ...],
        keep: NDArray[np.bool_],
    ) -> None:
        """Count a flat tensor of this shape; ``keep`` bool[size], or empty for all."""
        for place in self._of_row.get(row, ()):
            self._add(place, bits, shape, keep)

    def _add(
        self,
        place: int,
        bits: NDArray[np.uint32],
        shape: tuple[int, ...],
        keep: NDArray[np.bool_],
    ) -> None:
        grouping, counters = self._groupings[place], self._counters[place]
        if grouping.n_channels == VARIED or not bits.size:
            return
        axis, known = grouping.axis, grouping.n_channels
        n = shape[axis] if -len(shape) <= axis < len(shape) else VARIED
        if n > MAX_CHANNELS or known not in (UNSEEN, n):
            n = VARIED
        self._groupings[place] = grouping = replace(grouping, n_channels=n)
        if n == VARIED:
            self._counters[place] = PagedCounters()
            return
        request, group_slots = grouping.request, _slots(grouping)
        if known == UNSEEN:
            counters.add_slots(request.groups_for(n) * group_slots)
        inner = math.prod(shape[axis % len(shape) + 1 :])
        done = 0
        while done < bits.size:
            done = count_groups(
                bits,
                done,
                keep,
                inner,
                n,
                request.size_for(n),
                23 - grouping.mantissa_bits,
                0,
                counters.page_of,
                counters.pool,
                counters.used,
            )
            if done < bits.size:
                counters.reserve(_SOME_PAGES)

    def columns(self) -> GroupColumns:
        """What was counted."""
        parts = []
        for grouping, counters in zip(self._groupings, self._counters, strict=True):
            found = counters.entries(0, counters.page_of.size)
            n_bins = _slots(grouping) * PAGE_BINS
            keys = (found.keys // n_bins << GROUP_SHIFT) | found.keys % n_bins
            parts.append(Entries(keys=keys, counts=found.counts))
        return stack_groupings(tuple(self._groupings), parts)


def _slots(grouping: Grouping) -> int:
    return (1 << (9 + grouping.mantissa_bits)) // PAGE_BINS
