"""A search for a target of few freedoms, scored on the calibration samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.session import RaySession
from qdist.plan.plan import load_plan
from tests.command_line import check_error, here, succeed
from tests.e2e.tracked import client_for, made_uri

SCORED = (
    *("model=digits_cnn", "data=digits", "evaluation=accuracy"),
    *("data.evaluation.inputs.images=calibration_images", "data.evaluation.limit=40"),
    "data.evaluation.labels=calibration_labels",
)
TUNE = (
    *("tune", *SCORED, "target=qdq_power_of_two", "search=greedy"),
    *("quantization.symmetric=true", "quantization.granularity=tensor"),
    *("search.max_trials=4", "search.saturations=[]", "search.sensitivity_samples=4"),
    *("compare.samples=8", "compare.batch=3", "cluster.workers=1"),
)
NOTE = "note: 40 of 40 evaluation samples are calibration samples"


def test_a_target_without_scales_per_channel_is_searched_to_the_end(
    cluster: RaySession, cnn_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    folder = Path(shutil.copytree(cnn_runs, "qdist-runs")).absolute() / "digits_cnn"
    uri = f"tracking.uri={made_uri(tmp_path)}"
    said = succeed(*TUNE, uri, "search.artifacts=best")
    assert "is the best" in said
    assert "failed" not in said
    assert "w4a8 in" in said
    plan = load_plan(folder / "plan.json")
    quantizers = [entry.quantizer for layer in plan.layers for entry in layer.weights]
    assert quantizers
    assert all(quantizer.axis is None for quantizer in quantizers)
    assert not list((folder / "scratch").iterdir())
    assert NOTE in said
    assert NOTE in succeed("evaluate", *SCORED, uri)
    numbers = json.loads((folder / "evaluation.json").read_text())
    assert numbers["float"]["metrics"]["agreement"] == 1
    assert not list((folder / "scratch").iterdir())
    client = client_for(uri.removeprefix("tracking.uri="))
    (experiment,) = client.search_experiments(filter_string="name = 'qdist'")
    found = client.search_runs(
        [experiment.experiment_id], "tags.`qdist.evaluation_overlap` = '40 of 40'"
    )
    assert sorted(run.data.tags["qdist.command"] for run in found) == ["evaluate", "tune"]

    # The models that the first search let go were sent; another one sends them once more.
    assert len(list(folder.glob("trials/trial-*/model.onnx"))) == 1
    assert "4 of them known before" in succeed(*TUNE, uri)
    searches = client.search_runs([experiment.experiment_id], "tags.`qdist.command` = 'tune'")
    again, first = (models(client, run) for run in searches)
    assert len(first) == 4
    assert again == first
    assert not list(folder.glob("trials/qdist-model-*"))


def models(client: Any, parent: Any) -> dict[str, bytes]:
    """Number of each trial below a search -> its model."""
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    return {
        run.data.tags["qdist.number"]: Path(
            client.download_artifacts(run.info.run_id, "model.onnx")
        ).read_bytes()
        for run in children
    }


def test_whole_plans_are_tried_with_the_clippings_that_a_user_names(
    cluster: RaySession, cnn_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    folder = Path(shutil.copytree(cnn_runs, "qdist-runs")).absolute() / "digits_cnn"
    words = (
        *("tune", *SCORED, "tracking=none", "cluster.workers=1"),
        *("search.max_trials=5", "search.saturations=[]", "search.sensitivity_samples=4"),
        *("compare.samples=8", "compare.batch=3"),
    )
    said = succeed(*words, "search.clipping=['max:th_scale=0.5',percentile:99.5]")
    assert "max:th_scale=0.5 everywhere" in said
    assert "least harm, max:th_scale=0.5" in said

    def tops(number: int) -> dict[str, float]:
        plan = load_plan(folder / f"trials/trial-{number:03d}/plan.json")
        return {
            entry.tensor: entry.quantizer.bounds[1]
            for layer in plan.layers
            for entry in layer.activations
        }

    trials = sorted((folder / "trials").glob("trial-*/trial.json"))
    labels = [json.loads(trial.read_text())["label"] for trial in trials]
    halved = tops(labels.index("max:th_scale=0.5 everywhere"))
    succeed(*words, "search.max_trials=1", "quantization.saturation=max")
    whole = tops(0)
    assert halved.keys() == whole.keys()
    for tensor, top in whole.items():
        assert halved[tensor] == pytest.approx(top / 2, rel=1e-6)
    for wrong, code in (
        ("msee", "QD501"),
        ("percentile:99.9,percent=3", "QD502"),
        ("percentile:200", "QD104"),
    ):
        check_error(here(*words, f"search.clipping=['{wrong}']"), code, wrong.split(":")[-1][:3])
