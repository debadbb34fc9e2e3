"""What the threshold method ``auto`` knows of where a tensor's values end up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdist.plan.choice import LayerChoice
from qdist.plan.plan import QuantizationPlan
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.planner import Planner
from qdist.plan.quantizer import Quantizer
from qdist.stats.histogram import Density
from qdist.threshold.clip import Levels, scale_and_zero
from qdist.threshold.root import root_error
from tests.onnx_models import HeldSamples, frozen_from, model, normal, planner_for, value

SYMMETRIC = Levels(low=-127, high=127, symmetric=True)


def auto_plan(planner: Planner) -> QuantizationPlan:
    return planner.plan({layer.name: LayerChoice(saturation="auto") for layer in planner.layers})


def read_by(plan: QuantizationPlan, name: str) -> tuple[Quantizer, ...]:
    found = next(layer for layer in plan.layers if layer.name == name)
    return tuple(entry.quantizer for entry in found.activations)


def images(n: int = 8) -> HeldSamples:
    """Values of which few are large, so that methods differ."""
    rng = np.random.default_rng(7)
    shape = (n, 2, 8, 8)
    return HeldSamples(samples=[{"x": x} for x in rng.standard_t(3, shape).astype(np.float32)])


def pooled(middle: list[Any], constants: dict[str, Any]) -> Any:
    return model(
        [
            helper.make_node("Relu", ["x"], ["r"], name="relu"),
            *middle,
            helper.make_node("Conv", ["m", "w"], ["out"], name="conv"),
        ],
        [value("x", ["n", 2, 8, 8])],
        [value("out", ["n", 3, None, None])],
        {"w": normal(3, constants.pop("n_channels", 2), 1, 1, seed=1), **constants},
    )


POOL = helper.make_node("MaxPool", ["r"], ["m"], name="middle", kernel_shape=[2, 2], strides=[2, 2])
PADS = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)


@pytest.mark.parametrize(
    ("middle", "constants"),
    [
        ([POOL], {}),
        ([helper.make_node("Pad", ["r", "pads"], ["m"], name="middle")], {"pads": PADS}),
        (
            [
                helper.make_node("Sigmoid", ["x"], ["s"], name="gate"),
                helper.make_node("Concat", ["r", "s"], ["m"], name="middle", axis=1),
            ],
            {"n_channels": 4},
        ),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_handed_on_is_stored_in_the_steps_of_where_it_goes(
    middle: list[Any], constants: dict[str, Any], symmetric: bool, tmp_path: Path
) -> None:
    frozen = frozen_from(pooled(middle, dict(constants)), tmp_path / "model.onnx")
    settings = PlanSettings(symmetric=symmetric)
    planner = planner_for(frozen, images(), tmp_path / "store", settings)
    plan = auto_plan(planner)
    (last,) = read_by(plan, "conv")
    for quantizer in read_by(plan, "middle"):
        assert (quantizer.scales, quantizer.zero_points) == (last.scales, last.zero_points)
    # So the second rounding finds nothing to do.
    values = normal(64, seed=2) * 3
    once = last.applied(values)
    assert np.array_equal(last.applied(once), once)
    # Any other method judges each tensor by itself.
    plan = planner.plan({x.name: LayerChoice(saturation="mse") for x in planner.layers})
    if middle == [POOL]:
        assert read_by(plan, "middle")[0].scales != read_by(plan, "conv")[0].scales


def test_a_tensor_with_another_reader_keeps_its_own_range(tmp_path: Path) -> None:
    proto = pooled([POOL], {})
    proto.graph.node.append(helper.make_node("Sigmoid", ["r"], ["also"], name="other"))
    proto.graph.output.append(value("also", ["n", 2, 8, 8]))
    planner = planner_for(frozen_from(proto, tmp_path / "m.onnx"), images(), tmp_path / "store")
    plan = auto_plan(planner)
    assert read_by(plan, "middle") == read_by(plan, "other")
    assert read_by(plan, "middle")[0].scales != read_by(plan, "conv")[0].scales


def scores_model(factor: float) -> Any:
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node("Mul", ["a", "factor"], ["s"], name="scaled"),
            helper.make_node("Softmax", ["s"], ["out"], name="softmax"),
        ],
        [value("x", ["n", 6])],
        [value("out", ["n", 6])],
        {"w": np.eye(6, dtype=np.float32), "factor": np.array(factor, np.float32)},
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("factor", [0.5, -0.5])
def test_scores_keep_their_top(factor: float, symmetric: bool, tmp_path: Path) -> None:
    """The largest score decides a Softmax; scaled by a negative number it is the smallest."""
    rng = np.random.default_rng(3)
    rows = rng.laplace(size=(1000, 6)).astype(np.float32)
    rows[0, 0] = 40.0
    rows[1, 1] = -40.0
    source = HeldSamples(samples=[{"x": x} for x in rows])
    frozen = frozen_from(scores_model(factor), tmp_path / "model.onnx")
    settings = PlanSettings(symmetric=symmetric)
    planner = planner_for(frozen, source, tmp_path / "store", settings)
    plan = auto_plan(planner)
    (scores,), (unscaled,) = read_by(plan, "softmax"), read_by(plan, "scaled")
    assert scores.bounds[1] == pytest.approx(20.0)
    assert (unscaled.bounds[1] == pytest.approx(40.0)) == (factor > 0)
    # Scaled on purpose, they are scaled.
    for given in ({"th_scale": 0.5}, {"threshold": 3.0}):
        other = PlanSettings(symmetric=symmetric, saturation_parameters=given)
        scaled = Planner(planner.graph, planner.record, planner.taps, other)
        assert read_by(auto_plan(scaled), "softmax")[0].bounds[1] < 20.0


# --- square roots -------------------------------------------------------------------------------


def magnitude_model(*more: Any) -> Any:
    """The magnitude of pairs, as a spectrogram has it."""
    return model(
        [
            helper.make_node("Mul", ["x", "x"], ["a"], name="real"),
            helper.make_node("Mul", ["z", "z"], ["b"], name="imaginary"),
            helper.make_node("Add", ["a", "b"], ["s"], name="sum"),
            helper.make_node("Sqrt", ["s"], ["m"], name="root"),
            helper.make_node("MatMul", ["m", "w"], ["out"], name="layer"),
            *more,
        ],
        [value("x", ["n", 16]), value("z", ["n", 16])],
        [value("out", ["n", 5])],
        {"w": np.abs(normal(16, 5, seed=1))},
    )


def spectrum(n: int = 500) -> HeldSamples:
    """Many small values and few large ones."""
    rng = np.random.default_rng(7)
    x, z = (rng.standard_t(2.5, (n, 16)).astype(np.float32) for _ in "xz")
    return HeldSamples(samples=[{"x": a, "z": b} for a, b in zip(x, z, strict=True)])


@pytest.mark.parametrize("symmetric", [False, True])
def test_squares_count_by_their_root(symmetric: bool, tmp_path: Path) -> None:
    frozen = frozen_from(magnitude_model(), tmp_path / "model.onnx")
    settings = PlanSettings(symmetric=symmetric)
    planner = planner_for(frozen, spectrum(), tmp_path / "store", settings)
    by_square = planner.plan({x.name: LayerChoice(saturation="mse") for x in planner.layers})
    plan = auto_plan(planner)
    squares = np.concatenate([sample["x"] for sample in spectrum().samples]) ** 2

    def root_error(quantizer: Quantizer) -> float:
        return float(np.square(np.sqrt(quantizer.applied(squares)) - np.sqrt(squares)).mean())

    chosen, usual = read_by(plan, "sum")[0], read_by(by_square, "sum")[0]
    assert root_error(chosen) < 0.8 * root_error(usual)
    assert chosen.bounds[1] < usual.bounds[1]


@pytest.mark.parametrize(
    "more",
    [
        helper.make_node("Sigmoid", ["a"], ["also"], name="other"),
        helper.make_node("Sigmoid", ["s"], ["also"], name="other"),
    ],
)
def test_squares_that_others_read_as_they_are_count_as_they_are(more: Any, tmp_path: Path) -> None:
    proto = magnitude_model(more)
    proto.graph.output.append(value("also", ["n", 16]))
    planner = planner_for(frozen_from(proto, tmp_path / "m.onnx"), spectrum(), tmp_path / "store")
    plan = auto_plan(planner)
    by_square = planner.plan({x.name: LayerChoice(saturation="mse") for x in planner.layers})
    assert read_by(plan, "sum")[0].scales == read_by(by_square, "sum")[0].scales


@pytest.mark.parametrize("levels", [Levels(low=-128, high=127, symmetric=False), SYMMETRIC])
def test_the_error_of_a_root_is_the_mean_over_the_values(levels: Levels) -> None:
    rng = np.random.default_rng(11)
    edges = np.linspace(0.0, 9.0, 400)
    counts = rng.integers(1, 60, edges.size - 1).astype(np.float64)
    density = Density(lower=edges[:-1], upper=edges[1:], counts=counts)
    for high in (9.0, 4.0, 0.7):
        found = root_error(density, 0.0, high, levels)
        scale, zero = scale_and_zero(0.0, high, levels)
        x = (edges[:-1, None] + np.diff(edges)[:, None] * rng.random((edges.size - 1, 4000))).T
        stored = np.clip(np.rint(x / scale), levels.low - zero, levels.high - zero) * scale
        error = np.square(np.sqrt(stored) - np.sqrt(x)).mean(axis=0)
        expected = float(counts @ error / (counts @ x.mean(axis=0)))
        assert found == pytest.approx(expected, rel=0.03)
    nothing = Density(lower=np.zeros(1), upper=np.zeros(1), counts=np.ones(1))
    assert root_error(nothing, 0.0, 1.0, levels) == 0.0
