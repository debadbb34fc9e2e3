"""The clip that an assumed distribution has (``aciq``).

R. Banner, Y. Nahshan, D. Soudry, "Post training 4-bit quantization of convolutional networks for
rapid-deployment" (NeurIPS 2019). The values are taken as Laplace's or Gauss's; then the expected
squared error of clipping at ``mean +- a`` and rounding to ``2^M`` levels has a closed form, with
one minimum. For a Laplace distribution of mean deviation b it is

    2 b^2 e^(-a/b) + a^2 / (3 4^M),

for a Gauss distribution of deviation s

    (a^2 + s^2)(1 - erf(a / (sqrt2 s))) + a^2 / (3 4^M) - sqrt(2/pi) a s e^(-a^2 / (2 s^2)).

The zero of the derivative is solved for, for any number of levels. After a ReLU the range is
``0 .. a``, half as wide for as many levels: the clip is that of one bit more, of the distribution
before it, which is estimated from the values that are not zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels

DISTRIBUTIONS = ("fit", "laplace", "gauss")


@cache
def optimal_clip(distribution: str, n_levels: float, *, one_sided: bool = False) -> float:
    """Where to clip, in mean deviations (``laplace``) or standard deviations (``gauss``).

    ``n_levels``: of the quantizer, ``2^M`` for M bits. ``one_sided``: after a ReLU. Raises
    `ValueError` for another distribution or fewer than 2 levels.

    >>> [round(optimal_clip(name, 2**8), 4) for name in ("laplace", "gauss")]
    [9.8968, 3.924]
    """
    if distribution not in ("laplace", "gauss") or n_levels < 2:
        raise ValueError(f"no clip of a {distribution} distribution at {n_levels} levels")
    four_to_bits = float(n_levels) ** 2 * (4.0 if one_sided else 1.0)
    slope = _laplace_slope if distribution == "laplace" else _gauss_slope
    # A quarter of a second to import, which workers that need no clip should not pay.
    from scipy.optimize import brentq

    # At 2 levels the zero lies above 1; at 2^32 still below 50.
    return float(brentq(slope, 0.1, 60.0, args=(four_to_bits,), xtol=1e-12, rtol=1e-12))


def _laplace_slope(a: float, four_to_bits: float) -> float:
    """Half the derivative of the error by the clip, at b = 1."""
    return a / (3.0 * four_to_bits) - math.exp(-a)


def _gauss_slope(a: float, four_to_bits: float) -> float:
    """Half the derivative of the error by the clip, at s = 1."""
    tail = a * math.erfc(a / math.sqrt(2.0))
    return tail - math.sqrt(2.0 / math.pi) * math.exp(-a * a / 2.0) + a / (3.0 * four_to_bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a density tells of the distribution that it came from: its ``mean``, the mean deviation
    ``b`` and the standard deviation ``sigma`` around it. ``one_sided``: they are those of the
    distribution around zero before a ReLU."""

    mean: float
    b: float
    sigma: float
    one_sided: bool

    @property
    def likelier(self) -> str:
        """The distribution under which the density is likelier, each with its own estimate."""
        if not (self.b > 0 and self.sigma > 0):
            return "laplace"
        # Mean log-likelihoods: -(ln 2b + 1) and -(ln(2 pi s^2) + 1) / 2.
        laplace = math.log(2.0 * self.b) + 1.0
        gauss = 0.5 * (math.log(2.0 * math.pi) + 1.0) + math.log(self.sigma)
        return "gauss" if gauss < laplace else "laplace"


def fit(density: Density) -> Fit:
    """The estimates. A density of one sign is taken as what a ReLU left."""
    is_positive, is_negative = density.minimum >= 0.0, density.maximum <= 0.0
    if is_positive or is_negative:
        some = density.upper > 0.0 if is_positive else density.lower < 0.0
        lower, upper, counts = density.lower[some], density.upper[some], density.counts[some]
        total = counts.sum()
        if total <= 0:
            return Fit(mean=0.0, b=0.0, sigma=0.0, one_sided=True)
        # Mirrored at zero the distribution has mean 0, so its deviations are the moments.
        b = float(np.dot(counts, np.abs(lower + upper)) / 2.0 / total)
        square = float(np.dot(counts, _mean_square(lower, upper)) / total)
        return Fit(mean=0.0, b=b, sigma=math.sqrt(square), one_sided=True)
    lower, upper, counts, total = density.lower, density.upper, density.counts, density.total
    mean = float(np.dot(counts, density.centers) / total)
    left, right = lower - mean, upper - mean
    width = right - left
    # An interval around the mean has its deviations on both sides.
    around = (left < 0) & (right > 0)
    deviation = np.where(
        around,
        (left**2 + right**2) / (2.0 * np.where(around, width, 1.0)),
        np.abs(left + right) / 2,
    )
    b = float(np.dot(counts, deviation) / total)
    square = float(np.dot(counts, _mean_square(left, right)) / total)
    return Fit(mean=mean, b=b, sigma=math.sqrt(square), one_sided=False)


def aciq(density: Density, levels: Levels, *, distribution: str = "fit") -> tuple[float, float]:
    """The bounds of Banner et al., cut to the range that was seen.

    ``distribution``: ``laplace``, ``gauss``, or ``fit`` for the likelier one. A symmetric
    quantizer has half its levels for a tensor of one sign, so its clip is that of two signs.
    """
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    if density.is_empty or low == high:
        return low, high
    found = fit(density)
    name = found.likelier if distribution == "fit" else distribution
    n_levels = 2.0 * levels.high + 1.0 if levels.symmetric else levels.n_steps + 1.0
    clip = optimal_clip(name, n_levels, one_sided=found.one_sided and not levels.symmetric)
    reach = clip * (found.b if name == "laplace" else found.sigma)
    if levels.symmetric:
        bound = abs(found.mean) + reach
        return max(-bound, low), min(bound, high)
    return max(min(found.mean - reach, 0.0), low), min(max(found.mean + reach, 0.0), high)


def _mean_square(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    return (lower**2 + lower * upper + upper**2) / 3.0
