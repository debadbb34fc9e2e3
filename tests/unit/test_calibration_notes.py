"""Nothing silent: NaN, infinities, masks, experts and what was not measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper

from qdist.calibration import CalibrationSettings, Merged, calibrate_here, prepare
from qdist.errors import DataError
from qdist.model.graph import Graph
from qdist.plan.choice import LayerChoice
from qdist.plan.planner import Planner
from qdist.store.zarr_store import create_store
from tests.onnx_models import EXECUTION, Array, HeldSamples, floats, frozen_from, model, value
from tests.unit.test_taps_experts import N_EXPERTS, mixture, tokens_for

N = 6


def graph_of(
    nodes: list[NodeProto], folder: Path, constants: dict[str, Array] | None = None
) -> Graph:
    ends = [value("x", ["n", 4])], [value("y", None)]
    return Graph(frozen_from(model(nodes, *ends, constants), folder / "model.onnx"), EXECUTION)


def rows(*odd: tuple[int, float]) -> HeldSamples:
    """Ones, but for one number in some of the samples."""
    samples = np.ones((N, 4), np.float32)
    # No two alike: what repeats another sample counts once.
    samples[:, 1] += np.arange(N)
    for i, number in odd:
        samples[i, 2] = number
    return HeldSamples(samples=[{"x": row} for row in samples])


def calibrated(
    graph: Graph, source: HeldSamples, store: Path, on_nan: str = "error", taps: str = "all"
) -> Merged:
    settings = CalibrationSettings(micro_batch=2, shard_samples=2, on_nan=on_nan, taps=taps)
    job = prepare(graph.model, source, settings, EXECUTION, graph=graph)
    return calibrate_here(job, source, create_store(store, job.identity))


ROOT = [
    helper.make_node("Sqrt", ["x"], ["root"], "sqrt"),
    helper.make_node("Relu", ["root"], ["y"], "relu"),
]


def test_a_nan_stops_with_the_names_of_tensor_and_sample(tmp_path: Path) -> None:
    graph = graph_of(ROOT, tmp_path)
    with pytest.raises(DataError) as caught:
        calibrated(graph, rows((4, -1.0)), tmp_path / "s")
    assert caught.value.code == "QD309"
    assert "tensor root" in str(caught.value)
    assert "0004" in str(caught.value)


def test_reported_nans_are_counted_and_set_no_range(tmp_path: Path) -> None:
    graph = graph_of(ROOT, tmp_path)
    source = rows((1, -1.0), (4, -2.0))
    merged = calibrated(graph, source, tmp_path / "s", "report")
    histogram = merged.record.histogram("root")
    assert histogram.n_nan == 2
    assert (histogram.minimum, histogram.maximum) == (1.0, float(np.float32(np.sqrt(6))))
    assert "tensor root held 2 NaN, which count for nothing" in merged.notes
    # The store holds them now; whoever does not allow them is told, whatever is left to measure.
    with pytest.raises(DataError) as caught:
        calibrated(graph, source, tmp_path / "s", "error")
    assert caught.value.code == "QD309"
    assert "tensor root" in str(caught.value)
    again = calibrated(graph, source, tmp_path / "s", "report")
    assert again.record.digest == merged.record.digest
    assert again.notes == merged.notes


def test_taps_that_see_no_nan_are_not_stopped_by_one(tmp_path: Path) -> None:
    nodes = [
        *ROOT[:1],
        helper.make_node("MatMul", ["x", "w"], ["y"], "matmul"),
    ]
    graph = graph_of(nodes, tmp_path, {"w": np.eye(4, dtype=np.float32)})
    merged = calibrated(graph, rows((4, -1.0)), tmp_path / "s", taps="compute")
    assert merged.record.tensors == ("x", "y")


def test_infinities_are_reported_and_set_no_range(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"], "exp"),
        helper.make_node("MatMul", ["e", "w"], ["y"], "matmul"),
    ]
    # A zero weight would make NaN of an infinity.
    graph = graph_of(nodes, tmp_path, {"w": np.ones((4, 4), np.float32)})
    merged = calibrated(graph, rows((3, 1000.0)), tmp_path / "s")
    histogram = merged.record.histogram("e")
    assert histogram.n_infinite == 1
    assert histogram.maximum == pytest.approx(np.exp(6), rel=1e-5)
    assert "tensor e held 1 infinities" in merged.notes
    assert "tensor y held 4 infinities" in merged.notes


@pytest.mark.parametrize("low", [-np.inf, -3.4e38, -1e9, -1e4])
def test_masks_into_a_softmax_are_noted_and_set_no_range(low: float, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"], "matmul"),
        helper.make_node("Add", ["s", "mask"], ["m"], "mask"),
        helper.make_node("Softmax", ["m"], ["p"], "softmax"),
        helper.make_node("MatMul", ["p", "w"], ["y"], "mix"),
    ]
    mask = floats([0, 0, low, 0])
    graph = graph_of(nodes, tmp_path, {"w": np.eye(4, dtype=np.float32), "mask": mask})
    merged = calibrated(graph, rows(), tmp_path / "s")
    (note,) = (note for note in merged.notes if "mean masked" in note)
    assert note.startswith("1 tensors on the way into softmax")
    assert note.endswith(f"{N} in m")
    assert not any("infinities" in note for note in merged.notes)
    job = prepare(graph.model, rows(), CalibrationSettings(), EXECUTION, graph=graph)
    planner = Planner(graph, merged.record, job.taps)
    plan = planner.plan({layer.name: LayerChoice() for layer in planner.layers})
    for layer in plan.layers:
        for entry in layer.activations:
            assert max(entry.quantizer.scales) < 1


def test_experts_that_saw_little_are_named(tmp_path: Path) -> None:
    proto: ModelProto = mixture()
    graph = Graph(frozen_from(proto, tmp_path / "model.onnx"), EXECUTION)
    counts = [(20, 2, 0, 30), (20, 1, 0, 27)]
    source = HeldSamples(samples=[{"x": tokens_for(*each)[0]} for each in counts])
    settings = CalibrationSettings(micro_batch=1)
    job = prepare(graph.model, source, settings, EXECUTION, graph=graph)
    merged = calibrate_here(job, source, create_store(tmp_path / "s", job.identity))
    notes = [note for note in merged.notes if note.startswith("expert")]
    assert len(notes) == 2 < N_EXPERTS
    assert "expert1/fc1 and 1 more of its layers saw 3 tokens of 100" in notes[0]
    assert "expert2/fc1 and 1 more of its layers saw 0 tokens of 100" in notes[1]


def test_what_operators_compute_inside_is_named_as_not_measured(tmp_path: Path) -> None:
    weights: dict[str, Array] = {
        "w": np.full((1, 8, 4), 0.1, np.float32),
        "r": np.full((1, 8, 2), 0.1, np.float32),
        "axes": np.array([0], np.int64),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axes"], ["sequence"], "unsqueeze"),
        helper.make_node("LSTM", ["sequence", "w", "r"], ["", "y"], "lstm", hidden_size=2),
    ]
    graph = graph_of(nodes, tmp_path, weights)
    settings = CalibrationSettings(micro_batch=2)
    job = prepare(graph.model, rows(), settings, EXECUTION, graph=graph)
    assert list(job.taps.untapped) == ["lstm"]
    assert "LSTM" in job.taps.untapped["lstm"]
    merged = calibrate_here(job, rows(), create_store(tmp_path / "s", job.identity))
    assert merged.record.histogram("y").n_values > 0
