"""Counting one tensor densely, and the merging loops, compiled with Numba.

Each has a plain NumPy twin in the tests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats import sweep
from qdist.stats.compiled import compiled

_NO_KEYS = np.zeros(0, np.int32)


def count_bits(
    bits: NDArray[np.uint32], counts: NDArray[np.uint64], extrema: NDArray[np.float32]
) -> None:
    """Add a flat tensor, given as its bits, to ``counts[65536]`` and ``extrema = [min, max]``.

    NaNs count in the quiet-NaN bin of their sign, infinities in theirs; neither changes the
    extrema, which are those of the finite values.
    """
    state = sweep.new_state(1)
    sweep.sweep(
        sweep.bits_of(bits.view(np.float32)),
        0,
        sweep.NO_CHANNELS,
        1,
        _NO_KEYS,
        _NO_KEYS,
        0,
        state,
        np.zeros((1, 0), np.uint32),
        0,
        np.arange(sweep.PAGES, dtype=np.int32),
        counts.reshape(sweep.PAGES, sweep.PAGE_BINS),
        np.full(1, sweep.PAGES, np.int64),
        sweep.new_scratch(),
        np.empty(sweep.BLOCK, np.uint32),
    )
    extrema[0] = min(extrema[0], sweep.floats_of(state[:, sweep.LOW], np.inf)[0])
    extrema[1] = max(extrema[1], sweep.floats_of(state[:, sweep.HIGH], -np.inf)[0])


@compiled
def merge_sorted(
    keys_a: NDArray[np.int64],
    counts_a: NDArray[np.uint64],
    keys_b: NDArray[np.int64],
    counts_b: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Union of two ascending key lists, adding the counts of equal keys. Linear time."""
    n_a, n_b = keys_a.size, keys_b.size
    keys = np.empty(n_a + n_b, np.int64)
    counts = np.empty(n_a + n_b, np.uint64)
    i = j = k = 0
    while i < n_a and j < n_b:
        if keys_a[i] < keys_b[j]:
            keys[k] = keys_a[i]
            counts[k] = counts_a[i]
            i += 1
        elif keys_b[j] < keys_a[i]:
            keys[k] = keys_b[j]
            counts[k] = counts_b[j]
            j += 1
        else:
            keys[k] = keys_a[i]
            counts[k] = counts_a[i] + counts_b[j]
            i += 1
            j += 1
        k += 1
    while i < n_a:
        keys[k] = keys_a[i]
        counts[k] = counts_a[i]
        i += 1
        k += 1
    while j < n_b:
        keys[k] = keys_b[j]
        counts[k] = counts_b[j]
        j += 1
        k += 1
    return keys[:k].copy(), counts[:k].copy()


@compiled
def merge_largest(
    keys_a: NDArray[np.uint32],
    offsets_a: NDArray[np.int64],
    keys_b: NDArray[np.uint32],
    offsets_b: NDArray[np.int64],
    limit: int,
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Row by row, the ``limit`` largest of two descending lists, descending; and the offsets."""
    n_rows = offsets_a.size - 1
    offsets = np.zeros(n_rows + 1, np.int64)
    for row in range(n_rows):
        n_a, n_b = offsets_a[row + 1] - offsets_a[row], offsets_b[row + 1] - offsets_b[row]
        offsets[row + 1] = offsets[row] + min(limit, n_a + n_b)
    keys = np.empty(offsets[n_rows], np.uint32)
    k = 0
    for row in range(n_rows):
        i, end_a = offsets_a[row], offsets_a[row + 1]
        j, end_b = offsets_b[row], offsets_b[row + 1]
        stop = offsets[row + 1]
        while k < stop and i < end_a and j < end_b:
            # Without a branch, since nobody can foresee it.
            a, b = keys_a[i], keys_b[j]
            first = a >= b
            keys[k] = a if first else b
            i += np.int64(first)
            j += np.int64(not first)
            k += 1
        while k < stop and i < end_a:
            keys[k] = keys_a[i]
            i += 1
            k += 1
        while k < stop:
            keys[k] = keys_b[j]
            j += 1
            k += 1
    return keys, offsets


@compiled
def ascend(steps: NDArray[np.int64], keys: NDArray[np.int64]) -> bool:
    """Sum ``steps`` up into ``keys``; whether the first is not negative and all others positive.

    Without a branch for every step, so that it takes one pass at the speed of memory.
    """
    total = np.int64(0)
    lowest = np.int64(1)
    for i in range(steps.size):
        step = steps[i]
        total += step
        keys[i] = total
        lowest = min(lowest, step + np.int64(i == 0))
    return bool(lowest > 0)


@compiled
def all_counted(counts: NDArray[np.uint64]) -> bool:
    """Whether no count is zero, or 2**64 - 1, which stands for a missing one."""
    n_wrong = 0
    for i in range(counts.size):
        n_wrong += int((counts[i] == np.uint64(0)) | (counts[i] == ~np.uint64(0)))
    return n_wrong == 0


@compiled
def mass_below(
    lower: NDArray[np.float64], upper: NDArray[np.float64], counts: NDArray[np.float64], x: float
) -> float:
    """How many values of a density lie at or below ``x``; a part of the interval that holds it."""
    total = 0.0
    for i in range(lower.size):
        a, b = lower[i], upper[i]
        if b <= x:
            total += counts[i]
        elif a < x:
            total += counts[i] * ((x - a) / (b - a))
    return total
