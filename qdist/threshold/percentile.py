"""The range that holds a given share of the values (``percentile``)."""

from __future__ import annotations

import numpy as np

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels


def percentile(density: Density, levels: Levels, *, percent: float = 99.99) -> tuple[float, float]:
    """A symmetric quantizer clips ``100 - percent`` % of the |x|; an asymmetric one half of that
    at either end. Values are interpolated within a bin.
    """
    if density.is_empty:
        return 0.0, 0.0
    if levels.symmetric:
        bound = quantile(density.magnitudes(), percent / 100)
        return max(-bound, min(density.minimum, 0.0)), min(bound, max(density.maximum, 0.0))
    tail = (1 - percent / 100) / 2
    return min(quantile(density, tail), 0.0), max(quantile(density, 1 - tail), 0.0)


def quantile(density: Density, share: float) -> float:
    """The value below which ``share`` of the density lies, 0..1."""
    below = np.cumsum(density.counts)
    wanted = share * below[-1]
    i = int(np.searchsorted(below, wanted, side="left"))
    i = min(i, density.counts.size - 1)
    inside = (wanted - (below[i] - density.counts[i])) / density.counts[i]
    step = density.upper[i] - density.lower[i]
    return float(density.lower[i] + min(max(inside, 0.0), 1.0) * step)
