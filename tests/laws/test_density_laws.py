"""The loops of densities equal their plain NumPy twins bit for bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.stats import grid
from qdist.stats.density_kernels import magnitudes_of, points_of
from qdist.stats.histogram import Density, Exact, Histogram

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW = st.sampled_from([-3.0, -1.5, -1.0, -0.0, 0.0, 0.5, 1.0, 1.5, 3.0])
VALUES = st.lists(st.one_of(FINITE, FEW), max_size=40)


def by_magnitude(values: list[float]) -> NDArray[np.float32]:
    """Descending, of two equal magnitudes the negative one first."""
    return np.array(sorted(values, key=lambda x: (-abs(x), not np.signbit(x))), np.float32)


def magnitudes_reference(density: Density) -> Density:
    lower = np.maximum(np.maximum(density.lower, -density.upper), 0.0)
    upper = np.maximum(density.upper, -density.lower)
    order = np.argsort(lower, kind="stable")
    lower, upper, counts = lower[order], upper[order], density.counts[order]
    reach = np.maximum.accumulate(upper)
    first = np.flatnonzero(np.append(True, lower[1:] >= reach[:-1]))
    return Density(
        lower=lower[first],
        upper=np.maximum.reduceat(upper, first),
        counts=np.add.reduceat(counts, first),
    )


def finite_reference(histogram: Histogram) -> Density:
    magnitude = histogram.bins & np.uint16(0x7FFF)
    keep = magnitude < grid.POSITIVE_INFINITY
    if histogram.exact is not None:
        keep = magnitude < histogram.exact.first_bin
    bins, counts = histogram.bins[keep], histogram.counts[keep].astype(np.float64)
    order = grid.ascending(bins)
    edges = grid.edges_of(bins[order])
    lower = np.clip(edges.lower, histogram.minimum, histogram.maximum)
    upper = np.clip(edges.upper, histogram.minimum, histogram.maximum)
    counts = counts[order]
    if histogram.exact is not None:
        points, n = histogram.exact.values, histogram.exact.counts
        zero = int(np.searchsorted(points, 0.0))
        lower = np.concatenate([points[:zero], lower, points[zero:]])
        upper = np.concatenate([points[:zero], upper, points[zero:]])
        counts = np.concatenate([n[:zero], counts, n[zero:]])
    return Density(lower=lower, upper=upper, counts=counts)


def assert_equal(one: Density, other: Density) -> None:
    assert np.array_equal(one.lower, other.lower)
    assert np.array_equal(one.upper, other.upper)
    assert np.array_equal(one.counts, other.counts)


@given(VALUES, st.integers(0, 40))
def test_points_are_the_unique_values(values: list[float], n: int) -> None:
    largest = by_magnitude(values)
    n = min(n, largest.size)
    unique, counts = np.unique(largest[:n].astype(np.float64), return_counts=True)
    found = points_of(largest, n)
    assert np.array_equal(found[0], unique)
    assert np.array_equal(found[1], counts)
    assert not np.signbit(found[0][found[0] == 0]).any()


@given(st.lists(st.one_of(FINITE, FEW, st.sampled_from([np.inf, -np.inf, np.nan])), max_size=60))
def test_a_histogram_as_a_density_is_as_numpy_puts_it(values: list[float]) -> None:
    array = np.array(values, np.float32)
    bins, counts = np.unique(grid.bin_of(array), return_counts=True)
    finite = array[np.isfinite(array)]
    for exact in (
        None,
        Exact.of_largest(by_magnitude(finite.tolist())[:5], 5),
        Exact.of_largest(by_magnitude(finite.tolist()), 1000),
    ):
        histogram = Histogram(
            bins=bins.astype(np.uint16),
            counts=counts.astype(np.uint64),
            minimum=float(finite.min()) if finite.size else np.inf,
            maximum=float(finite.max()) if finite.size else -np.inf,
            exact=exact,
        )
        assert_equal(histogram.finite, finite_reference(histogram))
        if histogram.finite.counts.size:
            assert_equal(histogram.finite.magnitudes(), magnitudes_reference(histogram.finite))


@given(st.lists(st.one_of(FINITE, FEW), min_size=1, max_size=24, unique=True), st.data())
def test_magnitudes_of_intervals_that_touch_overlap_or_are_points(
    ends: list[float], data: st.DataObject
) -> None:
    """Any ascending, disjoint intervals; neighbours may touch, and points lie at their ends."""
    ordered = np.unique(np.array(ends, np.float64))
    lower, upper = [], []
    for a, b in zip(ordered, [*ordered[1:], ordered[-1]], strict=True):
        kind = data.draw(st.sampled_from(["point", "interval", "both", "neither"]))
        if kind in ("point", "both"):
            lower.append(a)
            upper.append(a)
        if kind in ("interval", "both") and b > a:
            lower.append(a)
            upper.append(b)
    if not lower:
        return
    counts = np.arange(1.0, len(lower) + 1)
    density = Density(lower=np.array(lower), upper=np.array(upper), counts=counts)
    found = magnitudes_of(density.lower, density.upper, density.counts)
    assert_equal(
        Density(lower=found[0], upper=found[1], counts=found[2]), magnitudes_reference(density)
    )
