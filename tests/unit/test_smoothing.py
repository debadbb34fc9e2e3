"""SmoothQuant by powers of two: which tensors, which factors, and that nothing else changes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdist.calibration import CalibrationJob, CalibrationSettings, calibrate_here, prepare
from qdist.calibration.blockwise import block_records
from qdist.calibration.here import statistics_here
from qdist.calibration.smoothed import (
    channels_job,
    channels_location,
    joined,
    joined_blocks,
    on_batches,
    smoothed_job,
    smoothed_location,
    smoothed_rows,
    stored_channels,
    stored_rows,
)
from qdist.emit.qdq import emit_qdq
from qdist.errors import ModelError, PlanError, StoreError
from qdist.model.difference import rewriting_difference
from qdist.model.freeze import FrozenModel
from qdist.model.graph import Graph
from qdist.model.session import measuring_session, run, scoring_session
from qdist.model.smooth_points import find_points
from qdist.model.smoothed import smoothed_model
from qdist.model.smoothing import Smoothing
from qdist.model.taps import tapped_graph
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import load_plan
from qdist.plan.planner import Planner, PlanSettings
from qdist.plan.resolved import resolved_digest
from qdist.plan.smoothing import find_smoothing, lacking_channels
from qdist.search.applied import planner_with
from qdist.search.statistics import CandidateStatistics
from qdist.search.trial import Settings
from qdist.stats.record import CalibrationRecord
from qdist.store.zarr_store import ZarrStore, create_store, open_store
from tests.onnx_models import (
    ANY_TARGET,
    EXECUTION,
    HeldSamples,
    floats,
    frozen_from,
    integers,
    model,
    normal,
    samples_of,
    value,
)

WIDTH, TOKENS, HIDDEN = 16, 6, 24
OUTLIERS = (3, 11)
SMOOTHED = {
    "n1": WIDTH,
    "n2_sum": WIDTH,
    "hidden": HIDDEN,
    "n3_scaled": WIDTH,
    "gated": HIDDEN,
    "n4": WIDTH,
}
"""The tensors of `transformer` that can be smoothed, with their channels."""


def gamma(seed: int, outlier: float = 60.0) -> NDArray[np.float32]:
    """Scales of a normalization, two of them far larger than the others."""
    found = 1 + 0.1 * normal(WIDTH, seed=seed)
    found[list(OUTLIERS)] *= outlier
    return found.astype(np.float32)


def linear(rows: int, columns: int, seed: int, gains: Any = None) -> NDArray[np.float32]:
    """Weights whose rows undo the scales that their input has."""
    found = normal(rows, columns, seed=seed) / np.sqrt(rows)
    return (found if gains is None else found / gains[:, None]).astype(np.float32)


def transformer(opset: int = 17) -> onnx.ModelProto:
    """Attention after a LayerNormalization, an MLP with ReLU after one written out, a gated MLP
    after an RMS norm written out, and a head; residuals around each."""
    g1, g2, g3, g4 = (gamma(seed) for seed in (1, 2, 3, 4))
    uneven = np.exp2(np.arange(HIDDEN) % 5).astype(np.float32)
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "g1", "b1"], ["n1"], "ln1"),
        *(node("MatMul", ["n1", f"w{c}"], [f"{c}"], f"mm_{c}") for c in "qkv"),
        node("Transpose", ["k"], ["kt"], "turn", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"], "scores_mm"),
        node("Softmax", ["scores"], ["weights"], "softmax", axis=-1),
        node("MatMul", ["weights", "v"], ["context"], "context_mm"),
        node("MatMul", ["context", "wo"], ["attended"], "mm_o"),
        node("Add", ["x", "attended"], ["x1"], "residual1"),
        # A LayerNorm, written out.
        node("ReduceMean", ["x1"], ["mean"], "mean", axes=[-1]),
        node("Sub", ["x1", "mean"], ["centred"], "centre"),
        node("Mul", ["centred", "centred"], ["square"], "square"),
        node("ReduceMean", ["square"], ["variance"], "variance", axes=[-1]),
        node("Add", ["variance", "epsilon"], ["safe"], "safe"),
        node("Sqrt", ["safe"], ["deviation"], "deviation"),
        node("Div", ["centred", "deviation"], ["unit"], "unit"),
        node("Mul", ["unit", "g2"], ["n2"], "n2_scale"),
        node("Add", ["n2", "b2"], ["n2_sum"], "n2_shift"),
        node("Reshape", ["n2_sum", "flat"], ["rows"], "flatten"),
        node("Gemm", ["rows", "w1", "c1"], ["wide"], "fc1", transB=1),
        node("Relu", ["wide"], ["hidden"], "relu"),
        node("Gemm", ["hidden", "w2"], ["narrow"], "fc2"),
        node("Reshape", ["narrow", "tokens"], ["mlp"], "unflatten"),
        node("Add", ["x1", "mlp"], ["x2"], "residual2"),
        # An RMS norm, written out, and a gated MLP.
        node("Mul", ["x2", "x2"], ["square3"], "square3"),
        node("ReduceMean", ["square3"], ["power"], "power", axes=[-1]),
        node("Add", ["power", "epsilon"], ["safe3"], "safe3"),
        node("Sqrt", ["safe3"], ["root"], "root"),
        node("Div", ["x2", "root"], ["unit3"], "unit3"),
        node("Mul", ["g3", "unit3"], ["n3_scaled"], "n3_scale"),
        node("MatMul", ["n3_scaled", "wg"], ["gate"], "mm_gate"),
        node("Sigmoid", ["gate"], ["open"], "sigmoid"),
        node("Mul", ["gate", "open"], ["silu"], "silu"),
        node("MatMul", ["n3_scaled", "wu"], ["up"], "mm_up"),
        node("Mul", ["silu", "up"], ["gated"], "gating"),
        node("MatMul", ["gated", "wd"], ["down"], "mm_down"),
        node("Add", ["x2", "down"], ["x3"], "residual3"),
        node("LayerNormalization", ["x3", "g4", "b4"], ["n4"], "ln4"),
        node("MatMul", ["n4", "wh"], ["logits"], "head"),
    ]
    constants: dict[str, Any] = {
        "g1": g1,
        "b1": 0.1 * normal(WIDTH, seed=21),
        "g2": g2,
        "b2": 0.1 * normal(WIDTH, seed=22),
        "g3": g3,
        "g4": g4,
        "b4": 0.1 * normal(WIDTH, seed=23),
        **{f"w{c}": linear(WIDTH, WIDTH, 30 + i, g1) for i, c in enumerate("qkv")},
        "wo": linear(WIDTH, WIDTH, 34),
        "w1": np.ascontiguousarray((linear(WIDTH, HIDDEN, 35, g2) * uneven).T),
        "c1": 0.1 * normal(HIDDEN, seed=24),
        "w2": linear(HIDDEN, WIDTH, 36, uneven),
        "wg": linear(WIDTH, HIDDEN, 37, g3),
        "wu": linear(WIDTH, HIDDEN, 38, g3) * uneven,
        "wd": linear(HIDDEN, WIDTH, 39, uneven),
        "wh": linear(WIDTH, 8, 40, g4),
        "epsilon": floats(1e-5),
        "flat": integers([-1, WIDTH]),
        "tokens": integers([-1, TOKENS, WIDTH]),
    }
    return model(
        nodes,
        [value("x", ["n", TOKENS, WIDTH])],
        [value("logits", ["n", TOKENS, 8])],
        constants,
        opset=opset,
    )


class Measured:
    """A calibrated model in a folder."""

    def __init__(self, proto: onnx.ModelProto, folder: Path, source: Any, **settings: Any) -> None:
        self.frozen = frozen_from(proto, folder / "model.onnx")
        self.graph = Graph(self.frozen)
        self.source = source
        how = CalibrationSettings(**settings)
        self.job = prepare(self.frozen, source, how, EXECUTION, graph=self.graph)
        self.store = create_store(folder / "store", self.job.identity)
        self.record = calibrate_here(self.job, source, self.store).record

    def smoothing(self, alpha: float = 0.5) -> Smoothing:
        return find_smoothing(self.graph, self.record, self.job.taps, alpha).smoothing

    def smoothed(self, smoothing: Smoothing) -> tuple[FrozenModel, CalibrationJob, ZarrStore]:
        frozen = smoothed_model(self.graph, smoothing)
        rows = smoothed_rows(self.graph, self.job.taps, smoothing)
        job = smoothed_job(self.job, Graph(frozen), rows)
        place = smoothed_location(self.store.location, frozen)
        return frozen, job, create_store(place, job.identity)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    source = samples_of("x", TOKENS, WIDTH, n=12)
    return Measured(transformer(), tmp_path_factory.mktemp("smooth"), source, shard_samples=4)


def outputs(frozen: FrozenModel, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    session = measuring_session(frozen.graph_bytes, frozen.data_folder, EXECUTION)
    return run(session, [output.name for output in frozen.proto().graph.output], feeds)


def batch(source: HeldSamples) -> dict[str, NDArray[Any]]:
    return {"x": np.stack([sample["x"] for sample in source.samples])}


def test_the_tensors_that_can_be_smoothed_and_why_others_cannot(measured: Measured) -> None:
    found = find_points(measured.graph)
    assert {point.tensor: point.n_channels for point in found.points} == SMOOTHED
    assert found.left == {"context": "MatMul of activations makes it"}
    by_name = {point.tensor: point for point in found.points}
    assert [fold.node for fold in by_name["n1"].weights] == ["mm_q", "mm_k", "mm_v"]
    assert set(by_name["n2_sum"].changed) == {"n2_sum", "n2", "rows"}
    assert set(by_name["hidden"].changed) == {"hidden", "wide"}
    assert set(by_name["gated"].changed) == {"gated", "up"}
    assert {(f.node, f.index, f.axis) for f in by_name["hidden"].makers} == {
        ("fc1", 1, 0),
        ("fc1", 2, 0),
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_factors_are_the_formula_rounded_to_powers_of_two(measured: Measured, alpha: float) -> None:
    found = measured.smoothing(alpha)
    channels = measured.record.channels("n1")
    assert channels is not None
    weights = [measured.graph.weights.read(f"w{c}") for c in "qkv"]
    weight = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
    factor = channels.magnitude**alpha / weight ** (1 - alpha)
    exact = np.log2(factor / np.exp(np.log(factor).mean()))
    assert np.abs(found.of("n1") - exact).max() <= 0.5001
    assert (found.of("n1")[list(OUTLIERS)] > np.delete(found.of("n1"), OUTLIERS).max()).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_outputs_keep_their_bits(measured: Measured, alpha: float) -> None:
    frozen, _, _ = measured.smoothed(measured.smoothing(alpha))
    assert frozen.digest != measured.frozen.digest
    feeds = batch(measured.source)
    (before,), (after,) = outputs(measured.frozen, feeds), outputs(frozen, feeds)
    assert np.array_equal(before, after)
    assert np.ptp(before) > 0.1
    assert rewriting_difference(measured.frozen, frozen, feeds, EXECUTION) == 0.0
    onnx.checker.check_model(frozen.proto(), full_check=True)


def test_a_model_that_computes_something_else_is_refused(measured: Measured) -> None:
    smoothing = measured.smoothing()
    frozen, _, _ = measured.smoothed(smoothing)
    proto = frozen.proto()
    (g1,) = [tensor for tensor in proto.graph.initializer if tensor.name == "g1"]
    g1.raw_data = onnx.numpy_helper.from_array(measured.graph.weights.read("g1")).raw_data
    wrong = replace(frozen, graph_bytes=proto.SerializeToString())
    with pytest.raises(ModelError, match="QD207"):
        rewriting_difference(measured.frozen, wrong, batch(measured.source), EXECUTION)


def test_the_joined_record_is_that_of_the_smoothed_model(measured: Measured) -> None:
    """Rows that were not measured again are those of the smoothed model, to the last bit."""
    smoothing = measured.smoothing(0.4)
    frozen, job, store = measured.smoothed(smoothing)
    part = calibrate_here(job, measured.source, store).record
    assert set(part.tensors) == {"n1", "n2", "n2_sum", "wide", "hidden"} | {
        "n3_scaled",
        "up",
        "gated",
        "n4",
    }
    whole_job = prepare(frozen, measured.source, measured.job.settings, EXECUTION)
    place = Path(measured.store.location).with_name("whole")
    whole = calibrate_here(
        whole_job, measured.source, create_store(place, whole_job.identity)
    ).record
    found = joined(measured.record, part)
    assert found.tensors == whole.tensors
    assert found.digest == whole.digest != measured.record.digest
    # What was measured again was divided by the factors.
    for tensor in ("n1", "hidden", "gated"):
        before, after = measured.record.channels(tensor), found.channels(tensor)
        assert before is not None
        assert after is not None
        assert np.array_equal(np.ldexp(before.maximum, -smoothing.of(tensor)), after.maximum)


def test_rows_for_candidates_are_measured_in_parts_by_any_process(tmp_path: Path) -> None:
    source = samples_of("x", TOKENS, WIDTH, n=12)
    own = Measured(transformer(), tmp_path, source, shard_samples=2, micro_batch=2)
    statistics = CandidateStatistics(
        job=own.job,
        source=source,
        location=own.store.location,
        batches=own.store.latest().batches,
        record=own.record,
    )
    settings: Settings = {"smoothing": 0.4, "n_samples": 10}
    assert statistics.n_parts(settings, 3) == 3
    assert statistics.n_parts(settings, 64) == 5
    for part in (2, 0, 1):
        other = pickle.loads(pickle.dumps(statistics))
        other.measure(settings, part, 3)
    store = statistics.smoothed(0.4).store
    n_receipts = len(store.receipts())
    assert n_receipts >= 5
    record = statistics(settings)
    # All was there, and is what a model of its own has.
    assert len(store.receipts()) == n_receipts
    frozen, _, _ = own.smoothed(own.smoothing(0.4))
    first = replace(source, samples=source.samples[:10])
    alone = prepare(frozen, first, own.job.settings, EXECUTION)
    place = tmp_path / "alone"
    expected = calibrate_here(alone, first, create_store(place, alone.identity)).record
    assert record.digest == expected.digest
    assert statistics({"smoothing": 0.4}).n_samples == 12


def test_stored_rows_are_found_again_and_missing_ones_are_named(
    tmp_path: Path,
) -> None:
    source = samples_of("x", TOKENS, WIDTH, n=8)
    own = Measured(transformer(), tmp_path, source, shard_samples=4, n_blocks=2)
    smoothing = own.smoothing(0.7)
    frozen = smoothed_model(own.graph, smoothing)
    rows = smoothed_rows(own.graph, own.job.taps, smoothing)
    merge = own.store.latest()
    with pytest.raises(StoreError, match="QD402") as info:
        stored_rows(own.store.location, frozen, merge, rows)
    assert "calibration.smoothing=0.7" in info.value.mend
    _, job, store = own.smoothed(smoothing)
    part = calibrate_here(on_batches(job, merge.batches), source, store).record
    before = block_records(own.store, merge.name)
    again, found = stored_rows(own.store.location, frozen, merge, rows)
    assert found.record.digest == part.digest
    blocks = joined_blocks(before, again, found)
    assert blocks[0].merge(blocks[1]).digest == joined(own.record, part).digest
    # A store for the model as it is stays one, and another strength has its own.
    assert open_store(own.store.location).latest().record.digest == own.record.digest
    other = smoothed_model(own.graph, own.smoothing(0.2))
    with pytest.raises(StoreError, match="QD402"):
        stored_rows(own.store.location, other, merge, rows)


def test_fewer_samples_and_a_part_of_the_grid(measured: Measured) -> None:
    smoothing = measured.smoothing(0.6)
    _, job, store = measured.smoothed(smoothing)
    base = statistics_here(measured.job, measured.source, measured.store, 4).record
    part = statistics_here(job, measured.source, store, 4).record
    assert joined(base, part).n_samples == 4
    first = [batch.ids for batch in job.grid[:2]]
    assert on_batches(job, first).n_samples == 8
    with pytest.raises(ValueError, match="another job"):
        on_batches(job, [("x",)])
    with pytest.raises(ValueError, match="numbers of samples"):
        joined(measured.record, part)


def sqnr_db(planner: Planner, folder: Path, feeds: dict[str, NDArray[Any]]) -> float:
    """Of the emitted model's outputs against the float model's."""
    choices = {layer.name: LayerChoice(precision="int8") for layer in planner.layers}
    plan = ANY_TARGET.project(planner.plan(choices))
    artifact = emit_qdq(planner.graph.model, plan, folder / "model.onnx")
    (found,) = run(scoring_session(artifact.path, EXECUTION), ["logits"], feeds)
    (wanted,) = outputs(planner.graph.model, feeds)
    noise = np.square(found.astype(np.float64) - wanted).sum()
    return float(10 * np.log10(np.square(wanted.astype(np.float64)).sum() / noise))


def statistics_of(own: Measured, smoothing: Smoothing) -> CalibrationRecord:
    _, job, store = own.smoothed(smoothing)
    return joined(own.record, calibrate_here(job, own.source, store).record)


@pytest.mark.parametrize("symmetric", [False, True])
def test_planted_outliers_cost_less_when_smoothed(
    measured: Measured, tmp_path: Path, symmetric: bool
) -> None:
    settings = PlanSettings(symmetric=symmetric, scope="compute")
    plain = Planner(measured.graph, measured.record, measured.job.taps, settings)
    feeds = batch(samples_of("x", TOKENS, WIDTH, n=16, seed=9))

    def statistics(own: Any) -> CalibrationRecord:
        return statistics_of(measured, measured.smoothing(own["smoothing"]))

    smoothed = planner_with(plain, {"smoothing": 0.5}, statistics)
    before = sqnr_db(plain, tmp_path / "plain", feeds)
    after = sqnr_db(smoothed, tmp_path / "smoothed", feeds)
    assert after > before + 6


def test_a_plan_says_what_was_smoothed_and_rebuilds_it(measured: Measured, tmp_path: Path) -> None:
    smoothing = measured.smoothing(0.5)
    plain = Planner(measured.graph, measured.record, measured.job.taps)
    planner = planner_with(
        plain, {"smoothing": 0.5}, lambda own: statistics_of(measured, smoothing)
    )
    choices = {layer.name: LayerChoice() for layer in planner.layers}
    plan = planner.plan(choices)
    path = plan.save(tmp_path / "plan.json")
    again = load_plan(path, planner.graph.model.digest)
    assert again == plan
    assert again.digest == plan.digest
    assert again.smoothing is not None
    assert smoothed_model(measured.graph, again.smoothing) == planner.graph.model
    assert any("smoothed with alpha 0.5" in note for note in plan.notes)
    # A plan without smoothing says nothing of it, and is another one.
    other = plain.plan(choices)
    assert "smoothing" not in other.to_json()
    assert resolved_digest(other) != resolved_digest(plan)
    with pytest.raises(PlanError, match="QD505"):
        load_plan(path, measured.frozen.digest)
    text = path.read_text().replace('"digest": "', '"digest": "0', 1)
    path.write_text(text)
    with pytest.raises(PlanError, match="QD504"):
        load_plan(path)


def test_factors_of_another_model_are_refused(measured: Measured) -> None:
    for exponents in ({"context": (1,) * WIDTH}, {"n1": (1, 2)}):
        with pytest.raises(ModelError, match="QD212"):
            smoothed_model(measured.graph, Smoothing(alpha=0.5, exponents=exponents))


def two_layers(*extra: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **constants: Any) -> Any:
    """A normalization and a linear layer, with more around them."""
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "g"], ["n"], "ln"),
        node("MatMul", ["n", "w"], ["y"], "mm"),
        *extra,
    ]
    constants = {"g": gamma(5), "w": linear(WIDTH, 4, 50), **constants}
    shapes: dict[str, list[int | str | None]] = {"y": ["n", TOKENS, 4]}
    return model(
        nodes,
        [value("x", ["n", TOKENS, WIDTH])],
        [value(name, shapes.get(name, ["n", TOKENS, WIDTH])) for name in outputs],
        constants,
        opset=17,
    )


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (two_layers(outputs=("y", "n")), "it is an output of the model"),
        (
            two_layers(helper.make_node("Add", ["n", "x"], ["z"], "add"), outputs=("y", "z")),
            "Add reads it too",
        ),
    ],
)
def test_readers_that_could_not_undo_the_factors(
    proto: onnx.ModelProto, reason: str, tmp_path: Path
) -> None:
    found = find_points(Graph(frozen_from(proto, tmp_path / "m.onnx")))
    assert not found.points
    assert found.left == {"n": reason}


def test_what_asks_for_the_shape_alone_may_read_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["n"], ["s"], "shape"),
        helper.make_node("Expand", ["one", "s"], ["z"], "expand"),
    ]
    proto = two_layers(*nodes, outputs=("y", "z"), one=floats([1.0]))
    found = find_points(Graph(frozen_from(proto, tmp_path / "m.onnx")))
    assert [point.tensor for point in found.points] == ["n"]


def test_constants_that_others_read_are_copied(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "g"], ["z"], "scale"),
        helper.make_node("MatMul", ["x", "w"], ["u"], "tied"),
    ]
    proto = two_layers(*nodes, outputs=("y", "z"))
    proto.graph.output.append(value("u", ["n", TOKENS, 4]))
    source = samples_of("x", TOKENS, WIDTH)
    own = Measured(proto, tmp_path, source)
    frozen, _, _ = own.smoothed(own.smoothing())
    names = {tensor.name for tensor in frozen.proto().graph.initializer}
    assert names == {"g", "w", "g.smoothed_0", "w.smoothed_0"}
    for before, after in zip(
        outputs(own.frozen, batch(source)), outputs(frozen, batch(source)), strict=True
    ):
        assert np.array_equal(before, after)


def test_channels_along_another_axis_of_a_batch_normalization(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["t"], "before", perm=[0, 2, 1]),
        node("BatchNormalization", ["t", "g", "b", "m", "v"], ["n"], "bn"),
        node("Transpose", ["n"], ["tokens"], "after", perm=[0, 2, 1]),
        node("MatMul", ["tokens", "w"], ["y"], "mm"),
    ]
    constants = {
        "g": gamma(6),
        "b": normal(WIDTH, seed=7),
        "m": normal(WIDTH, seed=8),
        "v": floats(np.full(WIDTH, 1.5)),
        "w": linear(WIDTH, 4, 51),
    }
    proto = model(
        nodes,
        [value("x", ["n", TOKENS, WIDTH])],
        [value("y", ["n", TOKENS, 4])],
        constants,
        opset=15,
    )
    source = samples_of("x", TOKENS, WIDTH)
    own = Measured(proto, tmp_path, source)
    (point,) = find_points(own.graph).points
    assert (point.tensor, point.axis) == ("n", 1)
    frozen, _, _ = own.smoothed(own.smoothing())
    assert np.array_equal(outputs(own.frozen, batch(source))[0], outputs(frozen, batch(source))[0])


def test_channels_that_the_statistics_lack_are_measured(tmp_path: Path) -> None:
    """Four axes count as an image's, whose channels are the second; these lie along the last."""
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "g"], ["n"], "ln"),
        node("MatMul", ["n", "w"], ["y"], "mm"),
    ]
    proto = model(
        nodes,
        [value("x", ["n", 2, TOKENS, WIDTH])],
        [value("y", ["n", 2, TOKENS, 4])],
        {"g": gamma(5), "w": linear(WIDTH, 4, 50)},
        opset=17,
    )
    source = samples_of("x", 2, TOKENS, WIDTH, n=6)
    own = Measured(proto, tmp_path, source)
    with pytest.raises(ModelError, match="another axis"):
        own.smoothing()
    axes = lacking_channels(own.graph, own.record)
    assert axes == {"n": 3}
    merge = own.store.latest()
    assert stored_channels(own.store.location, merge, axes) is merge.record
    job = channels_job(own.job, axes)
    store = create_store(channels_location(own.store.location), job.identity)
    calibrate_here(job, source, store)
    factors = stored_channels(own.store.location, merge, axes)
    assert factors.histogram("n").counts.tolist() == own.record.histogram("n").counts.tolist()
    channels = factors.channels("n")
    assert channels is not None
    (values,) = run(
        measuring_session(tapped_graph(own.graph, job.taps), tmp_path, EXECUTION),
        ["n"],
        batch(source),
    )
    assert np.array_equal(channels.magnitude, np.abs(values).max(axis=(0, 1, 2)))
    found = find_smoothing(own.graph, factors, own.job.taps, 0.5)
    frozen = smoothed_model(own.graph, found.smoothing)
    before, after = outputs(own.frozen, batch(source)), outputs(frozen, batch(source))
    assert np.array_equal(before[0], after[0])


def test_numbers_stay_normal(tmp_path: Path) -> None:
    """Weights at the end of float32's range, and channels that are never used."""
    weight = linear(WIDTH, 4, 52)
    weight[0] *= 2.0**-120
    weight[1] = 0
    weight[2, 0] = 1.5e-38
    scale = gamma(9)
    scale[4] = 0
    folder = tmp_path / "edges"
    folder.mkdir()
    edges = Measured(two_layers(w=weight, g=scale), folder, samples_of("x", TOKENS, WIDTH))
    found = edges.smoothing(0.0)
    exponents = found.of("n")
    assert exponents[1] == exponents[4] == 0
    assert exponents[2] >= 0
    frozen, _, _ = edges.smoothed(found)
    for tensor in frozen.proto().graph.initializer:
        values = np.abs(onnx.numpy_helper.to_array(tensor))
        assert np.isfinite(values).all()
        assert (values[values > 0] >= np.finfo(np.float32).tiny).all()
    feeds = batch(edges.source)
    assert np.array_equal(outputs(edges.frozen, feeds)[0], outputs(frozen, feeds)[0])


def test_a_model_with_nothing_to_smooth_is_refused(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("Relu", ["x"], ["y"], "relu")],
        [value("x", ["n", 4])],
        [value("y", ["n", 4])],
    )
    own = Measured(proto, tmp_path, samples_of("x", 4))
    with pytest.raises(ModelError, match="QD212"):
        own.smoothing()


def test_tensors_that_were_not_measured_are_left(measured: Measured, tmp_path: Path) -> None:
    some = measured.record.select([t for t in measured.record.tensors if t != "n1"])
    found = find_smoothing(measured.graph, some, measured.job.taps, 0.5)
    assert found.left["n1"] == "it was not measured"
    assert "n1" not in found.smoothing.exponents
    assert any("it was not measured): n1" in note for note in found.notes())


def test_halves_are_left_alone(tmp_path: Path) -> None:
    proto = two_layers()
    for tensor in proto.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for entry in (*proto.graph.input, *proto.graph.output):
        entry.type.tensor_type.elem_type = TensorProto.FLOAT16
    found = find_points(Graph(frozen_from(proto, tmp_path / "half.onnx")))
    assert not found.points
