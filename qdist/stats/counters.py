"""Counters of many histograms, allocated by the page, so that bins nobody hits cost no memory.

A histogram is a row of *slots*, each of 128 bins; a slot has a page of the shared pool once one of
its bins is hit. A tensor of typical activations hits some 40 of its 512 slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled
from qdist.stats.entries import Entries

PAGE_BINS = 128
ROW_SLOTS = 512
"""Slots of a histogram on the full grid."""
_FIRST_PAGES = 1024


class PagedCounters:
    """uint64 counters. Kernels read and write the public arrays; one thread at a time.

    ``page_of`` int32[slots]: each slot's page, -1 for none yet. ``pool`` uint64[pages, 128]; pages
    from ``used[0]`` on are free, and hold anything.
    """

    def __init__(self, n_rows: int = 0) -> None:
        self.page_of: NDArray[np.int32] = np.full(n_rows * ROW_SLOTS, -1, np.int32)
        self.pool: NDArray[np.uint64] = np.empty((_FIRST_PAGES, PAGE_BINS), np.uint64)
        self.used: NDArray[np.int64] = np.zeros(1, np.int64)

    @property
    def n_bytes(self) -> int:
        """Bytes of the pages in use and the page table."""
        return int(self.used[0]) * PAGE_BINS * 8 + self.page_of.nbytes

    def clear(self) -> None:
        """Forget all counts; keeps the slots and the memory."""
        self.page_of.fill(-1)
        self.used[0] = 0

    def add_slots(self, n: int) -> int:
        """Append ``n`` slots; returns the first of them."""
        first = self.page_of.size
        self.page_of = np.concatenate([self.page_of, np.full(n, -1, np.int32)])
        return first

    def reserve(self, n_pages: int) -> None:
        """See to it that ``n_pages`` are free."""
        wanted = int(self.used[0]) + n_pages
        if wanted > len(self.pool):
            # Fresh memory costs nothing until it is written to.
            pool = np.empty((max(wanted, 2 * len(self.pool)), PAGE_BINS), np.uint64)
            pool[: self.used[0]] = self.pool[: self.used[0]]
            self.pool = pool

    def add(self, flat: NDArray[np.int64], counts: NDArray[np.uint64]) -> None:
        """Add ``counts`` to counters, by their slot * 128 + bin."""
        done = 0
        while True:
            done = _add(flat, counts, done, self.page_of, self.pool, self.used)
            if done == flat.size:
                return
            self.reserve(_FIRST_PAGES)

    def entries(self, first: int, n_slots: int) -> Entries:
        """What is not zero in ``n_slots`` slots from ``first``: keys are slot * 128 + bin,
        counted from the first."""
        page_of = self.page_of[first : first + n_slots]
        n = _n_hit(page_of, self.pool)
        keys, counts = np.empty(n, np.int64), np.empty(n, np.uint64)
        _collect(page_of, self.pool, keys, counts)
        return Entries(keys=keys, counts=counts)


@compiled
def _add(
    flat: NDArray[np.int64],
    counts: NDArray[np.uint64],
    first: int,
    page_of: NDArray[np.int32],
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
) -> int:
    """Returns where it stopped: at the end, or where a page was missing."""
    slot = np.int64(-1)
    page = np.int64(-1)
    for i in range(first, flat.size):
        if flat[i] >> 7 != slot:
            slot = flat[i] >> 7
            page = np.int64(page_of[slot])
            if page < 0:
                if used[0] == len(pool):
                    return i
                page = used[0]
                used[0] = page + 1
                page_of[slot] = page
                pool[page, :] = 0
        pool[page, flat[i] & 127] += counts[i]
    return flat.size


@compiled
def _n_hit(page_of: NDArray[np.int32], pool: NDArray[np.uint64]) -> int:
    n = 0
    for slot in range(page_of.size):
        page = np.int64(page_of[slot])
        if page >= 0:
            for i in range(128):
                if pool[page, i] != np.uint64(0):
                    n += 1
    return n


@compiled
def _collect(
    page_of: NDArray[np.int32],
    pool: NDArray[np.uint64],
    keys: NDArray[np.int64],
    counts: NDArray[np.uint64],
) -> None:
    n = 0
    for slot in range(page_of.size):
        page = np.int64(page_of[slot])
        if page >= 0:
            for i in range(128):
                if pool[page, i] != np.uint64(0):
                    keys[n] = slot * 128 + i
                    counts[n] = pool[page, i]
                    n += 1


@compiled
def count_groups(
    bits: NDArray[np.uint32],
    first: int,
    keep: NDArray[np.bool_],
    inner: int,
    n_channels: int,
    group_size: int,
    shift: int,
    first_slot: int,
    page_of: NDArray[np.int32],
    pool: NDArray[np.uint64],
    used: NDArray[np.int64],
) -> int:
    """Count a flat tensor's elements from ``first`` on, each in the histogram of its group.

    Element ``i`` is of channel ``i // inner % n_channels``. Its bin is ``bits >> shift``, NaNs
    quiet; a group has ``2 ** (32 - shift - 7)`` slots. ``keep``: which elements count; all when
    empty. Returns where it stopped: at the end, or where a page was missing.
    """
    group_slots = 1 << (32 - shift - 7)
    i = first
    run = i // inner
    channel = run % n_channels
    within = channel % group_size
    base = first_slot + (channel // group_size) * group_slots
    stop = (run + 1) * inner
    while i < bits.size:
        while i < stop:
            if keep.size == 0 or keep[i]:
                b = bits[i]
                if np.uint32(b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
                    b = np.uint32(np.uint32(b & np.uint32(0x80000000)) | np.uint32(0x7FC00000))
                place = np.int64(b) >> shift
                slot = base + (place >> 7)
                page = np.int64(page_of[slot])
                if page < 0:
                    if used[0] == len(pool):
                        return i
                    page = used[0]
                    used[0] = page + 1
                    page_of[slot] = page
                    pool[page, :] = 0
                pool[page, place & 127] += np.uint64(1)
            i += 1
        stop += inner
        channel += 1
        within += 1
        if within == group_size:
            within = 0
            base += group_slots
        if channel == n_channels:
            channel = within = 0
            base = first_slot
    return bits.size
