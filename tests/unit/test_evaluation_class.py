"""SlimAI's metric classes: found, fed with blobs, and what they may return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdist.data.arrays import ArraySource
from qdist.errors import ConfigError, DataError, EvaluationError
from qdist.evaluate.blob import write_blob
from qdist.evaluate.builtin import Runner
from qdist.evaluate.custom_metric import ClassEvaluation, blob_file_reader
from qdist.evaluate.dumped import score_dumped
from qdist.evaluate.scorer import Scorer
from qdist.files import write_json
from qdist.model.session import Execution

CLASS = """
import numpy as np
from file_utils import blob_file_reader
from metric import metric_register, custom_metric_base

@metric_register
class first_is_less(custom_metric_base):
    def __init__(self):
        self.scale = None

    def init_params(self, metric_input):
        self.scale = float(metric_input.partition("scale=")[2])

    def load_and_analysis(self, blobsfile, imglist):
        rows = [line.split() for line in open(blobsfile)]
        self.names = open(imglist).read().split()
        less = [
            (blob_file_reader(a) < blob_file_reader(b)).mean() * self.scale for a, b in rows
        ]
        return float(np.mean(less)), len(self.names)

    def accumulate_results(self, result):
        return None
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """double = 2 x, half = x / 2, for x [n, 3]."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["double"], name="adds"),
            helper.make_node("Div", ["x", "two"], ["half"], name="halves"),
        ],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("double", TensorProto.FLOAT, ["n", 3]), value("half", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor("two", TensorProto.FLOAT, [], [2.0])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def source(tmp_path: Path) -> ArraySource:
    rows = np.abs(np.random.default_rng(0).normal(size=(5, 3))).astype(np.float32) + 0.5
    np.savez(tmp_path / "x.npz", x=rows)
    return ArraySource(path=tmp_path / "x.npz", inputs={"x": "x"})


def evaluation(tmp_path: Path, text: str = CLASS, **changes: Any) -> ClassEvaluation:
    plugins = tmp_path / "plugins"
    plugins.mkdir(exist_ok=True)
    (plugins / "first_is_less.py").write_text(text)
    fields: dict[str, Any] = {
        "source": source(tmp_path),
        "metric_cls": "first_is_less",
        "metric_input": "somewhere scale=0.5",
        "folders": (tmp_path / "nowhere", plugins),
        "batch": 2,
    }
    return ClassEvaluation(**{**fields, **changes})


def test_a_class_scores_the_outputs_in_the_order_that_it_wants(tmp_path: Path, model: Path) -> None:
    with Scorer(
        evaluation=evaluation(tmp_path, replace_output=("half", "double")),
        float_model=model,
        scratch=tmp_path / "scratch",
        execution=Execution(),
    ) as scorer:
        report = scorer.score(model)
    assert report.metrics == {"first_is_less": 0.5, "first_is_less_1": 5.0}
    assert (report.n_samples, report.higher_is_better) == (5, True)
    assert list((tmp_path / "scratch").iterdir()) == [], "blobs were left"
    plain = evaluation(tmp_path).run(Runner(model, Execution()), tmp_path / "scratch")
    assert plain.score == 0.0


def test_blobs_are_read_dequantized(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(1, 2, 1, 3)
    path = write_blob(tmp_path / "a.blob", values)
    path.write_text(path.read_text().replace("1.00000000e+00", "4.00000000e+00"))
    np.testing.assert_array_equal(blob_file_reader(str(path)), values / 4)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("float(np.mean(less)), len(self.names)", "1.5", "QD704"),
        ("float(np.mean(less)), len(self.names)", "float('nan')", "QD704"),
        ("float(np.mean(less)), len(self.names)", "'good'", "QD704"),
        ("float(np.mean(less)), len(self.names)", "[]", "QD704"),
        ("float(np.mean(less)), len(self.names)", "1 / 0", "QD705"),
        ("def accumulate_results", "def something_else", "QD705"),
        ("class first_is_less(custom_metric_base)", "class first_is_less", "QD108"),
        ("class first_is_less", "class another", "QD108"),
        ("import numpy as np", "import no_such_module_at_all", "QD108"),
    ],
)
def test_what_is_wrong_with_a_class_is_said(
    tmp_path: Path, model: Path, old: str, new: str, code: str
) -> None:
    text = CLASS.replace(old, new)
    if code == "QD108":
        text = text.replace("def accumulate_results", "def another_member")
    with pytest.raises((EvaluationError, ConfigError)) as caught:
        evaluation(tmp_path, text).run(Runner(model, Execution()), tmp_path / "scratch")
    assert caught.value.code == code


def test_what_accumulates_takes_the_place_of_the_result(tmp_path: Path, model: Path) -> None:
    text = CLASS.replace("return None", "return [result[0] + 0.125]")
    report = evaluation(tmp_path, text).run(Runner(model, Execution()), tmp_path / "scratch")
    assert report.metrics == {"first_is_less": 0.125}


def test_an_output_that_there_is_not(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluation(tmp_path, replace_output=("third",)).run(
            Runner(model, Execution()), tmp_path / "scratch"
        )
    assert (caught.value.code, caught.value.where) == ("QD104", "evaluation.replace_output")


def test_a_file_that_is_nowhere(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluation(tmp_path, metric_cls="other").run(Runner(model, Execution()), tmp_path / "s")
    assert caught.value.code == "QD108"


def test_dumped_outputs_are_scored_without_a_model(tmp_path: Path) -> None:
    dump = tmp_path / "my dump"
    for place, sign in (("m_ref", 1), ("m_int8", -1)):
        (dump / place).mkdir(parents=True)
        for sample in ("a", "b"):
            for output, value in (("half_1", 1.0), ("double_2", 2.0)):
                values = np.full((1, 2, 1, 1), sign * value, np.float32)
                write_blob(dump / place / f"{sample}_{output}.blob", values)
    (dump / "output_control.octrl").write_text("[half_1 double_2] save\n")
    names = {"samples": {"a": "a.png", "b": "b.png"}, "outputs": {"half_1": "half/1"}}
    names["outputs"]["double_2"] = "double:2"
    write_json(dump / "names.json", {**names, "layers": {}})
    reports = score_dumped(evaluation(tmp_path), dump)
    assert {place: report.score for place, report in reports.items()} == {
        "m_ref": 0.5,
        "m_int8": 0.0,
    }
    assert list(reports) == ["m_ref", "m_int8"]
    # By the model's names as by those of files.
    for order in (("double:2", "half/1"), ("double_2", "half_1")):
        turned = score_dumped(evaluation(tmp_path, replace_output=order), dump)
        assert [report.score for report in turned.values()] == [0.0, 0.5]


def test_spaces_in_the_folder_do_not_split_a_path(tmp_path: Path, model: Path) -> None:
    scratch = tmp_path / "my results" / "of\tmay"
    plain = evaluation(tmp_path).run(Runner(model, Execution()), tmp_path / "scratch")
    assert evaluation(tmp_path).run(Runner(model, Execution()), scratch).metrics == plain.metrics
    assert list(scratch.iterdir()) == []


def test_a_folder_that_is_no_dump(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        score_dumped(evaluation(tmp_path), tmp_path)
    assert caught.value.code == "QD306"
