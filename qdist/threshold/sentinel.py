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
    """Take off large negative values that lie beyond an empty gap from all the others.

    Where nothing else was seen there is no telling, and nothing is taken off.
    """
    if density.is_empty or density.minimum > -LEAST_MAGNITUDE:
        return Split(body=density, n_sentinels=0.0)
    # Ascending: each interval's successors are all of smaller magnitude, or positive.
    body_bound = np.maximum(-density.lower, density.maximum)[1:]
    near = -density.upper[:-1]
    beyond = (near >= LEAST_MAGNITUDE) & (near >= LEAST_GAP * body_bound)
    n = int(np.flatnonzero(beyond)[-1]) + 1 if beyond.any() else 0
    body = Density(lower=density.lower[n:], upper=density.upper[n:], counts=density.counts[n:])
    return Split(body=body, n_sentinels=float(density.counts[:n].sum()))
