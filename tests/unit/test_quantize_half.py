"""Models of float16 and bfloat16, quantized: computed in float32, rounded where the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from qdist.emit.qdq import emit_qdq
from qdist.errors import ModelError
from qdist.evaluate.compare import compare_layers
from qdist.evaluate.modes import compare_modes
from qdist.model.freeze import FrozenModel
from qdist.model.session import run, scoring_session
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.plan.target import ProjectedPlan
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

KINDS: dict[str, tuple[int, Any]] = {
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "float32": (TensorProto.FLOAT, np.float32),
}


def network(name: str) -> ModelProto:
    """A float32 input, two matmuls with a bias and a ReLU in ``name``, and a float32 output."""
    element, kind = KINDS[name]
    return model(
        [
            helper.make_node("Cast", ["x"], ["h"], "narrow", to=element),
            helper.make_node("MatMul", ["h", "w"], ["m"], "first"),
            helper.make_node("Add", ["m", "bias"], ["a"], "bias"),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("MatMul", ["r", "w2"], ["o"], "second"),
            helper.make_node("Cast", ["o"], ["y"], "widen", to=TensorProto.FLOAT),
        ],
        [value("x", ["n", 24])],
        [value("y", ["n", 5])],
        {
            "w": normal(24, 16, seed=3).astype(kind),
            "bias": normal(16, seed=4).astype(kind),
            "w2": normal(16, 5, seed=5).astype(kind),
        },
    )


def planned(
    name: str, folder: Path, **settings: Any
) -> tuple[FrozenModel, ProjectedPlan, HeldSamples]:
    folder.mkdir(exist_ok=True)
    frozen = frozen_from(network(name), folder / "model.onnx")
    source = samples_of("x", 24, n=24)
    planner = planner_for(frozen, source, folder / "store")
    return frozen, projected_by(planner, **settings), source


def projected_by(planner: Planner, **settings: Any) -> ProjectedPlan:
    choice = LayerChoice(**settings)
    return ANY_TARGET.project(planner.plan({layer.name: choice for layer in planner.layers}))


def output_of(path: Path, x: Array) -> Array:
    (found,) = run(scoring_session(path, EXECUTION), None, {"x": x})
    return np.asarray(found)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "int8"},
        {"precision": "int16"},
        {"precision": "w4", "granularity": "block=8"},
        {"activation_granularity": "token"},
    ],
)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_half_precision_model_is_quantized_like_its_float32_twin(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    x = normal(9, 24, seed=8)
    outputs = {}
    for kind in (name, "float32"):
        frozen, plan, _ = planned(kind, tmp_path / kind, **settings)
        artifact = emit_qdq(frozen, plan, tmp_path / kind / "quantized.onnx")
        outputs[kind] = output_of(artifact.path, x)
        first = next(layer for layer in plan.plan.layers if layer.name == "first")
        assert first.weights
        assert first.activations or settings["precision"] == "w4"
        stored = {t.name: t.data_type for t in onnx.load(artifact.path).graph.initializer}
        assert not {"w", "w2"} & set(stored)
    step = {"float16": 2e-3, "bfloat16": 2e-2}[name]
    # Rounding to half precision moves few values across a boundary of the integers.
    off = np.abs(outputs[name] - outputs["float32"])
    top = np.abs(outputs["float32"]).max()
    assert np.median(off) <= 2 * step * top
    assert not np.array_equal(outputs[name], outputs["float32"])
    # What the last layer makes is of the model's own precision.
    kind_of = KINDS[name][1]
    assert np.array_equal(outputs[name], outputs[name].astype(kind_of).astype(np.float32))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_layers_of_half_precision_models_are_compared(name: str, tmp_path: Path) -> None:
    frozen, plan, source = planned(name, tmp_path / name)
    rows = {row.name: row for row in compare_layers(frozen, plan, source, EXECUTION)}
    assert set(rows) == {"first", "second"}
    assert all(row.alone.sqnr_db > 25 for row in rows.values())
    modes = compare_modes(frozen, plan, source, EXECUTION)
    # The first has its bias behind a rounding of the model.
    assert modes.n_integer == 2
    assert modes.outputs["y"].sqnr_db > 25


def test_inputs_and_outputs_of_half_precision_keep_their_type(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")],
        [value("x", ["n", 6], TensorProto.FLOAT16)],
        [value("y", ["n", 4], TensorProto.FLOAT16)],
        {"w": normal(6, 4).astype(np.float16)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    source = HeldSamples(samples=[{"x": row.astype(np.float16)} for row in normal(12, 6)])
    planner = planner_for(frozen, source, tmp_path / "store")
    artifact = emit_qdq(frozen, projected_by(planner), tmp_path / "quantized.onnx")
    x = (normal(12, 6) * 0.9).astype(np.float16)
    found = output_of(artifact.path, x)
    assert found.dtype == np.float16
    exact = x.astype(np.float32) @ normal(6, 4).astype(np.float16).astype(np.float32)
    assert 0 < np.abs(found - exact).max() < 0.1


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_what_is_of_half_precision_is_not_rounded_to_another(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{name} already") as caught:
        planned(name, tmp_path / name, precision="tf32")
    assert caught.value.code == "QD209"


def test_weights_of_half_precision_are_those_that_float32_holds(tmp_path: Path) -> None:
    """Same integers, same scales, whatever type the weight is stored in."""
    scales = []
    for kind in (np.float16, np.float32):
        weight = normal(6, 4).astype(np.float16).astype(kind)
        element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        proto = model(
            [helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")],
            [value("x", ["n", 6], element)],
            [value("y", ["n", 4], element)],
            {"w": weight},
        )
        frozen = frozen_from(proto, tmp_path / f"{np.dtype(kind).name}.onnx")
        source = HeldSamples(samples=[{"x": row.astype(kind)} for row in normal(12, 6)])
        planner = planner_for(frozen, source, tmp_path / f"store{np.dtype(kind).name}")
        (layer,) = projected_by(planner).plan.layers
        scales.append(layer.weights[0].quantizer)
    assert scales[0] == scales[1]
