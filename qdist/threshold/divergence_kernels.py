"""The divergence searches over linear bins as compiled loops.

All four divergences are sums over levels, since squeezing gives every filled bin of a level the
same mass. With running sums of the counts, of the filled bins, of ``c ln c`` and of ``ln c``, a
candidate costs one logarithm a level, where the definition costs one a bin. Only the
Jensen-Shannon divergence needs one a bin. `qdist.threshold.entropy` says what is computed, and
holds the plain definitions that a test compares these loops with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.compiled import compiled

KL, SYMKL, JSD, KL_V2 = 0, 1, 2, 3
TRACE = 1e-12
"""Share of the mass that a bin gets where Q has none, so that its logarithm is finite."""
TIE = 1e-12
"""Nats within which two candidates count as equal: running sums round differently."""


@compiled
def fill_magnitudes(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    top: float,
    n: int,
) -> NDArray[np.float64]:
    """Counts of |x| in ``n`` equal bins over 0..``top``; intervals are split in proportion."""
    bins = np.zeros(n)
    for i in range(lower.size):
        a, b = lower[i], upper[i]
        if a < 0.0 < b:
            share = b / (b - a)
            _spread(bins, 0.0, b / top * n, counts[i] * share)
            _spread(bins, 0.0, -a / top * n, counts[i] * (1.0 - share))
        elif b <= 0.0:
            _spread(bins, -b / top * n, -a / top * n, counts[i])
        else:
            _spread(bins, a / top * n, b / top * n, counts[i])
    return bins


@compiled
def fill_values(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    counts: NDArray[np.float64],
    start: float,
    stop: float,
    n: int,
) -> NDArray[np.float64]:
    """Counts of x in ``n`` equal bins over ``start..stop``."""
    bins = np.zeros(n)
    width = stop - start
    for i in range(lower.size):
        _spread(bins, (lower[i] - start) / width * n, (upper[i] - start) / width * n, counts[i])
    return bins


@compiled
def _spread(bins: NDArray[np.float64], a: float, b: float, count: float) -> None:
    """Add ``count``, spread evenly over ``a..b`` in units of bins."""
    n = bins.size
    first, last = min(max(int(a), 0), n - 1), min(max(int(b), 0), n - 1)
    if first == last:
        bins[first] += count
        return
    density = count / (b - a)
    bins[first] += density * (first + 1 - a)
    for i in range(first + 1, last):
        bins[i] += density
    bins[last] += density * (b - last)


@compiled
def search(
    counts: NDArray[np.float64], n_levels: int, first: int, stride: int, kind: int
) -> tuple[int, float]:
    """Bins to keep among ``len, len - stride, ..`` down to ``first``, and the divergence there.

    ``first >= n_levels``. The most bins win ties.
    """
    n = counts.size
    mass, filled, entropy, logs = _running(counts)
    best, least = n, np.inf
    for kept in range(n, first - 1, -stride):
        if kind == JSD:
            found = _jensen_shannon(counts, mass, filled, entropy, kept, n_levels)
        elif kind == KL_V2:
            found = _fractional(counts, mass, filled, entropy, kept, n_levels)
        else:
            found = _kullback_leibler(counts, mass, filled, entropy, logs, kept, n_levels, kind)
        if found < least - TIE:
            best, least = kept, found
    return best, least


@compiled
def divergence(counts: NDArray[np.float64], kept: int, n_levels: int, kind: int) -> float:
    """The divergence of one candidate, in nats."""
    mass, filled, entropy, logs = _running(counts)
    if kind == JSD:
        return _jensen_shannon(counts, mass, filled, entropy, kept, n_levels)
    if kind == KL_V2:
        return _fractional(counts, mass, filled, entropy, kept, n_levels)
    return _kullback_leibler(counts, mass, filled, entropy, logs, kept, n_levels, kind)


@compiled
def _running(
    counts: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Sums over the bins before each edge: counts, filled bins, c ln c, ln c."""
    n = counts.size
    mass, filled = np.zeros(n + 1), np.zeros(n + 1)
    entropy, logs = np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        c = counts[i]
        mass[i + 1], filled[i + 1] = mass[i] + c, filled[i]
        entropy[i + 1], logs[i + 1] = entropy[i], logs[i]
        if c > 0.0:
            log = np.log(c)
            filled[i + 1] += 1.0
            entropy[i + 1] += c * log
            logs[i + 1] += log
    return mass, filled, entropy, logs


@compiled
def _folded(
    counts: NDArray[np.float64], entropy: NDArray[np.float64], kept: int, p: float
) -> float:
    """Sum of p ln p over the kept bins, of which the last holds ``p``."""
    return entropy[kept - 1] + (p * np.log(p) if p > 0.0 else 0.0)


@compiled
def _folding(
    counts: NDArray[np.float64], mass: NDArray[np.float64], kept: int
) -> tuple[float, float, float, float]:
    """All counts, those of the kept bins, that of the last of them, and what folds into it."""
    p_sum, q_sum = mass[-1], mass[kept]
    return p_sum, q_sum, counts[kept - 1], p_sum - q_sum if kept < counts.size else 0.0


@compiled
def _kullback_leibler(
    counts: NDArray[np.float64],
    mass: NDArray[np.float64],
    filled: NDArray[np.float64],
    entropy: NDArray[np.float64],
    logs: NDArray[np.float64],
    kept: int,
    n_levels: int,
    kind: int,
) -> float:
    p_sum, q_sum, last, tail = _folding(counts, mass, kept)
    if p_sum <= 0.0 or q_sum <= 0.0:
        return np.inf
    cross = 0.0  # sum of p ln q
    back = 0.0  # sum of q (ln q - ln p)
    log_total = np.log(p_sum)
    for level in range(n_levels):
        start, stop = level * kept // n_levels, (level + 1) * kept // n_levels
        m, f = mass[stop] - mass[start], filled[stop] - filled[start]
        if f == 0.0:
            continue
        q = m / f / q_sum
        log_q = np.log(max(q, TRACE))
        cross += m * log_q
        ends = level == n_levels - 1 and last > 0.0
        if ends:
            cross += tail * log_q
        if kind == SYMKL:
            log_p = logs[stop] - logs[start] - f * log_total
            if ends:
                log_p += np.log(last + tail) - np.log(last)
            back += q * (f * np.log(q) - log_p)
    if last <= 0.0 and tail > 0.0:
        cross += tail * np.log(TRACE)
    forward = (_folded(counts, entropy, kept, last + tail) - cross) / p_sum - log_total
    return forward + back


@compiled
def _jensen_shannon(
    counts: NDArray[np.float64],
    mass: NDArray[np.float64],
    filled: NDArray[np.float64],
    entropy: NDArray[np.float64],
    kept: int,
    n_levels: int,
) -> float:
    p_sum, q_sum, last, tail = _folding(counts, mass, kept)
    if p_sum <= 0.0 or q_sum <= 0.0:
        return np.inf
    of_q, of_middle = 0.0, 0.0
    for level in range(n_levels):
        start, stop = level * kept // n_levels, (level + 1) * kept // n_levels
        f = filled[stop] - filled[start]
        if f == 0.0:
            continue
        q = (mass[stop] - mass[start]) / f / q_sum
        of_q += f * q * np.log(q)
        for i in range(start, min(stop, kept - 1)):
            if counts[i] > 0.0:
                middle = 0.5 * (counts[i] / p_sum + q)
                of_middle += middle * np.log(middle)
        if level == n_levels - 1 and last > 0.0:
            middle = 0.5 * ((last + tail) / p_sum + q)
            of_middle += middle * np.log(middle)
    if last <= 0.0 and tail > 0.0:
        middle = 0.5 * tail / p_sum
        of_middle += middle * np.log(middle)
    of_p = _folded(counts, entropy, kept, last + tail) / p_sum - np.log(p_sum)
    return 0.5 * of_p + 0.5 * of_q - of_middle


@compiled
def _until(sums: NDArray[np.float64], edge: float) -> float:
    """A running sum at a place between two bins' edges."""
    i = int(edge)
    if i >= sums.size - 1:
        return sums[-1]
    return sums[i] + (edge - i) * (sums[i + 1] - sums[i])


@compiled
def _fractional(
    counts: NDArray[np.float64],
    mass: NDArray[np.float64],
    filled: NDArray[np.float64],
    entropy: NDArray[np.float64],
    kept: int,
    n_levels: int,
) -> float:
    """KL(P||Q) with levels of equal width, and the folded tail's bin counted as filled."""
    p_sum, q_sum, last, tail = _folding(counts, mass, kept)
    if p_sum <= 0.0 or q_sum <= 0.0:
        return np.inf
    extra = 1.0 if last <= 0.0 and tail > 0.0 else 0.0
    width = kept / n_levels
    cross = 0.0
    before = 0.0  # the density of the level before
    for level in range(n_levels):
        low = level * width
        high = kept if level == n_levels - 1 else (level + 1) * width
        m = _until(mass, high) - _until(mass, low)
        f = _until(filled, high) - _until(filled, low)
        if high > kept - 1:
            f += extra * (high - max(low, kept - 1))
        density = m / f / q_sum if f > 1e-9 else 0.0
        start, stop = int(np.ceil(low)), int(high)
        if start > low:
            # A bin that two levels share has some of either.
            i = start - 1
            p = counts[i] + (tail if i == kept - 1 else 0.0)
            if p > 0.0:
                q = (low - i) * before + (start - low) * density
                cross += p * np.log(max(q, TRACE))
        if stop > start:
            p = mass[stop] - mass[start] + (tail if stop == kept else 0.0)
            if p > 0.0:
                cross += p * np.log(max(density, TRACE))
        before = density
    return (_folded(counts, entropy, kept, last + tail) - cross) / p_sum - np.log(p_sum)
