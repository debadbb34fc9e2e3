"""How far stored bins pin a range down that is found on linear bins.

A bin of the store covers several linear ones near the maximum, and how its values lie among these
is not known. A divergence counts every linear bin, and is often so flat that this alone moves the
place of its least; the squared error of a pair of bounds is flat more seldom. So the counts are
placed anew a few times, as chance might have it, and the range is found on each: where it moves, a
true histogram of as many linear bins may give any of these ranges. What would be lost is little,
since the criterion is flat there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.divergence_kernels import fill_magnitudes, fill_values
from qdist.threshold.entropy import BINS, ICRAFT_BINS
from qdist.threshold.improved import BINS as JOINT_BINS
from qdist.threshold.registry import find_threshold, resolve

DIVERGENCES = {"kl": BINS, "symkl": BINS, "jsd": BINS, "kl_v2": BINS, "kld": ICRAFT_BINS}
"""Methods on linear bins of |x|, and how many these are unless told otherwise."""
PAIRS = {"improved_mse": JOINT_BINS}
"""Methods on linear bins of both signs, which find two bounds."""
NEAR = 0.01
"""Bounds that differ by less than this share agree: of the bound, or of the width of a pair."""
PLACEMENTS, PAIR_PLACEMENTS = 4, 8
"""Placements that are tried: more of them for pairs of bounds, which move less often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinning:
    """A bound, and the least and most of those that other placements of the same counts give: the
    largest magnitude of a range, or that end of a pair which moves most. ``width``: what moves are
    shares of."""

    bound: float
    least: float
    most: float
    width: float

    @property
    def is_pinned(self) -> bool:
        """Whether all of them agree."""
        furthest = max(self.bound - self.least, self.most - self.bound)
        return furthest <= NEAR * self.width


def pinning(
    density: Density,
    levels: Levels,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    placements: int | None = None,
) -> Pinning | None:
    """How far the range of a method on linear bins is pinned down; None for other methods, and
    where there is nothing to search. The placements are the same every time."""
    name, given = resolve(method, parameters)
    given = {key: value for key, value in given.items() if key not in ("th_scale", "threshold")}
    if name not in DIVERGENCES | PAIRS or density.is_empty:
        return None
    found = find_threshold(density, levels, name, given)
    top = max(-density.minimum, density.maximum)
    if found.method != name or top <= 0.0:
        return None
    n = int(given.get("bins", (DIVERGENCES | PAIRS)[name]))
    place = _signed if name in PAIRS else _magnitudes
    usual = PAIR_PLACEMENTS if name in PAIRS else PLACEMENTS
    placements = usual if placements is None else placements
    others = [find_threshold(other, levels, name, given) for other in place(density, n, placements)]
    ranges = np.array([(each.low, each.high) for each in (found, *others)])
    if name in DIVERGENCES:
        bounds = np.maximum(-ranges[:, 0], ranges[:, 1])
        width = bounds[0]
    else:
        bounds = ranges[:, int(np.argmax(np.ptp(ranges, axis=0)))]
        width = found.high - found.low
    return Pinning(
        bound=float(bounds[0]),
        least=float(bounds.min()),
        most=float(bounds.max()),
        width=float(width),
    )


def _magnitudes(density: Density, n: int, placements: int) -> Iterator[Density]:
    """Other placements in ``n`` bins of |x|: point masses in their middles, with as many signs."""
    top = max(-density.minimum, density.maximum)
    lower, upper = density.lower, density.upper
    counts = fill_magnitudes(lower, upper, density.counts, top, n)
    spread = np.sqrt(placing_variance(lower, upper, density.counts, top, n))
    centers = (np.arange(n) + 0.5) * (top / n)
    end = -top if density.minimum < 0.0 < density.maximum else 0.0
    points = np.concatenate([[end], centers, [top]])
    for placed in _placed(counts, spread, placements):
        yield Density(lower=points, upper=points, counts=np.concatenate([[0.0], placed, [0.0]]))


def _signed(density: Density, n: int, placements: int) -> Iterator[Density]:
    """Other placements in ``n`` bins between the extrema or zero; zeros stay where they are."""
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    is_zero = (density.lower == 0.0) & (density.upper == 0.0)
    lower, upper, held = (part[~is_zero] for part in (density.lower, density.upper, density.counts))
    counts = fill_values(lower, upper, held, low, high, n)
    spread = np.sqrt(placing_variance(lower - low, upper - low, held, high - low, n))
    edges = np.linspace(low, high, n + 1)
    n_zeros = float(density.counts[is_zero].sum())
    for placed in _placed(counts, spread, placements):
        some = placed > 0.0
        starts, stops, kept = edges[:-1][some], edges[1:][some], placed[some]
        if n_zeros:
            at = int(np.searchsorted(starts, 0.0))
            starts, stops = np.insert(starts, at, 0.0), np.insert(stops, at, 0.0)
            kept = np.insert(kept, at, n_zeros)
        yield Density(lower=starts, upper=stops, counts=kept)


def _placed(
    counts: NDArray[np.float64], spread: NDArray[np.float64], placements: int
) -> Iterator[NDArray[np.float64]]:
    """The counts as chance might have them. What lies within one linear bin stays there."""
    random = np.random.default_rng(0)
    for _ in range(placements):
        moved = np.rint(counts + spread * random.standard_normal(counts.size))
        yield np.where(spread > 0.0, np.maximum(moved, 0.0), counts)


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
