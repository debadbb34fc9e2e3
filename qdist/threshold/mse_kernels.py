"""The searches for the range of least squared error as compiled loops.

The error of a range has three parts on either side of zero: what rounds to zero, what is clipped,
and what lies between. The first two are read off running sums, taken from zero outwards and from
the far end inwards, so that no small sum is the difference of two large ones; only the third is a
loop over intervals. `qdist.threshold.error` holds the definition, and a test compares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled

SYMMETRIC, POSITIVE, NEGATIVE, TOGETHER, UPPER, LOWER = 0, 1, 2, 3, 4, 5
"""What a search moves: both bounds alike, the only one there is, both in proportion, or one."""
_FEW_STEPS = 32


@compiled
def _side(
    lower: NDArray[np.float64], upper: NDArray[np.float64], counts: NDArray[np.float64], sign: float
) -> NDArray[np.float64]:
    """The |x| of one sign, float64[8, n], ascending.

    Rows: near and far end, count, count over width; running sums from zero of c x^2 (before each);
    running sums from the far end of c, c x, c x^2 (from each on).
    """
    n = lower.size
    found = np.zeros((8, n + 1))
    k = 0
    for j in range(n):
        i = j if sign > 0 else n - 1 - j
        a = lower[i] if sign > 0 else -upper[i]
        b = upper[i] if sign > 0 else -lower[i]
        if b < 0.0 or (b == 0.0 and sign < 0):
            continue
        c = counts[i]
        if a < 0.0:
            c = c * b / (b - a)
            a = 0.0
        if c <= 0.0:
            continue
        found[0, k], found[1, k], found[2, k] = a, b, c
        found[3, k] = c / (b - a) if b - a > 1e-12 * b else 0.0
        found[4, k + 1] = found[4, k] + c * (a * a + a * b + b * b) / 3.0
        k += 1
    for j in range(k - 1, -1, -1):
        a, b, c = found[0, j], found[1, j], found[2, j]
        found[5, j] = found[5, j + 1] + c
        found[6, j] = found[6, j + 1] + c * (a + b) / 2.0
        found[7, j] = found[7, j + 1] + c * (a * a + a * b + b * b) / 3.0
    return found[:, : k + 1]


@compiled
def _side_error(side: NDArray[np.float64], scale: float, n_levels: float) -> float:
    """Summed squared error of rounding |x| to ``0 .. n_levels`` times ``scale``."""
    n = side.shape[1] - 1
    if n == 0:
        return 0.0
    if n_levels <= 0.0:
        return side[7, 0]
    top = n_levels * scale
    near, far = side[0, :n], side[1, :n]
    first = np.searchsorted(far, 0.5 * scale, side="right")
    last = max(np.searchsorted(near, top, side="left"), first)
    total = side[4, first]
    if last < n:
        total += max(side[7, last] - 2.0 * top * side[6, last] + top * top * side[5, last], 0.0)
    inverse, cube = 1.0 / scale, scale * scale * scale / 12.0
    for i in range(first, last):
        a, b = near[i], far[i]
        if side[3, i] == 0.0:
            x = 0.5 * (a + b)
            rest = x - min(np.rint(x * inverse), n_levels) * scale
            total += side[2, i] * rest * rest
            continue
        inner = min(b, top)
        level_a, level_b = np.rint(a * inverse), min(np.rint(inner * inverse), n_levels)
        rest_a, rest_b = a - level_a * scale, inner - level_b * scale
        if level_a == level_b and b <= top:
            total += side[2, i] * (rest_a * rest_a + rest_a * rest_b + rest_b * rest_b) / 3.0
            continue
        part = (rest_b**3 - rest_a**3) / 3.0 + (level_b - level_a) * cube
        if b > top:
            part += (b - top) ** 3 / 3.0
        total += side[3, i] * max(part, 0.0)
    return total


@compiled
def _error(
    plus: NDArray[np.float64],
    minus: NDArray[np.float64],
    low: float,
    high: float,
    first: int,
    last: int,
    is_symmetric: bool,
) -> float:
    """Summed squared error of the quantizer that `clip.scale_and_zero` makes of a range."""
    scale = max(-low, high) / last if is_symmetric else (high - low) / (last - first)
    if not scale > 0.0:
        return np.inf
    zero = 0.0 if is_symmetric else min(max(np.rint(first - low / scale), first), last)
    return _side_error(plus, scale, last - zero) + _side_error(minus, scale, zero - first)


@compiled
def _cost(
    plus: NDArray[np.float64],
    minus: NDArray[np.float64],
    low: float,
    high: float,
    t: float,
    mode: int,
    first: int,
    last: int,
) -> float:
    is_symmetric = mode == SYMMETRIC
    if mode == SYMMETRIC:
        low, high = -t, t
    elif mode == POSITIVE:
        low, high = 0.0, t
    elif mode == NEGATIVE:
        low, high = -t, 0.0
    elif mode == TOGETHER:
        low, high = low * t, high * t
    elif mode == UPPER:
        high = t
    else:
        low = -t
    return _error(plus, minus, low, high, first, last, is_symmetric)


@compiled
def _least(
    plus: NDArray[np.float64],
    minus: NDArray[np.float64],
    low: float,
    high: float,
    top: float,
    mode: int,
    first: int,
    last: int,
    scan: NDArray[np.float64],
) -> float:
    """The argument in (0, ``top``] of least cost: the best of ``scan * top``, ascending, then of
    even steps between its neighbours, refined by golden sections. The top itself wins ties.

    Where single values leave the range the cost has several dips between two points of a scan, of
    which golden sections alone would find any.
    """
    n = scan.size
    best_i, best_cost = n - 1, np.inf
    for i in range(n - 1, -1, -1):
        found = _cost(plus, minus, low, high, scan[i] * top, mode, first, last)
        if found < best_cost:
            best_i, best_cost = i, found
    best = scan[best_i] * top
    left, right = scan[max(best_i - 1, 0)] * top, scan[min(best_i + 1, n - 1)] * top
    start, step = left, (right - left) / 16.0
    for i in range(15, 0, -1):
        t = start + i * step
        found = _cost(plus, minus, low, high, t, mode, first, last)
        if found < best_cost:
            best, best_cost = t, found
    left, right = max(best - step, start), min(best + step, right)
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    a, b = right - golden * (right - left), left + golden * (right - left)
    cost_a = _cost(plus, minus, low, high, a, mode, first, last)
    cost_b = _cost(plus, minus, low, high, b, mode, first, last)
    for _ in range(8):
        if cost_a < cost_b:
            right, b, cost_b = b, a, cost_a
            a = right - golden * (right - left)
            cost_a = _cost(plus, minus, low, high, a, mode, first, last)
        else:
            left, a, cost_a = a, b, cost_b
            b = left + golden * (right - left)
            cost_b = _cost(plus, minus, low, high, b, mode, first, last)
    if min(cost_a, cost_b) < best_cost:
        best = a if cost_a < cost_b else b
    return best


@compiled
def _near(scan: NDArray[np.float64], fraction: float) -> NDArray[np.float64]:
    """The part of an ascending ``scan`` from half the fraction to twice it."""
    start = max(np.searchsorted(scan, 0.5 * fraction, side="right") - 1, 0)
    stop = min(np.searchsorted(scan, 2.0 * fraction, side="left") + 1, scan.size)
    return scan[start:stop]


@compiled
def least_error(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    first: int,
    last: int,
    is_symmetric: bool,
    rounds: int,
    scan: NDArray[np.float64],
    pairs: NDArray[np.float64],
) -> tuple[float, float]:
    """The bounds of least squared error over a density that is not all zero. ``scan``: fractions of
    a bound to look at; ``pairs``: of both, where there are few levels."""
    plus, minus = _side(lower, upper, counts, 1.0), _side(lower, upper, counts, -1.0)
    low, high = min(lower[0], 0.0), max(upper[-1], 0.0)
    if is_symmetric:
        t = _least(plus, minus, low, high, max(-low, high), SYMMETRIC, first, last, scan)
        return -t, t
    if low == 0.0:
        return 0.0, _least(plus, minus, low, high, high, POSITIVE, first, last, scan)
    if high == 0.0:
        return -_least(plus, minus, low, high, -low, NEGATIVE, first, last, scan), 0.0
    # Both shrink together first: from the full range, moving one end alone gains little.
    t = _least(plus, minus, low, high, 1.0, TOGETHER, first, last, scan)
    best_low, best_high = low * t, high * t
    for turn in range(rounds):
        old_low, old_high = best_low, best_high
        # The first turn looks everywhere, the others near what it found.
        near = _near(scan, best_high / high) if turn else scan
        best_high = _least(plus, minus, best_low, best_high, high, UPPER, first, last, near)
        near = _near(scan, best_low / low) if turn else scan
        best_low = -_least(plus, minus, best_low, best_high, -low, LOWER, first, last, near)
        if abs(best_low - old_low) <= 1e-3 * -best_low and (
            abs(best_high - old_high) <= 1e-3 * best_high
        ):
            break
    if last - first >= _FEW_STEPS:
        return best_low, best_high
    # In few levels the bounds depend on one another, and taking turns ends where neither moves
    # alone, which may be far from the best pair.
    other_low, other_high = least_error_of_both(lower, upper, counts, first, last, pairs, 4)
    found = _error(plus, minus, best_low, best_high, first, last, False)
    if _error(plus, minus, other_low, other_high, first, last, False) < found:
        return other_low, other_high
    return best_low, best_high


@compiled
def least_error_of_both(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    first: int,
    last: int,
    coarse: NDArray[np.float64],
    n_zooms: int,
) -> tuple[float, float]:
    """The best pair of bounds on a grid of both, refined around it ``n_zooms`` times.

    ``coarse``: fractions of either bound, ascending, the last 1. Both signs occur.
    """
    plus, minus = _side(lower, upper, counts, 1.0), _side(lower, upper, counts, -1.0)
    low, high = lower[0], upper[-1]
    best_a, best_b, best = 1.0, 1.0, np.inf
    for i in range(coarse.size - 1, -1, -1):
        for j in range(coarse.size - 1, -1, -1):
            a, b = coarse[i], coarse[j]
            found = _error(plus, minus, low * a, high * b, first, last, False)
            if found < best:
                best_a, best_b, best = a, b, found
    step = coarse[1] / coarse[0]
    for _ in range(n_zooms):
        centre_a, centre_b = best_a, best_b
        fine = step ** (1.0 / 3.0)
        for i in range(-2, 3):
            for j in range(-2, 3):
                a, b = min(centre_a * fine**i, 1.0), min(centre_b * fine**j, 1.0)
                found = _error(plus, minus, low * a, high * b, first, last, False)
                if found < best:
                    best_a, best_b, best = a, b, found
        step = fine
    return low * best_a, high * best_b
