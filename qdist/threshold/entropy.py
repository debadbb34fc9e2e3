"""The range of least information loss (``kl``, ``kl_v2``, ``symkl``, ``jsd``, ``kld``).

Method of S. Migacz, "8-bit inference with TensorRT" (GTC 2017): the |x| go into linear bins; for
every candidate bound, P is the clipped distribution with the tail added to its last bin, Q is P
squeezed into the quantizer's levels and spread back over the bins that were not empty; the bound
with the least divergence of the two wins. Linear bins are filled from the stored density.

``kl``      KL(P||Q), of Migacz and of Sophgo's and Knight's tools.
``symkl``   KL(P||Q) + KL(Q||P), Jeffreys' divergence (Sophgo's SYMKL).
``jsd``     the mean of KL(P||M) and KL(Q||M) with M = (P + Q) / 2, the Jensen-Shannon divergence
            (J. Lin, "Divergence measures based on the Shannon entropy", 1991; Sophgo's JSD).
``kld``     KL(P||Q) as Icraft's quantizer defines it: candidates at every 128th bin, the bound in
            the middle of the last bin kept, zeros counted like all others.
``kl_v2``   KL(P||Q) with three cases put right, see `kl_v2`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels
from qdist.threshold.divergence_kernels import (
    JSD,
    KL,
    KL_V2,
    SYMKL,
    divergence,
    fill_magnitudes,
    search,
)

BINS = 2048
"""Linear bins of |x|, unless told otherwise."""
STRIDE = 8
"""Bins between two candidates, unless told otherwise."""
ICRAFT_BINS = 4096
KINDS = {"kl": KL, "symkl": SYMKL, "jsd": JSD, "kl_v2": KL_V2}


def n_halves(levels: Levels) -> int:
    """Levels that the |x| share: those of one sign."""
    return levels.high if levels.symmetric else (levels.n_steps + 1) // 2


def n_levels_of(density: Density, levels: Levels) -> int:
    """Levels that the |x| share, where a tensor of one sign has all of an asymmetric quantizer."""
    one_sided = density.minimum >= 0.0 or density.maximum <= 0.0
    return levels.n_steps + 1 if one_sided and not levels.symmetric else n_halves(levels)


def entropy(
    density: Density, levels: Levels, *, bins: int = BINS, stride: int = STRIDE
) -> tuple[float, float]:
    """The symmetric bound on |x| of least KL divergence, cut to the range that was seen.

    ``bins``: linear bins over 0..max|x|. ``stride``: bins between candidates. With no more bins
    than levels there is nothing to squeeze, and the whole range is kept.
    """
    return _range(density, levels, n_halves(levels), bins, stride, KL)


def symkl(
    density: Density, levels: Levels, *, bins: int = BINS, stride: int = STRIDE
) -> tuple[float, float]:
    """`entropy` with Jeffreys' divergence, which charges Q's surplus as well as its lack."""
    return _range(density, levels, n_halves(levels), bins, stride, SYMKL)


def jsd(
    density: Density, levels: Levels, *, bins: int = BINS, stride: int = STRIDE
) -> tuple[float, float]:
    """`entropy` with the Jensen-Shannon divergence, which is bounded by ln 2."""
    return _range(density, levels, n_halves(levels), bins, stride, JSD)


def kl_v2(
    density: Density, levels: Levels, *, bins: int = BINS, stride: int = STRIDE
) -> tuple[float, float]:
    """`entropy` with three cases put right. Knight's document says of its ``kl_v2`` only that it
    corrects the divergence in particular cases, so which ones they are is our reading:

    - *The last bin kept is empty.* The folded tail then lies where Q has nothing, and the
      divergence is infinite, or what an arbitrary trace makes of it: a candidate is won or lost by
      whether one bin happened to be hit. Here that bin counts as filled, and has its part of the
      last level.
    - *The bins do not divide into the levels.* Whole bins only make some levels narrower than
      others, and levels of one bin cost nothing, so candidates between two multiples look better
      than they are. Here all levels are equally wide, and a bin that two of them share has some
      of either.
    - *All values have one sign,* as after a ReLU. An asymmetric quantizer then has twice the
      levels for them; taking half of them clips for a coarseness that is not there.
    """
    return _range(density, levels, n_levels_of(density, levels), bins, stride, KL_V2)


def kld(
    density: Density, levels: Levels, *, bins: int = ICRAFT_BINS, stride: int = 128
) -> tuple[float, float]:
    """Icraft's: candidates keep 128, 256, .. bins (``stride``) and bound at the middle of the last.

    The tail is added to the last bin of P. Q is made of the counts before that, as in Migacz's
    method: of P itself it would equal P at the first candidate, 128 bins and 128 codes, and that
    would always win. The 128 codes of 8 bits are ``high + 1`` of other levels; candidates of
    fewer bins than codes are left out.
    """
    n_codes = levels.high + 1 if levels.symmetric else (levels.n_steps + 1) // 2
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    top = max(-low, high)
    last = bins // stride * stride
    if density.is_empty or top == 0.0 or n_codes >= bins or last < n_codes:
        return low, high
    counts = fill_magnitudes(density.lower, density.upper, density.counts, top, bins)
    if np.count_nonzero(counts[1:-1]) == 0:
        return low, high  # One value, or one with zeros: there is no tail.
    if last < bins:
        # Beyond the last candidate there is only tail.
        counts = np.append(counts[:last], counts[last:].sum())
    kept, _ = _search_multiples(counts, last, n_codes, stride)
    bound = top * ((kept - 0.5) / bins)
    return max(-bound, low), min(bound, high)


def _search_multiples(
    counts: NDArray[np.float64], last: int, n_codes: int, stride: int
) -> tuple[int, float]:
    first = max(stride, -(-n_codes // stride) * stride)
    if counts.size == last:
        return search(counts, n_codes, first, stride, KL)
    best, least = last, np.inf
    for kept in range(last, first - 1, -stride):
        found = divergence(counts, kept, n_codes, KL)
        if found < least:
            best, least = kept, found
    return best, least


def _range(
    density: Density, levels: Levels, n_levels: int, bins: int, stride: int, kind: int
) -> tuple[float, float]:
    low, high = min(density.minimum, 0.0), max(density.maximum, 0.0)
    top = max(-low, high)
    if density.is_empty or top == 0.0 or n_levels >= bins:
        return low, high
    counts = fill_magnitudes(density.lower, density.upper, density.counts, top, bins)
    # Zeros cost nothing to represent; counting them would drown the rest.
    counts[0] = counts[1]
    kept, _ = search(counts, n_levels, n_levels, stride, kind)
    bound = top * (kept / bins)
    return max(-bound, low), min(bound, high)


def linear_bins(magnitudes: Density, n: int, top: float) -> NDArray[np.float64]:
    """A density over ``n`` equal bins of |x| in 0..``top``; intervals are split in proportion."""
    return fill_magnitudes(magnitudes.lower, magnitudes.upper, magnitudes.counts, top, n)


def best_candidate(
    counts: NDArray[np.float64], n_levels: int, stride: int, method: str = "kl"
) -> int:
    """How many of the bins to keep, ``n_levels .. len(counts)``; the most on ties."""
    kept, _ = search(counts, n_levels, n_levels, stride, KINDS[method])
    return int(kept)


def divergence_of(
    counts: NDArray[np.float64], kept: int, n_levels: int, method: str = "kl"
) -> float:
    """The divergence of ``method`` in nats when the first ``kept`` bins share ``n_levels``."""
    return float(divergence(counts, kept, n_levels, KINDS[method]))


def kl_divergence(counts: NDArray[np.float64], kept: int, n_levels: int) -> float:
    """KL(P||Q) in nats when the first ``kept`` bins share ``n_levels`` levels."""
    return divergence_of(counts, kept, n_levels)
