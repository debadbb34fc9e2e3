"""Activations with several scales in the target-exact graph, against whole numbers in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto

from qdist.emit.writer import write_model
from qdist.model.freeze import FrozenModel
from qdist.model.session import run, scoring_session
from qdist.numbers.cuts import matrix_cuts, vector_cuts, vector_grid
from qdist.numbers.rounding import round_integer
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import PlanSettings
from qdist.plan.target import ProjectedPlan, Target
from qdist.simulate.integers import integer_graph
from qdist.simulate.ratios import kept_axis
from qdist.simulate.reference import (
    convolution,
    cut_product,
    fixed_point,
    folded,
    matrix_product,
    requantized,
    sum_of,
)
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
from tests.unit.test_simulate_integers import ICRAFT, computed, node, of, transposed


def spread(shape: tuple[int, ...], seed: int) -> Array:
    """Normal values of which the channels are up to 30 times as wide as others. ``shape``: with the
    batch; channels lie along axis 1 of four axes, else along the last."""
    axis = 1 if len(shape) == 4 else len(shape) - 1
    sides = [1] * len(shape)
    sides[axis] = -1
    factors = np.geomspace(0.1, 3.0, shape[axis]).reshape(sides)
    return (normal(*shape, seed=seed) * factors).astype(np.float32)


def planned(
    proto: onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    target: Target,
    single: tuple[str, ...] = (),
    **settings: Any,
) -> tuple[FrozenModel, ProjectedPlan]:
    """A plan with scales for channels, but of the tensors named ``single``."""
    frozen = frozen_from(proto, folder / "model.onnx")
    samples = [
        {name: spread((1, *shape), 10 * i + k)[0] for k, (name, shape) in enumerate(shapes.items())}
        for i in range(8)
    ]
    symmetric = PlanSettings(symmetric=target.symmetric_only)
    planner = planner_for(frozen, HeldSamples(samples=samples), folder / "store", symmetric)
    settings = {"activation_granularity": "channel", **settings}
    fine, coarse = (
        planner.plan({la.name: LayerChoice(**kind) for la in planner.layers})
        for kind in (settings, {**settings, "activation_granularity": "tensor"})
    )

    layers = []
    for la, other in zip(fine.layers, coarse.layers, strict=True):
        both = zip(la.activations, other.activations, strict=True)
        kept = tuple(one if one.tensor in single else several for several, one in both)
        layers.append(replace(la, activations=kept))
    return frozen, target.project(replace(fine, layers=tuple(layers)))


def whole(plan: ProjectedPlan, layer: str, index: int, values: Array) -> Array:
    """What the layer reads of an activation: whole numbers, less the zero points."""
    q = next(e.quantizer for e in of(plan, layer).activations if e.index == index)
    shape = [1] * values.ndim
    if q.axis is not None:
        shape[q.axis] = -1
    scales = np.asarray(q.scales, np.float32).reshape(shape)
    zeros = np.asarray(q.zero_points).reshape(shape)
    rounded = round_integer((values / scales).astype(np.float64), plan.target.rounding)
    return (np.clip(rounded + zeros, q.low, q.high) - zeros).astype(np.int64)


def exact(frozen: FrozenModel, feeds: dict[str, Array]) -> Array:
    (found,) = run(scoring_session(frozen.source, EXECUTION), None, feeds)
    return np.asarray(found)


# --- products with a weight ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """``place``: the ratios, shaped to broadcast with the weight. ``result``: values of the output
    channels, shaped to broadcast with the result. ``axis``: of the weight's output channels."""

    nodes: list[NodeProto]
    constants: dict[str, Array]
    shape: tuple[int, ...]
    accumulate: Callable[[Array, Array], Array]
    place: Callable[[Array], Array]
    result: Callable[[Array], Array]
    axis: int
    alpha: float = 1.0
    beta: float = 1.0
    is_depthwise: bool = False


def conv(group: int, n_out: int, *, depthwise: bool = False) -> Case:
    def place(ratios: Array) -> Array:
        # Output channel o reads the channels of its group.
        rows = [ratios.reshape(group, -1)[o * group // n_out] for o in range(n_out)]
        return np.array(rows)[:, :, None, None]

    return Case(
        nodes=[node("Conv", ["x", "w", "b"], ["y"], "layer", group=group, pads=[1, 0, 0, 1])],
        constants={"w": normal(n_out, 4 // group, 2, 2), "b": normal(n_out, seed=5)},
        shape=(4, 5, 4),
        accumulate=lambda x, w: convolution(
            x, w, strides=[1, 1], pads=[1, 0, 0, 1], dilations=[1, 1], group=group
        ),
        place=place,
        result=lambda v: v.reshape(-1, 1, 1),
        axis=0,
        is_depthwise=depthwise,
    )


CASES = {
    "matmul": Case(
        nodes=[
            node("MatMul", ["x", "w"], ["m"], "layer"),
            node("Add", ["m", "b"], ["y"], "bias"),
        ],
        constants={"w": normal(12, 7), "b": normal(7, seed=5)},
        shape=(3, 12),
        accumulate=matrix_product,
        place=lambda r: r[:, None],
        result=lambda v: v,
        axis=1,
    ),
    "gemm": Case(
        nodes=[node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1, alpha=0.5, beta=2.0)],
        constants={"w": normal(7, 12), "b": normal(7, seed=5)},
        shape=(12,),
        accumulate=lambda x, w: matrix_product(x, w.T),
        place=lambda r: r[None],
        result=lambda v: v,
        axis=0,
        alpha=0.5,
        beta=2.0,
    ),
    "conv": conv(1, 5),
    "grouped": conv(2, 6),
    "depthwise": conv(4, 4, depthwise=True),
    "depthwise, two each": conv(4, 8, depthwise=True),
    "transposed": Case(
        nodes=[node("ConvTranspose", ["x", "w", "b"], ["y"], "layer", strides=[2, 2])],
        constants={"w": normal(3, 5, 3, 3), "b": normal(5, seed=5)},
        shape=(3, 4, 4),
        accumulate=transposed,
        place=lambda r: r.reshape(-1, 1, 1, 1),
        result=lambda v: v.reshape(-1, 1, 1),
        axis=1,
    ),
}


def scales_of(case: Case, plan: ProjectedPlan) -> tuple[Array, Array]:
    """The ratios at each place of the weight, and the scale that each output channel asks for: of
    its widest value, or of a depthwise convolution the product of both scales."""
    layer = of(plan, "layer")
    source, numbers = layer.activations[0].quantizer, layer.weights[0].quantizer
    ratios = case.place(np.asarray(source.scales)) * case.alpha
    if case.is_depthwise:
        return ratios, np.asarray(numbers.scales) * ratios.ravel()
    widest = np.abs(case.constants["w"].astype(np.float64) * ratios)
    axes = tuple(a for a in range(widest.ndim) if numbers.axis is None or a != case.axis)
    top = numbers.high - numbers.zero_points[0]
    return ratios, widest.max(axis=axes).reshape(-1) / top


def along_weight(case: Case, scales: Array) -> Array:
    shape = [1] * case.constants["w"].ndim
    shape[case.axis] = -1
    return scales.reshape(shape)


@pytest.mark.parametrize("settings", [
    {},
    {"precision": "uint8", "granularity": "tensor"},
    {"precision": "u4a8", "activation_granularity": "group=2"},
    {"precision": "int16"},
])  # fmt: skip
@pytest.mark.parametrize("name", CASES)
def test_ratios_go_into_the_weight_or_out_of_the_sum(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES[name]
    rank = len(case.shape) + 1
    proto = model(
        case.nodes, [value("x", ["n", *case.shape])], [value("y", [None] * rank)], case.constants
    )
    frozen, plan = planned(proto, {"x": case.shape}, tmp_path, ANY_TARGET, **settings)
    layer = of(plan, "layer")
    source, numbers, result = (
        e.quantizer for e in (layer.activations[0], layer.weights[0], layer.outputs[0])
    )
    assert len(set(source.scales)) > 1
    ratios, scales = scales_of(case, plan)
    top = numbers.high - numbers.zero_points[0]
    weight = case.constants["w"]
    if case.is_depthwise:
        integers = numbers.quantize(weight).astype(np.int64) - numbers.zero_points[0]
    else:
        integers = folded(weight, ratios, along_weight(case, scales), top)
    x = spread((4, *case.shape), 77)
    total = case.accumulate(whole(plan, "layer", 0, x), integers)
    scales = case.result(scales) if scales.size > 1 else scales.reshape(())
    bias = case.result(case.constants["b"].astype(np.float64) * case.beta)
    total = total + np.rint(bias / scales).astype(np.int64)
    m, n = fixed_point((scales / result.scales[0]).astype(np.float32))
    stored = requantized(total, m, n, result.zero_points[0], (result.low, result.high))
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))
    assert integer_graph(frozen, plan).schemes == {"layer": "product"}
    # What the numbers of the input and of the result leave is the error of the weight.
    y = result.applied(exact(frozen, {"x": source.applied(x)}))
    share = {"u4a8": 0.2, "int16": 1e-4}.get(settings.get("precision", ""), 0.02)
    assert np.abs(found - y).max() < share * np.abs(y).max() + 1.01 * result.scales[0]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", CASES)
def test_ratios_go_into_the_weight_on_targets_that_cut(
    name: str, granularity: str, tmp_path: Path
) -> None:
    case = CASES[name]
    rank = len(case.shape) + 1
    proto = model(
        case.nodes, [value("x", ["n", *case.shape])], [value("y", [None] * rank)], case.constants
    )
    frozen, plan = planned(proto, {"x": case.shape}, tmp_path, ICRAFT, granularity=granularity)
    layer = of(plan, "layer")
    numbers, result = layer.weights[0].quantizer, layer.outputs[0].quantizer
    ratios, scales = scales_of(case, plan)
    sy = result.scales[0]
    bias = case.constants["b"].astype(np.float64) * case.beta
    bounds = np.abs(bias) / sy if scales.size > 1 else np.abs(bias).max(keepdims=True) / sy
    split = vector_cuts if name == "depthwise" else matrix_cuts
    cuts = split(list(scales / sy), 8, list(bounds))
    values = np.array([s.value for s in cuts.scales])
    m, n = (np.array([getattr(s, part) for s in cuts.scales], np.int64) for part in "mn")
    weight = case.constants["w"]
    integers = folded(weight, ratios / sy, along_weight(case, values), numbers.high, "half_away")
    x = spread((4, *case.shape), 77)
    total = case.accumulate(whole(plan, "layer", 0, x), integers)
    if values.size > 1:
        values, m, n = (case.result(part) for part in (values, m, n))
    offset = round_integer(case.result(bias) / (values * 2.0**cuts.shift * sy), "half_away")
    offset = np.clip(offset, -32767, 32767).astype(np.int64)
    stored = cut_product(total, offset, (m, n, cuts.shift), (result.low, result.high))
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))
    assert integer_graph(frozen, plan).schemes == {"layer": "cuts"}
    source = layer.activations[0].quantizer
    y = result.applied(exact(frozen, {"x": source.applied(x)}))
    assert np.abs(found - y).max() < 0.03 * np.abs(y).max() + 1.01 * sy


@pytest.mark.parametrize("target", [ANY_TARGET, ICRAFT])
def test_channels_without_weights_keep_their_bias(target: Target, tmp_path: Path) -> None:
    weight = normal(4, 4, 1, 1)
    weight[1] = 0
    bias = np.array([0.1, -1.5, 0.2, 0.3], np.float32)
    proto = model(
        [node("Conv", ["x", "w", "b"], ["y"], "layer")],
        [value("x", ["n", 4, 5, 5])],
        [value("y", ["n", 4, 5, 5])],
        {"w": weight, "b": bias},
    )
    frozen, plan = planned(proto, {"x": (4, 5, 5)}, tmp_path, target)
    found = computed(frozen, plan, tmp_path, {"x": spread((2, 4, 5, 5), 3)})
    step = of(plan, "layer").outputs[0].quantizer.scales[0]
    assert np.abs(found[:, 1] + 1.5).max() < step


@pytest.mark.parametrize("target", [ANY_TARGET, ICRAFT])
def test_a_weight_that_is_the_first_factor_takes_the_ratios(target: Target, tmp_path: Path) -> None:
    """Channels before positions, as after a convolution: the rows of the second factor."""
    weight = normal(7, 12)
    proto = model(
        [
            node("MaxPool", ["x"], ["p"], "pool", kernel_shape=[1]),
            node("MatMul", ["w", "p"], ["y"], "layer"),
        ],
        [value("x", ["n", 12, 6])],
        [value("y", ["n", 7, 6])],
        {"w": weight},
    )
    frozen, plan = planned(proto, {"x": (12, 6)}, tmp_path, target)
    layer = of(plan, "layer")
    source, numbers, result = (
        e.quantizer for e in (layer.activations[0], layer.weights[0], layer.outputs[0])
    )
    assert (source.axis, numbers.axis) == (1, 0)
    ratios, sy = np.asarray(source.scales)[None], result.scales[0]
    scales = np.abs(weight * ratios).max(axis=1, keepdims=True) / 127
    levels = (result.low, result.high)
    graph = integer_graph(frozen, plan).graph
    graph.proto.graph.output.append(onnx.ValueInfoProto(name="p"))
    written = write_model(graph, tmp_path / "seen.onnx")
    session = scoring_session(written.path, EXECUTION)
    found, pooled = run(session, ["y", "p"], {"x": spread((3, 12, 6), 5)})
    read = whole(plan, "layer", 1, pooled)
    if target is ANY_TARGET:
        total = matrix_product(folded(weight, ratios, scales, 127), read)
        m, n = fixed_point((scales / sy).astype(np.float32))
        stored = requantized(total, m, n, result.zero_points[0], levels)
    else:
        cuts = matrix_cuts(list((scales / sy).ravel()), 8)
        values = np.array([s.value for s in cuts.scales])[:, None]
        total = matrix_product(folded(weight, ratios / sy, values, 127, "half_away"), read)
        m, n = (np.reshape([getattr(s, p) for s in cuts.scales], (-1, 1)) for p in "mn")
        stored = cut_product(total, None, (m, n, cuts.shift), levels)
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))
    assert "layer" in integer_graph(frozen, plan).schemes


def test_groups_of_a_transposed_convolution_share_their_scales(tmp_path: Path) -> None:
    """A scale for each output channel of a group, and an input of one scale."""
    weight = spread((4, 3, 3, 3), 1)
    proto = model(
        [node("ConvTranspose", ["x", "w"], ["y"], "layer", group=2, strides=[2, 2])],
        [value("x", ["n", 4, 4, 4])],
        [value("y", ["n", 6, 9, 9])],
        {"w": weight},
    )
    frozen, plan = planned(proto, {"x": (4, 4, 4)}, tmp_path, ANY_TARGET, ("x",))
    layer = of(plan, "layer")
    source, numbers, result = (
        e.quantizer for e in (layer.activations[0], layer.weights[0], layer.outputs[0])
    )
    assert (numbers.axis, len(numbers.scales)) == (1, 3)
    x = spread((3, 4, 4, 4), 5)
    read, w = whole(plan, "layer", 0, x), numbers.quantize(weight).astype(np.int64)
    halves = [transposed(read[:, part], w[part]) for part in (slice(0, 2), slice(2, 4))]
    scales = np.tile(np.asarray(numbers.scales) * source.scales[0] / result.scales[0], 2)
    m, n = (v.reshape(-1, 1, 1) for v in fixed_point(scales.astype(np.float32)))
    levels = (result.low, result.high)
    stored = requantized(np.concatenate(halves, axis=1), m, n, result.zero_points[0], levels)
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))


# --- products and sums of activations -----------------------------------------------------------


def pointwise(op_type: str, second: tuple[int, ...]) -> onnx.ModelProto:
    return model(
        [node(op_type, ["x", "z"], ["y"], "layer")],
        [value("x", ["n", 4, 5, 3]), value("z", ["n", *second])],
        [value("y", ["n", 4, 5, 3])],
    )


@pytest.mark.parametrize("single", [(), ("x",), ("z",)])
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("target", [ANY_TARGET, ICRAFT])
def test_pointwise_operators_have_factors_along_the_axis(
    op_type: str, single: tuple[str, ...], target: Target, tmp_path: Path
) -> None:
    second = (4, 1, 1) if op_type == "Mul" else (4, 5, 3)
    proto = pointwise(op_type, second)
    frozen, plan = planned(proto, {"x": (4, 5, 3), "z": second}, tmp_path, target, single)
    layer, result = of(plan, "layer"), of(plan, "layer").outputs[0].quantizer
    x, z = spread((6, 4, 5, 3), 5), spread((6, *second), 6)
    first, other = (whole(plan, "layer", i, v) for i, v in enumerate((x, z)))
    sx, sz = (np.reshape(e.quantizer.scales, (-1, 1, 1)) for e in layer.activations)
    assert {len(sx), len(sz)} == ({4} if not single else {1, 4})
    levels, zero, sy = (result.low, result.high), result.zero_points[0], result.scales[0]
    sign = -1 if op_type == "Sub" else 1
    if target is ANY_TARGET and op_type == "Mul":
        m, n = fixed_point((sx * sz / sy).astype(np.float32))
        stored = requantized(first * other, m, n, zero, levels)
    elif target is ANY_TARGET:
        ratios = (np.float32(sx / sy), np.float32(sz / sy))
        stored = sum_of(first, sign * other, ratios, zero, levels)
    else:
        stored = np.empty(x.shape, np.int64)
        both = np.broadcast_to(sx, (4, 1, 1)).ravel(), np.broadcast_to(sz, (4, 1, 1)).ravel()
        for c, (a, b) in enumerate(zip(*both, strict=True)):
            if op_type == "Mul":
                cut = vector_grid(8).snap(a * b / sy)
                total = first[:, c] * other[:, c]
            else:
                cut = vector_grid(8).snap(max(a, b) / sy / 127)
                i, j = (int(np.floor(s / sy / cut.value + 0.5)) for s in (a, b))
                total = first[:, c] * i + sign * other[:, c] * j
            pair = np.int64(cut.m or 0), np.int64(cut.n or 0)
            stored[:, c] = cut_product(total, None, (*pair, 0), levels)
    found = computed(frozen, plan, tmp_path, {"x": x, "z": z})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))
    assert set(integer_graph(frozen, plan).schemes) == {"layer"}
    assert len(np.unique(stored)) > 10


@pytest.mark.parametrize("target", [ANY_TARGET, ICRAFT])
def test_heads_have_a_multiplier_each(target: Target, tmp_path: Path) -> None:
    proto = model(
        [node("MatMul", ["x", "z"], ["y"], "layer")],
        [value("x", ["n", 4, 3, 8]), value("z", ["n", 4, 8, 5])],
        [value("y", ["n", 4, 3, 5])],
    )
    frozen, plan = planned(proto, {"x": (4, 3, 8), "z": (4, 8, 5)}, tmp_path, target)
    layer, result = of(plan, "layer"), of(plan, "layer").outputs[0].quantizer
    x, z = spread((6, 4, 3, 8), 5), spread((6, 4, 8, 5), 6)
    total = matrix_product(whole(plan, "layer", 0, x), whole(plan, "layer", 1, z))
    sx, sz = (np.asarray(e.quantizer.scales) for e in layer.activations)
    normalized, levels = sx * sz / result.scales[0], (result.low, result.high)
    if target is ANY_TARGET:
        m, n = (v.reshape(-1, 1, 1) for v in fixed_point(normalized.astype(np.float32)))
        stored = requantized(total, m, n, result.zero_points[0], levels)
    else:
        cuts = matrix_cuts(list(normalized), 8)
        m, n = (np.reshape([getattr(s, p) for s in cuts.scales], (-1, 1, 1)) for p in "mn")
        stored = cut_product(total, None, (m, n, cuts.shift), levels)
    found = computed(frozen, plan, tmp_path, {"x": x, "z": z})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))
    assert set(integer_graph(frozen, plan).schemes) == {"layer"}


def test_columns_of_the_second_factor_have_a_multiplier_each(tmp_path: Path) -> None:
    proto = model(
        [node("MatMul", ["x", "z"], ["y"], "layer")],
        [value("x", ["n", 3, 8]), value("z", ["n", 8, 5])],
        [value("y", ["n", 3, 5])],
    )
    shapes = {"x": (3, 8), "z": (8, 5)}
    frozen, plan = planned(proto, shapes, tmp_path, ANY_TARGET, ("x",))
    layer, result = of(plan, "layer"), of(plan, "layer").outputs[0].quantizer
    x, z = spread((6, 3, 8), 5), spread((6, 8, 5), 6)
    total = matrix_product(whole(plan, "layer", 0, x), whole(plan, "layer", 1, z))
    sx, sz = (np.asarray(e.quantizer.scales) for e in layer.activations)
    m, n = fixed_point((sx * sz / result.scales[0]).astype(np.float32))
    stored = requantized(total, m, n, result.zero_points[0], (result.low, result.high))
    found = computed(frozen, plan, tmp_path, {"x": x, "z": z})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))


def test_batch_normalization_takes_the_ratio_of_each_channel(tmp_path: Path) -> None:
    gamma, beta = np.array([1, 0.5, 3, 2], np.float32), np.array([0.5, -2, 0.1, 1], np.float32)
    mean, variance = np.zeros(4, np.float32), np.array([0.1, 0.5, 2, 8], np.float32)
    proto = model(
        [node("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"], "layer", epsilon=1e-3)],
        [value("x", ["n", 4, 5, 3])],
        [value("y", ["n", 4, 5, 3])],
        {"g": gamma, "b": beta, "m": mean, "v": variance},
    )
    frozen, plan = planned(proto, {"x": (4, 5, 3)}, tmp_path, ICRAFT)
    layer = of(plan, "layer")
    source, result = layer.activations[0].quantizer, layer.outputs[0].quantizer
    x = spread((6, 4, 5, 3), 5)
    integers = whole(plan, "layer", 0, x)
    weight = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + np.float32(1e-3))
    stored = np.empty(x.shape, np.int64)
    for c, scale in enumerate(source.scales):
        w, b = weight[c] * scale / result.scales[0], beta[c] / result.scales[0]
        cut = vector_grid(8).snap(abs(w) / 127)
        m, n = np.int64(cut.m or 0), np.int64(cut.n or 0)
        wq = int(np.clip(round_integer(np.array(w / cut.value), "half_away"), -127, 127))
        bq = int(np.clip(round_integer(np.array(b / cut.value), "half_away"), -32767, 32767))
        total = integers[:, c] * wq
        stored[:, c] = cut_product(total, np.asarray(bq), (m, n, 0), (result.low, result.high))
    found = computed(frozen, plan, tmp_path, {"x": x})
    assert np.array_equal(found, result.dequantize(stored.astype(np.int32)))
    assert integer_graph(frozen, plan).schemes == {"layer": "cuts"}


# --- what stays in float32 ----------------------------------------------------------------------


def test_what_no_scheme_expresses_says_why(tmp_path: Path) -> None:
    summed = model(
        [node("MatMul", ["x", "z"], ["y"], "layer")],
        [value("x", ["n", 3, 16]), value("z", ["n", 16, 5])],
        [value("y", ["n", 3, 5])],
    )
    crossed = model(
        [node("Add", ["x", "z"], ["y"], "layer")],
        [value("x", ["n", 4, 5, 3]), value("z", ["n", 5, 3])],
        [value("y", None)],
    )
    grouped = model(
        [node("ConvTranspose", ["x", "w"], ["y"], "layer", group=2)],
        [value("x", ["n", 4, 5, 5])],
        [value("y", ["n", 6, 7, 7])],
        {"w": normal(4, 3, 3, 3)},
    )
    cases: tuple[tuple[onnx.ModelProto, dict[str, tuple[int, ...]], str], ...] = (
        (summed, {"x": (3, 16), "z": (16, 5)}, "along what is summed"),
        (crossed, {"x": (4, 5, 3), "z": (5, 3)}, "along different axes"),
        (grouped, {"x": (4, 5, 5)}, "the weight groups"),
    )
    for number, (proto, shapes, why) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        frozen, plan = planned(proto, shapes, folder, ANY_TARGET)
        assert why in integer_graph(frozen, plan).in_float["layer"]


def test_axes_of_matrices_that_are_transposed() -> None:
    turned = node("Gemm", ["x", "w"], ["y"], "layer", transA=1, transB=1)
    plain = node("MatMul", ["x", "w"], ["y"], "layer")
    assert [kept_axis(turned, 0, a) for a in (-1, -2)] == [-2, None]
    assert [kept_axis(turned, 1, a) for a in (-1, -2)] == [None, -1]
    assert [kept_axis(plain, 0, a) for a in (-1, -2, -3)] == [None, -2, -3]
    assert [kept_axis(plain, 1, a) for a in (-1, -2, -3)] == [-1, None, -3]
