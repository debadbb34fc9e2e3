"""From statistics and choices to a plan, on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.calibration import CalibrationSettings, calibrate_here, prepare
from qdist.errors import StoreError
from qdist.model.graph import Graph
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import LayerPlan, QuantizationPlan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.precision import activation_levels, weight_levels
from qdist.plan.weight_range import weight_quantizer
from qdist.store.zarr_store import ZarrStore
from qdist.threshold.clip import scale_and_zero
from qdist.threshold.registry import METHODS, find_threshold
from tests.onnx_models import (
    EXECUTION,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    samples_of,
    value,
)

WEIGHT = normal(6, 4, seed=3)
OTHER = normal(4, 4, seed=5)


def small_model() -> Any:
    """(x @ w + bias) -> Relu -> @ v * gain + mask -> Softmax * 2, where the mask holds a -1e9."""
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node("Add", ["a", "bias"], ["b"], name="bias"),
            helper.make_node("Relu", ["b"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "v"], ["s"], name="second"),
            helper.make_node("Mul", ["s", "gain"], ["g"], name="gained"),
            helper.make_node("Add", ["g", "mask"], ["t"], name="masking"),
            helper.make_node("Softmax", ["t"], ["p"], name="softmax"),
            helper.make_node("Mul", ["p", "two"], ["out"], name="scaled"),
        ],
        [value("x", ["n", 6])],
        [value("out", ["n", 4])],
        {
            "w": WEIGHT,
            "bias": normal(4, seed=4),
            "v": OTHER,
            "gain": normal(4, seed=6),
            "mask": np.array([0, 0, 0, -1e9], np.float32),
            "two": np.array(2, np.float32),
        },
    )


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    return planner_for(frozen, samples_of("x", 6, n=40), tmp_path / "store")


def plan_with(planner: Planner, **settings: str) -> QuantizationPlan:
    return planner.plan({layer.name: LayerChoice(**settings) for layer in planner.layers})


def layer(plan: QuantizationPlan, name: str) -> LayerPlan:
    return next(entry for entry in plan.layers if entry.name == name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int16", 16), ("w4a8", 8)])
def test_an_activation_gets_the_threshold_of_its_histogram(
    planner: Planner, method: str, precision: str, bits: int
) -> None:
    plan = plan_with(planner, saturation=method, precision=precision)
    found = layer(plan, "second").activations[0].quantizer
    levels = activation_levels(bits, symmetric=False)
    threshold = find_threshold(planner._record.histogram("r").finite, levels, method)
    scale, zero = scale_and_zero(threshold.low, threshold.high, levels)
    assert (found.scales, found.zero_points) == ((scale,), (zero,))
    assert found.bounds == (threshold.low, threshold.high)
    assert (found.clipped_share, found.expected_mse) == (
        threshold.clipped_share,
        threshold.expected_mse,
    )
    assert (found.bits, found.axis, found.method) == (bits, None, method)


@pytest.mark.parametrize(
    ("precision", "granularity", "weight_saturation", "expected"),
    [
        ("int8", "channel", "auto", (8, 1, "max")),
        ("int8", "tensor", "mse", (8, None, "mse")),
        ("w4a8", "channel", "auto", (4, 1, "mse")),
        ("w8a16", "tensor", "auto", (8, None, "max")),
    ],
)
def test_a_weight_gets_the_range_of_its_values(
    planner: Planner,
    precision: str,
    granularity: str,
    weight_saturation: str,
    expected: tuple[int, int | None, str],
) -> None:
    plan = plan_with(
        planner, precision=precision, granularity=granularity, weight_saturation=weight_saturation
    )
    bits, axis, method = expected
    (found,) = layer(plan, "first").weights
    assert (found.index, found.tensor) == (1, "w")
    assert found.quantizer == weight_quantizer(WEIGHT, weight_levels(bits), bits, axis, method)


def test_symmetric_settings_leave_no_zero_point(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    settings = PlanSettings(symmetric=True)
    planner = planner_for(frozen, samples_of("x", 6), tmp_path / "store", settings)
    found = [e.quantizer for entry in plan_with(planner).layers for e in entry.activations]
    assert found
    assert all(set(q.zero_points) == {0} for q in found)
    # An activation saturates where its type ends.
    assert {(q.low, q.high) for q in found} == {(-128, 127)}


def test_what_stays_float_says_why(planner: Planner) -> None:
    plan = plan_with(planner)
    reasons = {entry.name: entry.left_float for entry in plan.layers}
    assert reasons["first"] == {}
    assert reasons["bias"] == {"a": "computed with first", "bias": "computed with first"}
    assert reasons["relu"] == {"b": "computed with first"}
    assert reasons["softmax"] == {"t": "holds 40 values that mean masked, not magnitudes"}
    assert reasons["masking"] == {"mask": "holds values that mean masked, not magnitudes"}
    assert reasons["scaled"]["two"] == "a single number"
    floats = plan_with(planner, precision="float32")
    assert not any(entry.is_quantized for entry in floats.layers)
    assert layer(floats, "first").left_float == {
        "x": "precision float32",
        "w": "precision float32",
    }


def test_the_compute_scope_leaves_pointwise_layers_float(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    settings = PlanSettings(scope="compute")
    planner = planner_for(frozen, samples_of("x", 6), tmp_path / "store", settings)
    plan = plan_with(planner)
    assert [entry.name for entry in plan.layers if entry.is_quantized] == ["first", "second"]
    assert {entry.name for entry in planner.choosable()} == {"first", "second"}
    with pytest.raises(ValueError, match="scope"):
        Planner(planner.graph, planner._record, planner.taps, PlanSettings(scope="some"))


def test_a_tensor_that_was_not_measured_is_an_error(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    graph, source = Graph(frozen), samples_of("x", 6)
    job = prepare(frozen, source, CalibrationSettings(taps="compute"), EXECUTION, graph=graph)
    store = ZarrStore.create(tmp_path / "store", job.identity, job.taps)
    record = calibrate_here(job, source, store).record
    with pytest.raises(StoreError) as caught:
        plan_with(Planner(graph, record, job.taps))
    assert caught.value.code == "QD406"
    assert caught.value.where.startswith("tensor ")
    assert plan_with(Planner(graph, record, job.taps, PlanSettings(scope="compute")))


def test_one_plan_after_another_is_the_same(planner: Planner) -> None:
    first = plan_with(planner)
    plan_with(planner, precision="w4a16", saturation="max", granularity="tensor")
    assert plan_with(planner) == first
    fresh = Planner(planner.graph, planner._record, planner.taps)
    assert plan_with(fresh).digest == first.digest
    assert first.statistics_digest == planner._record.digest
    assert first.model_digest == planner.graph.model.digest


def test_a_constant_zero_activation_gets_a_quantizer_that_keeps_it(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    source = HeldSamples(samples=[{"x": np.zeros(6, np.float32)}])
    planner = planner_for(frozen, source, tmp_path / "store")
    found = layer(plan_with(planner), "first").activations[0].quantizer
    zeros = np.zeros(5, np.float32)
    assert found.scales == (1.0,)
    assert np.array_equal(found.dequantize(found.quantize(zeros)), zeros)


def test_weight_elements_are_counted(planner: Planner) -> None:
    counts = {entry.name: planner.weight_elements(entry) for entry in planner.layers}
    assert counts["first"] == WEIGHT.size
    assert counts["relu"] == 0
