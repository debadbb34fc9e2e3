from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdist.data.arrays import ArraySource
from qdist.data.preprocess import Preprocess
from qdist.data.source import Feeds
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
from qdist.evaluate.reference import append_outputs, read_outputs
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
    with pytest.raises(ModelError, match="QD205") as caught:
        runner.run({"ids": integers([[0, 1, 9]])})
    for setting in ("calibration.micro_batch", "evaluation.batch", "compare.batch"):
        assert setting in caught.value.mend


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


@dataclass(frozen=True, kw_only=True)
class CountedSamples(HeldSamples):
    """Notes the key of every sample that is loaded."""

    loaded: list[str] = field(default_factory=list)

    def load(self, key: str) -> Feeds:
        self.loaded.append(key)
        return super().load(key)


def scorer_of(float_model: Path, source: Any, scratch: Path, metric: str = "top1") -> Scorer:
    return Scorer(
        evaluation=DatasetEvaluation(source=source, metric=metric),
        float_model=float_model,
        scratch=scratch,
        execution=EXECUTION,
    )


def test_scorer_runs_the_float_model_once(tmp_path: Path, quantized: Path) -> None:
    float_model = tmp_path / "float.onnx"
    float_model.write_bytes(CNN.read_bytes())
    with scorer_of(float_model, digits(), tmp_path / "scratch") as scorer:
        first = scorer.score(quantized)
        float_model.unlink()
        second = scorer.score(quantized)
        assert first.metrics == second.metrics
        assert scorer.score(CNN).metrics["sqnr_db"] == SQNR_CEILING_DB
        assert scorer.source() == digits()


def test_float_model_is_scored_in_the_pass_that_keeps_its_outputs(
    tmp_path: Path, quantized: Path
) -> None:
    some = digits(limit=40)
    keys = some.keys()
    samples = [some.load(key) for key in keys]
    labels = [integers(i % 10) for i in range(40)]
    source = CountedSamples(samples=samples, labels=labels)
    evaluation = DatasetEvaluation(source=source, metric="top1")
    runner = Runner(CNN, EXECUTION)
    expected = [
        evaluate_on(runner_of, evaluation, list(float_outputs(runner, evaluation))).metrics
        for runner_of in (runner, Runner(quantized, EXECUTION))
    ]
    source.loaded.clear()
    with scorer_of(CNN, source, tmp_path) as scorer:
        assert scorer.score(CNN).metrics == expected[0]
        assert scorer.score(quantized).metrics == expected[1]
        assert len(source.loaded) == 2 * 40
        # As in another process, that is told only where the outputs are.
        other = replace(scorer, reference=scorer.reference, _folder=None)
        assert other.score(quantized).metrics == expected[1]
        assert len(source.loaded) == 3 * 40
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")],
        [value("x", ["n", 8])],
        [value("y", ["n", 4096])],
        {"w": normal(8, 4096)},
    )
    path = saved(proto, tmp_path / "wide.onnx")
    n = 512
    tracemalloc.start()
    with scorer_of(path, samples_of("x", 8, n=n), tmp_path, "sqnr_db") as scorer:
        scorer.score(path)
        scorer.score(path)
        kept = scorer.reference
        assert kept is not None
        assert kept.stat().st_size > 4096 * 4 * n
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096 * 4 * n * 0.75


def test_outputs_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    runs: list[list[Array]] = [
        [normal(3, 2), np.zeros((0, 4), np.float16), integers([1, 2])],
        [np.asarray(0.5, np.float32), normal(2, 3).T, np.array([["a", "b"]], object)],
        [],
    ]
    path = tmp_path / "outputs.npy"
    with path.open("wb") as file:
        for outputs in runs:
            append_outputs(file, outputs)
    found = list(read_outputs(path))
    assert [len(outputs) for outputs in found] == [3, 3, 0]
    assert found[1][2].shape == (1, 2)
    pairs = [*zip(runs[0], found[0], strict=True), *zip(runs[1][:2], found[1][:2], strict=True)]
    for expected, array in pairs:
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_samples_that_come_after_the_float_model_ran_are_an_error(tmp_path: Path) -> None:
    samples = list(samples_of("x", 3, 2, n=2).samples)
    with scorer_of(matmul(tmp_path, 2), HeldSamples(samples=samples), tmp_path, "mse") as scorer:
        scorer.score(scorer.float_model)
        samples.extend(samples_of("x", 3, 2, n=2).samples)
        with pytest.raises(DataError, match="QD306"):
            scorer.score(scorer.float_model)


def test_metrics_beside_the_score_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    """As for a recurrent model, whose states are [1, b, n]: they have no leading sample axis."""
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["logits"], "layer"),
            helper.make_node("Unsqueeze", ["logits", "axis"], ["state"], "state"),
        ],
        [value("x", ["n", 3])],
        [value("logits", ["n", 4]), value("state", [1, "n", 4])],
        {"w": normal(3, 4), "axis": integers([0])},
    )
    path = saved(proto, tmp_path / "model.onnx")
    source = HeldSamples(samples=samples_of("x", 3, n=6).samples, labels=[integers(1)] * 6)
    with scorer_of(path, source, tmp_path) as scorer:
        for report in (scorer.score(path), scorer.score(path)):
            assert list(report.metrics) == ["top1"]
            assert report.n_samples == 6
            lines = report.log.splitlines()
            assert [line.split()[0] for line in lines] == list(BESIDE)
            assert "QD704" in report.log
    with (
        scorer_of(path, source, tmp_path, "sqnr_db") as scorer,
        pytest.raises(EvaluationError, match="QD704"),
    ):
        scorer.score(path)


def test_inputs_of_unknown_rank_take_stacked_samples(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("Relu", ["x"], ["y"], "layer")], [value("x", None)], [value("y", None)]
    )
    runner = Runner(saved(proto, tmp_path / "model.onnx"), EXECUTION)
    assert shapes_run(runner, samples_of("x", 3, 2, n=5), 4) == [(4, 3, 2), (1, 3, 2)]


def test_every_row_runs_once_where_samples_with_and_without_a_batch_axis_meet(
    tmp_path: Path,
) -> None:
    runner = Runner(matmul(tmp_path, "b"), EXECUTION)
    shapes = [(3, 2), (1, 3, 2), (1, 3, 2), (3, 2), (3, 2), (2, 3, 2), (3, 2)]
    samples = [{"x": normal(*shape, seed=i)} for i, shape in enumerate(shapes)]
    found = list(batches(HeldSamples(samples=samples), runner.inputs, 4))
    assert [key for batch in found for key in batch.keys] == [f"{i:04d}" for i in range(7)]
    np.testing.assert_array_equal(
        np.concatenate([batch.feeds["x"] for batch in found]),
        np.concatenate([sample["x"].reshape(-1, 3, 2) for sample in samples]),
    )
