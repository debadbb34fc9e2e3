"""Expected squared error of a uniform quantizer on a density, in closed form.

Within one interval the values are taken as evenly spread. Then the error of rounding is a sum of
integrals of (x - round(x/s) s)^2, whose antiderivative is ``n s^3/12 + r^3/3`` with ``n`` the
nearest level of ``x`` and ``r = x - n s``; beyond the range it is the integral of (x - bound)^2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, Threshold, scale_and_zero
from qdist.threshold.kernels import sum_squared_error


def expected_mse(density: Density, low: float, high: float, levels: Levels) -> float:
    """Mean squared error over the density of quantizing into ``low .. high``; 0 when empty."""
    if density.is_empty:
        return 0.0
    scale, zero = scale_and_zero(low, high, levels)
    return mean_squared_error(density, scale, zero, levels)


def measured(
    density: Density, low: float, high: float, levels: Levels, *, method: str, note: str = ""
) -> Threshold:
    """The range ``low .. high`` with what it costs on the density."""
    return Threshold(
        low=low,
        high=high,
        method=method,
        clipped_share=density.share_outside(low, high),
        expected_mse=expected_mse(density, low, high, levels),
        mean_square=density.second_moment,
        note=note,
    )


def mean_squared_error(density: Density, scale: float, zero: int, levels: Levels) -> float:
    """The same for a scale and zero point: mean squared error over the density."""
    first, last = levels.low - zero, levels.high - zero
    total = sum_squared_error(density.lower, density.upper, density.counts, scale, first, last)
    return float(total) / density.total


def mean_squared_error_reference(
    density: Density, scale: float, zero: int, levels: Levels
) -> float:
    """`mean_squared_error` in plain NumPy: the definition that the compiled loop must equal."""
    bottom, top = (levels.low - zero) * scale, (levels.high - zero) * scale
    lower, upper = density.lower, density.upper
    width = upper - lower
    wide = width > 1e-12 * np.maximum(np.abs(lower), np.abs(upper))
    inside_low = np.clip(lower, bottom, top)
    inside_high = np.clip(upper, bottom, top)
    total = _rounding(inside_high, scale) - _rounding(inside_low, scale)
    total += _cube(np.minimum(upper, bottom) - bottom) - _cube(np.minimum(lower, bottom) - bottom)
    total += _cube(np.maximum(upper, top) - top) - _cube(np.maximum(lower, top) - top)
    middle = np.clip(np.rint(density.centers / scale), levels.low - zero, levels.high - zero)
    point = (density.centers - middle * scale) ** 2
    per_value = np.where(wide, total / np.where(wide, width, 1.0), point)
    return float(np.dot(density.counts, np.maximum(per_value, 0.0)) / density.total)


def _rounding(x: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Antiderivative of the squared rounding error, at ``x``."""
    level = np.rint(x / scale)
    rest = x - level * scale
    return level * scale**3 / 12 + rest**3 / 3


def _cube(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x**3 / 3
