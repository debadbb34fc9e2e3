"""The range of least expected squared error (``mse``; Icraft's ``ems``).

The criterion is Max's and Lloyd's (J. Max, "Quantizing for minimum distortion", 1960) for a
uniform quantizer. The error is a nearly unimodal function of each bound, with small dips where
single values leave the range, so a coarse scan over fractions of the maximum, a fine one around its
best and a golden-section refinement find the minimum. The two bounds of an asymmetric quantizer
take turns; with few levels all pairs are looked at too.
"""

from __future__ import annotations

import numpy as np

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.mse_kernels import least_error

_SCAN = np.concatenate([np.geomspace(1 / 4096, 1 / 4, 21)[:-1], np.linspace(1 / 4, 1, 31)])
PAIRS = np.geomspace(1 / 64, 1, 19)
"""Fractions of either bound, where both are searched together."""


def mse(density: Density, levels: Levels, *, rounds: int = 3) -> tuple[float, float]:
    """The bounds of least expected error; ``rounds`` of taking turns when asymmetric."""
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    if density.is_empty or low == high:
        return low, high
    found_low, found_high = least_error(
        density.lower,
        density.upper,
        density.counts,
        levels.low,
        levels.high,
        levels.symmetric,
        rounds,
        _SCAN,
        PAIRS,
    )
    return max(found_low, low), min(found_high, high)
