"""Ranges that a user has a hand in: Sophgo's ``th_scale`` and ``threshold``.

``th_scale`` multiplies the bound that a method found, ``threshold`` takes its place. Either gives a
`Threshold` with the clipped share and the expected error of the range that came out of it.
"""

from __future__ import annotations

import math

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.error import measured


def scale_threshold(found: Threshold, factor: float, density: Density, levels: Levels) -> Threshold:
    """Both bounds times ``factor`` > 0; above 1 the range may exceed what was seen.

    Raises `ValueError` for a factor that is not finite and positive.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"a range is scaled by a finite factor above 0, got {factor}")
    low, high = found.low * factor, found.high * factor
    return measured(density, low, high, levels, method=found.method, note=found.note)


def fixed_threshold(bound: float, density: Density, levels: Levels) -> Threshold:
    """The range up to ``bound`` > 0 on every side of zero that has values, whatever was seen there.

    A tensor without values gets it on both sides. Raises `ValueError` for a bound that is not
    finite and positive.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise ValueError(f"a threshold is finite and above 0, got {bound}")
    low = -bound if density.minimum < 0.0 or density.is_empty else 0.0
    high = bound if density.maximum > 0.0 or low == 0.0 or density.is_empty else 0.0
    return measured(density, low, high, levels, method="fixed")
