"""Ratios that Icraft's targets pass on: MaxPool, Pad, Split, Slice, Concat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from qdist.emit.qdq import emit_qdq
from qdist.emit.writer import write_model
from qdist.model.freeze import FrozenModel
from qdist.model.session import run, scoring_session
from qdist.numbers.rounding import round_integer
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import QuantizationPlan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.quantizer import Quantizer
from qdist.plan.rules import Rule, apply_rules
from qdist.plan.target import ProjectedPlan, Target
from qdist.simulate.cut_numbers import folded_weight
from qdist.simulate.integers import integer_graph
from qdist.simulate.reference import cut_product, fixed_point
from tests.onnx_models import (
    EXECUTION,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    value,
)
from tests.unit.test_simulate_integers import ICRAFT, node

BUYI = replace(ICRAFT, activation_channels=False)
PLAIN = replace(ICRAFT, scale_grid="float")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenModel, Planner]:
    folder = tmp_path_factory.mktemp("passing")
    proto = model(
        [
            node("Conv", ["x", "w1"], ["a"], "one"),
            node("Conv", ["x", "w2"], ["b"], "two"),
            node("MaxPool", ["a"], ["p"], "pool", kernel_shape=[2, 2], strides=[1, 1]),
            node("Pad", ["p", "pads", "pad"], ["d"], "pad_it"),
            node("Split", ["d", "parts"], ["s1", "s2"], "split", axis=1),
            node("Tanh", ["s2"], ["t"], "tanh"),
            node("Concat", ["s1", "t"], ["c1"], "with_tanh", axis=1),
            node("Conv", ["c1", "w3"], ["y1"], "after"),
            node("Concat", ["a", "b"], ["c2"], "both", axis=1),
            node("MaxPool", ["c2"], ["c3"], "pool_both", kernel_shape=[2, 2]),
            node("Split", ["c3", "halves"], ["h1", "h2"], "split_both", axis=1),
            node("Conv", ["h2", "w4"], ["y2"], "half"),
            node("Concat", ["b", "k"], ["y3"], "with_constant", axis=0),
            node("Conv", ["y3", "w5"], ["y4"], "last"),
        ],
        [value("x", [1, 3, 8, 8])],
        [value("y1", [1, 2, 8, 8]), value("y2", [1, 2, 7, 7]), value("y4", [2, 2, 8, 8])],
        {
            "w1": normal(4, 3, 1, 1, seed=1),
            "w2": normal(4, 3, 1, 1, seed=2) * 8,
            "w3": normal(2, 4, 1, 1, seed=3),
            "w4": normal(2, 4, 1, 1, seed=4),
            "w5": normal(2, 4, 1, 1, seed=5),
            "k": normal(1, 4, 8, 8, seed=6) * 3,
            "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64),
            "pad": np.array(-60.0, np.float32),
            "parts": np.array([2, 2], np.int64),
            "halves": np.array([4, 4], np.int64),
        },
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    samples = [{"x": normal(1, 3, 8, 8, seed=i)[0]} for i in range(12)]
    source = HeldSamples(samples=samples)
    return frozen, planner_for(frozen, source, folder / "store", PlanSettings(symmetric=True))


def choices(planner: Planner) -> dict[str, LayerChoice]:
    return {layer.name: LayerChoice(granularity="tensor") for layer in planner.layers}


@pytest.fixture(scope="module")
def plan(made: tuple[FrozenModel, Planner]) -> QuantizationPlan:
    return made[1].plan(choices(made[1]))


def numbers(projected: ProjectedPlan) -> dict[str, Quantizer]:
    """Tensor -> its numbers where it is read, or where it is made."""
    found: dict[str, Quantizer] = {}
    for layer in projected.plan.layers:
        for entry in (*layer.outputs, *layer.activations):
            known = found.setdefault(entry.tensor, entry.quantizer)
            assert known.key == entry.quantizer.key, entry.tensor
    return found


def test_pool_pad_and_split_have_the_ratio_of_what_they_read(plan: QuantizationPlan) -> None:
    found, plain = numbers(ICRAFT.project(plan)), numbers(PLAIN.project(plan))
    for tensor in ("p", "s1", "s2"):
        assert found[tensor].key == found["a"].key
    # The pad is far outside, and was measured: without passing on it makes the range.
    assert plain["s2"].scales[0] > 5 * plain["a"].scales[0]


def test_a_concat_has_the_ratios_of_its_inputs_side_by_side(plan: QuantizationPlan) -> None:
    found = numbers(ICRAFT.project(plan))
    a, b, joined = found["a"], found["b"], found["c2"]
    assert joined.axis == 1
    assert joined.scales == (*a.scales * 4, *b.scales * 4)
    assert found["c3"].key == joined.key
    # The second half of a split along the channels.
    assert found["h2"].scales == b.scales * 4
    tanh = found["c1"]
    assert tanh.scales == (*a.scales * 2, *found["t"].scales * 2)


def test_constants_in_a_concat_take_the_ratio_of_the_tensor(plan: QuantizationPlan) -> None:
    projected = ICRAFT.project(plan)
    found = numbers(projected)
    assert found["y3"].key == found["b"].key
    layer = next(la for la in projected.plan.layers if la.name == "with_constant")
    assert layer.weights[0].quantizer.scales == found["b"].scales
    assert layer.weights[0].quantizer.rounding == "half_away"


def test_a_target_of_one_scale_says_where_ratios_are_not_passed_on(plan: QuantizationPlan) -> None:
    projected = BUYI.project(plan)
    found = numbers(projected)
    assert found["c2"].axis is None
    assert found["c2"].key != found["a"].key
    assert found["p"].key == found["s2"].key == found["a"].key
    assert any("not passed on to 2 tensors, such as c1, c2" in n for n in projected.plan.notes)


def test_other_targets_pass_nothing_on(plan: QuantizationPlan) -> None:
    projected = PLAIN.project(plan)
    assert {la.name: la.outputs for la in projected.plan.layers}.keys() == {
        la.name for la in plan.layers
    }
    for before, after in zip(plan.layers, projected.plan.layers, strict=True):
        one = [e.quantizer.bounds for e in (*before.activations, *before.outputs)]
        assert one == [e.quantizer.bounds for e in (*after.activations, *after.outputs)]


@pytest.mark.parametrize("chip", [ICRAFT, BUYI])
def test_passing_on_twice_changes_nothing(chip: Target, plan: QuantizationPlan) -> None:
    once = chip.project(plan)
    assert chip.project(once.plan).plan == once.plan
    assert QuantizationPlan.from_json(once.plan.to_json()) == once.plan


def test_rules_about_what_is_passed_on_have_no_effect(made: tuple[FrozenModel, Planner]) -> None:
    _, planner = made
    rule = Rule(match="tensor:p", settings={"bounds": (-9.0, 9.0)})
    found = apply_rules(planner.index, choices(planner), [rule])
    plan = planner.with_rules(found.tensors).plan(found.choices)
    projected = ICRAFT.project(plan)
    assert numbers(projected)["p"].key == numbers(projected)["a"].key
    assert any("rules about 1 tensors have no effect" in note for note in projected.plan.notes)


@pytest.mark.parametrize("chip", [ICRAFT, BUYI])
def test_both_modes_move_values_without_changing_them(
    chip: Target, made: tuple[FrozenModel, Planner], plan: QuantizationPlan, tmp_path: Path
) -> None:
    frozen, _ = made
    projected = chip.project(plan)
    x = normal(1, 3, 8, 8, seed=50)
    outputs = {}
    for mode in ("artifact-exact", "target-exact"):
        artifact = emit_qdq(frozen, projected, tmp_path / f"{mode}.onnx", mode=mode)
        outputs[mode] = run(scoring_session(artifact.path, EXECUTION), None, {"x": x})
    for name, one, other in zip(("y1", "y2", "y4"), *outputs.values(), strict=True):
        outs = [e.quantizer for la in projected.plan.layers for e in la.outputs if e.tensor == name]
        assert np.abs(outs[0].applied(one) - other).max() <= 3 * outs[0].scales[0]
    reasons = integer_graph(frozen, projected).in_float
    several = {n for n, why in reasons.items() if "several scales" in why}
    assert several == set()


def test_ratios_of_channels_go_into_the_weight(
    made: tuple[FrozenModel, Planner], plan: QuantizationPlan, tmp_path: Path
) -> None:
    """A convolution after a Concat, against whole numbers in NumPy."""
    frozen, _ = made
    projected = ICRAFT.project(plan)
    layer = next(la for la in projected.plan.layers if la.name == "after")
    source, result = layer.activations[0].quantizer, layer.outputs[0].quantizer
    assert source.axis == 1
    assert len(set(source.scales)) == 2
    weight = frozen.weights().read("w3")
    ratios = np.asarray(source.scales).reshape(-1, 1, 1)
    whole, values, shift = folded_weight(weight, layer, ratios, result.scales[0])
    normalized = weight * np.asarray(source.scales).reshape(-1, 1, 1) / result.scales[0]
    scales = values.reshape(-1, 1, 1, 1)
    assert np.abs(whole * scales - normalized).max() <= scales.max() * 1.01
    proto = frozen.proto()
    graph = integer_graph(frozen, projected).graph
    assert proto is not graph.proto
    graph.proto.graph.output.append(onnx.ValueInfoProto(name="c1"))
    written = write_model(graph, tmp_path / "seen.onnx")
    x = normal(1, 3, 8, 8, seed=50)
    y1, seen = run(scoring_session(written.path, EXECUTION), ["y1", "c1"], {"x": x})
    ratio = seen / np.asarray(source.scales, np.float32).reshape(-1, 1, 1)
    integers = round_integer(ratio.astype(np.float64), "half_away")
    integers = np.clip(integers, source.low, source.high).astype(np.int64)
    total = np.einsum("oc,nchw->nohw", whole[:, :, 0, 0].astype(np.int64), integers)
    m, n = fixed_point(values.astype(np.float32))
    shape = (-1, 1, 1) if values.size > 1 else ()
    cuts = (m.reshape(shape), n.reshape(shape), shift)
    stored = cut_product(total, None, cuts, (result.low, result.high))
    assert np.array_equal(y1, result.dequantize(stored.astype(np.int32)))
