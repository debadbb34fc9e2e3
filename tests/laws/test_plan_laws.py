"""Laws of quantizers, weight ranges, targets and plans."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.precision import PRECISIONS, weight_levels
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import SCALE_GRIDS, Target
from qdist.plan.weight_range import weight_quantizer

ELEMENTS = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}
RANGES = {4: (-8, 7), 8: (-128, 127), 16: (-32768, 32767)}
FULL = tuple(
    Target(name=grid, precisions=tuple(PRECISIONS), scale_grid=grid) for grid in SCALE_GRIDS
)
TINY = float(np.finfo(np.float32).tiny)

seeds = st.integers(0, 2**32 - 1)
widths = st.sampled_from([4, 8, 16])
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
scales32 = st.floats(2.0**-20, 2.0**20, width=32)


def quantizer(
    bits: int, scales: Any, zeros: Any, axis: int | None = None, **changes: Any
) -> Quantizer:
    low, high = RANGES[bits]
    fields: dict[str, Any] = {
        "bits": bits,
        "low": low,
        "high": high,
        "scales": tuple(float(s) for s in scales),
        "zero_points": tuple(int(z) for z in zeros),
        "axis": axis,
        "method": "max",
        "bounds": (-1.0, 1.0),
    }
    return Quantizer(**{**fields, **changes})


def session_for(q: Quantizer, rank: int, operator: str) -> ort.InferenceSession:
    """A model of one QuantizeLinear (with a cast to int32) or one DequantizeLinear."""
    element = ELEMENTS[q.bits]
    shape = [None] * rank
    size = () if q.axis is None else (len(q.scales),)
    scale = helper.make_tensor("scale", TensorProto.FLOAT, size, q.scales)
    zero = helper.make_tensor("zero", element, size, q.zero_points)
    extra = {} if q.axis is None else {"axis": q.axis}
    if operator == "QuantizeLinear":
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **extra),
            helper.make_node("Cast", ["q"], ["y"], to=TensorProto.INT32),
        ]
        kinds = TensorProto.FLOAT, TensorProto.INT32
    else:
        nodes = [
            helper.make_node("Cast", ["x"], ["q"], to=element),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **extra),
        ]
        kinds = TensorProto.INT32, TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kinds[0], shape)],
        [helper.make_tensor_value_info("y", kinds[1], shape)],
        [scale, zero],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def by_onnx(q: Quantizer, x: NDArray[Any], operator: str) -> NDArray[Any]:
    (y,) = session_for(q, x.ndim, operator).run(None, {"x": x})
    return np.asarray(y)


def same_bits(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def values_for(rng: np.random.Generator, scale: NDArray[np.float32], shape: Any) -> Any:
    """Floats around the levels: on them, exactly half-way between them, near, and far away."""
    level = rng.integers(-40000, 40000, shape).astype(np.float32)
    level = np.where(rng.random(shape) < 0.7, np.float32(rng.integers(-10, 10, shape)), level)
    half = rng.choice(np.array([0, 0.5, -0.5, 0.25], np.float32), shape)
    x = ((level + half) * scale).astype(np.float32)
    nudge = rng.integers(-2, 3, shape)
    x = np.where(nudge == 1, np.nextafter(x, np.float32(np.inf)), x)
    x = np.where(nudge == -1, np.nextafter(x, np.float32(-np.inf)), x)
    x[..., 0] = 0.0
    x[..., 1] = -0.0
    return np.ascontiguousarray(x, np.float32)


# --- quantize and dequantize ------------------------------------------------------------------


@given(seeds, widths, scales32, st.booleans())
@settings(max_examples=80)
def test_quantizing_a_tensor_is_onnx_quantize_linear(
    seed: int, bits: int, scale: float, symmetric: bool
) -> None:
    rng = np.random.default_rng(seed)
    low, high = RANGES[bits]
    q = quantizer(bits, [scale], [0 if symmetric else rng.integers(low, high + 1)])
    x = values_for(rng, np.array(scale, np.float32), (3, 101))
    x[0, :4] = [np.inf, -np.inf, 3e38, -3e38]
    with np.errstate(over="ignore"):
        found = q.quantize(x)
    assert np.array_equal(found, by_onnx(q, x, "QuantizeLinear"))


@given(seeds, widths, st.integers(0, 2), st.booleans())
@settings(max_examples=60)
def test_quantizing_per_channel_is_onnx_quantize_linear(
    seed: int, bits: int, axis: int, symmetric: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (4, 5, 6)
    n = shape[axis]
    low, high = RANGES[bits]
    scales = (2.0 ** rng.uniform(-12, 12, n)).astype(np.float32)
    zeros = np.zeros(n) if symmetric else rng.integers(low, high + 1, n)
    q = quantizer(bits, scales, zeros, axis)
    along = scales.reshape([-1 if i == axis else 1 for i in range(3)])
    x = values_for(rng, along, shape)
    assert np.array_equal(q.quantize(x), by_onnx(q, x, "QuantizeLinear"))
    back = replace(q, axis=axis - 3)
    assert np.array_equal(back.quantize(x), q.quantize(x))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_half_way_cases_round_to_even_at_every_level(bits: int) -> None:
    low, high = RANGES[bits]
    halves = np.arange(low - 2, high + 3, dtype=np.float32) + np.float32(0.5)
    for scale in (1.0, 2.0**-7, 0.1):
        x = (halves * np.float32(scale)).astype(np.float32)
        for zero in (0, 3, low):
            q = quantizer(bits, [np.float32(scale)], [zero])
            assert np.array_equal(q.quantize(x), by_onnx(q, x, "QuantizeLinear"))
    exact = quantizer(bits, [1.0], [0]).quantize(np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32))
    assert exact.tolist() == [0, 2, 2, 0, -2]


@given(seeds, widths, st.sampled_from([None, 0, 1]))
@settings(max_examples=60)
def test_dequantizing_is_onnx_dequantize_linear(seed: int, bits: int, axis: int | None) -> None:
    rng = np.random.default_rng(seed)
    low, high = RANGES[bits]
    shape = (5, 64)
    n = 1 if axis is None else shape[axis]
    scales = (2.0 ** rng.uniform(-30, 20, n)).astype(np.float32)
    q = quantizer(bits, scales, rng.integers(low, high + 1, n), axis)
    integers = rng.integers(low, high + 1, shape).astype(np.int32)
    assert same_bits(q.dequantize(integers), by_onnx(q, integers, "DequantizeLinear"))


@given(seeds, widths)
def test_quantizing_what_was_dequantized_changes_nothing(seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = RANGES[bits]
    q = quantizer(bits, [np.float32(2.0 ** rng.uniform(-20, 20))], [rng.integers(low, high + 1)])
    integers = rng.integers(low, high + 1, 200).astype(np.int32)
    assert np.array_equal(q.quantize(q.dequantize(integers)), integers)


def test_levels_narrower_than_the_type_are_kept() -> None:
    q = quantizer(8, [1.0], [0], low=-127)
    assert q.quantize(np.array([-1e9, -128, 1e9], np.float32)).tolist() == [-127, -127, 127]


# --- weights ----------------------------------------------------------------------------------


def fake_quantized(row: NDArray[Any], bound: float, high: int) -> NDArray[Any]:
    scale = np.float32(bound / high)
    return np.clip(np.rint(row.astype(np.float32) / scale), -high, high) * scale


def row_error(row: NDArray[Any], bound: float, high: int) -> float:
    return float(np.sum((row - fake_quantized(row, bound, high)).astype(np.float64) ** 2))


@given(
    seeds,
    st.sampled_from([(6, 40), (4, 3, 5, 2)]),
    st.sampled_from([None, 0, 1, -1]),
    widths,
    st.sampled_from(["max", "mse"]),
)
@settings(max_examples=80)
def test_weight_ranges_are_those_of_a_plain_loop_over_channels(
    seed: int, shape: tuple[int, ...], axis: int | None, bits: int, method: str
) -> None:
    weight = np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)
    levels = weight_levels(bits)
    q = weight_quantizer(weight, levels, bits, axis, method)
    rows: list[NDArray[Any]]
    rows = [weight] if axis is None else [*np.moveaxis(weight, axis, 0)]
    errors, n_clipped = 0.0, 0
    for row, scale in zip(rows, q.scales, strict=True):
        top = float(np.abs(row).max())
        tried = [top] if method == "max" else [top * f for f in np.linspace(1.0, 0.4, 25)]
        bound = scale * levels.high
        # Two bounds may be equally good but for the last bit of a sum.
        assert min(abs(bound - b) for b in tried) <= 1e-12 * top
        error = row_error(row, bound, levels.high)
        assert error <= min(row_error(row, b, levels.high) for b in tried) * (1 + 1e-4) + 1e-12
        errors += error
        n_clipped += int((np.abs(row) > np.float32(bound)).sum())
    assert q.axis == axis
    assert (q.low, q.high, q.bits) == (levels.low, levels.high, bits)
    assert set(q.zero_points) == {0}
    assert -q.bounds[0] == q.bounds[1] == pytest.approx(max(q.scales) * levels.high, rel=1e-12)
    assert q.clipped_share == pytest.approx(n_clipped / weight.size, abs=1.5 / weight.size)
    assert q.expected_mse is not None
    assert q.expected_mse == pytest.approx(errors / weight.size, rel=1e-4, abs=1e-12)


@given(seeds, st.sampled_from(["max", "mse"]), widths)
@settings(max_examples=40)
def test_the_error_of_a_weight_is_that_of_its_quantizer(seed: int, method: str, bits: int) -> None:
    weight = np.random.default_rng(seed).laplace(size=(5, 50)).astype(np.float32)
    q = weight_quantizer(weight, weight_levels(bits), bits, 0, method)
    back = q.dequantize(q.quantize(weight))
    exact = float(np.mean((weight - back).astype(np.float64) ** 2))
    assert q.expected_mse == pytest.approx(exact, rel=1e-3, abs=1e-12)


@given(seeds, widths, st.sampled_from([None, 0, 1]))
@settings(max_examples=40)
def test_mse_never_has_more_error_than_max(seed: int, bits: int, axis: int | None) -> None:
    weight = np.random.default_rng(seed).standard_t(2, size=(8, 30)).astype(np.float32)
    errors = {
        method: weight_quantizer(weight, weight_levels(bits), bits, axis, method).expected_mse
        for method in ("max", "mse")
    }
    assert errors["mse"] is not None
    assert errors["max"] is not None
    assert errors["mse"] <= errors["max"]


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-40, 1e-30])
def test_dead_channels_have_a_finite_error_and_a_positive_scale(method: str, small: float) -> None:
    """Weight decay leaves channels of zeros and of denormals."""
    weight = np.full((2, 9), small, np.float32)
    weight[:, ::2] = 0
    weight[1] = 1
    q = weight_quantizer(weight, weight_levels(8), 8, 0, method)
    assert q.expected_mse is not None
    assert q.expected_mse < 1e-12
    assert all(scale > 0 for scale in q.scales)
    if small == 0:
        assert q.scales[0] == 1.0
    json.dumps(q.to_json(), allow_nan=False)


def test_large_weights_are_handled_in_blocks_with_the_same_result() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(300, 20_000)).astype(np.float32)
    q = weight_quantizer(weight, weight_levels(8), 8, 0, "max")
    assert np.allclose(q.scales, np.abs(weight).max(axis=1) / 127, rtol=1e-6)
    moved = weight_quantizer(np.ascontiguousarray(weight.T), weight_levels(8), 8, 1, "max")
    assert moved.scales == q.scales


def test_half_precision_weights_are_measured_in_float32() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float16)
    half = weight_quantizer(weight, weight_levels(8), 8, 0, "mse")
    assert half == weight_quantizer(weight.astype(np.float32), weight_levels(8), 8, 0, "mse")


# --- targets ----------------------------------------------------------------------------------


@st.composite
def quantizers(draw: st.DrawFn) -> Quantizer:
    bits = draw(widths)
    low, high = RANGES[bits]
    if draw(st.booleans()):
        low = -high
    n = draw(st.integers(1, 3))
    positive = st.one_of(
        st.floats(1e-42, 1e30),
        st.integers(-140, 100).map(lambda e: 2.0**e),
        st.floats(0.9, 1.1),
    )
    return quantizer(
        bits,
        [draw(positive) for _ in range(n)],
        [draw(st.integers(low, high)) if low < -high else 0 for _ in range(n)],
        axis=None if n == 1 else 0,
        low=low,
    )


def plan_of(*inputs: Quantizer, precision: str = "int16") -> QuantizationPlan:
    layers = tuple(
        LayerPlan(
            name=f"layer{i}",
            op_type="MatMul",
            choice=LayerChoice(precision=precision),
            activations=(QuantizedInput(index=0, tensor=f"x{i}", quantizer=q),),
            weights=(),
            why="default",
        )
        for i, q in enumerate(inputs)
    )
    return QuantizationPlan(model_digest="m" * 64, statistics_digest="s" * 64, layers=layers)


@given(st.lists(quantizers(), min_size=1, max_size=3), st.sampled_from(FULL))
@settings(max_examples=200)
def test_projecting_twice_changes_nothing(inputs: list[Quantizer], target: Target) -> None:
    once = target.project(plan_of(*inputs)).plan
    twice = target.project(once).plan
    assert twice == once
    assert twice.digest == once.digest


@given(quantizers(), st.sampled_from(FULL))
@settings(max_examples=200)
def test_projected_numbers_are_the_targets_own(q: Quantizer, target: Target) -> None:
    plan = target.project(plan_of(q)).plan
    found = plan.layers[0].activations[0].quantizer
    for scale, zero, given_scale in zip(found.scales, found.zero_points, q.scales, strict=True):
        assert scale == float(np.float32(scale)) >= TINY
        assert q.low <= zero <= q.high
        if target.scale_grid == "power_of_two":
            assert np.frexp(scale)[0] == 0.5
            assert scale >= given_scale * (1 - 1e-8)
            assert scale <= max(2 * given_scale, TINY)
        else:
            assert scale == pytest.approx(max(given_scale, TINY), rel=1e-7)
    assert replace(found, scales=q.scales, zero_points=q.zero_points) == q
    n_raised = sum(scale < TINY for scale in q.scales)
    assert bool(plan.notes) == bool(n_raised)
    if n_raised:
        assert f"layer0: {n_raised} scales of x0 raised" in plan.notes[0]


@given(quantizers())
@settings(max_examples=200)
def test_a_power_of_two_grid_clips_no_more_than_half_a_step(q: Quantizer) -> None:
    """Whatever the finer quantizer could represent, the coarser one still holds."""
    target = FULL[SCALE_GRIDS.index("power_of_two")]
    found = target.project(plan_of(q)).plan.layers[0].activations[0].quantizer
    for s, z, t, w in zip(q.scales, q.zero_points, found.scales, found.zero_points, strict=True):
        assert (found.low - w) * t <= (q.low - z) * s + 0.5001 * t
        assert (found.high - w) * t >= (q.high - z) * s - 0.5001 * t


@given(st.lists(quantizers(), max_size=3))
def test_a_plan_survives_json(inputs: list[Quantizer]) -> None:
    plan = replace(plan_of(*inputs), notes=("a note",))
    again = QuantizationPlan.from_json(json.loads(json.dumps(plan.to_json(), allow_nan=False)))
    assert again == plan
    assert again.digest == plan.digest


@given(quantizers(), quantizers())
def test_plan_digests_are_equal_exactly_where_the_numbers_are(
    one: Quantizer, other: Quantizer
) -> None:
    assert (plan_of(one).digest == plan_of(other).digest) == (one == other)
    assert replace(plan_of(one), notes=("said",)).digest == plan_of(one).digest
