"""The mean over equal blocks: against the blocks' own ranges, and against the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.errors import PlanError
from qdist.stats import grid
from qdist.stats.histogram import Histogram
from qdist.threshold.blocks import mean_threshold, merged
from qdist.threshold.clip import Levels
from qdist.threshold.error import expected_mse
from qdist.threshold.registry import METHODS, find_threshold

INT8 = Levels(low=-128, high=127, symmetric=False)
SYMMETRIC = Levels(low=-128, high=127, symmetric=True)
Values = NDArray[np.float32]


def histogram(values: Values) -> Histogram:
    bins, counts = np.unique(grid.bin_of(values), return_counts=True)
    finite = values[np.isfinite(values)]
    return Histogram(
        bins=bins.astype(np.uint16),
        counts=counts.astype(np.uint64),
        minimum=float(finite.min(initial=np.inf)),
        maximum=float(finite.max(initial=-np.inf)),
    )


def normal(seed: int, n: int = 2000, scale: float = 1.0) -> Values:
    return (scale * np.random.default_rng(seed).normal(size=n)).astype(np.float32)


@pytest.mark.parametrize("levels", [INT8, SYMMETRIC], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_bounds_are_means_of_the_blocks_bounds(method: str, levels: Levels) -> None:
    blocks = [histogram(normal(seed, scale=1 + seed)) for seed in range(5)]
    each = [find_threshold(block.finite, levels, method) for block in blocks]
    found = mean_threshold(blocks, levels, method)
    assert found.threshold.low == pytest.approx(np.mean([t.low for t in each]))
    assert found.threshold.high == pytest.approx(np.mean([t.high for t in each]))
    assert found.threshold.method == each[0].method
    assert (found.n_used, found.n_blocks, found.notes) == (5, 5, ())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_one_block_is_the_whole(method: str) -> None:
    block = histogram(normal(1))
    found = mean_threshold([block], INT8, method)
    assert found.threshold == find_threshold(block.finite, INT8, method)
    assert found.relative_spread == found.relative_error == 0.0


def test_parameters_reach_the_method() -> None:
    blocks = [histogram(normal(seed)) for seed in range(3)]
    near, far = (
        mean_threshold(blocks, INT8, "percentile", {"percent": percent}).threshold
        for percent in (90.0, 99.9)
    )
    assert near.high < far.high


def test_cost_is_that_of_the_mean_range_over_all_values() -> None:
    parts = [normal(seed, scale=1 + seed) for seed in range(4)]
    found = mean_threshold([histogram(part) for part in parts], INT8, "max").threshold
    values = np.concatenate(parts)
    outside = np.mean((values < found.low) | (values > found.high))
    assert found.clipped_share == pytest.approx(outside, abs=2e-3)
    whole = histogram(values).finite
    assert found.expected_mse == pytest.approx(expected_mse(whole, found.low, found.high, INT8))


@settings(max_examples=40)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1), min_size=1, max_size=5))
def test_merged_is_the_histogram_of_all_values(parts: list[list[float]]) -> None:
    found = merged([histogram(np.array(part, np.float32)) for part in parts])
    wanted = histogram(np.array([x for part in parts for x in part], np.float32))
    assert np.array_equal(found.bins, wanted.bins)
    assert np.array_equal(found.counts, wanted.counts)
    assert (found.minimum, found.maximum) == (wanted.minimum, wanted.maximum)


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1), min_size=1, max_size=5),
    st.sampled_from(["max", "percentile", "mse"]),
)
def test_zero_stays_inside_and_no_bound_leaves_the_blocks(
    parts: list[list[float]], method: str
) -> None:
    blocks = [histogram(np.array(part, np.float32)) for part in parts]
    found = mean_threshold(blocks, INT8, method).threshold
    each = [find_threshold(block.finite, INT8, method) for block in blocks]
    assert found.low <= 0 <= found.high
    assert min(t.low for t in each) - 1e-9 <= found.low
    assert found.high <= max(t.high for t in each) + 1e-9


def test_a_tensor_of_one_sign_keeps_its_zero_bound() -> None:
    blocks = [histogram(np.abs(normal(seed))) for seed in range(3)]
    assert mean_threshold(blocks, INT8, "mse").threshold.low == 0.0


def test_blocks_without_a_range_are_left_out_and_named() -> None:
    there, zeros = histogram(normal(1)), histogram(np.zeros(10, np.float32))
    found = mean_threshold([there, zeros, there], INT8, "max")
    alone = find_threshold(there.finite, INT8, "max")
    assert (found.threshold.low, found.threshold.high) == (alone.low, alone.high)
    assert (found.n_used, found.n_blocks) == (2, 3)
    assert "1 of 3 blocks" in found.notes[0]
    nothing = mean_threshold([zeros, zeros], INT8, "mse")
    assert (nothing.threshold.low, nothing.threshold.high) == (0.0, 0.0)
    assert nothing.n_used == 0
    assert nothing.relative_error == 0.0


def test_masked_values_are_no_magnitudes() -> None:
    body = normal(1)
    masked = histogram(np.append(body, np.float32(-1e9)))
    found = mean_threshold([masked, histogram(body)], INT8, "max").threshold
    alone = find_threshold(histogram(body).finite, INT8, "max")
    assert found.low == pytest.approx(alone.low, rel=0.02)


def test_spread_tells_stable_from_unstable() -> None:
    random = np.random.default_rng(2)
    light = [histogram(normal(seed)) for seed in range(8)]
    heavy = [histogram(random.standard_cauchy(2000).astype(np.float32)) for _ in range(8)]
    steady, wild = (mean_threshold(b, INT8, "max").relative_spread for b in (light, heavy))
    assert steady < 0.2 < wild
    widths = [t.high - t.low for t in (find_threshold(b.finite, INT8, "max") for b in light)]
    assert steady == pytest.approx(np.std(widths, ddof=1) / np.mean(widths))
    found = mean_threshold(light, INT8, "max")
    assert found.relative_error == pytest.approx(found.relative_spread / 8**0.5)


def test_no_blocks_and_no_such_method() -> None:
    with pytest.raises(ValueError, match="no blocks"):
        mean_threshold([], INT8, "max")
    with pytest.raises(PlanError) as caught:
        mean_threshold([histogram(normal(1))], INT8, "median")
    assert caught.value.code == "QD501"
