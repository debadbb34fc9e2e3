"""What is said about ONNX Runtime's own kernels, and models of the two modes."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from rich.console import Console

from qdist.emit.deployment import artifact_notes, deployment_notes
from qdist.emit.qdq import MODE_KEY, emit_qdq
from qdist.evaluate.modes import compare_modes
from qdist.model.freeze import FrozenModel
from qdist.model.session import run, scoring_session
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import QuantizationPlan
from qdist.plan.planner import Planner
from qdist.report.modes import modes_table
from tests.onnx_models import (
    ANY_TARGET,
    EXECUTION,
    HeldSamples,
    frozen_from,
    model,
    normal,
    planner_for,
    samples_of,
    value,
)

OLD = ("avx", "avx2", "fma")


@pytest.fixture
def given(tmp_path: Path) -> tuple[FrozenModel, Planner, HeldSamples]:
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "first"),
            helper.make_node("Tanh", ["m"], ["t"], "tanh"),
            helper.make_node("MatMul", ["t", "w2"], ["y"], "second"),
        ],
        [value("x", ["n", 16])],
        [value("y", ["n", 5])],
        {"w": normal(16, 16), "w2": normal(16, 5, seed=2)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    source = samples_of("x", 16, n=20)
    return frozen, planner_for(frozen, source, tmp_path / "store"), source


def plan_of(planner: Planner, **settings: Any) -> QuantizationPlan:
    return planner.plan({layer.name: LayerChoice(**settings) for layer in planner.layers})


def test_processors_without_vnni_are_warned_about(
    given: tuple[FrozenModel, Planner, HeldSamples],
) -> None:
    plan = plan_of(given[1])
    (note,) = deployment_notes(plan, "x86_64", OLD)
    assert note.startswith("WARNING")
    assert "2 layers (first, second)" in note
    assert "weight_range_bits=7" in note
    assert deployment_notes(plan, "x86_64", (*OLD, "avx512_vnni")) == []
    assert deployment_notes(plan, "x86_64", (*OLD, "avx_vnni")) == []
    assert deployment_notes(plan, "aarch64", ("asimd",)) == []


def test_a_file_tells_the_same_as_its_plan(
    given: tuple[FrozenModel, Planner, HeldSamples], tmp_path: Path
) -> None:
    frozen, planner, _ = given
    every: list[dict[str, Any]] = [{}, {"granularity": "tensor"}, {"precision": "int16"}]
    every.append({"weight_range_bits": 7})
    for i, settings in enumerate(every):
        plan = ANY_TARGET.project(plan_of(planner, **settings))
        for external in (False, True):
            path = tmp_path / f"{i}{external}.onnx"
            emit_qdq(frozen, plan, path)
            if external:
                onnx.save(onnx.load(path), path, save_as_external_data=True, size_threshold=0)
            found = artifact_notes(path, "x86_64", OLD)
            assert found == deployment_notes(plan.plan, "x86_64", OLD)
            assert bool(found) == (i < 2)
            assert artifact_notes(path, "x86_64", (*OLD, "avx512_vnni")) == []


@pytest.mark.parametrize(
    "settings",
    [{"weight_range_bits": 7}, {"precision": "int16"}, {"precision": "bf16"}, {"precision": "w8"}],
)
def test_numbers_that_cannot_saturate_need_no_warning(
    settings: dict[str, Any], given: tuple[FrozenModel, Planner, HeldSamples]
) -> None:
    assert deployment_notes(plan_of(given[1], **settings), "x86_64", OLD) == []


def test_seven_bits_of_weight_fit_sixteen_bits_of_sum() -> None:
    """The rule behind the note: two products of a full unsigned activation."""
    assert 2 * 255 * 63 <= 2**15 - 1 < 2 * 255 * 127


def test_weights_in_blocks_are_computed_otherwise_by_default(
    given: tuple[FrozenModel, Planner, HeldSamples],
) -> None:
    plan = plan_of(given[1], precision="w4", granularity="block=16")
    (note,) = deployment_notes(plan, "x86_64", (*OLD, "avx512_vnni"))
    assert "qdq_matmulnbits_accuracy_level" in note


def test_a_target_exact_model_says_so_and_is_close(
    given: tuple[FrozenModel, Planner, HeldSamples], tmp_path: Path
) -> None:
    frozen, planner, source = given
    projected = ANY_TARGET.project(plan_of(planner))
    # Within the calibrated range: beyond it, only a chip's outputs saturate.
    x = np.stack([sample["x"] for sample in source.samples]) * np.float32(0.7)
    found = {}
    for mode in ("artifact-exact", "target-exact"):
        artifact = emit_qdq(frozen, projected, tmp_path / f"{mode}.onnx", mode=mode)
        assert artifact.mode == mode
        metadata = {e.key: e.value for e in onnx.load(artifact.path).metadata_props}
        assert metadata.get(MODE_KEY, "artifact-exact") == mode
        assert metadata["qdist.plan"] == projected.plan.digest
        (found[mode],) = run(scoring_session(artifact.path, EXECUTION), None, {"x": x})
    step = projected.plan.layers[-1].outputs[0].quantizer.scales[0]
    assert 0 < np.abs(found["artifact-exact"] - found["target-exact"]).max() < 6 * step
    with pytest.raises(ValueError, match="target-exact"):
        emit_qdq(frozen, projected, tmp_path / "x.onnx", mode="chip")

    report = compare_modes(frozen, projected, source, EXECUTION)
    assert [(row.name, row.scheme) for row in report.layers] == [
        ("first", "product"),
        ("tanh", None),
        ("second", "product"),
    ]
    assert report.n_integer == 2
    console = Console(width=100, record=True, file=StringIO())
    console.print(modes_table(report, 2))
    shown = console.export_text()
    assert "2 of 3 layers in whole numbers" in shown
    assert "our reading" in shown
    assert len(report.to_json()["layers"]) == 3
