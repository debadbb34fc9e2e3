"""Bad input: every one is refused with its code, in words that name what is wrong, in one line,
and leaves nothing half-written behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from actors.session import RaySession
from qdist.demo import demo_file
from tests.command_line import check_error, here, left_behind, process, succeed
from tests.e2e.mlflow_server import free_port
from tests.onnx_models import model, value

CNN = ("model=digits_cnn", "data=digits", "tracking=none")
VIT = ("model=digits_vit", "data=digits", "tracking=none")
SAMPLES = np.random.default_rng(0).normal(size=(12, 1, 8, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def runs(cnn_runs: Path, tmp_path: Path) -> Path:
    """A copy of a calibrated and quantized ``digits_cnn``, where `qdist` looks by default."""
    return Path(shutil.copytree(cnn_runs, tmp_path / "qdist-runs"))


def saved(array: NDArray[np.generic]) -> tuple[str, ...]:
    """Words that calibrate the demo CNN on these samples."""
    np.savez("samples.npz", x=array)
    return (
        "calibrate",
        "model=digits_cnn",
        "tracking=none",
        "data.path=samples.npz",
        "data.calibration.inputs.images=x",
        "cluster.workers=1",
    )


# --- models -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "quantize", "emit"])
def test_a_model_that_is_not_there(command: str, runs: Path) -> None:
    words = {
        "calibrate": ("data=digits",),
        "evaluate": ("data=digits", "artifact=qdist-runs/digits_cnn/model.onnx"),
        "quantize": (),
        "emit": ("plan=qdist-runs/digits_cnn/plan.json",),
    }[command]
    before = left_behind(Path())
    check_error(
        here(command, "model.path=gone.onnx", "tracking=none", *words), "QD201", "gone.onnx"
    )
    assert left_behind(Path()) == before


def damaged_text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)


def damaged_truncated(path: Path) -> None:
    whole = demo_file("digits_cnn.onnx").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def damaged_empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    ("damage", "code"),
    [(damaged_text, "QD202"), (damaged_truncated, "QD203"), (damaged_empty, "QD202")],
)
def test_a_model_that_is_none(damage: Callable[[Path], None], code: str) -> None:
    damage(Path("model.onnx"))
    for words in (
        ("calibrate", "data=digits"),
        ("evaluate", "data=digits", f"artifact={demo_file('digits_cnn.onnx')}"),
    ):
        result = here(*words, "model.path=model.onnx", "tracking=none")
        check_error(result, code, "model.onnx")
    assert left_behind(Path()) == ["model.onnx"]


def test_a_provider_that_is_not_there() -> None:
    words = ("model.provider=MIGraphXExecutionProvider",)
    check_error(
        here("calibrate", *CNN, *words), "QD210", "MIGraphXExecution", "CPUExecutionProvider"
    )
    artifact = f"artifact={demo_file('digits_cnn.onnx')}"
    check_error(here("evaluate", *CNN, artifact, *words), "QD210", "MIGraphXExecution")
    assert left_behind(Path()) == []


# --- data ---------------------------------------------------------------------------------


def test_a_calibration_set_that_is_not_there() -> None:
    words = saved(SAMPLES)
    Path("samples.npz").unlink()
    check_error(here(*words), "QD301", "samples.npz")
    assert left_behind(Path()) == []


def test_an_empty_calibration_set() -> None:
    check_error(here(*saved(SAMPLES[:0])), "QD302", "samples.npz", "0 samples")
    result = here(*saved(SAMPLES), "data.calibration.start=12")
    check_error(result, "QD302", "12 samples, of which the first 12 are skipped")
    assert left_behind(Path()) == ["samples.npz"]


def test_samples_of_the_wrong_shape() -> None:
    result = here(*saved(SAMPLES[:, :, :7]))
    check_error(result, "QD303", "sample 000000, input images", "[1, 7, 8]", "[1, 8, 8]")
    assert left_behind(Path()) == ["samples.npz"]


def test_samples_of_the_wrong_type() -> None:
    result = here(*saved(SAMPLES.astype(np.float64)))
    check_error(result, "QD304", "sample 000000, input images", "float64", "float32")
    check_error(result, "QD304", "preprocess.dtype=float32")
    assert left_behind(Path()) == ["samples.npz"]


def test_an_input_that_the_model_does_not_have() -> None:
    words = [w.replace("inputs.images", "inputs.image") for w in saved(SAMPLES)]
    check_error(here(*words), "QD307", "missing images", "not an input of the model: image;")
    assert left_behind(Path()) == ["samples.npz"]


def test_nan_in_a_sample_names_the_sample_and_the_input(cluster: RaySession) -> None:
    bad = SAMPLES.copy()
    bad[9, 0, 3, 5] = np.nan
    result = here(*saved(bad), "calibration.shard_samples=4")
    check_error(result, "QD305", "sample 000009, input images", "1 of 64", "nan at index [0, 3, 5]")
    # What was measured before stays, and is no finished calibration.
    assert left_behind(Path("qdist-runs")) == ["digits_cnn/calibration.zarr"]
    check_error(here("quantize", "model=digits_cnn", "tracking=none"), "QD402", "no finished")
    assert left_behind(Path("qdist-runs")) == ["digits_cnn/calibration.zarr"]
    # The same store goes on with the repaired sample.
    assert "samples          │ 12" in succeed(*saved(SAMPLES), "calibration.shard_samples=4")


def test_nan_in_an_activation_stops_or_is_reported(cluster: RaySession) -> None:
    nodes = [
        helper.make_node("Log", ["x"], ["logged"]),
        helper.make_node("MatMul", ["logged", "w"], ["y"]),
    ]
    weights = {"w": np.eye(4, dtype=np.float32)}
    onnx.save(model(nodes, [value("x", ["n", 4])], [value("y", ["n", 4])], weights), "log.onnx")
    rows = np.full((8, 4), 2, np.float32)
    rows[6, 1] = -1
    np.savez("samples.npz", x=rows)
    words = (
        "calibrate",
        "model.path=log.onnx",
        "data.path=samples.npz",
        "data.calibration.inputs={x: x}",
        "tracking=none",
        "cluster.workers=1",
    )
    result = here(*words)
    check_error(result, "QD309", "tensor logged", "000006", "1 NaN", "calibration.on_nan=report")
    assert left_behind(Path("qdist-runs")) == ["log/calibration.zarr"]
    out = succeed(*words, "calibration.on_nan=report")
    assert "note: tensor logged held 1 NaN" in out
    # What was measured under the lenient policy does not pass the strict one.
    check_error(here(*words), "QD309", "tensor logged", "1 NaN", "on_nan=report again")


def test_labels_that_are_missing(runs: Path) -> None:
    result = here("evaluate", *CNN, "evaluation=accuracy", "data.evaluation.labels=null")
    check_error(result, "QD308", "labels")
    assert not (runs / "digits_cnn/evaluation.json").exists()


# --- stores -------------------------------------------------------------------------------


def test_a_store_of_another_model(runs: Path) -> None:
    store = "store.path=qdist-runs/digits_cnn/calibration.zarr"
    check_error(here("calibrate", *VIT, store), "QD401", "differ in the model (stored ")
    result = here("quantize", "model=digits_vit", "tracking=none", store)
    check_error(result, "QD401", "statistics of model", "digits_vit.onnx", "qdist calibrate")
    assert not list((runs / "digits_vit").iterdir())


@pytest.mark.parametrize(
    ("word", "named"),
    [
        (
            "data.calibration.preprocess.scale=0.125",
            "the preprocessing (inputs images scale stored 0.0625, now 0.125)",
        ),
        ("calibration.micro_batch=2", "calibration.micro_batch (stored 4, now 2)"),
        (
            "calibration.groups=[{match: images, axis: 1, group_size: 1}]",
            "the statistics",
        ),
        ("model.threads=2", "the execution fingerprint"),
    ],
)
def test_a_store_made_with_other_settings(word: str, named: str, runs: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    check_error(here("calibrate", *CNN, word), "QD401", named)
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()} == before


def test_no_store_and_a_folder_that_is_none(tmp_path: Path) -> None:
    result = here("quantize", "model=digits_cnn", "tracking=none")
    check_error(result, "QD402", "calibration.zarr", "qdist calibrate")
    Path("things").mkdir()
    Path("things/notes.txt").touch()
    check_error(here("calibrate", *CNN, "store.path=things"), "QD405", "other files")
    assert left_behind(tmp_path) == ["things/notes.txt"]


# --- plans and artifacts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "code", "parts"),
    [
        ("quantization.saturation=msee", "QD501", ("'msee'", "max, percentile, mse, kl")),
        (
            "quantization.saturation_parameters={percent: 99}",
            "QD502",
            ("'percent'", "method auto"),
        ),
        ("quantization.precision=int9", "QD506", ("'int9'", "w4, w4a8, u4")),
        (
            "quantization.rules=[{match: '*con1*', precision: int16}]",
            "QD503",
            ("'*con1*'", "15 layers", "/conv/conv/Conv"),
        ),
        ("quantization.rules=[{match: 'op:Covn', precision: int16}]", "QD503", ("Conv", "Gemm")),
        ("quantization.rules=[{match: '*', precision: int9}]", "QD506", ("'int9'",)),
        ("quantization.rules=[{match: '*', saturation: msee}]", "QD501", ("'msee'",)),
        ("target.precisions=[int16]", "QD507", ("int8", "target qdq")),
        ("target.precisions=[int9]", "QD506", ("'int9'",)),
        ("target=qdq_symmetric", "QD507", ("quantization.symmetric=true",)),
    ],
)
def test_quantization_settings_that_cannot_be(
    word: str, code: str, parts: tuple[str, ...], runs: Path
) -> None:
    before = {p: p.read_bytes() for p in (runs / "digits_cnn").iterdir() if p.is_file()}
    check_error(here("quantize", "model=digits_cnn", "tracking=none", word), code, *parts)
    assert {p: p.read_bytes() for p in (runs / "digits_cnn").iterdir() if p.is_file()} == before


def test_a_plan_of_another_model(runs: Path) -> None:
    plan = "plan=qdist-runs/digits_cnn/plan.json"
    check_error(
        here("emit", "model=digits_vit", "tracking=none", plan, "artifact=vit.onnx"),
        "QD505",
        "plan.json",
        "qdist quantize",
    )
    check_error(here("compare", *VIT, plan), "QD505", "plan.json")
    assert not Path("vit.onnx").exists()


EMIT = ("emit", "model=digits_cnn", "tracking=none", "artifact=out.onnx")


def test_a_damaged_plan(runs: Path) -> None:
    path = runs / "digits_cnn/plan.json"
    whole = path.read_text()
    other = json.loads(whole)
    del other["layers"][0]["activations"]
    wrong = json.loads(whole)
    wrong["layers"][0]["choice"]["precision"] = "int9"
    future = json.loads(whole) | {"qdist_plan": 99}
    for text, part in (
        (whole[: len(whole) // 2], "JSON"),
        ("[]", "TypeError"),
        (json.dumps(other), "'activations'"),
        (json.dumps(wrong), "int9"),
        (json.dumps(future), "schema 99"),
    ):
        path.write_text(text)
        check_error(here(*EMIT), "QD504", str(path), part)
        check_error(here("show", str(path)), "QD504", str(path), part)
    path.unlink()
    check_error(here(*EMIT), "QD504", "nothing there")
    assert not Path("out.onnx").exists()


def test_an_artifact_that_is_not_there() -> None:
    result = here("evaluate", *CNN, "evaluation=accuracy")
    check_error(result, "QD604", "digits_cnn/model.onnx", "qdist quantize", "artifact=FILE")
    assert left_behind(Path()) == []


@pytest.mark.parametrize("command", ["calibrate", "quantize", "evaluate", "compare", "tune"])
def test_an_output_folder_that_cannot_be_written(command: str, runs: Path) -> None:
    Path("file").touch()
    settings = [f"output.folder={place}" for place in places_that_cannot_be_written()]
    words = {
        "calibrate": ("data=digits", "store.path=s.zarr"),
        "quantize": (f"store.path={runs}/digits_cnn/calibration.zarr",),
        "evaluate": ("data=digits", f"artifact={runs}/digits_cnn/model.onnx"),
        "compare": ("data=digits", f"plan={runs}/digits_cnn/plan.json"),
        "tune": ("data=digits", "store.path=s.zarr"),
    }[command]
    before = left_behind(Path())
    for setting in settings:
        result = here(command, "model=digits_cnn", "tracking=none", setting, *words)
        check_error(result, "QD603", setting.removeprefix("output.folder="), "output.folder=PATH")
    assert left_behind(Path()) == before


def test_an_artifact_that_cannot_be_written(runs: Path) -> None:
    Path("file").touch()
    Path("taken.onnx").mkdir()
    for place in ("file/model.onnx", "taken.onnx"):
        result = here("emit", "model=digits_cnn", "tracking=none", f"artifact={place}")
        check_error(result, "QD603", place.split("/")[0])
    assert not list(Path("taken.onnx").iterdir())
    assert not [p for p in Path().iterdir() if "partial" in p.name]


def places_that_cannot_be_written() -> list[str]:
    """A folder below a file and, unless this user may write anywhere, one without permission."""
    places = ["file/out"]
    if os.geteuid() != 0:
        Path("closed").mkdir(mode=0o500)
        places.append("closed/out")
    return places


# --- evaluations --------------------------------------------------------------------------

FAILS = "import sys; print('loading'); print('no GPU', file=sys.stderr); sys.exit(1)"
TALKS = "print('accuracy is good')"


def script(text: str) -> str:
    """A word that scores models with a Python script."""
    Path("score.py").write_text(text)
    return f"evaluation.command=[{sys.executable},{Path('score.py').absolute()},'{{model}}']"


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        (FAILS, "QD702", ("exit status 1", "'no GPU'")),
        (TALKS, "QD704", ("'accuracy is good' from stdout", "name: number")),
        ("print('nan')", "QD704", ("nan", "finite")),
    ],
    ids=["fails", "talks", "nan"],
)
def test_a_script_that_gives_no_score(
    text: str, code: str, parts: tuple[str, ...], runs: Path
) -> None:
    words = ("evaluate", *CNN, "evaluation=command", script(text))
    check_error(here(*words), code, "score.py", *parts)
    assert not (runs / "digits_cnn/evaluation.json").exists()
    assert not list((runs / "digits_cnn/scratch").iterdir())


def test_a_script_that_is_not_there(runs: Path) -> None:
    command = "evaluation.command=[./score-all,'{model}']"
    check_error(here("evaluate", *CNN, "evaluation=command", command), "QD707", "./score-all")


def test_a_script_that_hangs_is_ended_with_its_children(runs: Path) -> None:
    text = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"open({str(Path('pids').absolute())!r}, 'a').write(f'{{os.getpid()}} {{child.pid}} ')\n"
        "time.sleep(600)\n"
    )
    begin = time.monotonic()
    result = here("evaluate", *CNN, "evaluation=command", script(text), "evaluation.timeout_s=1")
    check_error(result, "QD703", "no end after 1 s", "timeout_s")
    assert time.monotonic() - begin < 20
    pids = [int(pid) for pid in Path("pids").read_text().split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not list((runs / "digits_cnn/scratch").iterdir())


TUNE = (
    *("tune", *CNN, "evaluation=command", "cluster.workers=1"),
    *("search.max_trials=3", "search.sensitivity_samples=4"),
)
COUNTS = """
import sys
import onnx
graph = onnx.load(sys.argv[1]).graph
n = sum(node.op_type == "DequantizeLinear" for node in graph.node)
"""


def test_a_search_goes_on_after_trials_whose_script_fails(runs: Path, cluster: RaySession) -> None:
    # The trials differ in the ranges of activations: an odd digit sum of a scale fails.
    text = (
        COUNTS
        + "digest = sum(open(sys.argv[1], 'rb').read()) % 2\n"
        + "sys.exit('unlucky') if n and digest else print('score:', 1 - n / 100)\n"
    )
    out = succeed(*TUNE, "search.max_trials=7", script(text))
    assert "failed" in out
    assert "QD702" in out
    assert "unlucky" in out
    assert "is the best" in out
    assert (runs / "digits_cnn/report.html").is_file()


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (
            "import os, time\n"
            "open(os.environ['TRACE'], 'a').write(f'{os.getpid()} ')\n"
            "time.sleep(600) if n else print(1)",
            "QD703",
        ),
        ("print('?' if n else 1)", "QD704"),
    ],
    ids=["hangs", "talks"],
)
def test_a_search_in_which_every_trial_fails(
    ending: str, code: str, runs: Path, cluster: RaySession
) -> None:
    before = {
        name: (runs / "digits_cnn" / name).read_bytes() for name in ("model.onnx", "plan.json")
    }
    trace = Path("pids").absolute()
    trace.touch()
    limits = (f"evaluation.environment.TRACE={trace}", "evaluation.timeout_s=2")
    words = (*TUNE, script(COUNTS + ending), *limits, "search.saturations=[]")
    check_error(here(*words), "QD706", "3 trials", code, "mend the evaluation")
    assert {name: (runs / "digits_cnn" / name).read_bytes() for name in before} == before
    assert not (runs / "digits_cnn/report.html").exists()
    assert not [pid for pid in trace.read_text().split() if Path(f"/proc/{pid}").exists()]


def test_a_script_that_fails_on_the_float_model_ends_the_search_at_once(
    runs: Path, cluster: RaySession
) -> None:
    check_error(here(*TUNE, script(FAILS)), "QD702", "exit status 1", "'no GPU'")
    assert not list(runs.glob("digits_cnn/trials/*"))


# --- clusters and tracking ----------------------------------------------------------------


def test_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    begin = time.monotonic()
    words = ("calibrate", *CNN, "cluster=ray", f"cluster.address=127.0.0.1:{free_port()}")
    result = process(*words, cwd=tmp_path)
    check_error(result, "QD801", "cluster.address=127.0.0.1:", "ray start --head")
    assert time.monotonic() - begin < 30


def test_workers_that_do_not_fit(cluster: RaySession) -> None:
    result = here("calibrate", *CNN, "cluster.cpus_per_worker=1000")
    check_error(result, "QD802", "1000 CPU", "cluster.cpus_per_worker")
    assert left_behind(Path("qdist-runs")) == ["digits_cnn/calibration.zarr"]


@pytest.mark.parametrize("command", ["calibrate", "quantize"])
def test_a_tracking_server_that_does_not_answer(
    command: str, runs: Path, cluster: RaySession
) -> None:
    (runs / "digits_cnn/plan.json").unlink()
    uri = f"tracking.uri=http://127.0.0.1:{free_port()}"
    data = ("data=digits", "store.path=new.zarr") if command == "calibrate" else ()
    result = here(command, "model=digits_cnn", "tracking=server", uri, *data)
    check_error(result, "QD901", uri.removeprefix("tracking.uri="), "tracking.enabled=false")
    # Found out before anything slow was done.
    assert not Path("new.zarr").exists()
    assert not (runs / "digits_cnn/plan.json").exists()
