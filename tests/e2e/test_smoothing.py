"""SmoothQuant from the command line: measured once, planned, written again, and searched."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.session import RaySession
from qdist.plan.plan import load_plan
from tests.command_line import here, succeed

MODEL = ("model=digits_vit", "tracking=none")
DATA = ("data=digits", "data.calibration.limit=24")
CALIBRATE = ("calibrate", *MODEL, *DATA, "cluster.workers=1")
TUNE = (
    *("tune", *MODEL, *DATA, "evaluation=accuracy", "data.evaluation.limit=40"),
    *("search.max_trials=5", "search.sensitivity_samples=4", "quantization.scope=compute"),
    *("compare.samples=4", "cluster.workers=1"),
)
SEARCHED = (
    "search.strategy=optuna",
    "search.options={saturations: [max], percent: [], smoothing: [0.5, 0.55], round_size: 3}",
)


@pytest.fixture(scope="module")
def runs(cluster: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output root of a calibration with the rows of alpha 0.5."""
    root = tmp_path_factory.mktemp("smoothing")
    said = succeed(*CALIBRATE, f"output.root={root}")
    assert "smoothed" not in said
    # The rows that a plan needs are not there, and are asked for.
    refused = here("quantize", *MODEL, f"output.root={root}", "quantization.smoothing=0.5")
    assert refused.status == 2
    assert "QD402" in refused.err
    assert "calibration.smoothing=0.5" in refused.err
    said = succeed(*CALIBRATE, f"output.root={root}", "calibration.smoothing=0.5")
    assert "tensors smoothed" in said
    assert "Reshape makes it" in said
    return root


def receipts(root: Path) -> dict[str, int]:
    """When the smoothed models' receipts were written."""
    found = (root / "digits_vit" / "calibration.zarr" / "smoothed").glob("*/receipts/*")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_a_plan_brings_its_factors_along(runs: Path, tmp_path: Path) -> None:
    words = (*MODEL, f"output.root={runs}", f"output.folder={tmp_path / 'plain'}")
    succeed("quantize", *words)
    plain = load_plan(tmp_path / "plain" / "plan.json")
    assert plain.smoothing is None
    words = (*MODEL, f"output.root={runs}", f"output.folder={tmp_path / 'out'}")
    said = succeed("quantize", *words, "quantization.smoothing=0.5")
    assert "tensors smoothed with alpha 0.5" in said
    folder = tmp_path / "out"
    plan = load_plan(folder / "plan.json")
    assert plan.smoothing is not None
    assert plan.model_digest != plain.model_digest
    assert plan.statistics_digest != plain.statistics_digest
    again = tmp_path / "again.onnx"
    succeed("emit", *words, f"artifact={again}")
    assert again.read_bytes() == (folder / "model.onnx").read_bytes()
    succeed("compare", *words, *DATA, "compare.samples=4")
    assert "/blocks.0/attn/qkv/MatMul" in (folder / "layers.json").read_text()
    other = here("emit", "model=digits_cnn", "tracking=none", f"plan={folder / 'plan.json'}")
    assert other.status == 2
    assert "QD505" in other.err


def test_a_search_measures_what_it_needs_and_goes_on(runs: Path, tmp_path: Path) -> None:
    words = (*TUNE, f"output.root={runs}", f"output.folder={tmp_path}", *SEARCHED)
    clash = here(*words, "quantization.smoothing=0.5")
    assert "QD107" in clash.err
    before = receipts(runs)
    succeed(*words, "search.max_trials=3")
    middle = receipts(runs)
    said = succeed(*words)
    assert "known before" in said
    assert "failed" not in said
    # What was measured before serves again; in all there is a store for each strength.
    now = receipts(runs)
    assert before.items() <= middle.items() <= now.items()
    assert len({Path(path).parent for path in now}) == 2
    plans = {path.parent: load_plan(path) for path in tmp_path.glob("trials/trial-*/plan.json")}
    smoothed = {place: p for place, p in plans.items() if p.smoothing is not None}
    assert {p.smoothing.alpha for p in smoothed.values() if p.smoothing} == {0.5, 0.55}
    for place in smoothed:
        copy = tmp_path / "copy.onnx"
        succeed("emit", *MODEL, f"plan={place / 'plan.json'}", f"artifact={copy}")
        assert copy.read_bytes() == (place / "model.onnx").read_bytes()


def test_all_trials_of_a_run_may_be_smoothed(runs: Path, tmp_path: Path) -> None:
    said = succeed(
        *TUNE,
        f"output.root={runs}",
        f"output.folder={tmp_path}",
        "quantization.smoothing=0.5",
        "search=greedy",
        "search.max_trials=2",
    )
    assert "tensors smoothed with alpha 0.5" in said
    assert "failed" not in said
    best = load_plan(tmp_path / "plan.json")
    assert best.smoothing is not None
    assert "smoothed with alpha 0.5" in (tmp_path / "report.html").read_text()


def test_a_model_without_such_tensors_is_refused(
    cluster: RaySession, cnn_runs: Path, tmp_path: Path
) -> None:
    words = ("model=digits_cnn", "tracking=none", f"output.root={cnn_runs}")
    refused = here(
        "quantize", *words, "quantization.smoothing=0.5", f"output.folder={tmp_path / 'out'}"
    )
    assert refused.status == 2
    assert "QD212" in refused.err
