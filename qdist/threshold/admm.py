"""Scale and codes by turns (``admm``).

The projection step of C. Leng, H. Li, S. Zhu, R. Jin, "Extremely low bit neural network: squeeze
the last bit out with ADMM" (AAAI 2018): minimise the squared error ``sum (x - s q)^2`` over the
codes q with the scale s held, ``q = clip(round(x / s))``, then over the scale with the codes held,
``s = sum x q / sum q^2``, until the scale stands still. Calibrators that do so on raw features
(Sophgo's ADMM among them) have to keep all of them; the two sums over a stored density are the
same sums, so nothing but the histogram is needed.

Every step lowers the error, but only to the nearest minimum. So the search starts from several
scales and keeps the best; ``starts=1`` is the plain method from the largest value on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, scale_and_zero
from qdist.threshold.error import mean_squared_error

_TOLERANCE = 3e-4
"""Relative change of the scale that counts as none."""


def admm(
    density: Density, levels: Levels, *, starts: int = 8, iterations: int = 20
) -> tuple[float, float]:
    """The bounds at the scale where the turns end, cut to the range that was seen.

    The zero point stays that of the whole range. ``starts``: how many scales to begin from, each
    three quarters of the one before. ``iterations``: turns at most from each.
    """
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    if density.is_empty or low == high:
        return low, high
    whole, zero = scale_and_zero(low, high, levels)
    first, last = levels.low - zero, levels.high - zero
    best, least = whole, mean_squared_error(density, whole, zero, levels)
    for start in range(starts):
        scale = settle(
            density.lower,
            density.upper,
            density.counts,
            whole * 0.75**start,
            first,
            last,
            iterations,
            _TOLERANCE,
        )
        error = mean_squared_error(density, scale, zero, levels)
        if error < least:
            best, least = scale, error
    if best == whole:
        return low, high
    if levels.symmetric:
        return max(-levels.high * best, low), min(levels.high * best, high)
    # A range of these bounds has this scale and this zero point; where the ends of the range that
    # was seen cut it, that only saves levels that nothing needs.
    return max(first * best, low), min(last * best, high)


@compiled
def settle(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    scale: float,
    first: int,
    last: int,
    iterations: int,
    tolerance: float,
) -> float:
    """The scale at which taking turns from ``scale`` ends."""
    for _ in range(iterations):
        products, squares = _sums(lower, upper, counts, scale, first, last)
        if squares <= 0.0 or products <= 0.0:
            return scale
        found = products / squares
        if abs(found - scale) <= tolerance * scale:
            return found
        scale = found
    return scale


@compiled
def _sums(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    scale: float,
    first: int,
    last: int,
) -> tuple[float, float]:
    """Sum of x q and of q^2 over the density, q the code of x."""
    products, squares = 0.0, 0.0
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
            products += c * 0.5 * (a + b) * code_b
            squares += c * code_b * code_b
            continue
        density = c / (b - a)
        # The parts in the cells of the first and last code, then the whole cells between them.
        left, right = (code_a + 0.5) * scale, (code_b - 0.5) * scale
        products += density * 0.5 * (left * left - a * a) * code_a
        squares += density * (left - a) * code_a * code_a
        products += density * 0.5 * (b * b - right * right) * code_b
        squares += density * (b - right) * code_b * code_b
        n = code_b - code_a - 1.0
        if n > 0.0:
            # Sum of k^2 for k = code_a + 1 .. code_b - 1; the mean of a cell is its code.
            k = (n * code_a * code_a) + code_a * n * (n + 1.0) + n * (n + 1.0) * (2.0 * n + 1.0) / 6
            products += density * scale * scale * k
            squares += density * scale * k
    return products, squares
