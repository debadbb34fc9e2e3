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


@numba.njit(cache=True, nogil=True)
def sum_codes(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    scale: float,
    first: int,
    last: int,
) -> tuple[float, float]:
    """Sums of q and of q x over the density, for q the nearest of ``first..last`` to x / scale."""
    codes, products = 0.0, 0.0
    inverse = 1.0 / scale
    # What rounds to zero adds nothing, and can be most of the intervals.
    start = np.searchsorted(lower, -0.5 * scale, side="left")
    stop = max(np.searchsorted(upper, 0.5 * scale, side="right"), start)
    for j in range(lower.size - (stop - start)):
        i = j if j < start else j + (stop - start)
        a, b, c = lower[i], upper[i], counts[i]
        code_a = min(max(np.rint(a * inverse), first), last)
        code_b = min(max(np.rint(b * inverse), first), last)
        if code_a == code_b or b - a <= 1e-12 * max(abs(a), abs(b)):
            codes += c * code_b
            products += c * code_b * 0.5 * (a + b)
            continue
        density = c / (b - a)
        # The parts in the cells of the first and last code, then the whole cells between them.
        left, right = (code_a + 0.5) * scale, (code_b - 0.5) * scale
        codes += density * ((left - a) * code_a + (b - right) * code_b)
        products += density * 0.5 * (left * left - a * a) * code_a
        products += density * 0.5 * (b * b - right * right) * code_b
        n = code_b - code_a - 1.0
        if n > 0.0:
            k = n * code_a + n * (n + 1.0) / 2.0
            codes += density * scale * k
            squares = n * code_a * code_a + code_a * n * (n + 1.0)
            squares += n * (n + 1.0) * (2.0 * n + 1.0) / 6.0
            products += density * scale * scale * squares
    return codes, products
