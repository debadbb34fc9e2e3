"""ACIQ, ADMM, auto and what stands around the methods: names, factors, sources, sentinels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import lambertw

from qdist.errors import ConfigError, PlanError
from qdist.stats.spec import GroupRequest, StatisticsSpec
from qdist.threshold.aciq import aciq, fit, optimal_clip
from qdist.threshold.adjust import fixed_threshold, scale_threshold
from qdist.threshold.admm import admm, settle
from qdist.threshold.auto import TENSOR_ALONE, choose
from qdist.threshold.clip import Levels, Threshold, scale_and_zero
from qdist.threshold.consumer import Consumer, clipping, output_error
from qdist.threshold.error import expected_mse
from qdist.threshold.improved import improved_mse
from qdist.threshold.kernels import sum_codes
from qdist.threshold.mse import mse
from qdist.threshold.registry import (
    METHODS,
    VENDOR_NAMES,
    applicable,
    find_threshold,
    find_thresholds,
    resolve,
)
from qdist.threshold.sentinel import keep_masked, masked_floor, split_sentinels
from qdist.threshold.sources import array_densities, group_densities
from tests.laws.test_threshold_laws import DISTRIBUTIONS, error_on_raw_data
from tests.records import measured
from tests.unit.test_thresholds import INT8, INT16, SYMMETRIC, density_of, normal

RNG = np.random.default_rng(17)


# --- ACIQ: Banner et al. 2019, table of optimal clips -----------------------------------------

PUBLISHED = {
    ("laplace", False): (1.8628, 2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968),
    ("laplace", True): (2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968, 11.1627),
    ("gauss", False): (1.2399, 1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240),
    ("gauss", True): (1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240, 4.2163),
}


@pytest.mark.parametrize(("distribution", "one_sided"), PUBLISHED)
def test_clips_are_the_published_ones(distribution: str, one_sided: bool) -> None:
    found = [optimal_clip(distribution, 2**bits, one_sided=one_sided) for bits in range(1, 9)]
    assert found == pytest.approx(PUBLISHED[distribution, one_sided], abs=1e-3)


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 24])
def test_the_laplace_clip_is_lamberts(bits: int) -> None:
    """The zero of ``a / (3 4^M) = e^-a``."""
    assert optimal_clip("laplace", 2**bits) == pytest.approx(lambertw(3 * 4.0**bits).real, rel=1e-9)


def test_impossible_clips_are_refused() -> None:
    for name, n_levels in (("cauchy", 256), ("gauss", 1)):
        with pytest.raises(ValueError, match="no clip"):
            optimal_clip(name, n_levels)


@pytest.mark.parametrize(("name", "expected"), [("gauss", "gauss"), ("laplace", "laplace")])
def test_the_fit_finds_the_distribution_and_its_moments(name: str, expected: str) -> None:
    values = 3 * DISTRIBUTIONS[name](RNG) + np.float32(0.5)
    found = fit(density_of(values))
    exact = values.astype(np.float64)
    assert found.likelier == expected
    assert found.mean == pytest.approx(exact.mean(), rel=1e-2)
    assert found.b == pytest.approx(np.abs(exact - exact.mean()).mean(), rel=1e-3)
    assert found.sigma == pytest.approx(exact.std(), rel=1e-3)
    rectified = fit(density_of(np.maximum(3 * DISTRIBUTIONS[name](RNG), 0)))
    assert (rectified.one_sided, rectified.likelier) == (True, expected)
    assert rectified.sigma == pytest.approx(3 * (1 if name == "gauss" else 2**0.5), rel=0.02)


@pytest.mark.parametrize("name", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [4, 8])
def test_aciq_is_near_the_least_error_where_its_assumption_holds(name: str, bits: int) -> None:
    levels = Levels(low=-(1 << bits - 1), high=(1 << bits - 1) - 1, symmetric=False)
    density = density_of(DISTRIBUTIONS[name](RNG, 200_000))
    found = expected_mse(density, *aciq(density, levels), levels)
    least = expected_mse(density, *mse(density, levels), levels)
    assert least <= found <= least * (1.1 if bits == 4 else 1.25)


def test_after_a_relu_the_clip_is_one_bit_wider() -> None:
    values, levels = DISTRIBUTIONS["laplace"](RNG), Levels(low=-8, high=7, symmetric=False)
    two_sided = aciq(density_of(values), levels, distribution="laplace")
    one_sided = aciq(density_of(np.maximum(values, 0)), levels, distribution="laplace")
    assert one_sided[0] == 0
    assert one_sided[1] / two_sided[1] == pytest.approx(6.2048 / 5.0286, rel=0.02)


# --- ADMM -------------------------------------------------------------------------------------


def turns_on_raw_data(values: Any, scale: float, first: int, last: int) -> float:
    x = values.astype(np.float64)
    for _ in range(100):
        q = np.clip(np.rint(x / scale), first, last)
        found = float((x * q).sum() / (q * q).sum())
        if abs(found - scale) <= 3e-4 * scale:
            return found
        scale = found
    return scale


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_turns_end_where_they_do_on_raw_features(name: str) -> None:
    values = DISTRIBUTIONS[name](RNG, 20_000)
    density = density_of(values)
    start = float(np.abs(values).max()) / 7 / 4
    arrays = density.lower, density.upper, density.counts
    found = settle(*arrays, start, -7, 7, 100, 3e-4)
    assert found == pytest.approx(turns_on_raw_data(values, start, -7, 7), rel=5e-3)


@pytest.mark.parametrize("levels", [INT8, SYMMETRIC, INT16], ids=repr)
def test_more_starts_never_cost_and_come_near_the_least_error(levels: Levels) -> None:
    density = density_of(DISTRIBUTIONS["student"](RNG))
    errors = [expected_mse(density, *admm(density, levels, starts=n), levels) for n in (1, 8)]
    least = expected_mse(density, *mse(density, levels), levels)
    assert least * (1 - 1e-6) <= errors[1] <= errors[0] * (1 + 1e-9)
    assert errors[1] <= 1.25 * least


# --- improved_mse -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bins", [2048, 4096, 10240])
def test_the_joint_search_is_as_good_as_by_turns(name: str, bins: int) -> None:
    values = DISTRIBUTIONS[name](RNG, 50_000)
    density = density_of(values)
    joint = error_on_raw_data(values, *improved_mse(density, INT8, bins=bins), INT8)
    assert joint <= 1.01 * error_on_raw_data(values, *mse(density, INT8), INT8)


# --- names, factors and fixed thresholds ------------------------------------------------------


@pytest.mark.parametrize("name", [*VENDOR_NAMES, "MAX", "SYMKL", "ImprovedKL", "PERCENTILE9999"])
def test_every_vendors_name_works(name: str) -> None:
    method, parameters = resolve(name)
    density = density_of(normal())
    assert method in METHODS
    assert find_threshold(density, INT8, name) == find_threshold(density, INT8, method, parameters)
    assert resolve("percentile9999", {"percent": 99.0}) == ("percentile", {"percent": 99.0})


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_scales_what_the_method_found(method: str) -> None:
    density = density_of(normal())
    plain = find_threshold(density, INT8, method)
    scaled = find_threshold(density, INT8, method, {"th_scale": 0.5})
    assert (scaled.low, scaled.high) == (plain.low / 2, plain.high / 2)
    assert scaled.method == plain.method
    assert scaled.expected_mse == expected_mse(density, plain.low / 2, plain.high / 2, INT8)
    assert scaled == scale_threshold(plain, 0.5, density, INT8)
    fixed = find_threshold(density, INT8, method, {"threshold": 2.5})
    assert (fixed.low, fixed.high, fixed.method) == (-2.5, 2.5, "fixed")


def test_a_fixed_threshold_stands_on_the_sides_that_have_values() -> None:
    for values, expected in (
        (normal(), (-9.0, 9.0)),
        (np.abs(normal()), (0.0, 9.0)),
        (-np.abs(normal()), (-9.0, 0.0)),
        ([0.0, 0.0], (0.0, 9.0)),
        ([], (-9.0, 9.0)),
    ):
        found = fixed_threshold(9.0, density_of(values), INT8)
        assert (found.low, found.high) == expected
        assert found.clipped_share == 0
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            fixed_threshold(wrong, density_of([1.0]), INT8)
        with pytest.raises(ValueError, match="above 0"):
            scale_threshold(found, wrong, density_of([1.0]), INT8)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("aciq", {"distribution": "cauchy"}),
        ("aciq", {"distribution": 3}),
        ("max", {"th_scale": 0}),
        ("kl", {"threshold": -1.0}),
        ("admm", {"starts": 1.5}),
        ("improved_kl", {"bins": 1}),
    ],
)
def test_other_values_are_refused(method: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        find_threshold(density_of(normal()), INT8, method, parameters)
    assert caught.value.code == "QD104"
    assert caught.value.where.endswith(next(iter(parameters)))


def test_only_what_a_method_takes_is_applicable() -> None:
    given = {"percent": 99.9, "bins": 512, "th_scale": 0.9}
    assert applicable("percentile", given) == {"percent": 99.9, "th_scale": 0.9}
    assert applicable("KL", given) == {"bins": 512, "th_scale": 0.9}
    with pytest.raises(PlanError):
        applicable("guess", given)


def test_error_is_told_in_decibels_too() -> None:
    found = find_threshold(density_of(normal(200_000)), SYMMETRIC, "max")
    # Uniform noise of a step / sqrt(12), for a deviation of 1.
    step = max(-found.low, found.high) / 127
    assert found.sqnr_db == pytest.approx(-10 * np.log10(step**2 / 12), abs=0.05)
    assert found.relative_error == pytest.approx(step**2 / 12, rel=0.02)
    nothing = Threshold(low=0.0, high=0.0, method="max", clipped_share=0.0, expected_mse=0.0)
    assert (nothing.relative_error, nothing.sqnr_db) == (0.0, float("inf"))


# --- rows of channels, groups and weights -----------------------------------------------------


@pytest.mark.parametrize("mantissa_bits", [7, 3, 0])
@pytest.mark.parametrize("group_size", [1, 3])
def test_group_densities_are_those_of_the_groups_values(
    mantissa_bits: int, group_size: int
) -> None:
    values = (RNG.standard_t(3, (50, 7, 6)) * 10.0 ** np.arange(7)[:, None]).astype(np.float32)
    values[:, 2] = 0
    values[0, 3, 0] = np.inf
    request = GroupRequest(match="x", axis=1, group_size=group_size, mantissa_bits=mantissa_bits)
    spec = StatisticsSpec(groups=(request,))
    record = measured({"x": values}, 50, spec=spec)
    found = group_densities(record.groups("x")[0])
    assert len(found) == -(-7 // group_size)
    for index, density in enumerate(found):
        raw = values[:, index * group_size : (index + 1) * group_size].ravel()
        raw = raw[np.isfinite(raw)]
        assert density.total == raw.size
        assert np.all(density.lower[1:] >= density.upper[:-1])
        assert density.minimum <= raw.min() <= density.minimum + abs(density.minimum)
        assert density.maximum >= raw.max() >= density.maximum - abs(density.maximum)
    assert find_threshold(found[-1], INT8, "mse").high > 1e4


def test_weights_become_densities_per_tensor_channel_and_group() -> None:
    weight = RNG.normal(size=(6, 5, 3, 3)).astype(np.float32)
    (whole,) = array_densities(weight)
    assert (whole.total, whole.minimum) == (270, float(weight.min()))
    per_channel = array_densities(weight, 1)
    assert [d.maximum for d in per_channel] == [float(weight[:, i].max()) for i in range(5)]
    grouped = array_densities(weight, 0, group_size=4)
    assert [d.total for d in grouped] == [4 * 45, 2 * 45]
    for method in ("mse", "kl", "aciq"):
        found = find_thresholds(per_channel, SYMMETRIC, method)
        assert found == tuple(find_threshold(d, SYMMETRIC, method) for d in per_channel)
    large = RNG.normal(size=(1, 20_000)).astype(np.float32)
    (binned,) = array_densities(large, 0)
    assert binned.counts.size < 8000
    assert (binned.minimum, binned.maximum) == (float(large.min()), float(large.max()))
    assert array_densities(np.zeros((3, 0), np.float32), 0)[2].is_empty
    with pytest.raises(ValueError, match="at least 1"):
        array_densities(weight, 0, group_size=0)


# --- auto: by the layer that reads the tensor -------------------------------------------------


def test_clipping_is_that_of_the_values() -> None:
    values = DISTRIBUTIONS["student"](RNG, 30_000)
    found = clipping(density_of(values), -1.5, 2.0)
    x = values.astype(np.float64)
    assert found == pytest.approx(((np.clip(x, -1.5, 2.0) - x) ** 2).mean(), rel=2e-3)
    points = density_of([-4.0, 0.0, 5.0])
    assert clipping(points, -1.5, 2.0) == pytest.approx((2.5**2 + 9) / 3)
    assert clipping(points, -4.0, 5.0) == 0.0


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("part", "n_levels"), [(0.5, 7), (0.1, 127), (1.0, 3)])
def test_sums_of_codes_are_those_of_the_values(name: str, part: float, n_levels: int) -> None:
    values = DISTRIBUTIONS[name](RNG, 30_000)
    density, x = density_of(values), values.astype(np.float64)
    scale = part * float(np.abs(x).max()) / n_levels
    q = np.clip(np.rint(x / scale), -n_levels, n_levels)
    arrays = density.lower, density.upper, density.counts
    codes, products = sum_codes(*arrays, scale, -n_levels, n_levels)
    assert products == pytest.approx((q * x).sum(), rel=5e-3)
    assert codes == pytest.approx(q.sum(), abs=5e-3 * np.abs(q).sum())


def test_what_rounds_to_zero_adds_up_over_inputs_of_one_sign() -> None:
    """Small values of one sign under weights of one sign: rounding is an offset of the sum."""
    x = RNG.exponential(0.3, size=(4000, 200)).astype(np.float32)
    w = np.abs(RNG.normal(size=(200, 16)))
    y = x.astype(np.float64) @ w
    consumer = Consumer.of_weight("sum", w, 0, 1, output_square=float((y * y).mean()))
    scale, zero = scale_and_zero(0.0, 255.0 * 0.8, INT8)
    e = (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale - x
    real = float(((e.astype(np.float64) @ w) ** 2).mean() / (y * y).mean())
    found = output_error(density_of(x), 0.0, 255.0 * 0.8, INT8, consumer)
    assert found == pytest.approx(real, rel=0.1)
    without = output_error(density_of(x), 0.0, 255.0 * 0.8, INT8, replace(consumer, mean_gain=0.0))
    assert without < 0.5 * real


def test_without_correlation_the_output_error_is_that_of_a_real_matmul() -> None:
    x = RNG.normal(size=(4000, 64)).astype(np.float32)
    w = RNG.normal(size=(64, 48))
    y = x.astype(np.float64) @ w
    consumer = Consumer.of_weight("matmul", w, 0, 1, output_square=float((y * y).mean()))
    density = density_of(x)
    for bound in (1.5, 3.0, 4.5):
        scale, zero = scale_and_zero(-bound, bound, SYMMETRIC)
        e = np.clip(np.rint(x / scale), -127, 127) * scale - x
        real = float(((e.astype(np.float64) @ w) ** 2).mean() / (y * y).mean())
        assert zero == 0
        found = output_error(density, -bound, bound, SYMMETRIC, consumer)
        assert found == pytest.approx(real, rel=0.1)


def test_coherent_inputs_make_clipping_dearer_than_the_tensor_shows() -> None:
    """Inputs that agree in sign, under weights of one sign: the sums shrink as a whole."""
    common = np.abs(RNG.standard_t(3, size=(4000, 1)))
    x = (common * np.abs(RNG.normal(1, 0.1, size=(4000, 256)))).astype(np.float32)
    w = np.abs(RNG.normal(size=(256, 16)))
    y = x.astype(np.float64) @ w
    knows = Consumer.of_weight("sum", w, 0, 1, output_square=float((y * y).mean()))
    blind = Consumer.of_weight("sum", w, 0, 1)
    density, bound = density_of(x), 6.0
    scale, zero = scale_and_zero(0.0, bound, INT8)
    e = (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale - x
    real = float(((e.astype(np.float64) @ w) ** 2).mean() / (y * y).mean())
    found = output_error(density, 0.0, bound, INT8, knows)
    # Rounding averages out over 256 inputs, clipping does not.
    tight, wide = (choose(density, INT8, each) for each in ((blind,), (knows,)))
    assert wide.high >= tight.high
    assert 0.3 * real < found < 3 * real


def test_channels_that_matter_little_may_be_clipped() -> None:
    """One channel holds all outliers, and its weights are tiny."""
    x = RNG.normal(size=(2000, 32)).astype(np.float32)
    x[:, 0] *= 60
    w = RNG.normal(size=(32, 16))
    w[0] *= 1e-4
    density = density_of(x)
    extrema = {"minimum": x.min(axis=0), "maximum": x.max(axis=0)}
    seen = Consumer.of_weight("after norm", w, 0, 1, **extrema)
    unseen = Consumer.of_weight("after norm", w, 0, 1)
    assert seen.gain_beyond(-8.0, 8.0) < 1e-6 * seen.gain()
    assert seen.gain_beyond(-1e4, 1e4) == seen.gain() == unseen.gain_beyond(-8.0, 8.0)
    narrow, wide = (choose(density, SYMMETRIC, (each,)) for each in (seen, unseen))
    assert narrow.high < wide.high
    assert narrow.note == "least expected error in after norm"


def test_a_grouped_convolution_weighs_each_group_by_itself() -> None:
    weight = RNG.normal(size=(6, 2, 3, 3))
    found = Consumer.of_weight("conv", weight, 1, 0, groups=3)
    assert found.gains.size == 6
    # Channels 2 and 3 are the second group's, of outputs 2 and 3.
    assert found.gains[2:4] == pytest.approx((weight[2:4] ** 2).sum(axis=(0, 2, 3)) / 6)
    assert found.gain() == pytest.approx((weight**2).sum() / 6)


def test_auto_takes_the_least_of_its_candidates_and_says_when_it_knows_no_reader() -> None:
    density = density_of(DISTRIBUTIONS["outlier"](RNG, 20_000))
    alone = find_threshold(density, INT8, "auto")
    assert alone.note == TENSOR_ALONE
    assert alone.method == "mse"
    others = [find_threshold(density, INT8, m).expected_mse for m in ("max", "kl", "percentile")]
    assert alone.expected_mse <= min(others) * (1 + 1e-6)
    assert choose(density_of(normal()), INT16).low < 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"gains": np.zeros((2, 2))},
        {"gains": np.array([-1.0])},
        {"gains": np.ones(2), "minimum": np.zeros(3)},
    ],
)
def test_consumers_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layer"):
        Consumer(name="layer", **wrong)


# --- sentinels --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [-1e9, -65504.0, float(np.finfo(np.float32).min)])
def test_known_sentinels_need_a_smaller_gap(mask: float) -> None:
    """Scores in the thousands, with float16's mask not sixteen times beyond them."""
    scores = np.linspace(-9000, 9000, 5000)
    split = split_sentinels(density_of([*scores, *[mask] * 40]))
    assert (split.n_sentinels, split.body.total) == (40, 5000)
    # An ordinary tail that ends there is no mask.
    tail = -np.geomspace(1, 40_000, 4000)
    assert split_sentinels(density_of(tail)).n_sentinels == 0


@pytest.mark.parametrize("mask", [-1e9, -65504.0, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("levels", [INT8, SYMMETRIC, INT16], ids=repr)
@pytest.mark.parametrize(("spread", "shift"), [(1.0, 0.0), (6.0, -5.0), (0.3, 40.0)])
@pytest.mark.parametrize("method", ["max", "mse", "kl", "percentile"])
def test_masked_positions_keep_no_probability(
    mask: float, levels: Levels, spread: float, shift: float, method: str
) -> None:
    """A real Softmax over real rows, of which the first sees one position alone."""
    rng = np.random.default_rng(3)
    scores = (spread * rng.normal(size=(64, 64)) + shift).astype(np.float32)
    is_masked = np.triu(np.ones((64, 64), bool), 1)
    x = np.where(is_masked, scores + np.float32(mask), scores)
    split = split_sentinels(density_of(x))
    assert split.n_sentinels == is_masked.sum()
    plain = find_threshold(split.body, levels, method)
    found = keep_masked(plain, split.body, levels)
    scale, zero = scale_and_zero(found.low, found.high, levels)
    q = np.clip(np.rint(x.astype(np.float64) / scale) + zero, levels.low, levels.high)
    dequantized = (q - zero) * scale
    weights = np.exp(dequantized - dequantized.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    assert probabilities[is_masked].max() < 1e-6
    assert found.high == plain.high
    assert keep_masked(found, split.body, levels) == found
    if found.low < plain.low:
        assert "masked scores stay masked" in found.note
        assert found.expected_mse == expected_mse(split.body, found.low, found.high, levels)


def test_a_range_that_is_low_enough_is_left_alone() -> None:
    density = density_of([10.0, 50.0])
    found = find_threshold(density, INT8, "max")
    assert keep_masked(found, density, INT8) is not found
    high = density_of([40.0, 50.0])
    found = find_threshold(high, INT8, "max")
    # Clipped to 0 they are 40 below every other score.
    assert keep_masked(found, high, INT8) is found
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="probability"):
            masked_floor(density, wrong)
