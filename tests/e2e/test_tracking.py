"""Tracking against real stores: SQLite files and an ``mlflow server`` over HTTP."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from qdist.cli.commands.trial_models import TrialModels
from qdist.cli.commands.tune_log import TrialLog
from qdist.cli.tracking import SPOOL_NAME, Tracker, open_tracker
from qdist.cli.tracking.mlflow_sink import MlflowSink
from qdist.cli.tracking.spool import REFUSED_NAME, Spool
from qdist.cli.tracking.trials_view import KEY
from qdist.errors import ArtifactError, ConfigError
from qdist.evaluate.evaluation_run import EvaluationRun
from qdist.evaluate.report import EvalReport
from qdist.search.trial import EVALUATION, Candidate, Trial
from tests.e2e.mlflow_server import MlflowServer, free_port, mlflow_server
from tests.e2e.tracked import artifact, client_for, made_uri, spec

SCORES = [0.91, 0.95, 0.93]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(params=["sqlite", "http"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return made_uri(tmp_path / "a folder with spaces")
    running: MlflowServer = request.getfixturevalue("server")
    return running.url


def record_search(tracker: Tracker, model: Path) -> tuple[str, list[str]]:
    """A parent with three trials, as a search writes them; their run ids."""
    children: list[str] = []
    with tracker.start_run(
        "search vit",
        command="search",
        config={"search": {"n_trials": 3, "tolerance": float("inf")}, "model": Path("vit.onnx")},
        params={"strategy": "greedy"},
        tags={"team": "vision"},
        model_digest="aa" * 32,
        data_digest="bb" * 32,
    ) as parent:
        for number, score in enumerate(SCORES):
            with parent.start_child(
                f"trial-{number:03d} int8", params={"bits": 8 + number}, number=number
            ) as child:
                child.log_metrics({"score": score, "size_bytes": 1000 + number})
                for step in range(3):
                    child.log_metrics({"loss": 1.0 / (1 + step)}, step=step)
                child.log_table([{"layer": "fc1", "bits": 8}, {"layer": "fc2", "snr": 9.5}], "map")
                child.log_json({"ranges": [0.5, float("nan")]}, "plan/ranges.json")
                child.log_artifact(model, "model")
                children.append(child.id)
        parent.log_text("three trials\n", "summary.txt")
        return parent.id, children


def test_parent_and_trials_are_recorded(uri: str, tmp_path: Path) -> None:
    model = tmp_path / "vit.onnx"
    model.write_bytes(b"weights")
    with open_tracker(spec(uri), spool_folder=tmp_path / "out") as tracker:
        parent_id, children = record_search(tracker, model)
        assert tracker.n_spooled == 0

    client = client_for(uri)
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "search vit"
    assert parent.data.params == {"strategy": "greedy"}
    tags = parent.data.tags
    assert tags["team"] == "vision"
    assert tags["qdist.command"] == "search"
    assert tags["qdist.model_digest"] == "aa" * 32
    assert tags["qdist.data_digest"] == "bb" * 32
    assert tags["qdist.version"]
    curve = client.get_metric_history(parent_id, "score")
    assert sorted((point.step, point.value) for point in curve) == list(enumerate(SCORES))
    assert client.get_metric_history(parent_id, "loss") == []
    config = artifact(uri, parent_id, "config.yaml", tmp_path)
    assert config.splitlines()[:2] == ["search:", "  n_trials: 3"]
    assert artifact(uri, parent_id, "summary.txt", tmp_path) == "three trials\n"

    for number, child_id in enumerate(children):
        child = client.get_run(child_id)
        assert child.info.status == "FINISHED"
        assert child.info.run_name == f"trial-{number:03d} int8"
        assert child.data.tags["mlflow.parentRunId"] == parent_id
        assert child.data.params == {"bits": str(8 + number)}
        assert child.data.metrics["score"] == SCORES[number]
        assert child.data.metrics["size_bytes"] == 1000 + number
        losses = client.get_metric_history(child_id, "loss")
        assert sorted((point.step, point.value) for point in losses) == [
            (0, 1.0),
            (1, 0.5),
            (2, 1.0 / 3),
        ]
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = list(csv.DictReader(artifact(uri, child_id, "map.csv", folder).splitlines()))
        assert rows == [
            {"layer": "fc1", "bits": "8", "snr": ""},
            {"layer": "fc2", "bits": "", "snr": "9.5"},
        ]
        ranges = json.loads(artifact(uri, child_id, "plan/ranges.json", folder))
        assert ranges == {"ranges": [0.5, "nan"]}
        assert artifact(uri, child_id, "model/vit.onnx", folder) == "weights"


def test_an_experiment_has_a_view_of_trials_which_users_may_change(
    uri: str, tmp_path: Path
) -> None:
    tag = f"mlflow.sharedViewState.{KEY}"
    open_tracker(spec(uri), spool_folder=tmp_path / "out")
    client = client_for(uri)
    found = client.get_experiment_by_name("digits")
    view = json.loads(found.tags[tag])
    assert view["name"] == "Trials"
    state = json.loads(view["state"])
    assert "metrics.`score`" in state["selectedColumns"]
    client.set_experiment_tag(found.experiment_id, tag, "mine")
    open_tracker(spec(uri), spool_folder=tmp_path / "out")
    assert client.get_experiment(found.experiment_id).tags[tag] == "mine"
    client.delete_experiment_tag(found.experiment_id, tag)


def test_awkward_names_and_values_are_kept_and_confessed(uri: str, tmp_path: Path) -> None:
    long_name, long_value = "x/" * 200 + "y", "int8," * 3000
    with (
        open_tracker(spec(uri), spool_folder=tmp_path / "out") as tracker,
        tracker.start_run("odd", command="quantize", config={}) as run,
    ):
        run.log_params({"/blk.0/MatMul:0 (a)[1],b": "int8", "plan": long_value, long_name: 1})
        run.log_params({"m(1)": 1, "m[1]": 2, "../..": 3, "": 4})
        run.log_metrics({"ok": 1.0, "sqnr(fc1)": float("inf"), "bad": float("nan")}, step=4)
        run.set_tags({"note": "n" * 9000})
    assert tracker.n_spooled == 0

    data = client_for(uri).get_run(run.id).data
    assert data.params["blk.0/MatMul_0 _a__1__b"] == "int8"
    assert {data.params["m_1_"], data.params[next(k for k in data.params if "m_1_-" in k)]} == {
        "1",
        "2",
    }
    assert [len(key) for key in data.params if key.startswith("x/")] in ([249], [250])
    assert {data.params[key] for key in data.params if key.startswith("unnamed")} == {"3", "4"}
    shown = data.params["plan"]
    assert len(shown) == 500
    assert shown.endswith("\u2026 (15000 characters, see params/plan.txt)")
    assert artifact(uri, run.id, "params/plan.txt", tmp_path) == long_value
    assert len(data.tags["note"]) == 4000
    assert artifact(uri, run.id, "tags/note.txt", tmp_path) == "n" * 9000
    assert data.metrics == {"ok": 1.0}
    assert data.tags["qdist.skipped.sqnr_fc1_"] == "inf at step 4"
    assert data.tags["qdist.skipped.bad"] == "nan at step 4"


def test_hundreds_of_values_in_one_call(uri: str, tmp_path: Path) -> None:
    metrics = {f"sqnr/layer.{i}": float(i) for i in range(1200)}
    params = {f"layer.{i}": "int8" for i in range(250)}
    with (
        open_tracker(spec(uri), spool_folder=tmp_path) as tracker,
        tracker.start_run("wide", command="quantize", config={}, params=params) as run,
    ):
        run.log_metrics(metrics)
    assert tracker.n_spooled == 0
    data = client_for(uri).get_run(run.id).data
    assert data.metrics == metrics
    assert data.params == params


def test_exceptions_end_runs_as_failed_or_killed(tmp_path: Path) -> None:
    uri = made_uri(tmp_path)
    damage = ConfigError("QD104", where="a", got="b", expected="c", mend="d")
    with open_tracker(spec(uri), spool_folder=tmp_path) as tracker:
        parent = tracker.start_run("search", command="search", config={})
        failed = parent.start_child("trial-000")
        with pytest.raises(ConfigError), failed:
            raise damage
        killed = parent.start_child("trial-001")
        with pytest.raises(KeyboardInterrupt), killed:
            raise KeyboardInterrupt
    outer = pytest.raises(ZeroDivisionError)
    with outer, open_tracker(spec(uri), spool_folder=tmp_path) as second:
        left_open = second.start_run("search", command="search", config={})
        left_open_child = left_open.start_child("trial-000")
        raise ZeroDivisionError("seven by nought")

    client = client_for(uri)
    status = {
        run.id: client.get_run(run.id).info.status
        for run in (parent, failed, killed, left_open, left_open_child)
    }
    assert list(status.values()) == ["FINISHED", "FAILED", "KILLED", "FAILED", "FAILED"]
    tags = client.get_run(failed.id).data.tags
    assert tags["qdist.error"] == f"ConfigError: {damage}"
    assert tags["qdist.error_code"] == "QD104"
    trace = artifact(uri, left_open.id, "error.txt", tmp_path)
    assert "Traceback" in trace
    assert "seven by nought" in trace


@pytest.mark.parametrize(
    ("artifacts", "expected"),
    [("all", ["p", "c", "b"]), ("best", ["p", "b"]), ("none", [])],
)
def test_artifact_policy(
    artifacts: Literal["all", "best", "none"], expected: list[str], tmp_path: Path
) -> None:
    for name in "pcb":
        (tmp_path / name).write_text(name)
    uri = made_uri(tmp_path)
    with (
        open_tracker(spec(uri, artifacts=artifacts), spool_folder=tmp_path) as tracker,
        tracker.start_run("search", command="search", config={}) as parent,
    ):
        parent.log_artifact(tmp_path / "p", "files")
        child = parent.start_child("trial-000")
        child.log_artifact(tmp_path / "c", "files")
        child.log_artifact(tmp_path / "b", "files", best=True)
        child.end()
        with pytest.raises(ArtifactError, match="QD604"):
            child.log_artifact(tmp_path / "missing")
    client = client_for(uri)
    stored = [
        Path(item.path).name
        for run in (parent, child)
        for item in client.list_artifacts(run.id, "files")
    ]
    assert sorted(stored) == sorted(expected)
    assert client.get_run(parent.id).data.tags["qdist.artifacts"] == artifacts


def test_dashboard_hints(server: MlflowServer, tmp_path: Path) -> None:
    secret = server.url.replace("http://", "http://user:secret@")
    with (
        open_tracker(spec(secret), spool_folder=tmp_path) as tracker,
        tracker.start_run("r", command="search", config={}) as run,
    ):
        experiment = client_for(server.url).get_experiment_by_name("digits").experiment_id
        assert tracker.dashboard_hint == f"{server.url}/#/experiments/{experiment}"
        assert run.url == f"{server.url}/#/experiments/{experiment}/runs/{run.id}"
    with (
        open_tracker(spec(made_uri(tmp_path)), spool_folder=tmp_path) as local,
        local.start_run("r", command="search", config={}) as run,
    ):
        command = f"mlflow ui --backend-store-uri {made_uri(tmp_path)}"
        assert local.dashboard_hint.startswith(command)
        assert run.url == local.dashboard_hint


def test_a_server_killed_in_mid_run_loses_nothing(tmp_path: Path) -> None:
    spool, warnings = tmp_path / "out", list[str]()
    model = tmp_path / "temporary.onnx"
    model.write_bytes(b"weights")
    with mlflow_server(tmp_path / "server") as running:
        tracker = open_tracker(spec(running.url), spool_folder=spool, warn=warnings.append)
        parent = tracker.start_run("search", command="search", config={})
        first = parent.start_child("trial-000", number=0)
        first.log_metrics({"score": 0.5})
        assert tracker.n_spooled == 0
        running.kill()
        started = time.monotonic()
        first.log_artifact(model, "model")
        first.end()
        for number in range(1, 30):
            with parent.start_child(
                f"trial-{number:03d}", params={"n": number}, number=number
            ) as c:
                c.log_metrics({"score": number / 100, "nan": float("nan")})
                c.log_table([{"layer": "fc1"}], "map")
        parent.end()
        elapsed = time.monotonic() - started
    model.unlink()
    assert elapsed < 30
    assert len(warnings) == 1
    assert SPOOL_NAME in warnings[0]

    lines = [json.loads(line) for line in (spool / SPOOL_NAME).read_text().splitlines()]
    assert tracker.n_spooled == len(lines) == 3 + 29 * 6
    assert all(line["error"] for line in lines)
    assert [(line["run"], line["kind"]) for line in lines[:2]] == [
        (first.id, "file"),
        (first.id, "end"),
    ]
    assert Path(lines[0]["payload"]["path"]).read_bytes() == b"weights"
    assert lines[0]["payload"]["folder"] == "model"
    assert (lines[-1]["run"], lines[-1]["kind"]) == (parent.id, "end")
    second = [line for line in lines if line["run"] == lines[2]["run"]]
    assert lines[2]["run"].startswith("local-")
    assert [line["kind"] for line in second] == ["create", "batch", "batch", "text", "end"]
    created, params, metrics, table, end = (line["payload"] for line in second)
    assert created["name"] == "trial-001"
    assert created["tags"]["mlflow.parentRunId"] == parent.id
    assert params["params"] == {"n": "1"}
    assert [fields[:2] for fields in metrics["metrics"]] == [["score", 0.01]]
    assert metrics["tags"] == {"qdist.skipped.nan": "nan at step 0"}
    assert table == {"text": "layer\nfc1\n", "name": "map.csv"}
    assert end["status"] == "FINISHED"
    mirrored = [
        line["payload"]["metrics"]
        for line in lines
        if line["run"] == parent.id and line["kind"] == "batch"
    ]
    assert [fields[0][3] for fields in mirrored] == list(range(1, 30))


def test_what_waited_is_sent_when_the_server_is_back(tmp_path: Path) -> None:
    spool, port = tmp_path / "out", free_port()
    model = tmp_path / "temporary.onnx"
    model.write_bytes(b"weights")
    with mlflow_server(tmp_path / "server", port) as running:
        uri = running.url
        tracker = open_tracker(spec(uri), spool_folder=spool, warn=list[str]().append)
        parent = tracker.start_run("search", command="search", config={})
        running.kill()
        for number in range(3):
            with parent.start_child(f"trial-{number:03d}", number=number) as child:
                child.log(metrics={"score": number / 8}, params={"n": number}, tags={"a": "b"})
                child.log_text("x", "note.txt")
                child.log_artifact(model, "model")
    assert tracker.n_spooled > 0
    model.unlink()
    # Another process of the same output folder, which is killed while it sends, and one more.
    with mlflow_server(tmp_path / "server", port):
        halfway = Spool(spool, list[str]().append, address=json.loads(first_line(spool))["to"])
        experiment = str(client_for(uri).get_experiment_by_name("digits").experiment_id)
        sink = MlflowSink(client_for(uri), experiment, halfway, remote=True)
        for record in list(halfway.waiting())[:5]:
            sink._again(record)  # sent, and the process dies before it can note that
        said: list[str] = []
        with open_tracker(spec(uri), spool_folder=spool, warn=said.append) as again:
            assert again.n_spooled == 0
            assert "had waited" in said[0]
            assert not list(spool.iterdir())
            known = again._sink.children(parent.id)
            assert sorted(known) == [0, 1, 2]
        client = client_for(uri)
        runs = client.search_runs([experiment])
        assert len(runs) == 4, "nothing is there twice"
        for number, state in known.items():
            run = client.get_run(state.run)
            assert run.info.status == "FINISHED"
            assert run.data.metrics == {"score": number / 8}
            assert run.data.params == {"n": str(number)}
            assert run.data.tags["a"] == "b"
            folder = tmp_path / str(number)
            folder.mkdir()
            assert artifact(uri, state.run, "model/temporary.onnx", folder) == "weights"
        # A server of another address gets none of it, and waits for none of it.
        elsewhere = made_uri(tmp_path)
        halfway.add("r", "text", {"text": "x", "name": "n"}, "away")
        with (
            open_tracker(spec(elsewhere), spool_folder=spool) as other,
            other.start_run("r", command="search", config={}) as run_,
        ):
            run_.log_metrics({"score": 1.0})
            assert other.n_spooled == 0
        assert client_for(elsewhere).get_run(run_.id).data.metrics == {"score": 1.0}
        assert (spool / SPOOL_NAME).exists()


def test_a_search_goes_on_after_an_outage_in_its_middle(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "server"
    with mlflow_server(folder, port) as running:
        uri = running.url
        tracker = open_tracker(spec(uri), spool_folder=tmp_path / "out", warn=list[str]().append)
        parent = tracker.start_run("search", command="search", config={})
        running.kill()
        with parent.start_child("trial-000", number=0) as lost:
            lost.log_metrics({"score": 0.25})
        assert tracker.n_spooled
    with mlflow_server(folder, port):
        tracker._sink._paused_until = 0.0  # type: ignore[attr-defined]  # the pause is over
        with parent.start_child("trial-001", number=1) as found:
            found.log_metrics({"score": 0.5})
        parent.end()
        assert tracker.n_spooled == 0
        assert not (tmp_path / "out" / SPOOL_NAME).exists()
        history = client_for(uri).get_metric_history(parent.id, "score")
        assert sorted((point.step, point.value) for point in history) == [(0, 0.25), (1, 0.5)]
        with open_tracker(spec(uri), spool_folder=tmp_path / "out") as again:
            resumed = again.start_run("search", command="search", config={}, resume=parent.id)
            assert resumed.id == parent.id
            assert sorted(resumed.children()) == [0, 1]
            child = resumed.start_child("trial-001", resume=resumed.children()[1].run)
            child.log_text("more", "more.txt")
            child.end()
            strange = again.start_run("search", command="search", config={}, resume="0" * 32)
            assert strange.id not in (parent.id, "0" * 32)


def first_line(folder: Path) -> str:
    return (folder / SPOOL_NAME).read_text().splitlines()[0]


def test_a_refused_record_is_spooled_and_the_next_one_is_written(
    server: MlflowServer, tmp_path: Path
) -> None:
    warnings: list[str] = []
    tracker = open_tracker(spec(server.url), spool_folder=tmp_path, warn=warnings.append)
    with tracker, tracker.start_run("r", command="search", config={}, params={"n": 1}) as run:
        run.log_params({"n": 2})  # parameters cannot be changed
        run.log_metrics({"score": 1.0})
    assert tracker.n_spooled == 1
    assert len(warnings) == 1
    assert not (tmp_path / SPOOL_NAME).exists(), "sending it again would not help"
    assert "n" in (tmp_path / REFUSED_NAME).read_text()
    assert client_for(server.url).get_run(run.id).data.metrics == {"score": 1.0}


def test_how_a_trials_command_ended_is_recorded(tmp_path: Path) -> None:
    uri = made_uri(tmp_path)
    ran = EvaluationRun(exit_status=3, seconds=1.25, output_tail="no label file\n")
    failed = {"evaluation_s": 1.5, EVALUATION: ran.to_json()}
    report = EvalReport(
        score=0.5,
        metric="top1",
        higher_is_better=True,
        metrics={"top1": 0.5},
        n_samples=None,
        seconds=2.0,
        log="0.5\n",
        exit_status=0,
    )
    plans = [Candidate(number=i, label="int8", choices={}) for i in range(3)]
    trials = [
        Trial(candidate=plans[0], report=None, n_bytes=9, reason="QD702", details=failed),
        Trial(candidate=plans[1], report=report, n_bytes=9, details={"evaluation_s": 2.25}),
        Trial(candidate=plans[2], report=None, n_bytes=0, reason="QD507"),
    ]
    with open_tracker(spec(uri), spool_folder=tmp_path / "out") as tracker:
        parent = tracker.start_run("search", command="tune", config={})
        with TrialLog(parent, TrialModels(folder=tmp_path / "trials"), "net", "none") as log:
            for trial in trials:
                log.add(trial)
        children = parent.children()
    client = client_for(uri)
    data = [client.get_run(children[number].run).data for number in range(3)]
    assert [d.tags["qdist.status"] for d in data] == ["failed", "ok", "failed"]
    assert [d.tags.get("qdist.exit_status") for d in data] == ["3", "0", None]
    assert [d.metrics.get("evaluation_s") for d in data] == [1.5, 2.25, None]
    for number, said in ((0, "no label file\n"), (1, "0.5\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert artifact(uri, children[number].run, "evaluation.log", folder) == said
