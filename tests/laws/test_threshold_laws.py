"""Laws of the threshold methods: closed forms against brute force on raw data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import erf

from qdist.stats import grid
from qdist.stats.histogram import Density, Histogram
from qdist.stats.kernels import count_bits
from qdist.threshold.clip import Levels, scale_and_zero
from qdist.threshold.entropy import best_candidate, entropy, kl_divergence, linear_bins
from qdist.threshold.error import expected_mse, mean_squared_error, mean_squared_error_reference
from qdist.threshold.mse import mse
from qdist.threshold.percentile import percentile, quantile
from qdist.threshold.registry import METHODS, find_threshold

Data = NDArray[np.float32]

N = 100_000


def gauss(rng: np.random.Generator, n: int = N) -> Data:
    return rng.normal(size=n).astype(np.float32)


def laplace(rng: np.random.Generator, n: int = N) -> Data:
    return rng.laplace(size=n).astype(np.float32)


def student(rng: np.random.Generator, n: int = N) -> Data:
    return rng.standard_t(3, size=n).astype(np.float32)


def relu(rng: np.random.Generator, n: int = N) -> Data:
    return np.maximum(rng.normal(size=n), 0).astype(np.float32)


def gelu(rng: np.random.Generator, n: int = N) -> Data:
    x = 2 * rng.normal(size=n)
    return (x * (1 + erf(x / np.sqrt(2))) / 2).astype(np.float32)


def outlier(rng: np.random.Generator, n: int = N) -> Data:
    x = rng.normal(size=n).astype(np.float32)
    x[:20] *= 30
    return x


DISTRIBUTIONS: dict[str, Callable[..., Data]] = {
    make.__name__: make for make in (gauss, laplace, student, relu, gelu, outlier)
}
ASYMMETRIC = {
    4: Levels(low=-8, high=7, symmetric=False),
    8: Levels(low=-128, high=127, symmetric=False),
}
SYMMETRIC = {
    4: Levels(low=-7, high=7, symmetric=True),
    8: Levels(low=-127, high=127, symmetric=True),
}
ALL_LEVELS = (
    *ASYMMETRIC.values(),
    *SYMMETRIC.values(),
    Levels(low=-32768, high=32767, symmetric=False),
    Levels(low=0, high=255, symmetric=False),
    Levels(low=-128, high=127, symmetric=True),
)
each_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
each_width = pytest.mark.parametrize("bits", [4, 8])
each_symmetry = pytest.mark.parametrize(
    "levels_by_bits", [SYMMETRIC, ASYMMETRIC], ids=["sym", "asym"]
)
seeds = st.integers(0, 2**32 - 1)


def density_of(values: Data) -> Density:
    counts = np.zeros(grid.N_BINS, np.uint64)
    extrema = np.array([np.inf, -np.inf], np.float32)
    count_bits(np.ascontiguousarray(values).view(np.uint32), counts, extrema)
    hit = np.flatnonzero(counts)
    return Histogram(
        bins=hit.astype(np.uint16),
        counts=counts[hit],
        minimum=float(extrema[0]),
        maximum=float(extrema[1]),
    ).finite


def error_on_raw_data(values: Data, low: float, high: float, levels: Levels) -> float:
    """Mean squared error of quantizing every value, one by one."""
    scale, zero = scale_and_zero(low, high, levels)
    x = values.astype(np.float64)
    q = np.clip(np.rint(x / scale) + zero, levels.low, levels.high)
    return float(np.mean((x - (q - zero) * scale) ** 2))


def least_error_on_raw_data(values: Data, levels: Levels) -> float:
    """The least error over a fine grid of ranges; for two bounds, over both."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    fractions = np.geomspace(1 / 200, 1, 300)
    if levels.symmetric or low == 0.0:
        top = max(-low, high)
        bottom = -1.0 if levels.symmetric else 0.0
        return min(error_on_raw_data(values, bottom * t, t, levels) for t in top * fractions)
    coarse = np.geomspace(1 / 100, 1, 24)
    ranges = [(low * a, high * b) for a in coarse for b in coarse]
    best = min(ranges, key=lambda r: error_on_raw_data(values, r[0], r[1], levels))
    fine = np.linspace(0.85, 1.15, 13)
    near = [(max(low, best[0] * a), min(high, best[1] * b)) for a in fine for b in fine]
    return min(error_on_raw_data(values, a, b, levels) for a, b in near)


# --- the error integral -----------------------------------------------------------------------


@given(seeds, st.sampled_from(ALL_LEVELS), st.floats(-9, 3), st.integers(1, 400))
@settings(max_examples=200)
def test_the_compiled_error_equals_its_definition(
    seed: int, levels: Levels, exponent: float, n: int
) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_t(2, size=n) * 10.0 ** rng.integers(-6, 6)).astype(np.float32)
    values[: n // 5] = 0
    density = density_of(values)
    scale = 10.0**exponent * max(1e-30, float(np.abs(values).max()))
    zero = int(rng.integers(levels.low, levels.high + 1))
    fast = mean_squared_error(density, scale, zero, levels)
    slow = mean_squared_error_reference(density, scale, zero, levels)
    assert fast == pytest.approx(slow, rel=1e-9, abs=1e-9 * min(scale**2, density.second_moment))


@given(seeds, st.sampled_from(ALL_LEVELS), st.floats(-2.5, 1))
@settings(max_examples=60)
def test_the_error_integral_is_the_mean_over_evenly_spread_values(
    seed: int, levels: Levels, exponent: float
) -> None:
    """Against a sum over 4,000 points in each of a few wide intervals."""
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.normal(size=8))
    counts = rng.integers(1, 9, 4).astype(np.float64)
    density = Density(lower=edges[::2], upper=edges[1::2], counts=counts)
    scale, zero = 10.0**exponent, int(rng.integers(levels.low, levels.high + 1))
    steps = (np.arange(4000) + 0.5) / 4000
    points = density.lower[:, None] + (density.upper - density.lower)[:, None] * steps
    q = np.clip(np.rint(points / scale) + zero, levels.low, levels.high)
    errors = ((points - (q - zero) * scale) ** 2).mean(axis=1)
    expected = float(np.dot(errors, counts) / counts.sum())
    assert mean_squared_error(density, scale, zero, levels) == pytest.approx(
        expected, rel=2e-3, abs=1e-5 * scale**2
    )


@each_distribution
@each_width
@each_symmetry
def test_the_expected_error_is_that_of_the_raw_data(
    name: str, bits: int, levels_by_bits: dict[int, Levels]
) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(7))
    density, levels = density_of(values), levels_by_bits[bits]
    for part in (0.05, 0.2, 0.5, 1.0):
        low, high = part * min(0, float(values.min())), part * float(values.max())
        exact = error_on_raw_data(values, low, high, levels)
        assert expected_mse(density, low, high, levels) == pytest.approx(exact, rel=0.01)


def test_the_error_of_point_masses_is_exact() -> None:
    density = Density(
        lower=np.array([-1.0, 0.0, 0.3]),
        upper=np.array([-1.0, 0.0, 0.3]),
        counts=np.array([1.0, 6.0, 1.0]),
    )
    levels = Levels(low=-2, high=1, symmetric=False)
    # -1 is two steps of 0.5 down; 0.3 rounds to 0.5.
    expected = 0.2**2 / 8
    assert mean_squared_error(density, 0.5, 0, levels) == pytest.approx(expected, rel=1e-12)
    assert mean_squared_error_reference(density, 0.5, 0, levels) == pytest.approx(expected)


# --- mse --------------------------------------------------------------------------------------


@each_distribution
@each_width
@each_symmetry
def test_the_mse_range_is_as_good_as_brute_force_on_raw_data(
    name: str, bits: int, levels_by_bits: dict[int, Levels]
) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(11), 20_000)
    levels = levels_by_bits[bits]
    low, high = mse(density_of(values), levels)
    found = error_on_raw_data(values, low, high, levels)
    assert found <= least_error_on_raw_data(values, levels) * 1.002


@given(seeds, st.sampled_from(ALL_LEVELS), st.sampled_from(sorted(DISTRIBUTIONS)))
@example(159, Levels(low=-127, high=127, symmetric=True), "gelu")
@example(70, Levels(low=-8, high=7, symmetric=False), "gauss")
@settings(max_examples=40)
def test_no_method_has_less_expected_error_than_mse(seed: int, levels: Levels, name: str) -> None:
    density = density_of(DISTRIBUTIONS[name](np.random.default_rng(seed), 2000))
    errors = {method: find_threshold(density, levels, method).expected_mse for method in METHODS}
    # With so few values the error is a little bumpy where the last of them leave the range.
    assert errors["mse"] <= min(errors.values()) * 1.01


# --- percentile and quantile ------------------------------------------------------------------


@given(
    seeds,
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.floats(50, 100),
    st.booleans(),
)
@settings(max_examples=100)
def test_the_percentile_lies_in_the_bin_of_the_quantile(
    seed: int, name: str, percent: float, symmetric: bool
) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(seed), 5001)
    levels = (SYMMETRIC if symmetric else ASYMMETRIC)[8]
    low, high = percentile(density_of(values), levels, percent=percent)
    if symmetric:
        bound = around(np.abs(values), percent / 100)
        assert bound[0] <= max(-low, high) <= bound[1]
        return
    tail = (1 - percent / 100) / 2
    lowest, highest = around(values, tail), around(values, 1 - tail)
    assert min(lowest[0], 0) <= low <= min(lowest[1], 0)
    assert max(highest[0], 0) <= high <= max(highest[1], 0)


def around(values: Data, share: float) -> tuple[float, float]:
    """What `numpy.quantile` gives either side of ``share``, one sample or one bin apart."""
    slack = 1.5 / values.size
    low = float(np.quantile(values.astype(np.float64), max(0.0, share - slack)))
    high = float(np.quantile(values.astype(np.float64), min(1.0, share + slack)))
    return low - abs(low) / 127, high + abs(high) / 127


@given(seeds, st.sampled_from(sorted(DISTRIBUTIONS)))
@settings(max_examples=40)
def test_all_of_the_values_are_the_whole_range(seed: int, name: str) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(seed), 1000)
    density = density_of(values)
    top = float(np.abs(values).max())
    low, high = percentile(density, SYMMETRIC[8], percent=100)
    assert max(-low, high) == top
    low, high = percentile(density, ASYMMETRIC[8], percent=100)
    assert (low, high) == (min(0, float(values.min())), max(0, float(values.max())))
    assert find_threshold(density, SYMMETRIC[8], "percentile", {"percent": 100}).clipped_share == 0


@given(seeds, st.lists(st.floats(0, 1), min_size=2, max_size=6))
@settings(max_examples=60)
def test_a_quantile_rises_with_its_share(seed: int, shares: list[float]) -> None:
    density = density_of(student(np.random.default_rng(seed), 300))
    for one in (density, density.magnitudes()):
        found = [quantile(one, share) for share in sorted(shares)]
        assert found == sorted(found)


# --- kl ---------------------------------------------------------------------------------------


def divergence_by_definition(counts: list[float], kept: int, n_levels: int) -> float:
    """KL(P||Q) as Migacz describes it, bin by bin. ``kept`` bins share ``n_levels`` levels."""
    p = [counts[i] for i in range(kept)]
    for outlier_count in counts[kept:]:
        p[kept - 1] += outlier_count
    q = [0.0] * kept
    for level in range(n_levels):
        start, stop = level * kept // n_levels, (level + 1) * kept // n_levels
        total, n_filled = 0.0, 0
        for i in range(start, stop):
            total += counts[i]
            n_filled += counts[i] > 0
        for i in range(start, stop):
            if counts[i] > 0:
                q[i] = total / n_filled
    p_sum, q_sum = sum(p), sum(q)
    if p_sum == 0 or q_sum == 0:
        return float("inf")
    divergence = 0.0
    for p_i, q_i in zip(p, q, strict=True):
        if p_i > 0:
            divergence += p_i / p_sum * np.log(p_i / p_sum / max(q_i / q_sum, 1e-12))
    return divergence


small_counts = st.lists(
    st.one_of(st.just(0.0), st.integers(1, 1000).map(float)), min_size=8, max_size=60
)


@given(small_counts, st.integers(1, 8), st.data())
def test_the_divergence_is_that_of_the_definition(
    counts: list[float], n_levels: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(n_levels, len(counts)))
    found = kl_divergence(np.array(counts), kept, n_levels)
    expected = divergence_by_definition(counts, kept, n_levels)
    if np.isinf(expected):
        assert np.isinf(found)
    else:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(small_counts, st.integers(1, 8), st.integers(1, 5))
def test_the_best_candidate_has_the_least_divergence(
    counts: list[float], n_levels: int, stride: int
) -> None:
    tried = range(len(counts), n_levels - 1, -stride)
    best = best_candidate(np.array(counts), n_levels, stride)
    least = min(divergence_by_definition(counts, kept, n_levels) for kept in tried)
    assert best in tried
    if not np.isinf(least):
        found = divergence_by_definition(counts, best, n_levels)
        assert found == pytest.approx(least, rel=1e-9, abs=1e-12)


@each_distribution
def test_the_kl_bound_is_that_of_linear_bins_of_the_raw_data(name: str) -> None:
    """The divergence at the bound found from the density is near the least on raw data."""
    values = np.abs(DISTRIBUTIONS[name](np.random.default_rng(3), 50_000))
    top, bins, n_levels = float(values.max()), 512, 127
    counts = np.histogram(values, bins=bins, range=(0, top))[0].astype(np.float64)
    counts[0] = counts[1]
    low, high = entropy(density_of(values), SYMMETRIC[8], bins=bins, stride=8)
    assert low == 0
    kept = round(high / top * bins)
    divergences = {k: kl_divergence(counts, k, n_levels) for k in range(bins, n_levels - 1, -8)}
    assert divergences[kept] <= min(divergences.values()) * 1.25


@given(
    seeds, st.integers(1, 300), st.sampled_from([7, 64, 2048]), st.integers(-38, 0), st.booleans()
)
@settings(max_examples=100)
def test_linear_bins_lose_no_value_however_small_some_are(
    seed: int, n: int, n_bins: int, smallest: int, with_zeros: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = (10.0 ** rng.uniform(smallest, 1, n) * rng.choice([-1, 1], n)).astype(np.float32)
    values[: n // 4] = 0 if with_zeros else values[: n // 4]
    magnitudes = density_of(values).magnitudes()
    top = magnitudes.maximum
    if top == 0:
        return
    counts = linear_bins(magnitudes, n_bins, top)
    assert counts.min() >= 0
    assert counts.sum() == pytest.approx(n, rel=1e-9)
    # Up to each edge, as many as there are but for what its own bin of the grid holds.
    edges = np.linspace(0, top, n_bins + 1)[1:]
    below = np.cumsum(counts)
    raw = np.abs(values.astype(np.float64))
    least = np.searchsorted(np.sort(raw), edges * (1 - 1 / 64), side="left")
    most = np.searchsorted(np.sort(raw), edges * (1 + 1 / 64), side="right")
    assert np.all(least - 1e-6 <= below)
    assert np.all(below <= most + 1e-6)


# --- all methods ------------------------------------------------------------------------------


@given(seeds, st.sampled_from(sorted(DISTRIBUTIONS)), st.sampled_from(ALL_LEVELS))
@settings(max_examples=30)
def test_every_method_stays_in_the_range_that_was_seen(
    seed: int, name: str, levels: Levels
) -> None:
    values = DISTRIBUTIONS[name](np.random.default_rng(seed), 500)
    density = density_of(values)
    for method in METHODS:
        found = find_threshold(density, levels, method)
        assert min(0, float(values.min())) <= found.low <= 0 <= found.high
        assert found.high <= max(0, float(values.max()))
        assert found.high > found.low
        assert 0 <= found.clipped_share < 1
        outside = float(((values < found.low) | (values > found.high)).mean())
        assert found.clipped_share == pytest.approx(outside, abs=0.02)


@given(seeds, st.integers(1, 300), st.integers(0, 5), st.sampled_from(ALL_LEVELS))
@settings(max_examples=40)
def test_every_method_takes_values_of_any_magnitude(
    seed: int, n: int, kind: int, levels: Levels
) -> None:
    rng = np.random.default_rng(seed)
    values = (
        lambda: 10.0 ** rng.uniform(-44, 38, n) * rng.choice([-1, 1], n),
        lambda: rng.choice([0, 1.0, -2.5, 1e-30, 3e38], n),
        lambda: rng.choice([-3e38, 3e38], n),
        lambda: rng.integers(0, 256, n) / 255,
        lambda: np.append(np.zeros(n), rng.normal()),
        lambda: np.full(n, 1e-42),
    )[kind]()
    density = density_of(values.astype(np.float32))
    for method in METHODS:
        found = find_threshold(density, levels, method)
        assert min(0, density.minimum) <= found.low <= 0 <= found.high <= max(0, density.maximum)
        assert found.high > found.low or density.minimum == density.maximum == 0
        assert np.isfinite([found.expected_mse, found.clipped_share, found.mean_square]).all()


@given(seeds, st.sampled_from(sorted(DISTRIBUTIONS)), st.integers(-20, 20))
@settings(max_examples=30)
def test_scaling_the_data_by_a_power_of_two_scales_every_range(
    seed: int, name: str, exponent: int
) -> None:
    """Bins scale along exactly, so nothing but the exponent may change."""
    values = DISTRIBUTIONS[name](np.random.default_rng(seed), 500)
    values[np.abs(values) < 2.0**-60] = 0
    factor = 2.0**exponent
    scaled = (values * np.float32(factor)).astype(np.float32)
    for method in METHODS:
        for levels in (SYMMETRIC[8], ASYMMETRIC[4]):
            one = find_threshold(density_of(values), levels, method)
            other = find_threshold(density_of(scaled), levels, method)
            assert other.low == pytest.approx(one.low * factor, rel=1e-9)
            assert other.high == pytest.approx(one.high * factor, rel=1e-9)


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30), st.sampled_from(ALL_LEVELS))
def test_a_scale_covers_the_range_and_keeps_zero_exact(a: float, b: float, levels: Levels) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    if 0 < high - low < 1e-300:
        return
    scale, zero = scale_and_zero(low, high, levels)
    assert scale > 0
    assert levels.low <= zero <= levels.high
    assert not (levels.symmetric and zero)
    # Rounding the zero point moves either end by at most half a step.
    assert (levels.low - zero) * scale <= low + 0.5001 * scale
    assert (levels.high - zero) * scale >= high - 0.5001 * scale
    if levels.symmetric:
        assert levels.high * scale == pytest.approx(max(-low, high)) or low == high
