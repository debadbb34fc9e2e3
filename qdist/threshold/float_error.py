"""Ranges for floating-point types of 8 bits, by the expected error on their uneven grid.

The largest magnitude of a range becomes the type's largest number, so a range is a scale. Steps
grow with the magnitude: relative to a value they are alike in every binade, so the scale matters
only at both ends, where values are clipped and where subnormal numbers lie. The error is in closed
form on the density, as in `qdist.threshold.error`: the integral of ``(x - q(x))**2`` up to ``x`` is
that of all whole cells before ``x``, and of a part of one.

``max`` and ``percentile`` are the ranges of these names; ``mse`` has the least expected error, by a
scan and a golden section; ``auto`` the least of these in the tensor alone. The other methods
compare evenly spaced levels and mean nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.numbers.dtype import FloatType
from qdist.numbers.rounding import round_float
from qdist.stats.compiled import compiled
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.maximum import maximum
from qdist.threshold.percentile import percentile

FLOAT_METHODS = ("max", "percentile", "mse", "auto")
"""Methods that mean something on a floating-point grid."""
_SYMMETRIC = Levels(low=-127, high=127, symmetric=True)
"""Bounds of a symmetric quantizer; how many levels it has is of no account."""
_SCAN = 2.0 ** (-np.arange(0, 19) / 3)
_GOLDEN = (math.sqrt(5) - 1) / 2
_REFINEMENTS = 8


def float_threshold(
    density: Density, kind: FloatType, method: str, parameters: Mapping[str, Any] | None = None
) -> Threshold:
    """The symmetric range that a method of `FLOAT_METHODS` finds for a type with a scale.

    ``parameters``: ``percent`` of ``percentile``. Raises `KeyError` for another method.
    """
    top = max(-density.minimum, density.maximum)
    bounds = {"max": lambda: max(map(abs, maximum(density, _SYMMETRIC)))}
    bounds["percentile"] = lambda: _percentile(density, (parameters or {}).get("percent", 99.99))
    bounds["mse"] = lambda: _least_error(density, kind)
    if density.is_empty or top == 0.0:
        return _measured(density, 0.0, kind, "max" if method == "auto" else method)
    if method != "auto":
        return _measured(density, bounds[method](), kind, method)
    found = [_measured(density, bounds[name](), kind, name) for name in ("mse", "max")]
    found += [_measured(density, _percentile(density, p), kind, "percentile") for p in (99.999,)]
    return min(found, key=lambda each: each.expected_mse)


def measured_float(
    density: Density, low: float, high: float, kind: FloatType, method: str
) -> Threshold:
    """The range up to the larger of these magnitudes, with what it costs."""
    return _measured(density, max(-low, high), kind, method)


def expected_float_mse(density: Density, bound: float, kind: FloatType) -> float:
    """Mean squared error over the density when ``bound`` becomes the type's largest number, and
    what lies beyond saturates; 0 when empty."""
    if density.is_empty:
        return 0.0
    scale = bound / kind.largest if bound > 0 else 1.0
    total = _sum_error(
        density.lower / scale,
        density.upper / scale,
        density.counts,
        cells(kind),
    )
    return float(total) * scale * scale / density.total


@cache
def cells(kind: FloatType) -> NDArray[np.float64]:
    """Read-only, for every number of `positive_numbers`: where its cell begins, the integral of the
    squared error from 0 to there, and the number itself; float64[3, n]."""
    levels = positive_numbers(kind)
    middles = np.concatenate([[0.0], (levels[:-1] + levels[1:]) / 2])
    whole = ((middles[1:] - levels[:-1]) ** 3 - (middles[:-1] - levels[:-1]) ** 3) / 3
    found = np.stack([middles, np.concatenate([[0.0], np.cumsum(whole)]), levels])
    found.setflags(write=False)
    return found


def positive_numbers(kind: FloatType) -> NDArray[np.float64]:
    """Zero and all positive finite numbers of a type of 8 bits, ascending."""
    n = 1 << kind.mantissa_bits
    exponents = range(kind.least_exponent, math.frexp(kind.largest)[1])
    normal = [math.ldexp(n + m, e - kind.mantissa_bits) for e in exponents for m in range(n)]
    below = [math.ldexp(m, kind.least_exponent - kind.mantissa_bits) for m in range(n)]
    return np.array([x for x in (*below, *normal) if x <= kind.largest])


def expected_float_mse_reference(density: Density, bound: float, kind: FloatType) -> float:
    """`expected_float_mse` of point masses by the rounding itself, which it must equal."""
    scale = bound / kind.largest if bound > 0 else 1.0
    x = density.centers / scale
    stored = round_float(x.astype(np.float32), kind, saturate=True).astype(np.float64)
    return float(np.dot(density.counts, (x - stored) ** 2) * scale**2 / density.total)


def _measured(density: Density, bound: float, kind: FloatType, method: str) -> Threshold:
    low, high = -bound if density.minimum < 0 else 0.0, bound if density.maximum > 0 else 0.0
    return Threshold(
        low=low,
        high=high,
        method=method,
        clipped_share=density.share_outside(-bound, bound),
        expected_mse=expected_float_mse(density, bound, kind),
        mean_square=density.second_moment,
    )


def _percentile(density: Density, percent: float) -> float:
    return max(map(abs, percentile(density, _SYMMETRIC, percent=percent)))


def _least_error(density: Density, kind: FloatType) -> float:
    top = max(-density.minimum, density.maximum)
    bounds = top * _SCAN
    errors = [expected_float_mse(density, float(bound), kind) for bound in bounds]
    best = int(np.argmin(errors))
    high = float(bounds[max(best - 1, 0)])
    low = float(bounds[min(best + 1, bounds.size - 1)])
    tried = {float(bounds[best]): errors[best]}
    inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    for _ in range(_REFINEMENTS):
        for each in (inner, outer):
            if each not in tried:
                tried[each] = expected_float_mse(density, each, kind)
        if tried[inner] <= tried[outer]:
            high, outer = outer, inner
            inner = high - _GOLDEN * (high - low)
        else:
            low, inner = inner, outer
            outer = low + _GOLDEN * (high - low)
    return min(tried, key=lambda bound: tried[bound])


@compiled
def _sum_error(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    table: NDArray[np.float64],
) -> float:
    """Intervals ascend, so the cell of each is near that of the one before."""
    total = 0.0
    index = 0
    for i in range(lower.size):
        a, b = lower[i], upper[i]
        if b - a > 1e-12 * max(abs(a), abs(b)):
            index = _cell(abs(a), table, index)
            up_to_a = _integral(a, table, index)
            index = _cell(abs(b), table, index)
            total += counts[i] * max(_integral(b, table, index) - up_to_a, 0.0) / (b - a)
        else:
            x = abs(0.5 * (a + b))
            index = _cell(x, table, index)
            rest = x - table[2, index]
            total += counts[i] * rest * rest
    return total


@compiled
def _cell(size: float, table: NDArray[np.float64], start: int) -> int:
    """The index among `positive_numbers` of the one next to ``size >= 0``, looked for from
    ``start`` on; the last one for what saturates."""
    last = table.shape[1] - 1
    index = start
    while index < last and size > table[0, index + 1]:
        index += 1
    while index > 0 and size < table[0, index]:
        index -= 1
    return index


@compiled
def _integral(x: float, table: NDArray[np.float64], index: int) -> float:
    """The integral of the squared error from 0 to ``x``, which is odd and whose cell is known."""
    level = table[2, index]
    rest, start = abs(x) - level, table[0, index] - level
    found = table[1, index] + (rest * rest * rest - start * start * start) / 3.0
    return found if x >= 0.0 else -found
