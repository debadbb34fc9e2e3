"""Commands whose scores come from a part of the data, and from a metric class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.session import RaySession
from tests.command_line import check_error, here, succeed
from tests.e2e.tracked import client_for, made_uri

SCORED = (
    *("model=digits_cnn", "data=digits", "tracking=none"),
    *("data.evaluation.inputs.images=calibration_images", "data.evaluation.limit=40"),
    "data.evaluation.labels=calibration_labels",
)
TUNE = (
    *("tune", *SCORED, "search=greedy", "search.max_trials=2", "search.saturations=[]"),
    *("search.sensitivity_samples=4", "compare.samples=8", "cluster.workers=1"),
)
CLASS = """
import numpy as np
from file_utils import blob_file_reader
from metric import metric_register, custom_metric_base

@metric_register
class mean_peak(custom_metric_base):
    def init_params(self, metric_input):
        self.scale = float(metric_input)

    def load_and_analysis(self, blobsfile, imglist):
        logits = [blob_file_reader(line.rstrip("\\n")).ravel() for line in open(blobsfile)]
        peaks = [np.exp(x - x.max()).sum() ** -1 for x in logits]
        return self.scale * float(np.mean(peaks)), len(open(imglist).read().splitlines())

    def accumulate_results(self, result):
        return result
"""


@pytest.fixture
def folder(cnn_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of the model, calibrated and quantized, below a new current folder with a
    plugin folder."""
    place = tmp_path / "my work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "300")
    Path("plugins").mkdir()
    Path("plugins/mean_peak.py").write_text(CLASS)
    return Path(shutil.copytree(cnn_runs, "qdist-runs")).absolute() / "digits_cnn"


def test_the_search_and_the_report_share_no_sample(cluster: RaySession, folder: Path) -> None:
    uri = made_uri(folder)
    words = ("evaluation=accuracy", "evaluation.search_share=0.5", "tracking.enabled=true")
    said = succeed(*TUNE, *words, f"tracking.uri={uri}")
    unseen = json.loads((folder / "unseen.json").read_text())
    n_unseen = {unseen[name]["n_samples"] for name in ("float", "quantized")}
    reports = [json.loads(file.read_text()) for file in folder.rglob("trials/**/result.json")]
    n_seen = {result["report"]["n_samples"] for result in reports}
    assert (len(n_seen), len(n_unseen)) == (1, 1)
    assert n_seen.pop() + n_unseen.pop() == 40
    assert "samples that the search did not see: top1 " in said
    check_intervals(folder, unseen, said)
    (run,) = client_for(uri).search_runs(["1"], "tags.`qdist.command` = 'tune'")
    assert run.data.metrics["unseen_score"] == unseen["quantized"]["score"]


def check_intervals(folder: Path, unseen: dict[str, Any], said: str) -> None:
    """Every trial of the front has its difference from the plain plan and the float model."""
    plain, *rest = unseen["trials"]
    assert (plain["trial"], plain["over_plain"]) == (0, None)
    assert rest
    (best,) = (row for row in unseen["trials"] if row["best"])
    assert best["score"] == unseen["quantized"]["score"]
    for row in unseen["trials"]:
        over = row["over_float"]
        assert over["mean"] == pytest.approx(row["score"] - unseen["float"]["score"])
        assert over["low"] <= over["mean"] <= over["high"]
    for row in rest:
        assert row["over_plain"]["mean"] == pytest.approx(row["score"] - plain["score"])
    assert "better than the plain plan" in said
    assert 'id="unseen-table"' in (folder / "report.html").read_text()


def test_a_metric_class_scores_a_model_and_its_dump_alike(folder: Path) -> None:
    named = ("evaluation=class", "evaluation.metric_cls=mean_peak", "evaluation.folder=plugins")
    words = (*named, "evaluation.metric_input='0.5'")
    succeed("evaluate", *SCORED, *words)
    scores = json.loads((folder / "evaluation.json").read_text())
    assert scores["float"]["metrics"]["mean_peak_1"] == 40
    assert 0 < scores["quantized"]["score"] < scores["float"]["score"] + 0.01
    succeed("compare", *SCORED, "compare.dump=2", "compare.samples=40", "compare.dump_samples=40")
    succeed("evaluate", *SCORED, *words, f"evaluation.dumped='{folder / 'dump'}'")
    dumped = json.loads((folder / "evaluation.json").read_text())
    assert [name.endswith("_ref") for name in dumped] == [True, False]
    for mine, alone in zip(scores.values(), dumped.values(), strict=True):
        assert alone["metrics"] == pytest.approx(mine["metrics"], abs=1e-5)
    wrong = (*named, "evaluation.metric_input='9'")
    check_error(here("evaluate", *SCORED, *wrong), "QD704", "from 0 to 1")
