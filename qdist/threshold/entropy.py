"""The range of least information loss (``kl``).

Method of S. Migacz, "8-bit inference with TensorRT" (GTC 2017): the |x| go into linear bins; for
every candidate bound, P is the clipped distribution with the tail added to its last bin, Q is P
squeezed into the quantizer's levels and spread back over the bins that were not empty; the bound
with the least Kullback-Leibler divergence KL(P||Q) wins. Linear bins are filled from the stored
density.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels

BINS = 2048
"""Linear bins of |x|, unless told otherwise."""


def n_halves(levels: Levels) -> int:
    """Levels that the |x| share: those of one sign."""
    return levels.high if levels.symmetric else (levels.n_steps + 1) // 2


def entropy(
    density: Density, levels: Levels, *, bins: int = BINS, stride: int = 8
) -> tuple[float, float]:
    """The symmetric bound on |x| of least divergence, cut to the range that was seen.

    ``bins``: linear bins over 0..max|x|. ``stride``: bins between candidates. With no more bins
    than levels there is nothing to squeeze, and the whole range is kept.
    """
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    top = max(-low, high)
    n_levels = n_halves(levels)
    if density.is_empty or top == 0.0 or n_levels >= bins:
        return low, high
    counts = linear_bins(density.magnitudes(), bins, top)
    # Zeros cost nothing to represent; counting them would drown the rest.
    counts[0] = counts[1] if counts.size > 1 else counts[0]
    bound = top * best_candidate(counts, n_levels, stride) / bins
    return max(-bound, low), min(bound, high)


def linear_bins(magnitudes: Density, n: int, top: float) -> NDArray[np.float64]:
    """A density of |x| over ``n`` equal bins of 0..``top``; intervals are split in proportion."""
    edges = np.linspace(0.0, top, n + 1)
    counts = np.zeros(n)
    width = magnitudes.upper - magnitudes.lower
    points = width <= 0
    index = np.minimum((magnitudes.lower[points] / top * n).astype(np.int64), n - 1)
    np.add.at(counts, index, magnitudes.counts[points])
    # The mass below each edge, from the mass below every interval's ends: exact where a sum of
    # densities is not, since an interval near zero is so narrow that its density is immense.
    share = magnitudes.counts[~points]
    after = np.cumsum(share)
    knots = np.column_stack([magnitudes.lower[~points], magnitudes.upper[~points]]).ravel()
    mass = np.column_stack([after - share, after]).ravel()
    below = np.interp(edges, knots, mass) if knots.size else np.zeros(n + 1)
    return counts + np.diff(below)


def best_candidate(counts: NDArray[np.float64], n_levels: int, stride: int) -> int:
    """How many of the bins to keep, ``n_levels .. len(counts)``; the most on ties."""
    n = counts.size
    best, best_divergence = n, np.inf
    for kept in range(n, n_levels - 1, -stride):
        divergence = kl_divergence(counts, kept, n_levels)
        if divergence < best_divergence:
            best, best_divergence = kept, divergence
    return best


def kl_divergence(counts: NDArray[np.float64], kept: int, n_levels: int) -> float:
    """KL(P||Q) in nats when the first ``kept`` bins share ``n_levels`` levels."""
    inside = counts[:kept]
    p = inside.copy()
    p[-1] += counts[kept:].sum()
    starts = (np.arange(n_levels) * kept) // n_levels
    mass = np.add.reduceat(inside, starts)
    filled = (inside > 0).astype(np.float64)
    n_filled = np.add.reduceat(filled, starts)
    spread = np.divide(mass, n_filled, out=np.zeros_like(mass), where=n_filled > 0)
    lengths = np.diff(np.append(starts, kept))
    q = np.repeat(spread, lengths) * filled
    p_sum, q_sum = p.sum(), q.sum()
    if p_sum == 0 or q_sum == 0:
        return np.inf
    p, q = p / p_sum, q / q_sum
    some = p > 0
    # A bin that only the folded tail fills has no level of its own; give it a trace of mass.
    q = np.maximum(q[some], 1e-12)
    return float(np.sum(p[some] * np.log(p[some] / q)))
