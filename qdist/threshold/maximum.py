"""The whole range that was seen (``max``; Icraft's ``null``, Knight's ``min_max``)."""

from __future__ import annotations

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels


def maximum(density: Density, levels: Levels) -> tuple[float, float]:
    """Smallest and largest value, zero included."""
    return min(density.minimum, 0.0), max(density.maximum, 0.0)
