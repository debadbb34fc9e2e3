"""How far stored bins pin a range down that is found on linear bins.

A bin of the store covers several linear ones near the maximum, and how its values lie among these
is not known. A divergence counts every linear bin, and is often so flat that this alone moves the
place of its least. So the counts are placed anew a few times, as chance might have it, and the
range is found on each: where it moves, a true histogram of as many linear bins may give any of
these ranges. What would be lost is little, since the divergence is flat there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.divergence_kernels import fill_magnitudes
from qdist.threshold.entropy import BINS, ICRAFT_BINS
from qdist.threshold.registry import find_threshold, resolve

DIVERGENCES = {"kl": BINS, "symkl": BINS, "jsd": BINS, "kl_v2": BINS, "kld": ICRAFT_BINS}
"""Methods on linear bins of |x|, and how many these are unless told otherwise."""
NEAR = 0.01
"""Bounds that differ by less than this share agree."""
PLACEMENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinning:
    """The largest magnitude of a range, and the least and most of those that other placements of
    the same counts give."""

    bound: float
    least: float
    most: float

    @property
    def is_pinned(self) -> bool:
        """Whether all of them agree."""
        furthest = max(self.bound - self.least, self.most - self.bound)
        return furthest <= NEAR * self.bound


def pinning(
    density: Density,
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    placements: int = PLACEMENTS,
) -> Pinning | None:
    """How far the range of a divergence is pinned down; None for other methods, and where there is
    nothing to search. The placements are the same every time."""
    name, given = resolve(method, parameters)
    given = {key: value for key, value in given.items() if key not in ("th_scale", "threshold")}
    if name not in DIVERGENCES or density.is_empty:
        return None
    found = find_threshold(density, levels, name, given)
    bound, top = max(-found.low, found.high), max(-density.minimum, density.maximum)
    if found.method != name or top <= 0.0:
        return None
    n = int(given.get("bins", DIVERGENCES[name]))
    counts = fill_magnitudes(density.lower, density.upper, density.counts, top, n)
    spread = np.sqrt(placing_variance(density.lower, density.upper, density.counts, top, n))
    random = np.random.default_rng(0)
    bounds = [bound]
    for _ in range(placements):
        moved = np.rint(counts + spread * random.standard_normal(n))
        # What lies within one linear bin stays there.
        placed = np.where(spread > 0.0, np.maximum(moved, 0.0), counts)
        other = find_threshold(_of_bins(placed, top, density), levels, name, given)
        bounds.append(max(-other.low, other.high))
    return Pinning(bound=bound, least=min(bounds), most=max(bounds))


def _of_bins(counts: NDArray[np.float64], top: float, like: Density) -> Density:
    """Point masses in the middle of linear bins, with as many signs as ``like`` has."""
    centers = (np.arange(counts.size) + 0.5) * (top / counts.size)
    ends = np.array([-top if like.minimum < 0.0 < like.maximum else 0.0]), np.array([top])
    points = np.concatenate([ends[0], centers, ends[1]])
    return Density(lower=points, upper=points, counts=np.concatenate([[0.0], counts, [0.0]]))


@compiled
def placing_variance(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    top: float,
    n: int,
) -> NDArray[np.float64]:
    """Variance of the count in each of ``n`` bins of |x| when every value of an interval lies
    anywhere in it."""
    found = np.zeros(n)
    for i in range(lower.size):
        a, b = abs(lower[i]) / top * n, abs(upper[i]) / top * n
        if lower[i] < 0.0 < upper[i] or a == b:
            continue  # Around zero, where all is one bin; or a value that is known.
        a, b = min(a, b), max(a, b)
        for k in range(min(int(a), n - 1), min(int(b), n - 1) + 1):
            share = max(min(k + 1.0, b) - max(float(k), a), 0.0) / (b - a)
            found[k] += counts[i] * share * (1.0 - share)
    return found
