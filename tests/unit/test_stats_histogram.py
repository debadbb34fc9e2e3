"""What a histogram knows exactly beside its bins, and what group histograms will take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.stats.accumulator import Accumulator
from qdist.stats.groups import estimate_bytes
from qdist.stats.histogram import Histogram
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import GroupRequest, StatisticsSpec


def record_of(values: NDArray[np.float32], spec: StatisticsSpec) -> CalibrationRecord:
    accumulator = Accumulator(("x",), spec)
    accumulator.add(0, values)
    return accumulator.record()


def histogram_of(values: NDArray[np.float32], n_largest: int, n_values: int) -> Histogram:
    spec = StatisticsSpec(n_largest=n_largest, n_values=n_values)
    return record_of(values, spec).histogram("x")


@given(st.integers(0, 2**32 - 1), st.sampled_from((0, 1, 50, 3000)), st.sampled_from((0, 4000)))
@settings(max_examples=40)
@example(0, 3000, 0)
@example(0, 0, 4000)
def test_the_tail_of_a_density_is_as_exact_as_the_values_kept(
    seed: int, n_largest: int, n_values: int
) -> None:
    values = np.random.default_rng(seed).standard_t(3, size=2000).astype(np.float32)
    values[:100] = values[100]
    density = histogram_of(values, n_largest, n_values).finite
    assert density.total == values.size
    assert np.all(density.upper[:-1] <= density.lower[1:])
    everything = n_largest > values.size or n_values > values.size
    ordered = np.sort(np.abs(values.astype(np.float64)))[::-1]
    if everything:
        assert np.array_equal(density.lower, np.unique(values.astype(np.float64)))
        assert np.array_equal(density.lower, density.upper)
    elif n_largest:
        # Of all but the values that share a bin with the least one kept.
        known = ordered[:n_largest][ordered[:n_largest] > ordered[n_largest - 1] * (1 + 1 / 64)]
        for bound in known:
            assert density.share_outside(-bound, bound) == pytest.approx(
                (ordered > bound).mean(), abs=1e-12
            )


def test_values_in_a_table_are_point_masses() -> None:
    values = np.repeat(np.array([-1.5, -0.0, 0.0, 1.501, 1.502, np.inf, np.nan]), 3)
    density = histogram_of(values.astype(np.float32), 4, 10).finite
    assert density.lower.tolist() == density.upper.tolist()
    assert density.lower.astype(np.float32).tolist() == [
        np.float32(x) for x in (-1.5, 0, 1.501, 1.502)
    ]
    assert density.counts.tolist() == [3, 6, 3, 3]


def test_zeros_among_the_largest_do_not_hide_the_others() -> None:
    values = np.zeros(3000, np.float32)
    values[:5] = (1, 2, 3, -4, 5)
    density = histogram_of(values, 1024, 0).finite
    assert density.lower.tolist() == [-4, 0, 1, 2, 3, 5]
    assert density.counts.tolist() == [1, 2995, 1, 1, 1, 1]


def test_the_estimate_of_group_histograms_bounds_what_they_take() -> None:
    spec = StatisticsSpec(
        groups=(
            GroupRequest(match="wide*", axis=-1, group_size=1),
            GroupRequest(match="*", axis=1, group_count=4, mantissa_bits=5),
        )
    )
    shapes = {"wide": (40, 50, 300), "narrow": (40, 12), "scalar": (), "none": (3, 0)}
    estimate = estimate_bytes(spec, shapes)
    accumulator = Accumulator(shapes, spec)
    before = accumulator.n_bytes
    rng = np.random.default_rng(0)
    for i, shape in enumerate(shapes.values()):
        accumulator.add(i, np.asarray(rng.normal(size=shape), np.float32))
    record = accumulator.record()
    groups = [group for name in shapes for group in record.groups(name)]
    assert estimate.n_groups == sum(group.n_groups for group in groups) == 300 + 4 + 4
    assert estimate.largest == "wide"
    stored = sum(group.keys.nbytes + group.counts.nbytes for group in groups)
    assert 0.2 * estimate.stored_bytes < stored <= estimate.stored_bytes
    assert 0.2 * estimate.memory_bytes < accumulator.n_bytes - before
    assert accumulator.n_bytes - before <= estimate.most_bytes + 100 * 512 * 8
    assert estimate.memory_bytes <= estimate.most_bytes


def test_without_requests_group_histograms_take_nothing() -> None:
    estimate = estimate_bytes(StatisticsSpec(), {"x": (3, 4)})
    assert (estimate.n_groups, estimate.memory_bytes, estimate.largest) == (0, 0, None)


def test_a_group_that_is_not_there_is_refused() -> None:
    spec = StatisticsSpec(groups=(GroupRequest(match="*", axis=0, group_size=2),))
    (groups,) = record_of(np.ones((3, 2), np.float32), spec).groups("x")
    assert groups.n_groups == 2
    assert groups.group(1)[1].tolist() == [2]
    with pytest.raises(IndexError, match="group 2 of 2"):
        groups.group(2)
