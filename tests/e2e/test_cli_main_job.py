"""The whole job as a user does it, from the float model to the best artifact in MLflow."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from mlflow import MlflowClient

from actors.session import RaySession
from qdist.demo import demo_file
from qdist.plan.plan import load_plan
from qdist.store.zarr_store import open_store
from tests.command_line import here, succeed

N_TRIALS = 8
MODEL = "model=digits_cnn"
SCORED = (MODEL, "data=digits", "evaluation=accuracy")
TUNE = ("tune", *SCORED, f"search.max_trials={N_TRIALS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the commands printed and left. ``folder``: of the model; ``root``: of the runs."""

    root: Path
    folder: Path
    said: dict[str, str]
    int8_plan: Path
    int8_score: float


@pytest.fixture(scope="module")
def job(cluster: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """Every command once, in the order of a first run, with nothing but defaults."""
    home = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("COLUMNS", "250")
        folder = home / "qdist-runs/digits_cnn"
        said = {
            "calibrate": succeed("calibrate", MODEL, "data=digits", "tracking=none"),
            "quantize": succeed("quantize", MODEL, "tracking=none"),
            "evaluate": succeed("evaluate", *SCORED, "tracking=none"),
            "compare": succeed("compare", MODEL, "data=digits", "compare.dump=3", "tracking=none"),
            "emit": succeed("emit", MODEL, "artifact=again.onnx", "tracking=none"),
        }
        score = json.loads((folder / "evaluation.json").read_text())["quantized"]["score"]
        plan = Path(shutil.copy(folder / "plan.json", home / "int8.json"))
        (folder / "evaluation.json").unlink()
        assert (home / "again.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
        said["tune"] = succeed(*TUNE)
        said["evaluate the best"] = succeed("evaluate", *SCORED, "tracking=none")
        yield Job(root=home, folder=folder, said=said, int8_plan=plan, int8_score=score)


def rows(text: str) -> dict[str, str]:
    """A two-column table that a command printed."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return {pair[0]: pair[1] for pair in cells if len(pair) == 2}


def test_every_command_prints_real_numbers(job: Job) -> None:
    calibrated = rows(job.said["calibrate"])
    assert calibrated["samples"] == "160"
    # 160 images of 64 values are among what was counted.
    assert int(calibrated["values counted"].replace(",", "")) > 160 * 64
    assert "next: qdist quantize" in job.said["calibrate"]
    quantized = rows(job.said["quantize"])
    assert quantized["quantized"].startswith("7 of 7 matmul- and conv-like layers")
    assert re.fullmatch(r"0\.07 MB, 30% of the float model", quantized["size"])
    assert re.search(r"top1 +│ 0\.9983 │ +0\.99", job.said["evaluate"])
    assert job.int8_score > 0.97
    n_compared = sum(layer.is_quantized for layer in load_plan(job.int8_plan).layers)
    assert f"all {n_compared} layers: " in job.said["compare"]
    assert re.search(r"\d+ files of dump level 3", job.said["compare"])
    assert sum(path.is_file() for path in (job.folder / "dump").rglob("*")) > 10
    assert rows(job.said["emit"])["opset"] == "13"


def test_the_next_command_that_calibrate_names_works_as_it_stands(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = job.said["calibrate"].split("next: ")[1].splitlines()[0]
    program, *words = line.split()
    assert program == "qdist"
    succeed(*words, "tracking=none")
    assert (tmp_path / "qdist-runs/digits_cnn/model.onnx").is_file()


def trials_of(text: str) -> dict[int, float]:
    """Trial -> score, from the lines that appear while the search goes on."""
    found = re.findall(r"^trial +(\d+) +(\d\.\d{4}) ", text, re.MULTILINE)
    return {int(number): float(score) for number, score in found}


def test_the_best_is_never_worse_than_the_plain_plan(job: Job) -> None:
    scores = trials_of(job.said["tune"])
    assert sorted(scores) == list(range(N_TRIALS))
    rescored = json.loads((job.folder / "evaluation.json").read_text())
    assert rescored["quantized"]["score"] >= job.int8_score
    assert max(scores.values()) >= scores[0]
    assert round(rescored["quantized"]["score"], 4) == max(scores.values())
    assert (job.folder / "report.html").stat().st_size > 10_000


def test_what_was_scored_is_what_ships(job: Job) -> None:
    """Law 5: the file on disk, scored again by another command, has exactly the reported score."""
    parent, _ = runs_of(job)
    rescored = json.loads((job.folder / "evaluation.json").read_text())
    assert rescored["quantized"]["score"] == parent.data.metrics["best_score"]
    assert rescored["float"]["score"] == parent.data.metrics["float_score"]
    number = int(parent.data.tags["qdist.best_trial"])
    trial = job.folder / f"trials/trial-{number:03d}"
    assert (trial / "model.onnx").read_bytes() == (job.folder / "model.onnx").read_bytes()
    assert load_plan(trial / "plan.json").digest == metadata(job.folder / "model.onnx")


def metadata(path: Path) -> str:
    """The plan's digest that an artifact carries."""
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}["qdist.plan"]


def runs_of(job: Job) -> tuple[Any, list[Any]]:
    """The parent run and its children, by number."""
    client = MlflowClient(f"sqlite:///{job.root}/qdist-runs/mlflow.db")
    experiment = client.get_experiment_by_name("qdist")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == len(runs) - 1
    return parent, sorted(children, key=lambda run: int(run.data.tags["qdist.number"]))


def test_mlflow_has_one_parent_and_a_child_for_every_trial(job: Job) -> None:
    parent, children = runs_of(job)
    store = open_store(job.folder / "calibration.zarr")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["qdist.model_digest"] == store.identity.model_digest
    assert len(parent.data.tags["qdist.data_digest"]) == 64
    assert parent.data.params["model"] == "digits_cnn"
    assert parent.data.params["max_trials"] == str(N_TRIALS)
    assert {"report.html", "plan.json", "model.onnx", "layers.csv", "config.yaml"} <= files(parent)
    assert len(children) == N_TRIALS
    scores = trials_of(job.said["tune"])
    for number, child in enumerate(children):
        assert child.info.status == "FINISHED"
        assert child.data.tags["qdist.status"] == "ok"
        assert {"plan.json", "layers.csv", "model.onnx"} <= files(child)
        folder = artifacts(child)
        assert child.data.tags["qdist.plan_digest"] == load_plan(folder / "plan.json").digest
        assert child.data.tags["qdist.plan_digest"] == metadata(folder / "model.onnx")
        assert round(child.data.metrics["score"], 4) == scores[number]
        assert child.data.metrics["score"] == child.data.metrics["top1"]
        assert {"agreement", "sqnr_db", "artifact_mb", "build_s"} <= set(child.data.metrics)
        with (folder / "layers.csv").open() as file:
            table = list(csv.DictReader(file))
        changed = sum(row["changed"] == "True" for row in table)
        assert str(changed) == child.data.params["changed_layers"]
    assert len({frozenset(child.data.params) for child in children}) == 1, "not comparable"
    assert len({child.data.tags["qdist.plan_digest"] for child in children}) == N_TRIALS


def artifacts(run: Any) -> Path:
    return Path(str(run.info.artifact_uri).removeprefix("file://"))


def files(run: Any) -> set[str]:
    return {path.name for path in artifacts(run).iterdir()}


def test_one_worker_finds_the_same_best_plan_as_two(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"store.path={job.folder}/calibration.zarr"
    alone = succeed(*TUNE, "cluster.workers=1", "tracking=none", store)
    assert "all of it done before" in alone
    folder = tmp_path / "qdist-runs/digits_cnn"
    for name in ("plan.json", "model.onnx"):
        assert (folder / name).read_bytes() == (job.folder / name).read_bytes()
    assert trials_of(alone) == trials_of(job.said["tune"])


def test_a_plan_emitted_twice_is_the_same_to_the_byte(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first.onnx", "second.onnx"):
        succeed("emit", MODEL, f"plan={job.folder}/plan.json", f"artifact={name}", "tracking=none")
    first = (tmp_path / "first.onnx").read_bytes()
    assert first == (tmp_path / "second.onnx").read_bytes()
    assert first == (job.folder / "model.onnx").read_bytes()


def test_quantize_never_runs_the_float_model(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2: sessions exist only to prove that the artifact loads, and none of them runs."""
    monkeypatch.chdir(tmp_path)
    loaded: list[object] = []

    class Loaded:
        def __init__(self, model: object, *_: object, **__: object) -> None:
            loaded.append(model)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Loaded)
    store = f"store.path={job.folder}/calibration.zarr"
    for method in ("max", "percentile", "mse", "kl"):
        out = succeed(
            "quantize", MODEL, "tracking=none", store, f"quantization.saturation={method}"
        )
        assert "7 of 7" in out
    folder = tmp_path / "qdist-runs/digits_cnn"
    assert len(loaded) == 4
    for model in loaded:
        path = Path(str(model))
        assert path.name == "model.onnx"
        assert path.is_relative_to(folder)
    plan = load_plan(tmp_path / "qdist-runs/digits_cnn/plan.json")
    assert {e.quantizer.method for layer in plan.layers for e in layer.activations} == {"kl"}


def test_a_sweep_keeps_every_result_and_shares_the_store(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(job.root / "qdist-runs", tmp_path / "qdist-runs")
    before = (root / "digits_cnn/plan.json").read_bytes()
    out = succeed("quantize", MODEL, "tracking=none", "-m", "quantization.saturation=max,mse")
    sweep = root / "digits_cnn/sweep"
    assert sorted(path.name for path in sweep.iterdir()) == [
        "quantization.saturation=max",
        "quantization.saturation=mse",
    ]
    for method in ("max", "mse"):
        place = sweep / f"quantization.saturation={method}"
        assert f"── quantization.saturation={method} ──" in out
        plan = load_plan(place / "plan.json")
        used = {e.quantizer.method for layer in plan.layers for e in layer.activations}
        assert used == {method}
        assert metadata(place / "model.onnx") == plan.digest
    assert (root / "digits_cnn/plan.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.rglob("*.zarr")) == ["calibration.zarr"]
    # One mistake in a sweep ends it in one line, too.
    result = here("quantize", MODEL, "tracking=none", "-m", "quantization.precision=int8,int9")
    assert result.status == 2
    assert result.err.startswith("error: QD506")
    assert result.err.count("\n") == 1


def test_show_prints_what_is_in_everything(job: Job) -> None:
    best = job.folder / "plan.json"
    assert "160 samples in" in succeed("show", str(job.folder / "calibration.zarr"))
    assert "/conv/conv/Conv" in succeed("show", str(best))
    assert "/conv/conv/Conv" in succeed("show", "model", str(demo_file("digits_cnn.onnx")))
    artifact = succeed("show", str(job.folder / "model.onnx"))
    assert metadata(job.folder / "model.onnx")[:12] in artifact
    difference = succeed("show", str(job.int8_plan), str(best))
    changed = {
        layer.name
        for layer, other in zip(
            load_plan(job.int8_plan).layers, load_plan(best).layers, strict=True
        )
        if layer.choice != other.choice
    }
    assert changed
    assert all(name in difference for name in changed)
    same = succeed("show", str(best), str(best))
    assert not any(name in same for name in changed)
