"""Rules by name, pattern and operator type."""

from __future__ import annotations

from itertools import pairwise

import pytest

from qdist.errors import PlanError
from qdist.model.layers import Layer
from qdist.plan.choice import LayerChoice
from qdist.plan.layer_index import LayerIndex
from qdist.plan.rules import Rule, apply_rules

LAYERS = tuple(
    Layer(name=name, op_type=op_type, activations=(), weights=(), outputs=(name,))
    for name, op_type in (
        ("/stem/Conv", "Conv"),
        ("/blocks.0/attn/MatMul", "MatMul"),
        ("/blocks.0/mlp/Gemm", "Gemm"),
        ("/blocks.1/attn/MatMul", "MatMul"),
        ("/odd[0]/MatMul", "MatMul"),
    )
)
INDEX = LayerIndex(LAYERS)
DEFAULT = LayerChoice(precision="int8")


def precisions(*rules: Rule) -> list[str]:
    choices = apply_rules(INDEX, DEFAULT, rules).choices
    assert list(choices) == [layer.name for layer in LAYERS]
    return [choice.precision for choice in choices.values()]


def rule(match: str, precision: str = "int16") -> Rule:
    return Rule(match=match, settings={"precision": precision})


def test_without_rules_every_layer_has_the_default() -> None:
    assert precisions() == ["int8"] * 5


@pytest.mark.parametrize(
    ("match", "hit"),
    [
        ("/stem/Conv", [0]),
        ("*", [0, 1, 2, 3, 4]),
        ("/blocks.0/*", [1, 2]),
        ("/blocks.?/attn/MatMul", [1, 3]),
        ("*/attn/*", [1, 3]),
        ("op:MatMul", [1, 3, 4]),
        ("op:*m", [2]),
        ("op:Conv", [0]),
        ("/odd[0]/MatMul", [4]),
    ],
)
def test_a_rule_concerns_the_layers_that_it_matches(match: str, hit: list[int]) -> None:
    found = precisions(rule(match))
    assert [i for i, name in enumerate(found) if name == "int16"] == hit


def test_the_last_match_wins() -> None:
    wide, narrow = rule("*", "w4a8"), rule("/stem/*", "float32")
    assert precisions(wide, narrow) == ["float32", *["w4a8"] * 4]
    assert precisions(narrow, wide) == ["w4a8"] * 5


def test_rules_add_up_field_by_field() -> None:
    choices = apply_rules(
        INDEX,
        DEFAULT,
        [
            Rule(match="op:MatMul", settings={"saturation": "max", "granularity": "tensor"}),
            Rule(match="/blocks.0/*", settings={"precision": "int16"}),
        ],
    ).choices
    assert choices["/blocks.0/attn/MatMul"] == LayerChoice(
        precision="int16", saturation="max", granularity="tensor"
    )
    assert choices["/blocks.0/mlp/Gemm"] == LayerChoice(precision="int16")
    assert choices["/stem/Conv"] == DEFAULT


@pytest.mark.parametrize(
    ("match", "near"),
    [
        ("/stem/Konv", "/stem/Conv"),
        ("/block.0/attn/MatMul", "/blocks.0/attn/MatMul"),
        ("*blocks.7*", "/blocks.1/attn/MatMul"),
        ("zzz", "/stem/Conv"),
        ("op:Matmul", "an operator type of the model: Conv, Gemm, MatMul"),
        ("STEM/CONV", "/stem/Conv"),
    ],
)
def test_a_rule_without_a_match_names_near_layers(match: str, near: str) -> None:
    with pytest.raises(PlanError) as caught:
        precisions(rule("*"), rule(match))
    error = caught.value
    assert error.code == "QD503"
    assert error.where == f"rule {match!r}"
    assert error.got == "no match among 5 layers"
    assert near in error.expected


def test_a_rule_cannot_set_an_impossible_choice() -> None:
    with pytest.raises(PlanError) as caught:
        precisions(rule("*", "int3"))
    assert caught.value.code == "QD506"


def test_layers_are_named_apart() -> None:
    assert all(a.name != b.name for a, b in pairwise(LAYERS))
