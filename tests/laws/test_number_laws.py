"""Laws of number types, rounding, scale grids and cuts."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdist.numbers.cuts import MOST_FIRST_CUT, matrix_cuts, matrix_grid, vector_cuts, vector_grid
from qdist.numbers.dtype import DTYPES, FLOATS, INTEGERS, FloatType
from qdist.numbers.grid import LEAST_SCALE, FloatGrid, MultiplierGrid, PowerOfTwoGrid, ScaleGrid
from qdist.numbers.rounding import round_float, round_integer

OTHERS: dict[str, Any] = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
GRIDS: list[ScaleGrid] = [
    FloatGrid(),
    PowerOfTwoGrid(),
    PowerOfTwoGrid(direction="nearest"),
    vector_grid(8),
    matrix_grid(8),
    vector_grid(16),
    MultiplierGrid(m_low=3, m_high=9, n_low=-2, n_high=3),
]

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales = st.floats(1e-30, 1e30)
formats = st.sampled_from(list(FLOATS.values()))


def every_float32(step: int) -> NDArray[np.float32]:
    """Every ``step``-th bit pattern, the subnormal ones and both signs included."""
    return np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


def same_bits(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    nan = np.isnan(one) & np.isnan(other)
    return bool(((one.view(np.uint32) == other.view(np.uint32)) | nan).all())


# --- types ------------------------------------------------------------------------------------


def test_integer_ranges_are_those_of_their_bits() -> None:
    for name, kind in INTEGERS.items():
        assert name == f"{'' if kind.signed else 'u'}int{kind.bits}"
        assert kind.high - kind.low == 2**kind.bits - 1
        assert kind.range() == (kind.low, kind.high)
        for bits in range(2, kind.bits + 1):
            low, high = kind.range(bits)
            assert high - low == 2**bits - 1
            assert kind.low <= low <= 0 < high <= kind.high
            if kind.signed:
                assert kind.range(bits, balanced=True) == (-high, high)
    assert INTEGERS["int8"].range(7) == (-64, 63)
    assert INTEGERS["uint8"].range(7) == (0, 127)


def test_ranges_that_no_integer_has_are_refused() -> None:
    for bits in (1, 9):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            INTEGERS["int8"].range(bits)
    with pytest.raises(ValueError, match="no negative"):
        INTEGERS["uint8"].range(balanced=True)


def test_float_types_have_the_limits_of_other_implementations() -> None:
    for name, dtype in OTHERS.items():
        info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
        kind = FLOATS[name]
        assert kind.largest == float(info.max)
        assert kind.smallest == float(info.smallest_subnormal)
        assert kind.bits == info.bits
        assert kind.has_infinity == (name != "fp8_e4m3")
    assert FLOATS["fp32"].largest == float(np.finfo(np.float32).max)
    assert {t.name for t in FLOATS.values() if t.is_wide} == {"bf16", "tf32", "fp32"}
    assert set(DTYPES) == {*INTEGERS, *FLOATS}


# --- rounding to floats -----------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_rounding_is_that_of_other_implementations_bit_for_bit(name: str) -> None:
    x = every_float32(4099)
    with np.errstate(all="ignore"):
        expected = x.astype(OTHERS[name]).astype(np.float32)
    assert same_bits(round_float(x, FLOATS[name]), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_every_tie_goes_to_the_even_neighbour(name: str) -> None:
    dtype = OTHERS[name]
    codes = np.arange(2 ** (FLOATS[name].bits - 1) - 1)
    kind: Any = np.uint8 if FLOATS[name].bits == 8 else np.uint16
    below = codes.astype(kind).view(dtype).astype(np.float32)
    above = (codes + 1).astype(kind).view(dtype).astype(np.float32)
    good = np.isfinite(above) & np.isfinite(below)
    total = (below[good].astype(np.float64) + above[good]) / 2
    middle = total.astype(np.float32)
    expected = np.where(codes % 2 == 0, below, above)[good]
    # The lowest ties of bf16 lie between two float32s and are not ties any more.
    exact = middle == total
    found = round_float(middle, FLOATS[name])
    assert exact.mean() > 0.9
    assert np.array_equal(found[exact], expected[exact])
    away = round_float(middle, FLOATS[name], rounding="half_away")
    assert np.array_equal(away[exact], above[good][exact])


def test_tf32_is_float32_with_thirteen_bits_rounded_off() -> None:
    x = np.concatenate([every_float32(4099), np.arange(2**14, dtype=np.uint32).view(np.float32)])
    x = x[np.isfinite(x)]
    bits = x.view(np.uint32).astype(np.uint64)
    even = (bits + 0xFFF + ((bits >> 13) & 1)) & ~np.uint64(0x1FFF)
    assert same_bits(round_float(x, FLOATS["tf32"]), even.astype(np.uint32).view(np.float32))
    assert same_bits(round_float(x, FLOATS["fp32"]), x)


@given(st.lists(floats32, min_size=1, max_size=50), formats, st.booleans())
def test_rounding_is_idempotent_odd_and_monotone(
    values: list[float], kind: FloatType, saturate: bool
) -> None:
    x = np.sort(np.array(values, np.float32))
    once = round_float(x, kind, saturate=saturate)
    assert same_bits(round_float(once, kind, saturate=saturate), once)
    assert same_bits(round_float(-x, kind, saturate=saturate), -once)
    real = once[~np.isnan(once)]
    assert (np.diff(real[np.isfinite(real)]) >= 0).all()
    if saturate:
        assert np.isfinite(once).all()
        assert (np.abs(once) <= kind.largest).all()


@given(floats32, formats)
def test_rounding_moves_no_further_than_half_a_step(value: float, kind: FloatType) -> None:
    found = float(round_float(np.array([value], np.float32), kind, saturate=True)[0])
    if abs(value) <= kind.largest:
        step = max(math.frexp(value)[1] - 1, kind.least_exponent) - kind.mantissa_bits
        assert abs(found - value) <= math.ldexp(0.5, step)
    else:
        assert found == math.copysign(kind.largest, value)


def test_what_is_no_finite_number() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3e38, -0.0, 0.0], np.float32)
    for kind in FLOATS.values():
        plain, saturated = round_float(x, kind), round_float(x, kind, saturate=True)
        assert np.isnan(plain[2])
        assert np.isnan(saturated[2])
        assert np.signbit(plain[4])
        assert not np.signbit(plain[5])
        assert saturated[:2].tolist() == [kind.largest, -kind.largest]
        if kind.has_infinity:
            assert plain[:2].tolist() == [np.inf, -np.inf]
        else:
            assert np.isnan(plain[:2]).all()


# --- rounding to integers ---------------------------------------------------------------------


@given(st.integers(-(2**20), 2**20))
def test_halves_go_to_the_even_neighbour_or_away_from_zero(n: int) -> None:
    half = np.array([n + 0.5], np.float32)
    assert round_integer(half)[0] % 2 == 0
    assert round_integer(half, "half_away")[0] == (n + 1 if n >= 0 else n)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30))
def test_but_for_halves_the_roundings_agree(values: list[float]) -> None:
    x = np.array(values, np.float32)
    is_half = np.abs(x) % 1 == 0.5
    even, away = round_integer(x), round_integer(x, "half_away")
    assert np.array_equal(even[~is_half], away[~is_half])
    assert (np.abs(away - x) <= 0.5).all()
    assert np.array_equal(round_integer(away, "half_away"), away)


def test_the_float32_before_a_half_is_not_rounded_up() -> None:
    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert round_integer(np.array([below, -below]), "half_away").tolist() == [0, 0]
    assert np.isnan(round_integer(np.array([np.nan]), "half_away"))[0]
    with pytest.raises(ValueError, match="half_even"):
        round_integer(np.array([1.0]), "up")


# --- scale grids ------------------------------------------------------------------------------


@given(scales, st.sampled_from(GRIDS))
@settings(max_examples=300)
def test_snapping_twice_changes_nothing(scale: float, grid: ScaleGrid) -> None:
    once = grid.snap(scale)
    again = grid.snap(once.value)
    assert (again.value, again.m, again.n) == (once.value, once.m, once.n)
    assert not again.is_clamped
    assert once.value == float(np.float32(once.value)) > 0
    if once.m is not None and once.n is not None:
        assert once.value == math.ldexp(once.m, -once.n)


@given(scales, scales, st.sampled_from(GRIDS))
@settings(max_examples=300)
def test_snapping_keeps_the_order(one: float, other: float, grid: ScaleGrid) -> None:
    low, high = sorted((one, other))
    assert grid.snap(low).value <= grid.snap(high).value


@given(st.floats(1e-9, 1e9), st.sampled_from([g for g in GRIDS if isinstance(g, MultiplierGrid)]))
@settings(max_examples=300)
def test_a_multiplier_is_the_nearest_of_all(scale: float, grid: MultiplierGrid) -> None:
    points = {
        math.ldexp(m, -n)
        for n in range(grid.n_low, grid.n_high + 1)
        for m in range(max(1, grid.m_low), grid.m_high + 1)
    }
    found = grid.snap(scale)
    assert found.value in points
    assert abs(found.value - scale) == min(abs(p - scale) for p in points)
    assert found.is_clamped == (not min(points) <= scale <= max(points))


def test_of_two_equally_near_multipliers_the_larger_wins() -> None:
    grid = MultiplierGrid(m_high=4, n_low=0, n_high=1)
    assert grid.snap(2.5).value == 3.0
    assert grid.snap(0.75).value == 1.0
    assert (grid.snap(2.0).m, grid.snap(2.0).n) == (2, 0)


@given(scales)
def test_powers_of_two(scale: float) -> None:
    up, near = PowerOfTwoGrid().snap(scale).value, PowerOfTwoGrid(direction="nearest").snap(scale)
    assert scale * (1 - 1e-8) <= up < 2 * scale
    assert abs(near.value - scale) <= min(abs(up - scale), abs(up / 2 - scale))


def test_scales_below_the_least_are_clamped() -> None:
    for grid in (FloatGrid(), PowerOfTwoGrid()):
        assert grid.snap(1e-42).value == LEAST_SCALE
        assert grid.snap(1e-42).is_clamped
        assert not grid.snap(LEAST_SCALE).is_clamped
    assert vector_grid(8).snap(1e-9).value == 2.0**-16
    assert vector_grid(8).snap(1e9).value == 255 * 2.0**-8


def test_grids_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="no scale has"):
        MultiplierGrid(n_low=3, n_high=2)
    with pytest.raises(ValueError, match="no scale has"):
        MultiplierGrid(m_high=0, n_low=0, n_high=1)
    with pytest.raises(ValueError, match="exact in float32"):
        MultiplierGrid(m_high=1 << 24, n_low=0, n_high=1)
    with pytest.raises(ValueError, match="direction"):
        PowerOfTwoGrid(direction="down")


# --- cuts -------------------------------------------------------------------------------------

channels = st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=6)


@given(channels, st.sampled_from([8, 16]))
def test_both_cuts_are_what_the_hardware_has(values: list[float], bits: int) -> None:
    cuts = matrix_cuts(values, bits)
    assert 0 <= cuts.shift <= MOST_FIRST_CUT
    for scale, bias_scale in zip(cuts.scales, cuts.bias_scales, strict=True):
        assert scale.m is not None
        assert scale.n is not None
        assert 0 < scale.m <= 255
        assert bits <= scale.n - cuts.shift <= 2 * bits
        assert scale.n <= 2 * bits + MOST_FIRST_CUT
        assert bias_scale == math.ldexp(scale.m, cuts.shift - scale.n)


@given(channels)
def test_no_other_first_cut_keeps_the_scales_better(values: list[float]) -> None:
    cuts = matrix_cuts(values, 8)
    moved = sum((s.value / v - 1) ** 2 for s, v in zip(cuts.scales, values, strict=True))
    for shift in range(MOST_FIRST_CUT + 1):
        grid = MultiplierGrid(n_low=8 + shift, n_high=16 + shift)
        assert moved <= sum((grid.snap(v).value / v - 1) ** 2 for v in values) + 1e-15


def test_a_bias_that_would_overflow_asks_for_a_longer_first_cut() -> None:
    scale = 3 * 2.0**-12
    assert matrix_cuts([scale], 8).shift == 0
    large = 32767 * scale * 3
    cuts = matrix_cuts([scale], 8, [large])
    assert cuts.shift == 2
    assert cuts.scales[0].value == scale
    assert large <= 32767 * cuts.bias_scales[0]


def test_vector_operators_cut_once_and_share_the_scale() -> None:
    cuts = vector_cuts([0.3, 0.001], 8)
    assert cuts.shift == 0
    assert cuts.bias_scales == tuple(s.value for s in cuts.scales)
    assert all(s.n is not None and 8 <= s.n <= 16 for s in cuts.scales)
