"""Counting and merging loops, compiled with Numba. Each has a plain NumPy twin in the tests."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_QUIET = 0x7FC0


@numba.njit(cache=True, nogil=True)
def count_bits(
    bits: NDArray[np.uint32], counts: NDArray[np.uint64], extrema: NDArray[np.float32]
) -> None:
    """Add a flat tensor, given as its bits, to ``counts[65536]`` and ``extrema = [min, max]``.

    NaNs count in the quiet-NaN bin of their sign and leave the extrema alone; infinities count
    in their bins and leave the extrema alone too, so that the extrema stay those of the finite
    values. Large tensors go through two interleaved 32-bit tables, so that runs of equal values
    (zeros after ReLU) do not wait for one counter.
    """
    n = bits.size
    low_key = np.int64(1) << 40
    high_key = -(np.int64(1) << 40)
    if n < 1 << 15:
        for i in range(n):
            b = bits[i]
            magnitude = b & np.uint32(0x7FFFFFFF)
            if magnitude >= np.uint32(0x7F800000):
                counts[_special(b, magnitude)] += np.uint64(1)
                continue
            key = _order(b)
            low_key = min(low_key, key)
            high_key = max(high_key, key)
            counts[b >> np.uint32(16)] += np.uint64(1)
    else:
        low_key, high_key = _count_large(bits, counts, low_key, high_key)
    if low_key <= high_key:
        low = _value(low_key)
        high = _value(high_key)
        extrema[0] = min(extrema[0], low)
        extrema[1] = max(extrema[1], high)


@numba.njit(cache=True, nogil=True)
def _count_large(
    bits: NDArray[np.uint32], counts: NDArray[np.uint64], low_key: Any, high_key: Any
) -> tuple[Any, Any]:
    n = bits.size
    first = np.zeros(1 << 16, np.uint32)
    second = np.zeros(1 << 16, np.uint32)
    start = 0
    while start < n:
        # 32-bit counters cannot overflow within a block.
        stop = min(n, start + (1 << 30))
        even_stop = start + ((stop - start) // 2) * 2
        i = start
        while i < even_stop:
            a = bits[i]
            b = bits[i + 1]
            first[a >> np.uint32(16)] += np.uint32(1)
            second[b >> np.uint32(16)] += np.uint32(1)
            key_a = _order(a)
            key_b = _order(b)
            if (a & np.uint32(0x7FFFFFFF)) < np.uint32(0x7F800000):
                low_key = min(low_key, key_a)
                high_key = max(high_key, key_a)
            elif (a & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
                first[a >> np.uint32(16)] -= np.uint32(1)
                first[_special(a, a & np.uint32(0x7FFFFFFF))] += np.uint32(1)
            if (b & np.uint32(0x7FFFFFFF)) < np.uint32(0x7F800000):
                low_key = min(low_key, key_b)
                high_key = max(high_key, key_b)
            elif (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
                second[b >> np.uint32(16)] -= np.uint32(1)
                second[_special(b, b & np.uint32(0x7FFFFFFF))] += np.uint32(1)
            i += 2
        if even_stop < stop:
            a = bits[even_stop]
            magnitude = a & np.uint32(0x7FFFFFFF)
            if magnitude >= np.uint32(0x7F800000):
                first[_special(a, magnitude)] += np.uint32(1)
            else:
                first[a >> np.uint32(16)] += np.uint32(1)
                low_key = min(low_key, _order(a))
                high_key = max(high_key, _order(a))
        for j in range(1 << 16):
            counts[j] += np.uint64(first[j]) + np.uint64(second[j])
            first[j] = 0
            second[j] = 0
        start = stop
    return low_key, high_key


@numba.njit(cache=True, nogil=True, inline="always")
def _order(bits: Any) -> Any:
    """An integer that orders floats as their values do; -0 lies just below +0."""
    magnitude = np.int64(bits & np.uint32(0x7FFFFFFF))
    if bits >> np.uint32(31):
        return -magnitude - np.int64(1)
    return magnitude


@numba.njit(cache=True, nogil=True)
def _value(key: Any) -> Any:
    """The float32 of an `_order` key, with -0 as 0."""
    one = np.empty(1, np.uint32)
    if key < 0:
        magnitude = -(key + 1)
        one[0] = np.uint32(magnitude) | np.uint32(0x80000000 if magnitude else 0)
    else:
        one[0] = np.uint32(key)
    return one.view(np.float32)[0]


@numba.njit(cache=True, nogil=True, inline="always")
def _special(bits: Any, magnitude: Any) -> Any:
    if magnitude == np.uint32(0x7F800000):
        return np.int64(bits >> np.uint32(16))
    return np.int64(((bits >> np.uint32(31)) << np.uint32(15)) | np.uint32(_QUIET))


@numba.njit(cache=True, nogil=True)
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
