"""Smallest and largest value searched together (``improved_mse``, ``improved_kl``).

SlimAI's single-shot calibration: over the space of all pairs of a minimum and a maximum, the pair
with the least squared error, or the least KL divergence, between a tensor and its quantized form,
on a histogram of ``histogram_bins`` linear bins. A symmetric quantizer leaves one number to search.

``improved_mse`` measures the squared error on the linear bins' density, ``improved_kl`` the
divergence of Migacz's method with a tail on either side. Both are searched on a grid of fractions
of either bound, which is then refined around its best pair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.divergence_kernels import fill_values
from qdist.threshold.joint_kernels import search_both
from qdist.threshold.mse import PAIRS, mse
from qdist.threshold.mse_kernels import least_error_of_both

BINS = 10240
"""Linear bins that SlimAI's document advises."""
_ZOOMS = 4


def improved_mse(density: Density, levels: Levels, *, bins: int = BINS) -> tuple[float, float]:
    """The pair of bounds of least squared error on ``bins`` linear bins of the whole range."""
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    if density.is_empty or low == high:
        return low, high
    linear = on_linear_bins(density, bins)
    if np.count_nonzero(linear.counts[linear.lower < linear.upper]) <= 1:
        return low, high  # One value, or one with zeros: its bin is wider than it is.
    if levels.symmetric or low == 0.0 or high == 0.0:
        found_low, found_high = mse(linear, levels)
    else:
        found_low, found_high = least_error_of_both(
            linear.lower, linear.upper, linear.counts, levels.low, levels.high, PAIRS, _ZOOMS
        )
    return max(found_low, low), min(found_high, high)


def on_linear_bins(density: Density, bins: int) -> Density:
    """The density as ``bins`` equal intervals see it; of those that hold nothing none is left.

    Zero stays a point of its own where the density has it, since it costs nothing.
    """
    is_zero = (density.lower == 0.0) & (density.upper == 0.0)
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    edges = np.linspace(low, high, bins + 1)
    counts = fill_values(
        density.lower[~is_zero], density.upper[~is_zero], density.counts[~is_zero], low, high, bins
    )
    some = counts > 0
    lower, upper, kept = edges[:-1][some], edges[1:][some], counts[some]
    if is_zero.any():
        place = int(np.searchsorted(lower, 0.0))
        lower, upper = np.insert(lower, place, 0.0), np.insert(upper, place, 0.0)
        kept = np.insert(kept, place, density.counts[is_zero].sum())
    return Density(lower=lower, upper=upper, counts=kept)


def improved_kl(density: Density, levels: Levels, *, bins: int = BINS) -> tuple[float, float]:
    """The pair of bounds of least divergence on ``bins`` linear bins of the whole range.

    With no more bins than levels there is nothing to squeeze, and the whole range is kept.
    """
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    n_levels = n_joint_levels(levels)
    if density.is_empty or low == high or n_levels >= bins:
        return low, high
    top = max(-low, high)
    start, stop = (-top, top) if levels.symmetric else (low, high)
    counts = fill_values(density.lower, density.upper, density.counts, start, stop, bins)
    zero = (0.0 - start) / (stop - start) * bins
    _level_zero(counts, int(min(zero, bins - 1)))
    first, last = search_both(counts, zero, n_levels, levels.symmetric, PAIRS, _ZOOMS)
    step = (stop - start) / bins
    # Edges of the outermost bins are the bounds themselves, whatever the division rounds to.
    found_low = low if first == 0 and not levels.symmetric else (first - zero) * step
    found_high = high if last == bins and not levels.symmetric else (last - zero) * step
    return max(min(found_low, 0.0), low), min(max(found_high, 0.0), high)


def n_joint_levels(levels: Levels) -> int:
    """Levels that the values of both signs share."""
    return 2 * levels.high + 1 if levels.symmetric else levels.n_steps + 1


def _level_zero(counts: NDArray[np.float64], zero: int) -> None:
    """Give the bin of zero what its neighbours have: zeros cost nothing to represent, and counting
    them would drown the rest."""
    beside = [counts[i] for i in (zero - 1, zero + 1) if 0 <= i < counts.size]
    counts[zero] = min(counts[zero], float(np.mean(beside)))
