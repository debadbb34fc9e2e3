"""The bias of an int16 convolution as an Add of its own: plan, graphs, costs, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, helper
from rich.console import Console

from qdist.emit.qdq import emit_qdq
from qdist.emit.writer import write_model
from qdist.errors import PlanError
from qdist.evaluate.in_place import InPlace
from qdist.evaluate.sensitivity import sensitivities
from qdist.model.freeze import FrozenModel
from qdist.model.session import run, scoring_session
from qdist.numbers.cuts import vector_grid
from qdist.numbers.rounding import round_integer
from qdist.plan.bias_adds import range_before
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.icraft import template
from qdist.plan.dialects.reading import Before
from qdist.plan.difference import compare_plans
from qdist.plan.plan import BiasAdd, LayerPlan, load_plan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.precision import PRECISIONS
from qdist.plan.resolved import resolved_digest
from qdist.plan.rules import Rule, apply_rules
from qdist.plan.target import ProjectedPlan, Target
from qdist.report.tables import plan_table
from qdist.search.building import build_problem
from qdist.search.latency import read_latency_table
from qdist.search.space import SpaceSettings
from qdist.simulate.integers import integer_graph
from qdist.simulate.reference import convolution, cut_product, fixed_point, requantized, sum_of
from qdist.simulate.switched import switched_graph
from qdist.stats.channels import Channels
from tests.onnx_models import (
    ANY_TARGET,
    EXECUTION,
    Array,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    samples_of,
    value,
)

BUYI = Target(
    name="buyi",
    precisions=tuple(PRECISIONS),
    symmetric_only=True,
    scale_grid="m*2^-n",
    rounding="half_away",
    split_bias=True,
)
WHOLE = replace(ANY_TARGET, split_bias=True)
"""A target that splits biases too, and requantizes as any other does."""
SPLIT = LayerChoice(precision="int16", split_bias=True)
INT16 = LayerChoice(precision="int16")


def node(op_type: str, inputs: list[str], outputs: list[str], name: str, **kw: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, name, **kw)


BIAS = normal(4, seed=5) * np.float32(6)
CASES: dict[str, tuple[NodeProto, Array, dict[str, Any]]] = {
    "conv": (
        node("Conv", ["x", "w", "b"], ["c"], "layer", pads=[1, 1, 1, 1], strides=[2, 1]),
        normal(4, 4, 3, 3),
        {"strides": [2, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1]},
    ),
    "depthwise": (
        node("Conv", ["x", "w", "b"], ["c"], "layer", group=4),
        normal(4, 1, 3, 3),
        {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1], "group": 4},
    ),
}


def planner_of(
    nodes: list[NodeProto], constants: Mapping[str, Array], folder: Path, *, symmetric: bool = True
) -> Planner:
    """Of a model that reads ``x`` [n, 4, 7, 8] and gives ``y``."""
    proto = model(nodes, [value("x", ["n", 4, 7, 8])], [value("y", [None] * 4)], constants)
    frozen = frozen_from(proto, folder / "model.onnx")
    source = samples_of("x", 4, 7, 8, n=12)
    return planner_for(frozen, source, folder / "store", PlanSettings(symmetric=symmetric))


def planned(
    name: str, folder: Path, target: Target = BUYI, choice: LayerChoice = SPLIT
) -> tuple[Planner, ProjectedPlan]:
    """A convolution with a ReLU behind it, under one choice."""
    convolved, weight, _ = CASES[name]
    nodes = [convolved, node("Relu", ["c"], ["y"], "relu")]
    planner = planner_of(nodes, {"w": weight, "b": BIAS}, folder)
    return planner, target.project(planner.plan({"layer": choice, "relu": INT16}))


def of(plan: ProjectedPlan, name: str = "layer") -> LayerPlan:
    return next(layer for layer in plan.plan.layers if layer.name == name)


def split_of(plan: ProjectedPlan) -> BiasAdd:
    found = of(plan).bias_add
    assert found is not None
    return found


def outputs(path: Path, feeds: dict[str, Array]) -> Array:
    return np.asarray(run(scoring_session(path, EXECUTION), ["y"], feeds)[0])


def convolved_alone(name: str, x: Array, w: Array) -> Array:
    """The float convolution without its bias, as ONNX Runtime computes it."""
    bare = NodeProto.FromString(CASES[name][0].SerializeToString())
    del bare.input[2:]
    proto = model([bare], [value("x", ["n", 4, 7, 8])], [value("c", [None] * 4)], {"w": w})
    session = scoring_session(proto.SerializeToString(), EXECUTION)
    return np.asarray(run(session, ["c"], {"x": x})[0])


# --- the plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_range_before_the_bias_is_that_of_the_values_themselves(
    name: str, tmp_path: Path
) -> None:
    _, plan = planned(name, tmp_path, WHOLE)
    exact = convolved_alone(name, normal(12, 4, 7, 8, seed=1), CASES[name][1])
    add = split_of(plan)
    low, high = add.result.quantizer.bounds
    assert low == pytest.approx(exact.min(), rel=1e-6)
    assert high == pytest.approx(exact.max(), rel=1e-6)
    # With its bias the result needs another range.
    assert max(-low, high) < 0.8 * np.abs(exact + BIAS.reshape(-1, 1, 1)).max()
    assert add.result.quantizer.scales[0] == pytest.approx(max(-low, high) / 32767, rel=1e-6)
    assert add.bias.quantizer.scales[0] == pytest.approx(np.abs(BIAS).max() / 32767, rel=1e-6)
    assert (add.result.tensor, add.bias.tensor, add.shape) == ("c.before_bias", "b", (4, 1, 1))
    assert of(plan).bias_bounds == ()
    assert add.result.provenance.statistics
    assert any("the bias is an Add of its own in 1 layers: layer" in n for n in plan.plan.notes)


def test_channels_without_values_have_no_say_in_the_range() -> None:
    inf = np.float32(np.inf)
    channels = Channels(
        minimum=np.array([1, inf, 4], np.float32), maximum=np.array([3, -inf, 6], np.float32)
    )
    found = range_before(np.array([2, 100, -1], np.float32), channels)
    assert (found.low, found.high) == (-1.0, 7.0)


def test_a_plan_says_what_it_splits(tmp_path: Path) -> None:
    planner, plan = planned("conv", tmp_path)
    path = plan.plan.save(tmp_path / "plan.json")
    again = load_plan(path)
    assert again == plan.plan
    assert again.digest == plan.plan.digest
    written = json.loads(path.read_text())["layers"][0]
    assert written["choice"]["split_bias"] is True
    assert written["bias_add"]["shape"] == [4, 1, 1]
    assert BUYI.project(again) == plan
    console = Console(record=True, width=200)
    console.print(plan_table(again))
    shown = console.export_text()
    assert "bias int16 added apart, max" in shown
    assert "before it int16, -" in shown
    whole = planner.plan({"layer": INT16, "relu": INT16})
    assert "bias_add" not in whole.to_json()["layers"][0]
    assert "split_bias" not in whole.to_json()["layers"][0]["choice"]
    assert plan.plan.coverage().n_activations == whole.coverage().n_activations + 1
    assert resolved_digest(again) != resolved_digest(whole)
    found = {(c.what, c.tensor): c for c in compare_plans(whole, again).changes}
    assert (found["split_bias", ""].before, found["split_bias", ""].after) == ("", "True")
    assert found["type", "c.before_bias"].after == "int16"
    assert found["type", "b"].after == "int16"


def test_projecting_twice_changes_nothing(tmp_path: Path) -> None:
    planner, _ = planned("conv", tmp_path)
    for target in (BUYI, WHOLE):
        plan = target.project(planner.plan({"layer": SPLIT, "relu": INT16}))
        assert target.project(plan.plan) == plan


# --- artifact-exact -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [BUYI, WHOLE], ids=lambda t: t.name)
@pytest.mark.parametrize("name", CASES)
def test_the_artifact_stores_before_it_adds(name: str, target: Target, tmp_path: Path) -> None:
    planner, plan = planned(name, tmp_path, target)
    artifact = emit_qdq(planner.graph.model, plan, tmp_path / "q.onnx")
    layer, add = of(plan), split_of(plan)
    x = normal(5, 4, 7, 8, seed=77) * np.float32(1.5)
    read = layer.activations[0].quantizer.applied(x)
    weight = layer.weights[0].quantizer.applied(CASES[name][1])
    stored = add.result.quantizer.applied(convolved_alone(name, read, weight))
    total = stored + add.bias.quantizer.applied(BIAS).reshape(-1, 1, 1)
    found = outputs(artifact.path, {"x": x})
    assert np.array_equal(found, np.maximum(total, 0))
    graph = onnx.load(artifact.path).graph
    adds = [n for n in graph.node if n.op_type == "Add"]
    assert [n.name for n in adds] == ["layer.bias_add"]
    assert [len(n.input) for n in graph.node if n.op_type == "Conv"] == [2]
    assert "b" not in {tensor.name for tensor in graph.initializer}


def test_a_transposed_convolution_and_one_of_a_single_channel(tmp_path: Path) -> None:
    nodes = [
        node("ConvTranspose", ["x", "w", "b"], ["t"], "up", strides=[2, 2]),
        node("Conv", ["t", "v", "d"], ["y"], "last"),
    ]
    constants = {
        "w": normal(4, 3, 2, 2),
        "b": normal(3, seed=2),
        "v": normal(1, 3, 1, 1),
        "d": np.array([0.7], np.float32),
    }
    planner = planner_of(nodes, constants, tmp_path)
    plan = WHOLE.project(planner.plan({"up": SPLIT, "last": SPLIT}))
    # Samples of the calibration, so that nothing lies beyond the ranges.
    feeds = {"x": normal(12, 4, 7, 8, seed=1)}
    found = outputs(emit_qdq(planner.graph.model, plan, tmp_path / "q.onnx").path, feeds)
    proto = planner.graph.model.proto().SerializeToString()
    exact = run(scoring_session(proto, EXECUTION), ["y"], feeds)[0]
    assert np.abs(found - exact).max() < 1e-3 * np.abs(exact).max()
    assert not np.array_equal(found, exact)
    single = of(plan, "last").bias_add
    assert single is not None
    assert single.bias.quantizer.applied(constants["d"]) == pytest.approx([0.7])


# --- target-exact -------------------------------------------------------------------------------


def whole_numbers(plan: ProjectedPlan, name: str, x: Array) -> tuple[Array, Array]:
    layer = of(plan)
    read, weight = layer.activations[0].quantizer, layer.weights[0].quantizer
    ratio = (x / np.float32(read.scales[0])).astype(np.float64)
    taken = np.clip(round_integer(ratio, plan.target.rounding), read.low, read.high)
    numbers = weight.quantize(CASES[name][1]).astype(np.int64)
    total = convolution(taken.astype(np.int64), numbers, **CASES[name][2])
    return total, np.asarray(weight.scales).reshape(-1, 1, 1)


@pytest.mark.parametrize("name", CASES)
def test_on_buyi_the_add_has_a_cut_of_its_own(name: str, tmp_path: Path) -> None:
    planner, plan = planned(name, tmp_path)
    layer, add = of(plan), split_of(plan)
    x = normal(5, 4, 7, 8, seed=77)
    total, _ = whole_numbers(plan, name, x)
    m, n, shifts = (np.array(part) for part in zip(*layer.weights[0].quantizer.cuts, strict=True))
    assert len(set(shifts.tolist())) == 1
    result, bias = add.result.quantizer, add.bias.quantizer
    m, n = (part.reshape(-1, 1, 1) for part in (m, n))
    stored = cut_product(total, None, (m, n, int(shifts[0])), (result.low, result.high))
    output = layer.outputs[0].quantizer
    ratios = [q.scales[0] / output.scales[0] for q in (result, bias)]
    cut = vector_grid(16).snap(max(ratios) / output.high)
    i, j = (int(np.floor(ratio / cut.value + 0.5)) for ratio in ratios)
    constant = bias.quantize(BIAS).astype(np.int64).reshape(-1, 1, 1)
    summed = cut_product(
        stored * i + constant * j, None, (cut.m, cut.n, 0), (output.low, output.high)
    )
    graph = integer_graph(planner.graph.model, plan)
    path = write_model(graph.graph, tmp_path / "integers.onnx").path
    found = outputs(path, {"x": x})
    assert np.array_equal(found, np.maximum(output.dequantize(summed.astype(np.int32)), 0))
    assert len(np.unique(summed)) > 300
    assert graph.schemes == {"layer": "cuts"}
    assert not graph.in_float


@pytest.mark.parametrize("name", CASES)
def test_elsewhere_the_add_is_requantized_once(name: str, tmp_path: Path) -> None:
    planner, plan = planned(name, tmp_path, WHOLE)
    layer, add = of(plan), split_of(plan)
    x = normal(5, 4, 7, 8, seed=77)
    total, scales = whole_numbers(plan, name, x)
    result, bias = add.result.quantizer, add.bias.quantizer
    read = layer.activations[0].quantizer
    m, n = fixed_point((scales * read.scales[0] / result.scales[0]).astype(np.float32))
    stored = requantized(total, m, n, 0, (result.low, result.high))
    output = layer.outputs[0].quantizer
    ratios = [np.float32(q.scales[0] / output.scales[0]) for q in (result, bias)]
    constant = bias.quantize(BIAS).astype(np.int64).reshape(-1, 1, 1)
    summed = sum_of(
        stored,
        np.broadcast_to(constant, stored.shape),
        (ratios[0], ratios[1]),
        0,
        (output.low, output.high),
    )
    graph = integer_graph(planner.graph.model, plan)
    path = write_model(graph.graph, tmp_path / "integers.onnx").path
    found = outputs(path, {"x": x})
    assert np.array_equal(found, np.maximum(output.dequantize(summed.astype(np.int32)), 0))
    assert graph.schemes == {"layer": "product"}


# --- what compares layers -----------------------------------------------------------------------


def test_a_twin_is_the_convolution_with_its_add(tmp_path: Path) -> None:
    """Twins of the same layer with and without the split stand in one graph; their error is that of
    the sum, so that they can be compared."""
    planner, plan = planned("conv", tmp_path)
    whole = BUYI.project(planner.plan({"layer": INT16, "relu": INT16}))
    source = samples_of("x", 4, 7, 8, n=6, seed=9)
    frozen = planner.graph.model
    found = sensitivities(frozen, (plan, whole), source, EXECUTION)
    split, plain = (deviations["layer"].relative_l2 for deviations in found)
    assert 0 < split < 1e-3
    assert 0 < plain < 1e-3
    assert split != plain
    in_place = InPlace(frozen, source, EXECUTION).deviations(plan)
    assert in_place["layer"].relative_l2 == pytest.approx(split, rel=1e-3)


def test_a_switch_turns_the_add_on_and_off(tmp_path: Path) -> None:
    planner, plan = planned("conv", tmp_path)
    frozen = planner.graph.model
    switched = switched_graph(frozen, plan)
    session = scoring_session(write_model(switched.graph, tmp_path / "s.onnx").path, EXECUTION)
    feeds = {"x": normal(3, 4, 7, 8, seed=4)}
    (name,) = switched.switches.values()
    off, on = (run(session, ["y"], {**feeds, name: np.array(state)})[0] for state in (False, True))
    exact = run(scoring_session(frozen.proto().SerializeToString(), EXECUTION), ["y"], feeds)[0]
    assert np.array_equal(off, exact)
    assert np.array_equal(on, outputs(emit_qdq(frozen, plan, tmp_path / "q.onnx").path, feeds))
    assert not np.array_equal(on, off)


# --- where there is none ------------------------------------------------------------------------


def refused(planner: Planner, name: str, choice: LayerChoice = SPLIT) -> str:
    with pytest.raises(PlanError) as caught:
        planner.plan({layer.name: INT16 for layer in planner.layers} | {name: choice})
    assert caught.value.code == "QD507"
    assert name in str(caught.value.where)
    return str(caught.value.got)


def test_layers_without_a_bias_to_split_are_refused(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], "bare"),
        node("Sigmoid", ["a"], ["s"], "sigmoid"),
        node("Conv", ["s", "v", "b"], ["c"], "twice"),
        node("Add", ["c", "d"], ["e"], "more"),
        node("Sigmoid", ["e"], ["g"], "other"),
        node("Conv", ["g", "v", "i"], ["y"], "infinite"),
    ]
    constants = {
        "w": normal(4, 4, 1, 1),
        "v": normal(4, 4, 1, 1, seed=2),
        "b": normal(4),
        "d": normal(4, 1, 1),
        "i": np.array([np.inf, 1, 2, 3], np.float32),
    }
    planner = planner_of(nodes, constants, tmp_path)
    assert refused(planner, "bare") == "a Conv without a bias of its own"
    assert refused(planner, "sigmoid") == "a Sigmoid"
    assert refused(planner, "twice") == "a bias, and another that more adds"
    assert refused(planner, "infinite") == "a bias that is not finite"
    assert not any(planner.can_split_bias(layer) for layer in planner.layers)


def test_a_computed_bias_and_an_output_that_was_not_measured_are_refused(tmp_path: Path) -> None:
    proto = model(
        [
            node("ReduceMean", ["x"], ["m"], "mean", axes=[0, 2, 3], keepdims=0),
            node("Conv", ["x", "w", "m"], ["c"], "computed"),
            node("Conv", ["c", "w", "b"], ["y"], "last"),
        ],
        [value("x", ["n", 4, 7, 8])],
        [value("y", [None] * 4)],
        {"w": normal(4, 4, 1, 1), "b": normal(4)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    planner = planner_for(frozen, samples_of("x", 4, 7, 8), tmp_path / "store")
    assert refused(planner, "computed") == "a bias that is computed"
    record = planner.record.select([t for t in planner.record.tensors if t != "y"])
    less = Planner(planner.graph, record, planner.taps)
    assert refused(less, "last") == "an output of whose channels no extrema were measured"


def test_other_targets_and_other_precisions_are_refused(tmp_path: Path) -> None:
    planner, plan = planned("conv", tmp_path)
    with pytest.raises(PlanError) as caught:
        replace(BUYI, split_bias=False).project(plan.plan)
    assert caught.value.code == "QD507"
    assert caught.value.got == "split_bias"
    for precision in ("int8", "w8a16", "uint16", "w8", "fp8_e4m3"):
        with pytest.raises(PlanError, match="precision int16") as caught:
            LayerChoice(precision=precision, split_bias=True)
        assert caught.value.code == "QD507"
    for precision in ("float32", "bf16"):
        idle = LayerChoice(precision=precision, split_bias=True)
        found = planner.plan({"layer": idle, "relu": replace(idle, split_bias=False)} | {})
        assert of(BUYI.project(found)).bias_add is None
        assert "split_bias means nothing to 1 layers without int16: layer" in found.notes
    index = planner.index
    rule = Rule(match="op:Conv", settings={"split_bias": True})
    with pytest.raises(PlanError, match="rule 'op:Conv'"):
        apply_rules(index, LayerChoice(), [rule])
    assert apply_rules(index, INT16, [rule]).choices["layer"] == SPLIT


def test_icrafts_csv_has_no_word_for_it(tmp_path: Path) -> None:
    planner, _ = planned("conv", tmp_path)
    choice = replace(INT16, saturation="max")
    before = Before(index=planner.index, choices={"layer": choice, "relu": choice})
    assert "int16" in template(before).lower()
    split = replace(before, choices={**before.choices, "layer": replace(choice, split_bias=True)})
    with pytest.raises(PlanError, match="split_bias") as caught:
        template(split)
    assert caught.value.code == "QD507"


# --- the search's options and costs -------------------------------------------------------------


def test_options_and_costs_of_a_split(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], "layer"),
        node("Sigmoid", ["c"], ["s"], "sigmoid"),
        node("Conv", ["s", "w"], ["y"], "bare"),
    ]
    planner = planner_of(nodes, {"w": normal(4, 4, 1, 1), "b": normal(4)}, tmp_path)
    plain = {layer.name: LayerChoice() for layer in planner.layers}
    space = SpaceSettings(precisions=("int8", "int16", "float32"), split_bias=True)
    problem = build_problem(planner, BUYI, plain, space)
    splits = {
        name: [option for option in options if option.split_bias]
        for name, options in problem.options.items()
    }
    assert splits == {"layer": [SPLIT], "sigmoid": [], "bare": []}
    BUYI.project(planner.plan({**plain, "layer": SPLIT}))
    narrow = {name: replace(INT16, activation_range_bits=9) for name in plain}
    assert build_problem(planner, BUYI, narrow, space).options["layer"][0] == narrow["layer"]
    assert (
        replace(narrow["layer"], split_bias=True)
        in (build_problem(planner, BUYI, narrow, space).options["layer"])
    )
    for target, how in ((replace(BUYI, split_bias=False), space), (BUYI, SpaceSettings())):
        options = build_problem(planner, target, plain, how).options["layer"]
        assert not any(option.split_bias for option in options)
    table = tmp_path / "latency.csv"
    rows = ["operator,dtype,us", *(f"{op},{p},4" for op in ("Conv", "Sigmoid") for p in PRECISIONS)]
    table.write_text("\n".join(rows))
    with pytest.raises(PlanError, match="QD512"):
        build_problem(planner, BUYI, plain, space, unit="latency", table=read_latency_table(table))
    table.write_text("\n".join([*rows, "Add,int16,3"]))
    # Four values of 16 bits and a scale; 4 x 7 x 8 multiplications of 16 bits; three microseconds.
    added = {"bytes": 4 * 2 + 4, "bit_operations": 224 * 256, "latency": 3}
    for unit, expected in added.items():
        known = read_latency_table(table) if unit == "latency" else None
        found = build_problem(planner, BUYI, plain, space, unit=unit, table=known)
        cost = found.cost({**plain, "layer": SPLIT}) - found.cost({**plain, "layer": INT16})
        assert cost == expected, unit


def test_a_model_of_half_precision(tmp_path: Path) -> None:
    constants = {"w": normal(4, 4, 3, 3).astype(np.float16), "b": BIAS.astype(np.float16)}
    half = onnx.TensorProto.FLOAT16
    proto = model(
        [node("Conv", ["x", "w", "b"], ["y"], "layer")],
        [value("x", ["n", 4, 7, 8], half)],
        [value("y", ["n", 4, 5, 6], half)],
        constants,
    )
    frozen: FrozenModel = frozen_from(proto, tmp_path / "model.onnx")
    samples = [{"x": normal(4, 7, 8, seed=i).astype(np.float16)} for i in range(8)]
    symmetric = PlanSettings(symmetric=True)
    planner = planner_for(frozen, HeldSamples(samples=samples), tmp_path / "store", symmetric)
    plan = BUYI.project(planner.plan({"layer": SPLIT}))
    path = emit_qdq(frozen, plan, tmp_path / "q.onnx").path
    feeds = {"x": normal(2, 4, 7, 8, seed=50).astype(np.float16)}
    found = outputs(path, feeds)
    exact = run(scoring_session(frozen.proto().SerializeToString(), EXECUTION), ["y"], feeds)[0]
    assert found.dtype == np.float16
    assert np.abs(found.astype(np.float64) - exact).max() < 0.02
    assert "layer.bias_add" in {n.name for n in onnx.load(path).graph.node}
