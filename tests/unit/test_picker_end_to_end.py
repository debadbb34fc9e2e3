"""Layers switched one by one, and the picker that goes by what each does to the outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from qdist.data.shards import stack
from qdist.emit.qdq import emit_qdq
from qdist.emit.writer import write_model
from qdist.model.session import run, scoring_session
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.plan.target import ProjectedPlan
from qdist.search.pickers.end_to_end import end_to_end, output_errors
from qdist.search.pickers.picking import PickSettings
from qdist.simulate.switched import switched_graph
from qdist.simulate.twins import only
from tests.onnx_models import (
    ANY_TARGET,
    EXECUTION,
    Array,
    frozen_from,
    model,
    normal,
    planner_for,
    samples_of,
    value,
)

SOURCE = samples_of("x", 6, n=12)
FEEDS = stack(SOURCE.samples)


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """A residual sum, a branch that hardly counts, and a layer that reads one tensor twice."""
    folder = tmp_path_factory.mktemp("switched")
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "v"], ["b"], name="second"),
            helper.make_node("MatMul", ["x", "tiny"], ["c"], name="faint"),
            helper.make_node("Add", ["b", "c"], ["d"], name="sum"),
            helper.make_node("Mul", ["d", "d"], ["e"], name="square"),
            helper.make_node("Add", ["e", "x"], ["out"], name="residual"),
        ],
        [value("x", ["n", 6])],
        [value("out", ["n", 6])],
        {
            "w": normal(6, 6, seed=1),
            "v": normal(6, 6, seed=2),
            "tiny": normal(6, 6, seed=3) * np.float32(1e-4),
        },
    )
    frozen = frozen_from(proto, folder / "model.onnx")
    return planner_for(frozen, SOURCE, folder / "store")


def projected(planner: Planner, precision: str = "int8") -> ProjectedPlan:
    choice = LayerChoice(precision=precision)
    return ANY_TARGET.project(planner.plan({x.name: choice for x in planner.layers}))


def emitted(planner: Planner, plan: ProjectedPlan, path: Path) -> Array:
    emit_qdq(planner.graph.model, plan, path)
    return run(scoring_session(path, EXECUTION), ["out"], FEEDS)[0]


@pytest.mark.parametrize("precision", ["int8", "w8a16", "w4a8"])
def test_switches_make_the_very_model_that_would_be_emitted(
    planner: Planner, precision: str, tmp_path: Path
) -> None:
    plan = projected(planner, precision)
    switched = switched_graph(planner.graph.model, plan)
    path = write_model(switched.graph, tmp_path / "switched.onnx").path
    session = scoring_session(path, EXECUTION)
    layers = set(switched.switches)
    assert layers == {x.name for x in plan.plan.layers if x.is_quantized}
    for on in (set(), layers, {"sum"}, {"square", "faint"}):
        switches = {name: np.array(layer in on) for layer, name in switched.switches.items()}
        found = run(session, ["out"], {**FEEDS, **switches})[0]
        assert np.array_equal(found, emitted(planner, only(plan, on), tmp_path / "model.onnx"))


def test_errors_are_those_of_the_outputs(planner: Planner, tmp_path: Path) -> None:
    plan = projected(planner)
    errors = output_errors(planner.graph.model, plan, SOURCE, EXECUTION, batch=5)
    exact = emitted(planner, only(plan, set()), tmp_path / "float.onnx").astype(np.float64)
    for name, error in errors.items():
        found = emitted(planner, only(plan, {name}), tmp_path / "one.onnx")
        expected = np.square(found - exact).sum() / np.square(exact).sum()
        assert error == pytest.approx(expected, rel=1e-6), name
    assert min(errors, key=lambda name: errors[name]) == "faint"


def test_nothing_quantized_has_no_errors(planner: Planner) -> None:
    plan = only(projected(planner), set())
    assert output_errors(planner.graph.model, plan, SOURCE, EXECUTION) == {}


def test_the_largest_share_or_all_above_a_threshold_are_raised() -> None:
    errors = {"a": 0.1, "b": 0.4, "c": 0.0, "d": 0.2, "e": float("inf")}
    assert end_to_end(errors, PickSettings(high="int16")).raised == {"e"}
    assert end_to_end(errors, PickSettings(high="int16", low_share=0.4)).raised == {"e", "b", "d"}
    found = end_to_end(errors, PickSettings(high="int16", threshold=0.15))
    assert found.raised == {"e", "b", "d"}
    assert found.why["b"] == "moves the outputs by 0.4 of their energy"
