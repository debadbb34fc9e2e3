"""From counts to densities: loops that take the place of a dozen passes over short arrays.

A calibration ends with some hundred rows of some thousand bins each, so what counts is how often
NumPy is called. Each loop equals its NumPy twin in the tests bit for bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled

Floats = NDArray[np.float64]


@compiled
def points_of(largest: NDArray[np.float32], n: int) -> tuple[Floats, Floats]:
    """Distinct values among the first ``n``, ascending, and how often each is there.

    ``largest``: by descending magnitude; +0 and -0 are one value.
    """
    values, counts = np.empty(n, np.float64), np.empty(n, np.float64)
    k = 0
    for step in range(2 * n):
        # The negative ones as they come, the others backwards.
        i = step if step < n else 2 * n - 1 - step
        value = np.float64(largest[i])
        if (value < 0.0) != (step < n):
            continue
        if k > 0 and values[k - 1] == value:
            counts[k - 1] += 1.0
        else:
            values[k], counts[k] = value + 0.0, 1.0
            k += 1
    return values[:k], counts[:k]


@compiled
def intervals_of(
    bins: NDArray[np.uint16],
    counts: NDArray[np.uint64],
    first_bin: int,
    extrema: tuple[float, float],
    near: Floats,
    far: Floats,
    points: Floats,
    masses: Floats,
) -> tuple[Floats, Floats, Floats]:
    """Lower ends, upper ends and counts of ascending intervals.

    ``bins``: ascending; those from the magnitude ``first_bin`` on are left out, for ``points``
    (ascending, with their ``masses``) stand for them. ``near``, ``far``: ends of each bin without
    its sign. ``extrema`` cut the outermost bins.
    """
    n = bins.size
    n_positive = n
    for i in range(n):
        if bins[i] >= 0x8000:
            n_positive = i
            break
    size = n + points.size
    lower, upper, weights = np.empty(size), np.empty(size), np.empty(size)
    least, most = extrema
    k = p = 0
    while p < points.size and points[p] < 0.0:
        lower[k] = upper[k] = points[p]
        weights[k] = masses[p]
        k += 1
        p += 1
    for step in range(n):
        is_negative = step < n - n_positive
        i = n - 1 - step if is_negative else step - (n - n_positive)
        magnitude = np.int64(bins[i]) & 0x7FFF
        if magnitude >= first_bin:
            continue
        low = -far[magnitude] if is_negative else near[magnitude]
        high = -near[magnitude] if is_negative else far[magnitude]
        lower[k] = min(max(low, least), most)
        upper[k] = min(max(high, least), most)
        weights[k] = np.float64(counts[i])
        k += 1
    while p < points.size:
        lower[k] = upper[k] = points[p]
        weights[k] = masses[p]
        k += 1
        p += 1
    return lower[:k], upper[:k], weights[:k]


@compiled
def magnitudes_of(lower: Floats, upper: Floats, counts: Floats) -> tuple[Floats, Floats, Floats]:
    """The intervals of |x|, ascending, from ascending ones of x; those that overlap become one."""
    n = lower.size
    n_negative = 0
    while n_negative < n and lower[n_negative] < 0.0:
        n_negative += 1
    lows, highs, weights = np.empty(n), np.empty(n), np.empty(n)
    k = -1
    reach = 0.0
    b = n_negative
    # Negative ones go backwards, but those that begin at one magnitude in their order.
    stop = n_negative
    a = start = stop
    while a < stop or start > 0 or b < n:
        if a == stop and start > 0:
            stop = start
            begin = max(-upper[stop - 1], 0.0)
            start = stop - 1
            while start > 0 and max(-upper[start - 1], 0.0) == begin:
                start -= 1
            a = start
        if a < stop and (b == n or max(-upper[a], 0.0) <= lower[b]):
            i = a
            a += 1
        else:
            i = b
            b += 1
        low = max(max(lower[i], -upper[i]), 0.0)
        high = max(upper[i], -lower[i])
        if k < 0 or low >= reach:
            k += 1
            lows[k], highs[k], weights[k] = low, high, counts[i]
            reach = max(reach, high)
        else:
            highs[k] = max(highs[k], high)
            weights[k] += counts[i]
            reach = max(reach, high)
    return lows[: k + 1], highs[: k + 1], weights[: k + 1]


@compiled
def sum_of_squares(lower: Floats, upper: Floats, counts: Floats) -> float:
    """The sum of x^2 over values that are spread evenly over their intervals."""
    total = 0.0
    for i in range(lower.size):
        a, b = lower[i], upper[i]
        total += counts[i] * ((a * a + a * b + b * b) / 3.0)
    return total
