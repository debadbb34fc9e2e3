"""The target-exact graph: every scheme against exact whole numbers in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, helper

from qdist.demo import demo_file
from qdist.emit.writer import write_model
from qdist.errors import PlanError
from qdist.evaluate.modes import compare_modes
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.model.session import run, scoring_session
from qdist.model.weights import Weights
from qdist.numbers.cuts import matrix_cuts, vector_cuts, vector_grid
from qdist.numbers.rounding import round_integer
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan
from qdist.plan.planner import PlanSettings
from qdist.plan.precision import PRECISIONS
from qdist.plan.target import ProjectedPlan, Target
from qdist.simulate.integers import CUT_READING, OUR_READING, integer_graph
from qdist.simulate.pairs import Pairs
from qdist.simulate.reference import (
    convolution,
    cut_product,
    fixed_point,
    matrix_product,
    requantized,
    shifted,
    sum_of,
)
from qdist.simulate.rows import floor_division, gains_of, normalized, softmax
from qdist.simulate.tables import interpolated, table_of
from qdist.simulate.wires import Wires
from tests.onnx_models import (
    ANY_TARGET,
    EXECUTION,
    Array,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    value,
)

ICRAFT = Target(
    name="icraft",
    precisions=tuple(PRECISIONS),
    symmetric_only=True,
    scale_grid="m*2^-n",
    rounding="half_away",
)


def node(op_type: str, inputs: list[str], outputs: list[str], name: str, **kw: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, name, **kw)


def planned(
    proto: onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    target: Target = ANY_TARGET,
    **settings: Any,
) -> tuple[FrozenModel, ProjectedPlan]:
    frozen = frozen_from(proto, folder / "model.onnx")
    samples = [
        {name: normal(*shape, seed=10 * i + k) for k, (name, shape) in enumerate(shapes.items())}
        for i in range(12)
    ]
    symmetric = PlanSettings(symmetric=target.symmetric_only)
    planner = planner_for(frozen, HeldSamples(samples=samples), folder / "store", symmetric)
    choice = LayerChoice(**settings)
    return frozen, target.project(planner.plan({la.name: choice for la in planner.layers}))


def computed(
    frozen: FrozenModel, plan: ProjectedPlan, folder: Path, feeds: dict[str, Array]
) -> Array:
    graph = integer_graph(frozen, plan).graph
    written = write_model(graph, folder / "integers.onnx")
    (found,) = run(scoring_session(written.path, EXECUTION), None, feeds)
    return np.asarray(found)


def of(plan: ProjectedPlan, name: str) -> LayerPlan:
    return next(layer for layer in plan.plan.layers if layer.name == name)


def whole(plan: ProjectedPlan, layer: str, index: int, values: Array) -> Array:
    """What the layer reads: whole numbers, less the zero point."""
    found = of(plan, layer)
    entry = next(e for e in (*found.activations, *found.weights) if e.index == index)
    q = entry.quantizer
    if entry in found.activations:
        zero = q.zero_points[0]
        ratio = (values / np.float32(q.scales[0])).astype(np.float64)
        rounded = round_integer(ratio, plan.target.rounding)
        return np.clip(rounded, q.low - zero, q.high - zero).astype(np.int64)
    return q.quantize(values).astype(np.int64) - q.zero_points[0]


# --- the reference itself -----------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
def test_a_shift_rounds_to_the_nearest(rounding: str) -> None:
    values = np.arange(-200, 201, dtype=np.int64)
    for n in range(5):
        expected = round_integer(values / 2**n, rounding)
        assert np.array_equal(shifted(values, np.asarray(n), rounding), expected)


def test_a_multiplier_is_its_mantissa_and_exponent() -> None:
    values = np.array([1.0, 0.3, 3.7e-5, 1234.5], np.float32)
    m, n = fixed_point(values)
    assert np.array_equal(np.ldexp(m.astype(np.float64), -n), values.astype(np.float64))
    assert (m < 2**24).all()


@pytest.mark.parametrize(
    ("group", "strides", "pads", "dilations"),
    [
        (1, [1, 1], [0, 0, 0, 0], [1, 1]),
        (2, [2, 1], [1, 0, 2, 1], [1, 2]),
        (4, [1, 2], [1, 1, 1, 1], [2, 1]),
    ],
)
def test_convolution_is_that_of_onnx_runtime(
    group: int, strides: list[int], pads: list[int], dilations: list[int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 10, (2, 4, 9, 8)).astype(np.int64)
    w = rng.integers(-9, 10, (8, 4 // group, 3, 2)).astype(np.int64)
    attributes: dict[str, Any] = {
        "group": group,
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
    }
    proto = model(
        [node("Conv", ["x", "w"], ["y"], "conv", **attributes)],
        [value("x", [2, 4, 9, 8])],
        [value("y", [None] * 4)],
        {"w": w.astype(np.float32)},
    )
    session = scoring_session(proto.SerializeToString(), EXECUTION)
    (found,) = run(session, None, {"x": x.astype(np.float32)})
    assert np.array_equal(convolution(x, w, **attributes), found)


# --- products -----------------------------------------------------------------------------------

PRODUCTS: dict[str, tuple[list[NodeProto], dict[str, Array], tuple[int, ...], Any]] = {
    "matmul": (
        [node("MatMul", ["x", "w"], ["y"], "layer")],
        {"w": normal(20, 7)},
        (3, 20),
        lambda x, w: matrix_product(x, w),
    ),
    "matmul, bias, relu": (
        [
            node("MatMul", ["x", "w"], ["m"], "layer"),
            node("Add", ["m", "b"], ["a"], "bias"),
            node("Relu", ["a"], ["y"], "relu"),
        ],
        {"w": normal(20, 7), "b": normal(7, seed=5)},
        (3, 20),
        lambda x, w: matrix_product(x, w),
    ),
    "gemm": (
        [node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1, alpha=0.5, beta=2.0)],
        {"w": normal(7, 20), "b": normal(7, seed=5)},
        (20,),
        lambda x, w: matrix_product(x, w.T),
    ),
    "conv": (
        [node("Conv", ["x", "w", "b"], ["y"], "layer", pads=[1, 1, 1, 1], strides=[2, 1])],
        {"w": normal(5, 3, 3, 3), "b": normal(5, seed=5)},
        (3, 8, 7),
        lambda x, w: convolution(x, w, strides=[2, 1], pads=[1, 1, 1, 1], dilations=[1, 1]),
    ),
    "transposed": (
        [node("ConvTranspose", ["x", "w", "b"], ["y"], "layer", strides=[2, 2])],
        {"w": normal(3, 5, 3, 3), "b": normal(5, seed=5)},
        (3, 4, 4),
        lambda x, w: transposed(x, w),
    ),
    "depthwise": (
        [node("Conv", ["x", "w", "b"], ["y"], "layer", group=4)],
        {"w": normal(4, 1, 3, 3), "b": normal(4, seed=5)},
        (4, 6, 6),
        lambda x, w: convolution(x, w, strides=[1, 1], pads=[0] * 4, dilations=[1, 1], group=4),
    ),
}


def transposed(x: Array, w: Array) -> Array:
    """A transposed convolution with strides of 2: a convolution of the spread input."""
    n, c, h, width = x.shape
    spread = np.zeros((n, c, 2 * h - 1, 2 * width - 1), np.int64)
    spread[:, :, ::2, ::2] = x
    turned = np.swapaxes(w, 0, 1)[:, :, ::-1, ::-1]
    return convolution(spread, turned, strides=[1, 1], pads=[2] * 4, dilations=[1, 1])


def case(name: str) -> tuple[onnx.ModelProto, dict[str, Array], tuple[int, ...], Any]:
    nodes, constants, shape, accumulate = PRODUCTS[name]
    proto = model(
        nodes, [value("x", ["n", *shape])], [value("y", [None] * (len(shape) + 1))], constants
    )
    return proto, constants, shape, accumulate


SPATIAL = ("conv", "depthwise", "transposed")


def shaped(scales: Array, name: str) -> Array:
    return scales.reshape(-1, 1, 1) if name in SPATIAL and scales.size > 1 else scales


def bias_of(name: str, constants: Mapping[str, Array]) -> Array:
    if "b" not in constants:
        return np.zeros(1)
    bias = constants["b"].astype(np.float64) * (2.0 if name == "gemm" else 1.0)
    return shaped(bias, name)


@pytest.mark.parametrize("settings", [
    {"precision": "int8"},
    {"precision": "uint8", "granularity": "tensor"},
    {"precision": "w4a8", "granularity": "group=2"},
    {"precision": "u4a8", "granularity": "tensor"},
    {"precision": "int16"},
    {"precision": "int8", "weight_range_bits": 6, "activation_range_bits": 7},
])  # fmt: skip
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_exact_accumulators_requantized_once(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    proto, constants, shape, accumulate = case(name)
    frozen, plan = planned(proto, {"x": shape}, tmp_path, **settings)
    layer = of(plan, "layer")
    source, weight, result = (
        e.quantizer for e in (layer.activations[0], layer.weights[0], layer.outputs[0])
    )
    x = normal(4, *shape, seed=77) * 1.3
    total = accumulate(whole(plan, "layer", 0, x), whole(plan, "layer", 1, constants["w"]))
    alpha = 0.5 if name == "gemm" else 1.0
    scales = shaped(np.asarray(weight.scales) * source.scales[0] * alpha, name)
    total = total + np.rint(bias_of(name, constants) / scales).astype(np.int64)
    m, n = fixed_point((scales / result.scales[0]).astype(np.float32))
    stored = requantized(total, m, n, result.zero_points[0], (result.low, result.high))
    expected = result.dequantize(stored.astype(np.int32))
    if "relu" in name:
        expected = np.maximum(expected, 0)
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, expected)
    assert len(np.unique(stored)) > 10
    assert integer_graph(frozen, plan).reading == OUR_READING


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_cut_products_are_shifts_and_multiplications_of_whole_numbers(
    name: str, granularity: str, tmp_path: Path
) -> None:
    proto, constants, shape, accumulate = case(name)
    frozen, plan = planned(proto, {"x": shape}, tmp_path, ICRAFT, granularity=granularity)
    layer = of(plan, "layer")
    weight, result = layer.weights[0].quantizer, layer.outputs[0].quantizer
    x = normal(4, *shape, seed=77)
    total = accumulate(whole(plan, "layer", 0, x), whole(plan, "layer", 1, constants["w"]))
    cuts = weight.cuts
    if name == "gemm":
        # The plan's cuts know nothing of alpha.
        ratio = 0.5 * layer.activations[0].quantizer.scales[0] / result.scales[0]
        again = matrix_cuts([scale * ratio for scale in weight.scales], 8)
        cuts = tuple((s.m or 0, s.n or 0, again.shift) for s in again.scales)
    m, n, shifts = (np.array(part) for part in zip(*cuts, strict=True))
    assert len(set(shifts.tolist())) == 1
    first = int(shifts[0])
    bias_scale = shaped(np.ldexp(m.astype(np.float64), first - n) * result.scales[0], name)
    bias = round_integer(bias_of(name, constants) / bias_scale, "half_away")
    bias = np.clip(bias, -32767, 32767).astype(np.int64)
    stored = cut_product(
        total, bias, (shaped(m, name), shaped(n, name), first), (result.low, result.high)
    )
    expected = result.dequantize(stored.astype(np.int32))
    if "relu" in name:
        expected = np.maximum(expected, 0)
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, expected)
    assert integer_graph(frozen, plan).schemes == {"layer": "cuts"}
    assert integer_graph(frozen, plan).reading == CUT_READING


@pytest.mark.parametrize(("x_top", "w_top"), [(255, 127), (65535, 32767), (127, 7)])
def test_accumulators_of_the_largest_numbers_are_exact(x_top: int, w_top: int) -> None:
    """4,608 products of the largest numbers each, far beyond the integers of float32."""
    rng = np.random.default_rng(0)
    x = rng.choice([-x_top, x_top, x_top - 1, 1], (2, 512, 3, 3)).astype(np.int64)
    w = rng.choice([-w_top, w_top, w_top - 2], (3, 512, 3, 3)).astype(np.int64)
    x[0], w[0] = x_top, w_top
    pairs = Pairs(Weights([], None), {"x", "w", "y"})
    wires = Wires(pairs, "layer")
    y = wires.convolution("Conv", wires.wide("x"), "w", 512 * 9, (x_top, w_top))
    proto = model(
        [*wires.nodes, node("Identity", [y], ["y"], "last")],
        [value("x", [2, 512, 3, 3]), value("w", [3, 512, 3, 3])],
        [value("y", [2, 3, 1, 1], onnx.TensorProto.DOUBLE)],
    )
    proto.graph.initializer.extend(pairs.initializers)
    session = scoring_session(proto.SerializeToString(), EXECUTION)
    feeds = {"x": x.astype(np.float32), "w": w.astype(np.float32)}
    (found,) = run(session, None, feeds)
    expected = convolution(x, w, strides=[1, 1], pads=[0] * 4, dilations=[1, 1])
    assert np.array_equal(found.astype(np.int64), expected)
    assert np.abs(expected).max() >= 4608 * x_top * w_top


# --- elementwise --------------------------------------------------------------------------------


def elementwise(op_type: str, folder: Path, target: Target) -> tuple[FrozenModel, ProjectedPlan]:
    proto = model(
        [node(op_type, ["x", "z"], ["y"], "layer")],
        [value("x", ["n", 30]), value("z", ["n", 30])],
        [value("y", ["n", 30])],
    )
    return planned(proto, {"x": (30,), "z": (30,)}, folder, target)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("target", [ANY_TARGET, ICRAFT])
def test_elementwise_layers_are_exact(op_type: str, target: Target, tmp_path: Path) -> None:
    frozen, plan = elementwise(op_type, tmp_path, target)
    x, z = normal(50, 30, seed=5), normal(50, 30, seed=6) * 1.2
    first, second = (whole(plan, "layer", i, v) for i, v in enumerate((x, z)))
    layer = of(plan, "layer")
    sx, sz = (e.quantizer.scales[0] for e in layer.activations)
    result = layer.outputs[0].quantizer
    levels, zero, sy = (result.low, result.high), result.zero_points[0], result.scales[0]
    sign = -1 if op_type == "Sub" else 1
    if target is ANY_TARGET and op_type == "Mul":
        m, n = fixed_point(np.asarray(sx * sz / sy, np.float32))
        stored = requantized(first * second, m, n, zero, levels)
    elif target is ANY_TARGET:
        ratios = (np.float32(sx / sy), np.float32(sz / sy))
        stored = sum_of(first, sign * second, ratios, zero, levels)
    elif op_type == "Mul":
        (cut,) = vector_cuts([sx * sz / sy], 8).scales
        stored = cut_product(first * second, None, (cut.m, cut.n, 0), levels)
    else:
        cut = vector_grid(8).snap(max(sx, sz) / sy / 127)
        i, j = (int(np.floor(s / sy / cut.value + 0.5)) for s in (sx, sz))
        assert max(abs(i), abs(j)) <= 128
        stored = cut_product(first * i + sign * second * j, None, (cut.m, cut.n, 0), levels)
    found = computed(frozen, plan, tmp_path, {"x": x, "z": z})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))


def test_products_of_activations_have_both_cuts(tmp_path: Path) -> None:
    proto = model(
        [node("MatMul", ["x", "z"], ["y"], "layer")],
        [value("x", ["n", 3, 16]), value("z", ["n", 16, 5])],
        [value("y", ["n", 3, 5])],
    )
    frozen, plan = planned(proto, {"x": (3, 16), "z": (16, 5)}, tmp_path, ICRAFT)
    x, z = normal(6, 3, 16, seed=3), normal(6, 16, 5, seed=4)
    layer = of(plan, "layer")
    sx, sz = (e.quantizer.scales[0] for e in layer.activations)
    result = layer.outputs[0].quantizer
    cuts = matrix_cuts([sx * sz / result.scales[0]], 8)
    total = matrix_product(whole(plan, "layer", 0, x), whole(plan, "layer", 1, z))
    (cut,) = cuts.scales
    stored = cut_product(total, None, (cut.m, cut.n, cuts.shift), (result.low, result.high))
    found = computed(frozen, plan, tmp_path, {"x": x, "z": z})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))


# --- batch normalization ------------------------------------------------------------------------


@pytest.mark.parametrize("small", [0.5, 0.02])
def test_batch_normalization_is_always_per_channel(small: float, tmp_path: Path) -> None:
    """Weight and bias share a scale in every channel; the bias has twice the bits, which a weight
    that is small beside it does not leave it room for."""
    parameters = {
        "gamma": np.array([1.0, small, 3.0, 1e-9], np.float32),
        "beta": np.array([0.5, -2.0, 0.1, 1.5], np.float32),
        "mean": np.array([0.1, 0.2, -0.3, 0.0], np.float32),
        "variance": np.array([0.5, 1.0, 2.0, 1.0], np.float32),
    }
    proto = model(
        [node("BatchNormalization", ["x", *parameters], ["y"], "layer", epsilon=1e-3)],
        [value("x", ["n", 4, 5, 5])],
        [value("y", ["n", 4, 5, 5])],
        parameters,
    )
    frozen, plan = planned(proto, {"x": (4, 5, 5)}, tmp_path, ICRAFT, granularity="tensor")
    layer = of(plan, "layer")
    source, result = layer.activations[0].quantizer, layer.outputs[0].quantizer
    x = normal(6, 4, 5, 5, seed=3)
    weight = parameters["gamma"].astype(np.float64) / np.sqrt(
        parameters["variance"].astype(np.float64) + np.float32(1e-3)
    )
    bias = parameters["beta"] - parameters["mean"] * weight
    integers = whole(plan, "layer", 0, x)
    expected = np.empty(integers.shape, np.int64)
    for channel in range(4):
        w = weight[channel] * source.scales[0] / result.scales[0]
        b = bias[channel] / result.scales[0]
        by_bias = abs(b) / 32767 * (1 + 2.0**-7) + 2.0**-17
        wanted = abs(w) / 127 if abs(w) / 127 >= 2.0**-17 else by_bias
        cut = vector_grid(8).snap(wanted)
        m, n = np.int64(cut.m or 0), np.int64(cut.n or 0)
        wq = int(np.clip(round_integer(np.array(w / cut.value), "half_away"), -127, 127))
        bq = int(np.clip(round_integer(np.array(b / cut.value), "half_away"), -32767, 32767))
        expected[:, channel] = cut_product(
            integers[:, channel] * wq, np.asarray(bq), (m, n, 0), (result.low, result.high)
        )
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, result.dequantize(expected.astype(np.int32)))
    assert integer_graph(frozen, plan).schemes == {"layer": "cuts"}
    (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": source.applied(x)})
    off = np.abs(found - result.applied(exact)).max(axis=(0, 2, 3)) / result.scales[0]
    saturated = ("layer: 1 biases saturate in 16 bits",) if small < 0.1 else ()
    assert integer_graph(frozen, plan).notes == saturated
    assert (off[[0, 2, 3]] < 3).all()
    assert (off[1] > 3) == bool(saturated)


def test_the_first_cut_leaves_room_for_the_bias(tmp_path: Path) -> None:
    """A bias far above what is multiplied and summed fits its 16 bits where a cut allows it."""
    bias = np.array([5.0, -4.0, 0.5, 0.0], np.float32)
    proto = model(
        [
            node("Conv", ["x", "w"], ["c"], "layer"),
            node("Add", ["c", "b"], ["y"], "bias"),
        ],
        [value("x", ["n", 3, 6, 6])],
        [value("y", ["n", 4, 6, 6])],
        {"w": normal(4, 3, 1, 1, seed=1) * 0.03, "b": bias.reshape(4, 1, 1)},
    )
    frozen, plan = planned(proto, {"x": (3, 6, 6)}, tmp_path, ICRAFT, granularity="tensor")
    layer = of(plan, "layer")
    assert layer.bias_bounds == (5.0, 4.0, 0.5, 0.0)
    assert integer_graph(frozen, plan).notes == ()
    ((_, _, shift),) = layer.weights[0].quantizer.cuts
    blind = replace(
        plan.plan,
        layers=tuple(
            replace(
                la,
                bias_bounds=(),
                weights=tuple(
                    replace(e, quantizer=replace(e.quantizer, cuts=())) for e in la.weights
                ),
            )
            for la in plan.plan.layers
        ),
    )
    other = ICRAFT.project(blind)
    assert of(other, "layer").weights[0].quantizer.cuts[0][2] < shift
    assert integer_graph(frozen, other).notes == ("layer: 2 biases saturate in 16 bits",)
    x = normal(4, 3, 6, 6, seed=5)
    (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": x})
    assert np.abs(computed(frozen, plan, tmp_path, {"x": x}) - exact).max() < 0.1


def test_a_channel_without_weights_takes_the_scale_of_its_bias(tmp_path: Path) -> None:
    weights = normal(4, 1, 1, 1, seed=1)
    weights[2] = 1e-7
    proto = model(
        [node("Conv", ["x", "w", "b"], ["y"], "layer", group=4)],
        [value("x", ["n", 4, 6, 6])],
        [value("y", ["n", 4, 6, 6])],
        {"w": weights, "b": np.array([0.1, 0.2, 3.0, 0.0], np.float32)},
    )
    frozen, plan = planned(proto, {"x": (4, 6, 6)}, tmp_path, ICRAFT)
    assert of(plan, "layer").is_depthwise
    assert integer_graph(frozen, plan).notes == ()
    x = normal(4, 4, 6, 6, seed=5)
    (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": x})
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert (
        np.abs(found[:, 2] - exact[:, 2]).max() <= of(plan, "layer").outputs[0].quantizer.scales[0]
    )


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("op_type", ["Sigmoid", "Tanh", "Erf", "Softplus"])
def test_functions_of_sixteen_bits_are_tables(op_type: str, bits: int, tmp_path: Path) -> None:
    proto = model(
        [node(op_type, ["x"], ["y"], "layer")], [value("x", ["n", 50])], [value("y", ["n", 50])]
    )
    target = replace(ANY_TARGET, table_bits=bits)
    frozen, plan = planned(proto, {"x": (50,)}, tmp_path, target, precision="int16")
    layer = of(plan, "layer")
    source, result = layer.activations[0].quantizer, layer.outputs[0].quantizer
    x = normal(60, 50, seed=9) * 1.5
    table = table_of(proto.graph.node[0], source, result, bits, 21)
    assert table.shape == (2**bits + 1,)
    stored = interpolated(whole(plan, "layer", 0, x), table, source, bits)
    expected = result.dequantize((stored + result.zero_points[0]).astype(np.int32))
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, expected)
    assert integer_graph(frozen, plan).schemes == {"layer": "table"}
    # The error of linear interpolation: an eighth of the second derivative times the square step.
    (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": source.applied(x)})
    step = source.scales[0] * 2 ** (16 - bits)
    assert np.abs(found - result.applied(exact)).max() <= step**2 / 8 + 3 * result.scales[0]


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax_is_a_table_of_exponentials(axis: int, bits: int, tmp_path: Path) -> None:
    proto = model(
        [node("Softmax", ["x"], ["y"], "layer", axis=axis)],
        [value("x", ["n", 7, 50])],
        [value("y", ["n", 7, 50])],
    )
    target = replace(ANY_TARGET, table_bits=bits)
    frozen, plan = planned(proto, {"x": (7, 50)}, tmp_path, target, precision="int16")
    layer = of(plan, "layer")
    source, result = layer.activations[0].quantizer, layer.outputs[0].quantizer
    x = normal(20, 7, 50, seed=9) * 1.5
    stored = softmax(whole(plan, "layer", 0, x), axis, source, result, bits)
    expected = result.dequantize((stored + result.zero_points[0]).astype(np.int32))
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, expected)
    assert integer_graph(frozen, plan).schemes == {"layer": "table"}
    (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": source.applied(x)})
    # Interpolation errs by an eighth of the squared step, as a share; entries by 2**-16 each.
    step = source.scales[0] * 2 ** (16 - bits)
    assert np.abs(found - result.applied(exact)).max() < step**2 / 4 + x.shape[axis] * 2**-15


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization_is_a_table_of_roots(axis: int, bits: int, tmp_path: Path) -> None:
    row = (7, 50)[-1 if axis == -1 else 0 :]
    proto = model(
        [node("LayerNormalization", ["x", "g", "b"], ["y"], "layer", axis=axis, epsilon=1e-5)],
        [value("x", ["n", 7, 50])],
        [value("y", ["n", 7, 50])],
        {"g": normal(*row, seed=1) + 1, "b": normal(*row, seed=2)},
        opset=17,
    )
    target = replace(ANY_TARGET, table_bits=bits)
    frozen, plan = planned(proto, {"x": (7, 50)}, tmp_path, target, precision="int16")
    layer = of(plan, "layer")
    source, result = layer.activations[0].quantizer, layer.outputs[0].quantizer
    # Rows of very different spread, one of them constant.
    spread = np.array([1e-4, 1e-3, 1e-2, 0.1, 1.0, 2.0], np.float32).reshape(6, 1, 1)
    x = normal(6, 7, 50, seed=9) * spread
    x[0] = 0.5
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    gains = gains_of(weights["g"], weights["b"], 1e-5, source, result)
    axes = (-1,) if axis == -1 else (-2, -1)
    centred = normalized(whole(plan, "layer", 0, x), axes, gains.epsilon, bits)
    total = (centred * gains.whole.astype(np.int64)) + gains.bias.astype(np.int64)
    m, n = fixed_point(np.asarray(gains.multiplier, np.float32))
    zero, levels = result.zero_points[0], (result.low, result.high)
    stored = requantized(total, m, n, zero, levels)
    expected = result.dequantize(stored.astype(np.int32))
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, expected)
    assert integer_graph(frozen, plan).schemes == {"layer": "table"}
    (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": source.applied(x)})
    # An eighth of the second derivative (at most 3/4) times the square step of the table, a share
    # of what may be 7 root-mean-squares from the mean; the mean is exact to an eighth of a level.
    share = (4 / 2**bits) ** 2 * 3 / 32 + 2**-14
    off = np.abs(found - result.applied(exact))
    assert off[3:].max() < 4 * 7 * share + 8 * result.scales[0]
    assert off[0].max() < 3 * result.scales[0]


def test_whole_number_division_is_exact(tmp_path: Path) -> None:
    frozen = frozen_from(
        model([node("Relu", ["x"], ["y"], "layer")], [value("x", ["n"])], [value("y", ["n"])]),
        tmp_path / "model.onnx",
    )
    pairs = Pairs(frozen.weights(), {"a", "b", "q"})
    wires = Wires(pairs, "test")
    wires.add("Identity", floor_division(wires, "a", "b"), target="q")
    double = [helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, ["n"]) for name in "abq"]
    graph = helper.make_graph(wires.nodes, "test", double[:2], double[2:], pairs.initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    b = np.arange(1, 4001, dtype=np.int64)
    quotient = (2**52 // b) - 3
    # Next to whole quotients, where rounding a quotient to float64 would carry it over.
    a = np.concatenate([quotient * b - 1, quotient * b, quotient * b + 1])
    b = np.tile(b, 3)
    session = scoring_session(proto.SerializeToString(), EXECUTION)
    (found,) = run(session, None, {"a": a.astype(np.float64), "b": b.astype(np.float64)})
    assert np.array_equal(found.astype(np.int64), a // b)


@pytest.mark.parametrize("gain", [(1,), (50,)])
def test_rows_of_unknown_length_stay_float(gain: tuple[int, ...], tmp_path: Path) -> None:
    proto = model(
        [node("LayerNormalization", ["x", "g"], ["y"], "layer")],
        [value("x", ["n", 50])],
        [value("y", ["n", 50])],
        {"g": np.ones(gain, np.float32)},
        opset=17,
    )
    target = replace(ANY_TARGET, table_bits=10)
    frozen, plan = planned(proto, {"x": (50,)}, tmp_path, target, precision="int16")
    found = integer_graph(frozen, plan).in_float
    assert found == ({} if gain == (50,) else {"layer": "the length of its rows is not known"})


def test_a_layer_may_have_a_longer_table(tmp_path: Path) -> None:
    proto = model(
        [node("Sigmoid", ["x"], ["y"], "layer")], [value("x", ["n", 50])], [value("y", ["n", 50])]
    )
    target = replace(ANY_TARGET, table_bits=8)
    x = {"x": normal(60, 50, seed=9)}
    results = []
    for n, bits in enumerate((None, 8, 12)):
        (tmp_path / str(n)).mkdir()
        frozen, plan = planned(
            proto, {"x": (50,)}, tmp_path / str(n), target, precision="int16", table_bits=bits
        )
        results.append(computed(frozen, plan, tmp_path / str(n), x))
        assert not plan.plan.notes
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_lengths_of_tables_that_mean_nothing(tmp_path: Path) -> None:
    proto = model(
        [node("Sigmoid", ["x"], ["y"], "layer")], [value("x", ["n", 50])], [value("y", ["n", 50])]
    )
    target = replace(ANY_TARGET, table_bits=8)
    _, plan = planned(proto, {"x": (50,)}, tmp_path, target, precision="int8", table_bits=12)
    assert "table_bits means nothing to 1 layers, such as layer" in " ".join(plan.plan.notes)
    with pytest.raises(PlanError, match="the target has no tables") as caught:
        ANY_TARGET.project(plan.plan)
    assert caught.value.code == "QD507"
    with pytest.raises(PlanError, match="8, 9, 10, 11, 12"):
        LayerChoice(table_bits=7)


def test_tables_are_for_sixteen_bits_only(tmp_path: Path) -> None:
    proto = model(
        [node("Sigmoid", ["x"], ["y"], "layer")], [value("x", ["n", 50])], [value("y", ["n", 50])]
    )
    target = replace(ANY_TARGET, table_bits=10)
    frozen, plan = planned(proto, {"x": (50,)}, tmp_path, target, precision="int8")
    found = integer_graph(frozen, plan)
    assert found.in_float == {"layer": "its table would hold every level"}
    source, result = (
        e.quantizer for e in (of(plan, "layer").activations[0], of(plan, "layer").outputs[0])
    )
    x = normal(60, 50, seed=9)
    table = table_of(proto.graph.node[0], source, result, 8, 21)
    stored = interpolated(whole(plan, "layer", 0, x), table, source, 8) + result.zero_points[0]
    expected = result.dequantize(stored.astype(np.int32))
    assert np.array_equal(computed(frozen, plan, tmp_path, {"x": x}), expected)


# --- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [ANY_TARGET, ICRAFT])
@pytest.mark.parametrize("name", ["digits_cnn.onnx", "digits_vit.onnx"])
def test_modes_disagree_by_few_steps(name: str, target: Target, tmp_path: Path) -> None:
    frozen = freeze(load_model(demo_file(name)))
    images = np.load(demo_file("digits.npz"))["calibration_images"][:24]
    images = ((images / 16 - 0.3) / 0.37).astype(np.float32)
    source = HeldSamples(samples=[{"images": image} for image in images])
    symmetric = PlanSettings(symmetric=target.symmetric_only)
    planner = planner_for(frozen, source, tmp_path / "store", symmetric)
    plan = target.project(planner.plan({la.name: LayerChoice() for la in planner.layers}))
    report = compare_modes(frozen, plan, source, EXECUTION, n_samples=8)
    integer = [layer for layer in report.layers if layer.scheme is not None]
    compute = [la for la in integer if la.op_type in ("Conv", "MatMul", "Gemm")]
    assert len(compute) >= 0.9 * sum(
        la.op_type in ("Conv", "MatMul", "Gemm") for la in report.layers
    )
    assert report.n_integer == len(integer)
    first = next(la for la in integer if la.most_steps is not None)
    assert first.most_steps is not None
    assert first.most_steps <= 2
    for deviation in report.outputs.values():
        assert deviation.cosine > 0.99
    # They are two computations, not one run twice.
    assert any(la.differing for la in integer)
    assert all(la.why for la in report.layers if la.scheme is None)


def test_layers_that_no_scheme_covers_say_why(tmp_path: Path) -> None:
    proto = model(
        [
            node("MatMul", ["x", "w"], ["m"], "layer"),
            node("Sigmoid", ["m"], ["y"], "gate"),
        ],
        [value("x", ["n", 8])],
        [value("y", ["n", 5])],
        {"w": normal(8, 5)},
    )
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"granularity": "block=4"}, "scale for every block"),
        ({"activation_granularity": "token"}, "several scales"),
        ({"precision": "w8"}, "stays float"),
        ({"precision": "fp8_e4m3"}, "floating-point"),
        ({"precision": "bf16"}, "floating-point"),
    )
    for number, (settings, why) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        frozen, plan = planned(proto, {"x": (8,)}, folder, **settings)
        found = integer_graph(frozen, plan)
        assert why in found.in_float["layer"]
        written = write_model(found.graph, folder / "integers.onnx")
        x = normal(3, 8)
        (y,) = run(scoring_session(written.path, EXECUTION), None, {"x": x})
        (exact,) = run(scoring_session(frozen.source, EXECUTION), None, {"x": x})
        assert np.abs(y - exact).max() < 0.2
