"""The search for two bounds of least divergence as compiled loops, see `improved`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled

_TRACE = 1e-12
"""Share of the mass that a bin gets where Q has none."""
_TIE = 1e-12
"""Nats within which two windows count as equal: running sums round differently."""


@compiled
def search_both(
    counts: NDArray[np.float64],
    zero: float,
    n_levels: int,
    is_symmetric: bool,
    coarse: NDArray[np.float64],
    n_zooms: int,
) -> tuple[int, int]:
    """First bin and end of the window of least divergence; the widest on ties.

    ``zero``: where zero lies, in bins. ``coarse``: fractions of either side, ascending, the last 1.
    A symmetric window moves both ends alike. Windows of fewer bins than levels do not count.
    """
    n = counts.size
    mass, filled, entropy = _running(counts)
    best_a, best_b, best = 1.0, 1.0, np.inf
    step = coarse[1] / coarse[0]
    m = coarse.size
    for i in range(m - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            a, b = coarse[i], coarse[j]
            if (is_symmetric and i != j) or (zero <= 0.0 and i < m - 1):
                continue
            if zero >= n and j < m - 1:
                continue
            first, last = int(np.rint(zero - a * zero)), int(np.rint(zero + b * (n - zero)))
            found = _joint(counts, mass, filled, entropy, first, last, n_levels)
            if found < best - _TIE:
                best_a, best_b, best = a, b, found
    for _ in range(n_zooms):
        centre_a, centre_b = best_a, best_b
        step = step ** (1.0 / 3.0)
        for i in range(-2, 3):
            for j in range(-2, 3):
                if is_symmetric and i != j:
                    continue
                a, b = min(centre_a * step**i, 1.0), min(centre_b * step**j, 1.0)
                first, last = int(np.rint(zero - a * zero)), int(np.rint(zero + b * (n - zero)))
                found = _joint(counts, mass, filled, entropy, first, last, n_levels)
                if found < best - _TIE:
                    best_a, best_b, best = a, b, found
    return int(np.rint(zero - best_a * zero)), int(np.rint(zero + best_b * (n - zero)))


@compiled
def joint_divergence(counts: NDArray[np.float64], first: int, last: int, n_levels: int) -> float:
    """KL(P||Q) in nats of the window ``first .. last`` with both tails folded into its end bins."""
    mass, filled, entropy = _running(counts)
    return _joint(counts, mass, filled, entropy, first, last, n_levels)


@compiled
def _running(
    counts: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Sums over the bins before each edge: counts, filled bins, c ln c."""
    n = counts.size
    mass, filled, entropy = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        c = counts[i]
        mass[i + 1] = mass[i] + c
        filled[i + 1] = filled[i] + (1.0 if c > 0.0 else 0.0)
        entropy[i + 1] = entropy[i] + (c * np.log(c) if c > 0.0 else 0.0)
    return mass, filled, entropy


@compiled
def _joint(
    counts: NDArray[np.float64],
    mass: NDArray[np.float64],
    filled: NDArray[np.float64],
    entropy: NDArray[np.float64],
    first: int,
    last: int,
    n_levels: int,
) -> float:
    kept = last - first
    total, inside = mass[-1], mass[last] - mass[first]
    if kept < n_levels or kept < 2 or inside <= 0.0:
        return np.inf
    below, above = mass[first], total - mass[last] if last < counts.size else 0.0
    p_first, p_last = counts[first] + below, counts[last - 1] + above
    of_p = entropy[last - 1] - entropy[first + 1]
    of_p += p_first * np.log(p_first) if p_first > 0.0 else 0.0
    of_p += p_last * np.log(p_last) if p_last > 0.0 else 0.0
    cross = 0.0
    for level in range(n_levels):
        start, stop = first + level * kept // n_levels, first + (level + 1) * kept // n_levels
        f = filled[stop] - filled[start]
        # A bin that holds nothing but a folded tail counts as filled.
        if level == 0 and counts[first] <= 0.0 and below > 0.0:
            f += 1.0
        if level == n_levels - 1 and counts[last - 1] <= 0.0 and above > 0.0:
            f += 1.0
        if f == 0.0:
            continue
        m = mass[stop] - mass[start]
        log_q = np.log(max(m / f / inside, _TRACE))
        p = m
        if level == 0:
            p += below
        if level == n_levels - 1:
            p += above
        cross += p * log_q
    return (of_p - cross) / total - np.log(total)
