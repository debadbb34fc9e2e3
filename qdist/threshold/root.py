"""What a square root makes of an error in what it reads.

A magnitude, a norm or a standard deviation is the root of a sum of squares. Squares reach over
twice as many octaves as what they are squares of, so the range of least squared error keeps the few
largest and rounds the many small ones to zero; their roots are not that small. An error counts by
what it is after the root: ``sqrt(Q(x)) - sqrt(x)``, about ``e / (2 sqrt(x))``, first-order error
propagation, but exact where ``e`` is not small against ``x``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, scale_and_zero

_POINTS = (np.arange(8) + 0.5) / 8
"""Where in an interval the error is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A square root that is taken of a tensor of no negative values, or of a sum with it.
    ``name``: of the node."""

    name: str


def root_error(density: Density, low: float, high: float, levels: Levels) -> float:
    """Expected squared error of the roots of quantized values, as a share of their mean square.

    0 for a tensor of nothing but zeros. Negative values count as zeros.
    """
    scale, zero = scale_and_zero(low, high, levels)
    inside = density.lower[:, None] + (density.upper - density.lower)[:, None] * _POINTS
    x = np.maximum(inside, 0.0)
    stored = np.clip(np.rint(x / scale), levels.low - zero, levels.high - zero) * scale
    error = np.square(np.sqrt(np.maximum(stored, 0.0)) - np.sqrt(x)).mean(axis=1)
    energy = float(np.dot(density.counts, x.mean(axis=1)))
    return float(np.dot(density.counts, error)) / energy if energy > 0.0 else 0.0
