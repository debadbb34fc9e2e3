"""Plans as files, and what they say about themselves."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdist.errors import ArtifactError, PlanError
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import SCHEMA, LayerPlan, QuantizationPlan, QuantizedInput, load_plan
from qdist.plan.precision import PRECISIONS, activation_levels, precision, weight_levels
from qdist.plan.quantizer import Quantizer

ACTIVATION = Quantizer(
    bits=8,
    low=-128,
    high=127,
    scales=(0.1 + 0.2,),
    zero_points=(-3,),
    axis=None,
    method="mse",
    bounds=(-1.5, 1e-30),
    clipped_share=1 / 3,
    expected_mse=1e-40,
)
WEIGHT = Quantizer(
    bits=4,
    low=-7,
    high=7,
    scales=(0.5, 2.0**-40),
    zero_points=(0, 0),
    axis=1,
    method="max",
    bounds=(-3.5, 3.5),
)


def layer(name: str, op_type: str = "MatMul", **changes: Any) -> LayerPlan:
    fields: dict[str, Any] = {
        "name": name,
        "op_type": op_type,
        "choice": LayerChoice(),
        "activations": (QuantizedInput(index=0, tensor="x", quantizer=ACTIVATION),),
        "weights": (QuantizedInput(index=1, tensor="w", quantizer=WEIGHT),),
        "why": "default",
    }
    return LayerPlan(**{**fields, **changes})


PLAN = QuantizationPlan(
    model_digest="a" * 64,
    statistics_digest="b" * 64,
    layers=(
        layer("one", choice=LayerChoice(precision="w4a8", saturation="kl"), why="rule one"),
        layer("two", "Softmax", weights=(), left_float={"y": "precision float32"}),
        layer("three", "Conv", activations=(), weights=(), left_float={"x": "out of scope"}),
    ),
    notes=("said",),
)


def code_of(path: Path, digest: str | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        load_plan(path, digest)
    assert caught.value.where == str(path)
    return caught.value.code


def test_a_plan_survives_its_file_digest_and_all(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    for found in (load_plan(path), load_plan(path, PLAN.model_digest)):
        assert found == PLAN
        assert found.digest == PLAN.digest
    assert json.loads(path.read_text())["qdist_plan"] == SCHEMA


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "c" * 64},
        {"statistics_digest": "c" * 64},
        {"layers": PLAN.layers[:2]},
        {"layers": (replace(PLAN.layers[0], why="default"), *PLAN.layers[1:])},
        {"layers": (layer("one"), *PLAN.layers[1:])},
    ],
)
def test_the_digest_covers_everything_but_the_notes(change: dict[str, Any]) -> None:
    assert replace(PLAN, **change).digest != PLAN.digest
    assert replace(PLAN, notes=()).digest == PLAN.digest


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    with pytest.raises(PlanError) as caught:
        load_plan(path, "f" * 64)
    assert caught.value.code == "QD505"
    assert "aaaaaaaaaaaa" in caught.value.got
    assert "ffffffffffff" in caught.value.expected


def test_a_plan_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN.to_json(), "qdist_plan": 3}))
    assert code_of(path) == "QD504"
    with pytest.raises(PlanError, match="schema 3, this version reads 1 and 2"):
        load_plan(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff\xfe", b"NaN"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert code_of(path) == "QD504"


def test_a_missing_plan_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert code_of(tmp_path / "none.json") == "QD504"
    assert code_of(tmp_path) == "QD504"


def damaged() -> list[tuple[tuple[Any, ...], Any]]:
    """Places in the JSON and what cannot stand there."""
    quantizer = ("layers", 0, "activations", 0, "quantizer")
    return [
        (("layers",), None),
        (("layers",), 5),
        (("layers", 0), "text"),
        (("layers", 0, "choice"), {"precision": "int3"}),
        (("layers", 0, "choice"), {"saturation": "guess"}),
        (("layers", 0, "choice"), {"unknown": 1}),
        (("layers", 0, "choice"), 7),
        (("layers", 0, "left_float"), 7),
        ((*quantizer, "scales"), []),
        ((*quantizer, "scales"), [0.0]),
        ((*quantizer, "scales"), [float("nan")]),
        ((*quantizer, "scales"), ["one"]),
        ((*quantizer, "scales"), [1.0, 2.0]),
        ((*quantizer, "zero_points"), None),
        ((*quantizer, "bounds"), [1.0]),
        (quantizer, {}),
        (quantizer, None),
        (("notes",), None),
    ]


@pytest.mark.parametrize(("place", "value"), damaged(), ids=str)
def test_a_plan_that_was_edited_wrongly_is_refused(
    tmp_path: Path, place: tuple[Any, ...], value: Any
) -> None:
    document: Any = json.loads(json.dumps(PLAN.to_json()))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    assert code_of(path) == "QD504"


def test_a_number_for_the_model_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**PLAN.to_json(), "model_digest": 5}))
    assert code_of(path, "a" * 64) == "QD505"


def test_a_plan_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError) as caught:
        PLAN.save(tmp_path / "file" / "plan.json")
    assert caught.value.code == "QD603"


def test_counts_and_coverage_tell_what_is_quantized() -> None:
    assert PLAN.counts() == Counter({"w4a8": 1, "int8": 1, "float32": 1})
    found = PLAN.coverage()
    assert (found.n_quantized, found.n_compute, found.n_activations) == (1, 2, 1)
    assert str(found) == "1 of 2 matmul- and conv-like layers, 1 activations"


def test_the_opset_is_that_of_the_widest_need() -> None:
    assert PLAN.opset == 21
    assert replace(PLAN, layers=PLAN.layers[1:]).opset == 13
    assert replace(PLAN, layers=PLAN.layers[2:]).opset == 13


@pytest.mark.parametrize(
    "change",
    [
        {"scales": ()},
        {"scales": (1.0, 2.0)},
        {"scales": (0.0,)},
        {"scales": (-1.0,)},
        {"scales": (float("inf"),)},
        {"zero_points": (1, 2)},
        {"scales": (1.0, 2.0), "zero_points": (0, 0), "axis": None},
    ],
)
def test_impossible_quantizers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="scale"):
        replace(ACTIVATION, **change)


def test_equal_keys_mean_equal_numbers() -> None:
    assert replace(ACTIVATION, method="max", expected_mse=None).key == ACTIVATION.key
    for change in ({"scales": (0.5,)}, {"zero_points": (1,)}, {"low": -127}, {"bits": 16}):
        assert replace(ACTIVATION, **change).key != ACTIVATION.key


# --- choices and precisions -------------------------------------------------------------------


def test_an_unknown_precision_lists_the_known_ones() -> None:
    with pytest.raises(PlanError) as caught:
        LayerChoice(precision="int3")
    assert caught.value.code == "QD506"
    assert caught.value.got == "'int3'"
    assert caught.value.expected == f"one of {', '.join(PRECISIONS)}"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"granularity": "group"}, "QD507"),
        ({"weight_saturation": "best"}, "QD501"),
        ({"saturation": "best"}, "QD501"),
    ],
)
def test_an_unknown_choice_is_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError) as caught:
        LayerChoice(**change)
    assert caught.value.code == code
    assert caught.value.got == repr(next(iter(change.values())))


@pytest.mark.parametrize("name", PRECISIONS)
def test_four_bit_weights_are_fitted_and_others_keep_their_maximum(name: str) -> None:
    choice = LayerChoice(precision=name)
    assert choice.weight_method == ("mse" if precision(name).weight_bits == 4 else "max")
    assert LayerChoice(precision=name, weight_saturation="max").weight_method == "max"
    assert choice.bits.is_float == (name == "float32")
    old = ("w8", "int8", "uint8", "bf16", "fp16", "tf32", "float32")
    assert choice.bits.opset == (13 if name in old else 19 if name.startswith("fp8") else 21)


@pytest.mark.parametrize(("bits", "high"), [(4, 7), (8, 127), (16, 32767)])
def test_levels_fill_the_type_or_are_symmetric(bits: int, high: int) -> None:
    full = activation_levels(bits, symmetric=False)
    assert (full.low, full.high, full.symmetric) == (-high - 1, high, False)
    # An activation saturates where its storage does, whatever its scale was made from.
    even = activation_levels(bits, symmetric=True)
    assert (even.low, even.high, even.symmetric) == (-high - 1, high, True)
    weights = weight_levels(bits)
    assert (weights.low, weights.high, weights.symmetric) == (-high, high, True)
