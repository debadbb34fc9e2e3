"""Values that mean "masked" rather than a magnitude.

Attention masks add -3.4e38, -1e9, -65504 or -10000 to the scores that must not count. Seen as
magnitudes they would set the range and flatten every real value to one level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdist.stats.histogram import Density

LEAST_MAGNITUDE = 1e3
"""Sentinels in use start at 1e4; adding a score to them keeps them far below this."""
LEAST_GAP = 16.0
"""How many times larger than the largest ordinary magnitude a sentinel has to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A density without its sentinels, and how many values those were."""

    body: Density
    n_sentinels: float


def split_sentinels(density: Density) -> Split:
    """Take off large negative values that lie beyond an empty gap from all the others."""
    if density.is_empty or density.minimum > -LEAST_MAGNITUDE:
        return Split(body=density, n_sentinels=0.0)
    is_far = density.upper <= -LEAST_MAGNITUDE
    body_bound = float(
        np.max(np.maximum(np.abs(density.lower), np.abs(density.upper))[~is_far], initial=0.0)
    )
    nearest = float(-density.upper[is_far].max())
    if nearest < LEAST_GAP * body_bound:
        return Split(body=density, n_sentinels=0.0)
    keep = ~is_far
    body = Density(
        lower=density.lower[keep], upper=density.upper[keep], counts=density.counts[keep]
    )
    return Split(body=body, n_sentinels=float(density.counts[is_far].sum()))
