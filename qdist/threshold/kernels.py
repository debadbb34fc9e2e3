"""The error integral as a compiled loop. Its plain NumPy twin is `qdist.threshold.error`'s
``mean_squared_error_reference``; a test holds them together."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(cache=True, nogil=True)
def sum_squared_error(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    scale: float,
    first: int,
    last: int,
) -> float:
    """Summed squared error of rounding to multiples ``first..last`` of ``scale``."""
    bottom, top = first * scale, last * scale
    cube = scale**3 / 12.0
    total = 0.0
    for i in range(lower.size):
        a, b = lower[i], upper[i]
        width = b - a
        if width <= 1e-12 * max(abs(a), abs(b)):
            x = (a + b) / 2
            level = min(max(np.rint(x / scale), first), last)
            total += counts[i] * (x - level * scale) ** 2
            continue
        integral = 0.0
        if a < bottom:
            integral += ((min(b, bottom) - bottom) ** 3 - (a - bottom) ** 3) / 3
        if b > top:
            integral += ((b - top) ** 3 - (max(a, top) - top) ** 3) / 3
        inner_a, inner_b = max(a, bottom), min(b, top)
        if inner_b > inner_a:
            level_a, level_b = np.rint(inner_a / scale), np.rint(inner_b / scale)
            rest_a, rest_b = inner_a - level_a * scale, inner_b - level_b * scale
            integral += (level_b - level_a) * cube + (rest_b**3 - rest_a**3) / 3
        if integral > 0.0:
            total += counts[i] * integral / width
    return total
