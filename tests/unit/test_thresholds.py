"""Threshold methods: corner cases, sentinels, and the registry's errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdist.errors import ConfigError, PlanError
from qdist.stats import grid
from qdist.stats.histogram import Density, Histogram
from qdist.stats.kernels import count_bits
from qdist.threshold.clip import Levels, Threshold, scale_and_zero
from qdist.threshold.error import expected_mse
from qdist.threshold.registry import METHODS, check_method, find_threshold
from qdist.threshold.sentinel import split_sentinels

INT8 = Levels(low=-128, high=127, symmetric=False)
SYMMETRIC = Levels(low=-127, high=127, symmetric=True)
INT16 = Levels(low=-32768, high=32767, symmetric=False)
UINT8 = Levels(low=0, high=255, symmetric=False)
ALL_LEVELS = (INT8, SYMMETRIC, INT16, UINT8)

each_method = pytest.mark.parametrize("method", METHODS)
each_levels = pytest.mark.parametrize("levels", ALL_LEVELS, ids=repr)


def density_of(values: Any) -> Density:
    flat = np.asarray(values, np.float32)
    counts = np.zeros(grid.N_BINS, np.uint64)
    extrema = np.array([np.inf, -np.inf], np.float32)
    count_bits(flat.view(np.uint32), counts, extrema)
    hit = np.flatnonzero(counts)
    return Histogram(
        bins=hit.astype(np.uint16),
        counts=counts[hit],
        minimum=float(extrema[0]),
        maximum=float(extrema[1]),
    ).finite


def normal(n: int = 20_000) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=n).astype(np.float32)


# --- corner cases -----------------------------------------------------------------------------


@each_method
@each_levels
def test_an_empty_histogram_gives_the_range_zero(method: str, levels: Levels) -> None:
    found = find_threshold(density_of([]), levels, method)
    assert (found.low, found.high) == (0.0, 0.0)
    assert (found.clipped_share, found.expected_mse) == (0.0, 0.0)
    assert scale_and_zero(found.low, found.high, levels) == (1.0, 0)


@each_method
@each_levels
def test_a_tensor_of_zeros_gives_the_range_zero(method: str, levels: Levels) -> None:
    found = find_threshold(density_of(np.zeros(100)), levels, method)
    assert (found.low, found.high) == (0.0, 0.0)
    assert (found.clipped_share, found.expected_mse) == (0.0, 0.0)
    assert scale_and_zero(0.0, 0.0, levels)[0] == 1.0


@each_method
@pytest.mark.parametrize("value", [5.03, -3.7, 1e-20, -2e30, 1e-40])
def test_a_tensor_of_one_value_is_kept_whole(method: str, value: float) -> None:
    density = density_of(np.full(1000, value))
    found = find_threshold(density, INT8, method)
    exact = float(np.float32(value))
    assert (found.low, found.high) == (min(exact, 0.0), max(exact, 0.0))
    assert found.clipped_share == 0.0
    assert found.expected_mse <= (exact / 255) ** 2 / 4 * (1 + 1e-9)


@each_method
def test_a_positive_tensor_keeps_zero_at_the_end_of_its_range(method: str) -> None:
    density = density_of(np.abs(normal()) + 3)
    assert find_threshold(density, INT8, method).low == 0.0
    mirrored = find_threshold(density_of(-np.abs(normal()) - 3), INT8, method)
    assert mirrored.high == 0.0
    assert mirrored.low < -3


@each_method
def test_nan_and_infinity_do_not_reach_the_range(method: str) -> None:
    plain = find_threshold(density_of(normal(1000)), INT8, method)
    dirty = np.concatenate([normal(1000), [np.nan, np.inf, -np.inf]]).astype(np.float32)
    found = find_threshold(density_of(dirty), INT8, method)
    assert (found.low, found.high) == (plain.low, plain.high)


def test_max_is_the_exact_range_that_was_seen() -> None:
    values = normal()
    found = find_threshold(density_of(values), INT8, "max")
    assert (found.low, found.high) == (float(values.min()), float(values.max()))
    assert found.clipped_share == 0.0


def test_kl_falls_back_to_the_whole_range_where_levels_outnumber_bins() -> None:
    values = normal()
    found = find_threshold(density_of(values), INT16, "kl", {"bins": 2048})
    assert (found.low, found.high) == (float(values.min()), float(values.max()))
    assert found.method == "max"
    assert found == find_threshold(density_of(values), INT16, "max")
    assert find_threshold(density_of(values), INT16, "kl", {"bins": 40_000}).method == "kl"
    assert find_threshold(density_of(values), INT8, "kl", {"bins": 100}).method == "max"


def test_methods_clip_an_outlier_that_max_keeps() -> None:
    values = normal()
    values[0] = 1000
    density = density_of(values)
    ranges = {method: find_threshold(density, SYMMETRIC, method) for method in METHODS}
    assert ranges["max"].high == 1000
    assert ranges["percentile"].high < 6
    assert ranges["kl"].high < 100
    assert ranges["mse"].high < 1000
    least = min(found.expected_mse for found in ranges.values())
    assert ranges["mse"].expected_mse == pytest.approx(least, rel=1e-6)


def test_kl_is_not_thrown_off_by_values_near_zero() -> None:
    """Bins near zero are so narrow that their density is immense."""
    tiny = (10.0 ** np.random.default_rng(1).uniform(-38, -20, 500)).astype(np.float32)
    values = np.concatenate([normal(), tiny, -tiny])
    plain = find_threshold(density_of(normal()), SYMMETRIC, "kl")
    found = find_threshold(density_of(values), SYMMETRIC, "kl")
    assert found.high == pytest.approx(plain.high, rel=0.05)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_symmetric_percentile_of_all_values_reaches_the_larger_end(sign: int) -> None:
    """Both ends lie in one bin of the grid."""
    density = density_of([-5.01 * sign, 5.02 * sign])
    found = find_threshold(density, SYMMETRIC, "percentile", {"percent": 100})
    assert max(-found.low, found.high) == float(np.float32(5.02))
    assert found.clipped_share == 0.0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-1.0, 1.0, (2 / 255, 0)),
        (0.0, 255.0, (1.0, -128)),
        (-255.0, 0.0, (1.0, 127)),
        (-100.0, 155.0, (1.0, -28)),
    ],
)
def test_scale_and_zero_map_the_range_onto_the_levels(
    low: float, high: float, expected: tuple[float, int]
) -> None:
    scale, zero = scale_and_zero(low, high, INT8)
    assert scale == pytest.approx(expected[0], rel=1e-15)
    assert zero == expected[1]


def test_expected_error_of_nothing_is_zero() -> None:
    assert expected_mse(density_of([]), -1.0, 1.0, INT8) == 0.0


@pytest.mark.parametrize(
    ("low", "high", "symmetric"), [(1, 1, False), (5, -5, False), (1, 7, True), (-7, 0, True)]
)
def test_impossible_levels_are_refused(low: int, high: int, symmetric: bool) -> None:
    with pytest.raises(ValueError, match="no quantizer has the levels"):
        Levels(low=low, high=high, symmetric=symmetric)


@pytest.mark.parametrize(("low", "high"), [(0.1, 1.0), (-1.0, -0.1)])
def test_a_range_without_zero_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="must hold zero"):
        Threshold(low=low, high=high, method="max", clipped_share=0.0, expected_mse=0.0)


# --- sentinels --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [-1e9, -65504.0, -3.4e38, -1e4, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_mask_values_are_taken_off(mask: float, spread: float) -> None:
    """``spread``: the mask was added to scores, or stands alone."""
    scores = 4 * normal(5000)
    with np.errstate(over="ignore"):
        masked = np.maximum(mask + spread * normal(700), np.finfo(np.float32).min)
    split = split_sentinels(density_of(np.concatenate([scores, masked.astype(np.float32)])))
    assert split.n_sentinels == 700
    assert split.body.total == 5000
    # No longer cut by an exact extremum, the lowest bin is whole.
    assert split.body.minimum == pytest.approx(float(scores.min()), rel=1 / 128)
    assert split.body.minimum <= float(scores.min())
    assert split.body.maximum == float(scores.max())


def test_a_mask_tensor_of_zeros_and_sentinels_is_split() -> None:
    split = split_sentinels(density_of([0.0] * 10 + [-1e9] * 6))
    assert split.n_sentinels == 6
    assert (split.body.minimum, split.body.maximum) == (0.0, 0.0)


def test_sentinels_of_two_kinds_are_both_taken_off() -> None:
    split = split_sentinels(density_of([*normal(500), *[-1e9] * 3, *[-3e38] * 2]))
    assert split.n_sentinels == 5
    assert split.body.total == 500


def test_sentinels_are_found_beyond_a_heavy_tail() -> None:
    tail = -np.geomspace(0.1, 2000, 4000)
    split = split_sentinels(density_of([*tail, *[-1e9] * 7]))
    assert split.n_sentinels == 7
    assert split.body.minimum == pytest.approx(-2000, rel=1 / 128)


@pytest.mark.parametrize(
    "values",
    [
        np.concatenate([-np.geomspace(0.01, 2000, 3000), normal(1000)]),
        np.random.default_rng(2).standard_cauchy(200_000).clip(-2000, 2000),
        -np.linspace(1100, 2500, 1000),
        [-5000.0] * 10,
        [1e9, -1.0, 2.0],
        [-1e9, 1e9, 0.0],
        [-999.0, 0.0, 1.0],
        normal(1000),
        [],
    ],
    ids=[
        *("heavy tail", "Cauchy", "all far from zero", "one value", "positive outlier"),
        *("both signs", "small", "Gauss", "nothing"),
    ],
)
def test_ordinary_tensors_hold_no_sentinels(values: Any) -> None:
    density = density_of(values)
    split = split_sentinels(density)
    assert split.n_sentinels == 0
    assert split.body.total == density.total
    assert split.body.minimum == density.minimum


# --- the registry -----------------------------------------------------------------------------


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(PlanError) as caught:
        find_threshold(density_of([1.0]), INT8, "minmax")
    error = caught.value
    assert error.code == "QD501"
    assert error.where == "quantization.saturation"
    assert error.got == "'minmax'"
    assert error.expected.startswith("one of max, percentile, mse, kl, ")
    assert error.expected.endswith("improvedmse, improvedkl")


@pytest.mark.parametrize(
    ("method", "name", "expected"),
    [
        ("max", "percent", "one of th_scale, threshold"),
        ("percentile", "bins", "one of percent, th_scale, threshold"),
        ("kl", "density", "one of bins, stride, th_scale, threshold"),
        ("mse", "levels", "one of rounds, th_scale, threshold"),
        ("ems", "levels", "one of rounds, th_scale, threshold"),
    ],
)
def test_a_parameter_that_a_method_does_not_take_is_named(
    method: str, name: str, expected: str
) -> None:
    with pytest.raises(PlanError) as caught:
        find_threshold(density_of([1.0]), INT8, method, {name: 1})
    error = caught.value
    assert error.code == "QD502"
    assert error.where == f"method {method}"
    assert repr(name) in error.got
    assert error.expected == expected


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("percentile", "percent", 100.5),
        ("percentile", "percent", -1),
        ("percentile", "percent", float("nan")),
        ("percentile", "percent", "99"),
        ("percentile", "percent", True),
        ("kl", "stride", 0),
        ("kl", "bins", 2048.0),
        ("kl", "bins", 1),
        ("mse", "rounds", None),
    ],
)
def test_a_value_that_a_parameter_cannot_have_is_refused(
    method: str, name: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_method(method, {name: value})
    assert caught.value.code == "QD104"
    assert caught.value.where == f"quantization.saturation_parameters.{name}"
    assert caught.value.got == repr(value)


def test_parameters_reach_the_method() -> None:
    density = density_of(normal())
    wide = find_threshold(density, SYMMETRIC, "percentile", {"percent": 99.9})
    narrow = find_threshold(density, SYMMETRIC, "percentile", {"percent": 90})
    assert narrow.high < wide.high
    assert narrow.clipped_share == pytest.approx(0.1, abs=0.01)
    for method, parameters in (("kl", {"bins": 512, "stride": 1}), ("mse", {"rounds": 1})):
        assert find_threshold(density, INT8, method, parameters).method == method
