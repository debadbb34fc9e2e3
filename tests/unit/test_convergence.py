"""Early stopping: by complete prefixes alone, early for light tails, never for the maximum of
heavy ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.errors import ConfigError, PlanError
from qdist.stats import grid
from qdist.stats.histogram import Histogram
from qdist.threshold.clip import Threshold
from qdist.threshold.convergence import Convergence, Prefix, change, prefix_sizes

PER_BATCH = 4000


def histogram(values: NDArray[np.float32]) -> Histogram:
    bins, counts = np.unique(grid.bin_of(values), return_counts=True)
    return Histogram(
        bins=bins.astype(np.uint16),
        counts=counts.astype(np.uint64),
        minimum=float(values.min()),
        maximum=float(values.max()),
    )


def history_of(
    policy: Convergence,
    draw: Callable[[np.random.Generator, int], NDArray[np.float64]],
    n_batches: int,
) -> list[Prefix]:
    values = draw(np.random.default_rng(3), n_batches * PER_BATCH).astype(np.float32)
    return [
        policy.measured(size, {"x": histogram(values[: size * PER_BATCH])})
        for size in prefix_sizes(n_batches)
    ]


def bounds(high: float, low: float = 0.0, expected_mse: float = 0.0) -> Threshold:
    return Threshold(low=low, high=high, method="max", clipped_share=0.0, expected_mse=expected_mse)


def prefixes(*rows: Sequence[float]) -> list[Prefix]:
    """One prefix per row, one tensor per entry, its upper bound."""
    return [
        Prefix(n_batches=10 * i, thresholds={f"t{j}": bounds(x) for j, x in enumerate(row)})
        for i, row in enumerate(rows, start=1)
    ]


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_gauss_converges_early(method: str) -> None:
    policy = Convergence(method=method)
    history = history_of(policy, lambda rng, n: rng.normal(size=n), 128)
    decision = policy.decide(history)
    assert decision.stop
    assert decision.n_used < 128
    final, kept = history[-1].thresholds["x"], None
    for prefix in history:
        if prefix.n_batches == decision.n_used:
            kept = prefix.thresholds["x"]
    assert kept is not None
    assert change(kept, final) < 3 * policy.tolerance


def test_the_maximum_of_a_heavy_tail_does_not_converge() -> None:
    policy = Convergence(method="max")
    history = history_of(policy, lambda rng, n: rng.standard_cauchy(size=n), 128)
    decision = policy.decide(history)
    assert not decision.stop
    assert decision.n_used == 128
    assert decision.worst[0][0] == "x"
    assert decision.worst[0][1] > policy.tolerance
    assert "x the most" in decision.reason


@given(st.integers(1, 5000), st.integers(1, 64), st.floats(1.01, 4.0))
def test_prefixes_ascend_to_all_and_do_not_depend_on_what_follows(
    n: int, first: int, growth: float
) -> None:
    sizes = prefix_sizes(n, first=first, growth=growth)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == n
    assert prefix_sizes(n + 1000, first=first, growth=growth)[: len(sizes) - 1] == sizes[:-1]


@given(st.integers(1, 500), st.integers(1, 100))
def test_prefixes_at_equal_steps(n: int, every: int) -> None:
    sizes = prefix_sizes(n, every=every)
    assert sizes == (*range(every, n, every), n)


@pytest.mark.parametrize("wrong", [{"first": 0}, {"growth": 1.0}, {"every": 0}])
def test_prefixes_of_impossible_sizes(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="micro-batches"):
        prefix_sizes(10, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="micro-batches"):
        prefix_sizes(0)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.34, 0.67]),
)
def test_what_was_measured_beyond_the_deciding_prefix_changes_nothing(
    rows: list[list[float]], patience: int, exempt: float
) -> None:
    policy = Convergence(tolerance=0.2, patience=patience, exempt=exempt, method="max")
    history = prefixes(*rows)
    decisions = [policy.decide(history[: k + 1]) for k in range(len(history))]
    stops = [k for k, decision in enumerate(decisions) if decision.stop]
    if stops:
        assert stops == list(range(stops[0], len(history)))
        assert all(decisions[k] == decisions[stops[0]] for k in stops)
        assert decisions[stops[0]].n_used == history[stops[0]].n_batches
    for k, decision in enumerate(decisions):
        if not decision.stop:
            assert decision.n_used == history[k].n_batches


def test_patience_counts_calm_prefixes_in_a_row() -> None:
    history = prefixes([1.0], [1.0], [2.0], [2.0], [2.0], [2.0])
    assert Convergence(patience=1, method="max").decide(history).n_used == 20
    assert Convergence(patience=2, method="max").decide(history).n_used == 50
    assert Convergence(patience=3, method="max").decide(history).n_used == 60
    assert not Convergence(patience=4, method="max").decide(history).stop


def test_exempt_tensors_may_move_and_are_named() -> None:
    history = prefixes([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.0], [1.0, 1.0, 1.0, 9.0])
    assert not Convergence(method="max").decide(history).stop
    decision = Convergence(method="max", exempt=0.25).decide(history)
    assert decision.stop
    assert decision.n_moving == 1
    assert decision.worst[0][0] == "t3"
    assert decision.worst[0][1] == pytest.approx(2 / 3)


def test_one_prefix_decides_nothing() -> None:
    decision = Convergence(patience=1).decide(prefixes([1.0]))
    assert (decision.stop, decision.n_used, decision.worst) == (False, 10, ())


def test_change_of_the_range_and_of_the_error() -> None:
    assert change(bounds(1.0, -1.0), bounds(1.5, -1.0)) == pytest.approx(0.2)
    assert change(bounds(1.5, -1.0), bounds(1.0, -1.0)) == pytest.approx(0.2)
    assert change(bounds(0.0), bounds(0.0)) == 0.0
    assert change(bounds(0.0), bounds(3.0)) == 1.0
    before, after = bounds(1.0, expected_mse=3.0), bounds(1.0, expected_mse=4.0)
    assert change(before, after, "error") == pytest.approx(0.25)
    assert change(before, after) == 0.0


def test_masked_values_are_no_magnitudes() -> None:
    values = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    with_mask = np.append(values, np.float32(-65504.0))
    policy = Convergence(method="max")
    found = policy.measured(1, {"a": histogram(values), "b": histogram(with_mask)}).thresholds
    assert found["a"].high == found["b"].high
    assert found["b"].low > -10


@pytest.mark.parametrize(
    "wrong", [{"tolerance": 0.0}, {"patience": 0}, {"exempt": 1.0}, {"measure": "sum"}]
)
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Convergence(**wrong)  # type: ignore[arg-type]
    assert caught.value.code == "QD104"
    assert next(iter(wrong)) in caught.value.where


def test_unknown_method() -> None:
    with pytest.raises(PlanError) as caught:
        Convergence(method="median")
    assert caught.value.code == "QD501"


def test_histories_that_are_none() -> None:
    policy = Convergence(method="max")
    first, second = prefixes([1.0], [1.0])
    other = Prefix(n_batches=30, thresholds={"y": bounds(1.0)})
    for history in ([], [second, first], [first, other]):
        with pytest.raises(ValueError, match="prefixes"):
            policy.decide(history)
