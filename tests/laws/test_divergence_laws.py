"""The divergence searches against plain transcriptions of what they are defined as."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.threshold.clip import Levels
from qdist.threshold.entropy import (
    best_candidate,
    divergence_of,
    kl_v2,
    kld,
    linear_bins,
    n_levels_of,
)
from qdist.threshold.improved import improved_kl
from qdist.threshold.joint_kernels import joint_divergence, search_both
from tests.laws.test_threshold_laws import (
    DISTRIBUTIONS,
    SYMMETRIC,
    density_of,
    each_distribution,
    small_counts,
)

TRACE = 1e-12
Counts = list[float]


def folded(counts: Counts, kept: int) -> Counts:
    """The first ``kept`` bins, the last of them with all that lies beyond."""
    return [*counts[: kept - 1], sum(counts[kept - 1 :])]


def squeezed(counts: Counts, filled: list[bool], n_levels: int) -> Counts:
    """Every level's mass, spread evenly over its filled bins; levels are whole bins."""
    kept = len(counts)
    q = [0.0] * kept
    for level in range(n_levels):
        bins = range(level * kept // n_levels, (level + 1) * kept // n_levels)
        some = [i for i in bins if filled[i]]
        for i in some:
            q[i] = sum(counts[j] for j in bins) / len(some)
    return q


def shares(values: Counts) -> Counts:
    return [value / sum(values) for value in values]


def kl(p: Counts, q: Counts) -> float:
    return sum(a * math.log(a / max(b, TRACE)) for a, b in zip(p, q, strict=True) if a > 0)


def by_definition(counts: Counts, kept: int, n_levels: int, method: str) -> float:
    inside = counts[:kept]
    if sum(inside) == 0:
        return math.inf
    p = shares(folded(counts, kept))
    q = shares(squeezed(inside, [c > 0 for c in inside], n_levels))
    if method == "kl":
        return kl(p, q)
    if method == "symkl":
        return kl(p, q) + kl(q, p)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def v2_by_definition(counts: Counts, kept: int, n_levels: int) -> float:
    """Levels of one width, the bin of the folded tail filled: bin by bin and level by level."""
    inside, whole = counts[:kept], folded(counts, kept)
    if sum(inside) == 0:
        return math.inf
    width = kept / n_levels
    q = [0.0] * kept
    for level in range(n_levels):
        parts = [
            max(0.0, min(i + 1, (level + 1) * width) - max(i, level * width)) for i in range(kept)
        ]
        mass = sum(c * part for c, part in zip(inside, parts, strict=True))
        filled = sum(part for p, part in zip(whole, parts, strict=True) if p > 0)
        for i in range(kept):
            if whole[i] > 0 and filled > 1e-9:
                q[i] += parts[i] * mass / filled
    return kl(shares(whole), [value / sum(inside) for value in q])


@pytest.mark.parametrize("method", ["kl", "symkl", "jsd"])
@given(small_counts, st.integers(1, 8), st.data())
@settings(max_examples=60)
def test_each_divergence_is_that_of_its_definition(
    method: str, counts: Counts, n_levels: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(n_levels, len(counts)))
    found = divergence_of(np.array(counts), kept, n_levels, method)
    expected = by_definition(counts, kept, n_levels, method)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-11)


@given(small_counts, st.integers(1, 8), st.data())
@settings(max_examples=60)
def test_kl_v2_is_that_of_its_definition(
    counts: Counts, n_levels: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(n_levels, len(counts)))
    found = divergence_of(np.array(counts), kept, n_levels, "kl_v2")
    expected = v2_by_definition(counts, kept, n_levels)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ["kl", "symkl", "jsd", "kl_v2"])
@given(small_counts, st.integers(1, 8), st.integers(1, 5))
@settings(max_examples=40)
def test_the_candidate_that_is_kept_has_the_least(
    method: str, counts: Counts, n_levels: int, stride: int
) -> None:
    array = np.array(counts)
    tried = range(len(counts), n_levels - 1, -stride)
    best = best_candidate(array, n_levels, stride, method)
    assert best in tried
    least = min(divergence_of(array, kept, n_levels, method) for kept in tried)
    found = divergence_of(array, best, n_levels, method)
    assert found == least or found == pytest.approx(least, abs=1e-11)


def test_of_equal_candidates_the_widest_wins() -> None:
    """With every level one value, nothing is lost wherever the end is."""
    counts = np.zeros(64)
    counts[:8] = 5.0
    for method in ("kl", "symkl", "jsd", "kl_v2"):
        assert best_candidate(counts, 8, 8, method) in (8, 64)
        alone = np.zeros(64)
        alone[63] = 9.0
        assert best_candidate(alone, 8, 1, method) == 64


def test_kl_v2_does_not_hang_on_one_empty_bin() -> None:
    """A candidate whose last bin happens to be empty is not ruined by an arbitrary trace."""
    rng = np.random.default_rng(5)
    counts = rng.poisson(40, 96).astype(float) * np.exp(-np.arange(96) / 12)
    gap = counts.copy()
    gap[47] = 0.0
    worse = [divergence_of(each, 48, 16, "kl") for each in (counts, gap)]
    mended = [divergence_of(each, 48, 16, "kl_v2") for each in (counts, gap)]
    assert worse[1] > 5 * worse[0]
    assert mended[1] < 2 * mended[0]


def test_kl_v2_gives_a_tensor_of_one_sign_all_levels() -> None:
    asymmetric = Levels(low=-128, high=127, symmetric=False)
    values = np.abs(np.random.default_rng(0).standard_t(3, 50_000)).astype(np.float32)
    density = density_of(values)
    assert n_levels_of(density, asymmetric) == 256
    assert n_levels_of(density, SYMMETRIC[8]) == 127
    assert n_levels_of(density_of(values - 1), asymmetric) == 128
    # Twice the levels make a wider range as fine.
    wide, narrow = kl_v2(density, asymmetric)[1], kl_v2(density, SYMMETRIC[8])[1]
    assert wide > 1.2 * narrow


@pytest.mark.parametrize("name", ["student", "relu", "outlier"])
def test_kld_is_icrafts(name: str) -> None:
    """Transcribed: every 128th of 4,096 bins, tail onto the last, its middle the threshold."""
    values = np.abs(DISTRIBUTIONS[name](np.random.default_rng(9), 20_000))
    density, top = density_of(values), float(values.max())
    counts = linear_bins(density, 4096, top).tolist()
    divergences = {k: by_definition(counts, k, 128, "kl") for k in range(128, 4097, 128)}
    best = min(divergences, key=lambda k: (divergences[k], -k))
    _, high = kld(density, SYMMETRIC[8])
    assert high == pytest.approx((best - 0.5) / 4096 * top, rel=1e-12)


# --- both bounds at once ----------------------------------------------------------------------


def joint_by_definition(counts: Counts, first: int, last: int, n_levels: int) -> float:
    inside = counts[first:last]
    if len(inside) < max(2, n_levels) or sum(inside) == 0:
        return math.inf
    p = inside.copy()
    p[0] += sum(counts[:first])
    p[-1] += sum(counts[last:])
    return kl(shares(p), shares(squeezed(inside, [c > 0 for c in p], n_levels)))


@given(small_counts, st.integers(1, 8), st.data())
@settings(max_examples=60)
def test_the_joint_divergence_is_that_of_its_definition(
    counts: Counts, n_levels: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(counts) - 2))
    last = data.draw(st.integers(first + 1, len(counts)))
    found = joint_divergence(np.array(counts), first, last, n_levels)
    expected = joint_by_definition(counts, first, last, n_levels)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-11)


@each_distribution
def test_the_joint_search_is_near_the_least_of_all_windows(name: str) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(4), 30_000).astype(np.float64)
    low, high = min(0.0, float(values.min())), float(values.max())
    bins, n_levels = 256, 16
    counts = np.histogram(values, bins=bins, range=(low, high))[0].astype(np.float64)
    zero = -low / (high - low) * bins
    coarse: NDArray[np.float64] = np.geomspace(1 / 64, 1, 19)
    first, last = search_both(counts, zero, n_levels, False, coarse, 4)
    found = joint_divergence(counts, first, last, n_levels)
    windows = (
        joint_divergence(counts, a, b, n_levels)
        for a in range(0, int(zero) + 1, 2)
        for b in range(math.ceil(zero), bins + 1, 2)
    )
    assert found <= 1.3 * min(windows) + 1e-4


def test_a_symmetric_joint_window_is_symmetric() -> None:
    values = DISTRIBUTIONS["student"](np.random.default_rng(2), 50_000)
    low, high = improved_kl(density_of(values), SYMMETRIC[8], bins=2048)
    bound = max(-low, high)
    assert bound < 0.9 * float(np.abs(values).max())
    # The range that was seen cuts it, nothing else.
    assert -low == pytest.approx(min(bound, -float(values.min())))
    assert high == pytest.approx(min(bound, float(values.max())))
