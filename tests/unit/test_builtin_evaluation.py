from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.demo import demo_file
from qdist.emit.qdq import emit_qdq
from qdist.errors import DataError, EvaluationError, ModelError
from qdist.evaluate.builtin import (
    BESIDE,
    DatasetEvaluation,
    Runner,
    batches,
    evaluate_on,
    float_outputs,
)
from qdist.evaluate.metrics import SQNR_CEILING_DB
from qdist.evaluate.report import EvalReport
from qdist.evaluate.scorer import Scorer
from qdist.model.freeze import freeze
from qdist.model.loading import load_model
from tests.onnx_models import (
    EXECUTION,
    Array,
    HeldSamples,
    integers,
    model,
    normal,
    planner_for,
    projected,
    samples_of,
    value,
)

CNN = demo_file("digits_cnn.onnx")


def digits(labels: str | None = "test_labels", limit: int = 100) -> ArraySource:
    return ArraySource(
        path=demo_file("digits.npz"),
        inputs={"images": "test_images"},
        labels=labels,
        preprocess=Preprocess(scale=1 / 16, mean=(0.3,), std=(0.37,)),
        limit=limit,
    )


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    onnx.save(proto, path)
    return path


def matmul(folder: Path, batch: int | str, length: int | str = 3) -> Path:
    """Doubles ``x``, of shape [batch, length, 2]."""
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")],
        [value("x", [batch, length, 2])],
        [value("y", [batch, length, 2])],
        {"w": 2 * np.eye(2, dtype=np.float32)},
    )
    return saved(proto, folder / "model.onnx")


def shapes_run(runner: Runner, source: Any, size: int) -> list[tuple[int, ...]]:
    return [batch.feeds["x"].shape for batch in batches(source, runner.inputs, size)]


def ragged(lengths: Sequence[int], labels: Sequence[Array] | None = None) -> HeldSamples:
    samples = [{"x": normal(n, 2, seed=i)} for i, n in enumerate(lengths)]
    return HeldSamples(samples=samples, labels=labels)


def test_demo_model_reaches_its_published_accuracy() -> None:
    runner = Runner(CNN, EXECUTION)
    seen: list[int] = []
    evaluation = DatasetEvaluation(source=digits(limit=600), metric="top1", batch=64)
    report = evaluate_on(runner, evaluation, on_progress=seen.append)
    assert report.score == pytest.approx(599 / 600, abs=1e-9)
    assert report.n_samples == 600
    assert seen == [*range(64, 600, 64), 600]
    assert (report.metric, report.higher_is_better) == ("top1", True)
    assert list(report.metrics) == ["top1"]
    assert report.seconds > 0


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frozen = freeze(load_model(CNN))
    folder = tmp_path_factory.mktemp("quantized")
    plan = projected(planner_for(frozen, digits(limit=32), folder / "store"), "w4a8")
    return emit_qdq(frozen, plan, folder / "model.onnx").path


def test_reports_do_not_depend_on_the_batch(quantized: Path) -> None:
    reports: list[EvalReport] = []
    for batch in (1, 7, 32, 100):
        evaluation = DatasetEvaluation(source=digits(), metric="top1", batch=batch)
        reference = float_outputs(Runner(CNN, EXECUTION), evaluation)
        report = evaluate_on(Runner(quantized, EXECUTION), evaluation, reference)
        reports.append(report)
        assert set(report.metrics) == {"top1", *BESIDE}
    for report in reports[1:]:
        assert report.score == reports[0].score
        assert report.n_samples == 100
        for name, number in report.metrics.items():
            assert number == pytest.approx(reports[0].metrics[name], rel=1e-4)
    assert 5 < reports[0].metrics["sqnr_db"] < 60


def test_float_model_agrees_with_itself_entirely() -> None:
    evaluation = DatasetEvaluation(source=digits(labels=None), metric="agreement")
    runner = Runner(CNN, EXECUTION)
    report = evaluate_on(runner, evaluation, float_outputs(runner, evaluation))
    assert report.score == 1
    assert report.metrics["sqnr_db"] == SQNR_CEILING_DB
    assert report.metrics["cosine"] == pytest.approx(1)


def test_missing_labels_are_an_error_of_the_data() -> None:
    evaluation = DatasetEvaluation(source=digits(labels=None), metric="top1")
    with pytest.raises(DataError, match="QD308"):
        evaluate_on(Runner(CNN, EXECUTION), evaluation)


def test_labels_beyond_the_classes_are_an_error_of_the_data() -> None:
    source = samples_of("images", 1, 8, 8)
    labels = [integers(10)] * 4
    held = HeldSamples(samples=source.samples, labels=labels)
    with pytest.raises(DataError, match="QD308"):
        evaluate_on(Runner(CNN, EXECUTION), DatasetEvaluation(source=held, metric="top1"))


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(EvaluationError, match="QD701"):
        DatasetEvaluation(source=digits(), metric="top2.5")
    with pytest.raises(ValueError, match="at least 1"):
        DatasetEvaluation(source=digits(), metric="top1", batch=0)


def test_runner_tells_names_types_and_shapes(tmp_path: Path) -> None:
    proto = model(
        [
            helper.make_node("Gather", ["table", "ids"], ["e"], "gather"),
            helper.make_node("Where", ["mask", "e", "e"], ["y"], "where"),
            helper.make_node("Identity", ["half"], ["z"], "identity"),
        ],
        [
            value("ids", ["b", 3], TensorProto.INT64),
            value("mask", ["b", 3, 4], TensorProto.BOOL),
            value("half", [2], TensorProto.FLOAT16),
        ],
        [value("y", None), value("z", [2], TensorProto.FLOAT16)],
        {"table": normal(5, 4)},
    )
    runner = Runner(saved(proto, tmp_path / "model.onnx"), EXECUTION)
    assert [(i.name, i.dtype, i.shape) for i in runner.inputs] == [
        ("ids", "int64", ("b", 3)),
        ("mask", "bool", ("b", 3, 4)),
        ("half", "float16", (2,)),
    ]
    assert runner.output_names == ["y", "z"]
    with pytest.raises(ModelError, match="QD205"):
        runner.run({"ids": integers([[0, 1, 9]])})


def test_runs_are_consecutive_samples_of_one_shape(tmp_path: Path) -> None:
    runner = Runner(matmul(tmp_path, "b", "s"), EXECUTION)
    source = ragged([3, 3, 3, 5, 3, 3])
    found = list(batches(source, runner.inputs, 2))
    assert [b.keys for b in found] == [
        ("0000", "0001"),
        ("0002",),
        ("0003",),
        ("0004", "0005"),
    ]
    assert shapes_run(runner, source, 2) == [(2, 3, 2), (1, 3, 2), (1, 5, 2), (2, 3, 2)]
    assert [b.labels for b in found] == [None] * 4
    for b in found:
        (y,) = runner.run(b.feeds)
        for key, row in zip(b.keys, y, strict=True):
            np.testing.assert_array_equal(row, 2 * source.load(key)["x"])
    assert [b.keys for b in batches(source, runner.inputs, 2, n_samples=3)] == [
        ("0000", "0001"),
        ("0002",),
    ]
    limited = batches(source, runner.inputs, 4, n_samples=5)
    assert [b.keys for b in limited] == [("0000", "0001", "0002"), ("0003",), ("0004",)]


def test_variable_lengths_are_measured_as_one_set(tmp_path: Path) -> None:
    path = matmul(tmp_path, "b", "s")
    source = ragged([3, 5, 5, 2])
    evaluation = DatasetEvaluation(source=source, metric="sqnr_db", batch=8)
    runner = Runner(path, EXECUTION)
    reference = [[y + 0.5 for y in outputs] for outputs in float_outputs(runner, evaluation)]
    report = evaluate_on(runner, evaluation, reference)
    assert report.n_samples == 4
    signal = sum(float(np.square(r[0].astype(float)).sum()) for r in reference)
    noise = 0.25 * 2 * (3 + 5 + 5 + 2)
    assert report.score == pytest.approx(10 * np.log10(signal / noise))


def test_samples_with_a_batch_axis_of_their_own_run_alone(tmp_path: Path) -> None:
    runner = Runner(matmul(tmp_path, "b"), EXECUTION)
    samples = [{"x": normal(n, 3, 2, seed=n)} for n in (1, 1, 4)]
    assert shapes_run(runner, HeldSamples(samples=samples), 8) == [(1, 3, 2), (1, 3, 2), (4, 3, 2)]


def test_inputs_of_different_leading_sizes_run_when_samples_bring_them(tmp_path: Path) -> None:
    """As in recurrent models: input [b, n], state [2, b, n], and a scalar."""
    proto = model(
        [
            helper.make_node("Add", ["x", "state"], ["h"], "add"),
            helper.make_node("Mul", ["h", "rate"], ["y"], "mul"),
        ],
        [value("x", ["b", 3]), value("state", [2, "b", 3]), value("rate", [])],
        [value("y", [2, "b", 3])],
    )
    runner = Runner(saved(proto, tmp_path / "model.onnx"), EXECUTION)
    feeds = {
        "x": normal(1, 3),
        "state": normal(2, 1, 3),
        "rate": np.asarray(0.5, np.float32),
    }
    source = HeldSamples(samples=[feeds] * 3)
    found = list(batches(source, runner.inputs, 8))
    assert [b.feeds["state"].shape for b in found] == [(2, 1, 3)] * 3


@pytest.mark.parametrize("size", [1, 4, 100])
def test_fixed_batch_of_the_model_is_kept(size: int, tmp_path: Path) -> None:
    runner = Runner(matmul(tmp_path, 4), EXECUTION)
    assert shapes_run(runner, samples_of("x", 3, 2, n=8), size) == [(4, 3, 2)] * 2
    assert len(shapes_run(runner, HeldSamples(samples=samples_of("x", 3, 2).samples), size)) == 1


def test_samples_that_leave_a_fixed_batch_unfilled_are_refused_by_name(tmp_path: Path) -> None:
    runner = Runner(matmul(tmp_path, 4), EXECUTION)
    with pytest.raises(DataError) as caught:
        list(batches(samples_of("x", 3, 2, n=6), runner.inputs, 4))
    assert caught.value.code == "QD303"
    assert "0004 to 0005" in caught.value.where


def test_sample_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    runner = Runner(matmul(tmp_path, "b"), EXECUTION)
    with pytest.raises(DataError) as caught:
        list(batches(ragged([3, 4]), runner.inputs, 4))
    assert caught.value.code == "QD303"
    assert "0001" in caught.value.where


def test_labels_are_stacked_and_those_of_other_shapes_refused(tmp_path: Path) -> None:
    runner = Runner(matmul(tmp_path, "b"), EXECUTION)
    labelled = ragged([3, 3], [integers([1, 2]), integers([3, 4])])
    (found,) = batches(labelled, runner.inputs, 4)
    np.testing.assert_array_equal(found.labels, [[1, 2], [3, 4]])
    uneven = ragged([3, 3], [integers([1, 2]), integers([3])])
    with pytest.raises(DataError, match="QD308"):
        list(batches(uneven, runner.inputs, 4))
    assert len(list(batches(uneven, runner.inputs, 1))) == 2


def test_scorer_runs_the_float_model_once(tmp_path: Path, quantized: Path) -> None:
    float_model = tmp_path / "float.onnx"
    float_model.write_bytes(CNN.read_bytes())
    scorer = Scorer(
        evaluation=DatasetEvaluation(source=digits(), metric="top1"),
        float_model=float_model,
        scratch=tmp_path,
        execution=EXECUTION,
    )
    first = scorer.score(quantized)
    float_model.unlink()
    second = scorer.score(quantized)
    assert first.metrics == second.metrics
    assert scorer.score(CNN).metrics["sqnr_db"] == SQNR_CEILING_DB
    assert scorer.source() == digits()
