"""Biases that are Adds of their own, by a rule and by Icraft's search, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from actors.session import RaySession
from qdist.plan.plan import QuantizationPlan, load_plan
from qdist.search.icraft_ladders import SPLIT
from tests.command_line import check_error, here, succeed

BUYI = ("target=icraft_buyi", "quantization.symmetric=true", "tracking=none")
GEMM = '{match: "op:Gemm", granularity: tensor}'
# Three of int16's bits leave layers that are bad alone, so that the ladder is climbed.
TUNE = (
    *("tune", "model=digits_cnn", "data=digits", "evaluation=accuracy", *BUYI),
    *("quantization.precision=int16", "quantization.activation_range_bits=3"),
    *("data.evaluation.limit=40", "search.sensitivity_samples=8", "cluster.workers=1"),
    *("search=icraft", "search.precisions=[int16, float32]", "search.saturations=[]"),
    *("search.low=null", "search.high=int16", "search.together=none"),
    f"quantization.rules=[{GEMM}]",
    "search.options={chip: buyi, priority: PRIORITY, round_num: 6, threshold_level: 3, "
    "float_cal: 1, cos_targetvalue: 1.0}",
)


def n_split(plan: QuantizationPlan) -> int:
    return sum(layer.bias_add is not None for layer in plan.layers)


@pytest.fixture
def folder(cnn_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the demo CNN, in a copy of the runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Path(shutil.copytree(cnn_runs, "qdist-runs")).absolute() / "digits_cnn"


def test_a_rule_splits_the_biases_of_a_model(folder: Path) -> None:
    rules = f'quantization.rules=[{GEMM}, {{match: "op:Conv", precision: int16, split_bias: true}}]'
    said = succeed("quantize", "model=digits_cnn", *BUYI, rules)
    assert "the bias is an Add of its own in 6 layers" in said
    assert n_split(load_plan(folder / "plan.json")) == 6
    shown = succeed("show", str(folder / "plan.json"))
    assert shown.count("bias int16 added apart, max") == 6
    names = [node.name for node in onnx.load(folder / "model.onnx").graph.node]
    assert sum(name.endswith(".bias_add") for name in names) == 6
    succeed(
        *("compare", "model=digits_cnn", "data=digits", "target=icraft_buyi", "tracking=none"),
        *("compare.target_exact=true", "compare.samples=16"),
    )
    layers = json.loads((folder / "modes.json").read_text())["layers"]
    schemes = {layer["scheme"] for layer in layers if layer["op_type"] == "Conv"}
    assert schemes == {"cuts"}
    emitted = folder / "chip.onnx"
    succeed(
        *("emit", "model=digits_cnn", "target=icraft_buyi", "tracking=none"),
        *("mode=target-exact", f"artifact={emitted}"),
    )
    assert emitted.exists()


@pytest.mark.parametrize(
    ("rule", "target", "part"),
    [
        ('{match: "op:Conv", split_bias: true}', "icraft_buyi", "precision int16"),
        (f"{GEMM[:-1]}, precision: int16, split_bias: true}}", "icraft_buyi", "a Gemm"),
        ('{match: "op:Conv", precision: int16, split_bias: true}', "qdq", "target qdq"),
    ],
)
def test_where_nothing_can_be_split_it_is_an_error(
    folder: Path, rule: str, target: str, part: str
) -> None:
    before = (folder / "plan.json").read_bytes()
    words = ("quantize", "model=digits_cnn", f"target={target}", "tracking=none")
    rules = f"quantization.rules=[{GEMM}, {rule}]"
    check_error(here(*words, "quantization.symmetric=true", rules), "QD507", part)
    assert (folder / "plan.json").read_bytes() == before


@pytest.mark.parametrize("priority", ["accuracy", "tradeoff"])
def test_icrafts_search_splits_biases_before_it_turns_to_float32(
    priority: str, cluster: RaySession, folder: Path
) -> None:
    said = succeed(*(word.replace("PRIORITY", priority) for word in TUNE))
    assert "failed" not in said
    trials = sorted((folder / "trials").glob("trial-*"))
    plans = [load_plan(path / "plan.json") for path in trials]
    assert len(plans) > 2
    assert sum(layer.choice.precision == "float32" for layer in plans[-1].layers) > 2
    if priority == "tradeoff":
        assert not any(map(n_split, plans))
        return
    assert f"{SPLIT} in " in said
    split: set[str] = set()
    for plan in plans:
        for layer in plan.layers:
            if layer.bias_add is not None:
                assert (layer.op_type, layer.choice.precision) == ("Conv", "int16")
                split.add(layer.name)
            elif layer.op_type == "Conv":
                assert layer.choice.precision == ("float32" if layer.name in split else "int16")
    assert len(split) > 2
