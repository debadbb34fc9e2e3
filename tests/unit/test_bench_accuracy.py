"""The accuracy benchmark: its intervals, its coverage, and a smoke run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import save

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from bench_accuracy_ort import coverage  # noqa: E402

from qdist.emit.qdq import emit_qdq  # noqa: E402
from qdist.plan.choice import LayerChoice  # noqa: E402
from tests.onnx_models import (  # noqa: E402
    ANY_TARGET,
    frozen_from,
    planner_for,
    samples_of,
)
from tests.unit.test_plan_planner import small_model  # noqa: E402


def test_coverage_is_counted_in_the_file(tmp_path: Path) -> None:
    frozen = frozen_from(small_model(), tmp_path / "model.onnx")
    planner = planner_for(frozen, samples_of("x", 6), tmp_path / "store")
    for low, quantized in (({"first", "second"}, 2), ({"second"}, 1), (set(), 0)):
        choices = {
            x.name: LayerChoice(precision="int8" if x.name in low else "float32")
            for x in planner.layers
        }
        path = tmp_path / f"{quantized}.onnx"
        if low:
            emit_qdq(frozen, ANY_TARGET.project(planner.plan(choices)), path)
        else:
            save(small_model(), path)
        found = coverage(path)
        assert (found.n_compute, found.n_quantized) == (2, quantized)
        assert found.n_activations == quantized


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a smoke run writes, and what it prints."""
    written = tmp_path_factory.mktemp("smoke") / "accuracy.json"
    return written, run_quick("--json", str(written))


def run_quick(*words: str) -> str:
    command = [sys.executable, str(SCRIPTS / "bench_accuracy.py"), "--quick", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_models_side_by_side_are_measured_alike(smoke: tuple[Path, str], tmp_path: Path) -> None:
    written = tmp_path / "two.json"
    run_quick(
        *("--only", "digits_cnn", "--only", "digits_vit"),
        *("--jobs", "2", "--picker", "io_high", "--json", str(written)),
    )
    found = json.loads(written.read_text("utf-8"))["models"]
    assert list(found) == ["digits_vit", "digits_cnn"]
    assert not any("unfinished" in model for model in found.values())
    alone = json.loads(smoke[0].read_text("utf-8"))["models"]["digits_cnn"]
    for key in ("rows", "against_ort", "wide_against_float"):
        assert found["digits_cnn"][key] == alone[key]


def test_a_smoke_run_measures_both_sides(smoke: tuple[Path, str]) -> None:
    written, printed = smoke
    (model,) = json.loads(written.read_text("utf-8"))["models"].values()
    tools = {row["tool"] for row in model["rows"]}
    assert tools == {"qdist", "onnxruntime"}
    assert all("error" not in row and row["coverage"] > 0 for row in model["rows"])
    assert {(e["symmetric"], e["metric"]) for e in model["against_ort"]} == {
        (s, m) for s in (False, True) for m in ("agreement", "sqnr_db", "top1")
    }
    assert run_quick("--markdown", str(written)) == printed
