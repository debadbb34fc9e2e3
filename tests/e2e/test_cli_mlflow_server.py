"""The whole search against a real MLflow server, and with the server killed in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import process, succeed
from tests.e2e.mlflow_server import MlflowServer, mlflow_server

WORDS = (
    "tune",
    "model=digits_cnn",
    "data=digits",
    "evaluation=accuracy",
    "data.evaluation.limit=100",
    "data.calibration.limit=16",
    "search.max_trials=4",
    "search.saturations=[max,kl]",
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path / "server") as running:
        yield running


def runs_of(uri: str, name: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], max_results=100))


def test_tune_logs_parent_and_trials_to_a_server(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed(*WORDS, "tracking=server", f"tracking.uri={server.url}", "tracking.experiment=http")
    runs = runs_of(server.url, "http")
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert len(children) == 4
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parents[0].info.run_id}
    assert all(run.info.status == "FINISHED" for run in runs)
    assert len({frozenset(c.data.params) for c in children}) == 1, "trials must be comparable"
    best = max(child.data.metrics["score"] for child in children)
    assert parents[0].data.metrics["best_score"] == best
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server.url)
    history = client.get_metric_history(parents[0].info.run_id, "score")
    assert sorted(point.step for point in history) == [0, 1, 2, 3]
    kept = {entry.path for entry in client.list_artifacts(children[0].info.run_id)}
    assert {"plan.json", "layers.csv", "model.onnx"} <= kept
    plan = Path(client.download_artifacts(children[0].info.run_id, "plan.json", str(tmp_path)))
    assert json.loads(plan.read_text())["model_digest"]


@pytest.mark.slow
def test_a_search_survives_the_death_of_its_server(server: MlflowServer, tmp_path: Path) -> None:
    script = tmp_path / "eval.py"
    # The third evaluation kills the server, so later trials find nobody.
    script.write_text(
        "import os, pathlib, signal, sys\n"
        "count = pathlib.Path(sys.argv[1])\n"
        "n = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (n + 1))\n"
        "if n == 2:\n"
        "    os.killpg(int(sys.argv[2]), signal.SIGKILL)\n"
        "print(0.5 + n / 100)\n"
    )
    count = tmp_path / "count"
    result = process(
        *(word for word in WORDS if not word.startswith(("evaluation", "data.evaluation"))),
        "evaluation=command",
        f"evaluation.command=[python,{script},{count},{server.process.pid}]",
        "cluster.workers=1",
        "tracking=server",
        f"tracking.uri={server.url}",
        f"output.folder={tmp_path / 'out'}",
        cwd=tmp_path,
        timeout_s=150,
    )
    assert result.status == 0, result.err
    assert (tmp_path / "out" / "model.onnx").is_file()
    spool = [
        json.loads(line)
        for line in (tmp_path / "out" / "mlflow-spool.jsonl").read_text().splitlines()
    ]
    assert spool, "what the server did not take must be kept"
    assert "MLflow records wait" in result.out
