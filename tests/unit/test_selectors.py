"""What selectors take: layers by name, type, block, place and neighbours; tensors."""

from __future__ import annotations

import pytest

from qdist.errors import PlanError
from qdist.model.blocks import find_blocks
from qdist.model.layers import Layer, LayerInput
from qdist.plan.choice import LayerChoice
from qdist.plan.layer_index import LayerIndex
from qdist.plan.rules import Rule, apply_rules
from qdist.plan.selector import select_layers, select_tensors
from qdist.plan.tensor_settings import TensorSettings
from tests.vendor_models import block_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LayerIndex:
    return block_index(tmp_path_factory.mktemp("block"))


def names(match: str, index: LayerIndex) -> list[str]:
    return [layer.name for layer in select_layers(match, index)]


BLOCK = ["block/conv1", "block/relu1", "block/conv2", "block/sum"]


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("layer:stem", ["stem"]),
        ("layer:s*", []),
        ("s*", ["stem"]),
        (r"re:.*conv\d", ["block/conv1", "block/conv2"]),
        ("re:conv", []),
        ("block:0", BLOCK),
        ("block:0-0", BLOCK),
        ("block:block", BLOCK),
        ("block:bl*", BLOCK),
        ("block:stem", []),
        ("first:2", ["stem", "block/conv1"]),
        ("last:2", ["head", "prob"]),
        ("op:Conv & last:1", ["left"]),
        ("last:6 & op:Conv", ["left"]),
        ("op:Conv & block:0 & first:1", ["block/conv1"]),
        ("before:block/conv1", ["stem", "relu0", "block/conv1", "block/relu1"]),
        ("before:block/relu1", ["stem", "relu0", "block/conv1", "block/relu1"]),
        ("after:norm", ["norm", "head", "bias", "prob"]),
        ("until_compute:right", ["right", "cat", "norm"]),
        ("until_compute:head", ["head", "bias", "prob"]),
        ("until_compute:block/conv2", ["block/conv2", "block/sum", "right", "cat", "norm"]),
    ],
)
def test_words_take_layers(index: LayerIndex, match: str, expected: list[str]) -> None:
    assert names(match, index) == expected


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("tensor:r0", ("r0",)),
        ("tensor:w?", ("w0", "w1", "w2", "w3", "w4")),
        ("output:stem", ("r0",)),
        ("output:relu0", ("r0",)),
        ("output:op:Conv & block:0", ("r1", "c2")),
        ("output:none", ()),
    ],
)
def test_words_take_tensors(index: LayerIndex, match: str, expected: tuple[str, ...]) -> None:
    assert select_tensors(match, index) == expected


@pytest.mark.parametrize(
    ("match", "got"),
    [
        ("block:1", "block 1 of 1"),
        ("block:1-0", "block 1-0 of 1"),
        ("first:0", "'0'"),
        ("last:x", "'x'"),
        ("re:(", "'('"),
        ("before:stme", "no layer 'stme'"),
        ("first:3 & after:nrm", "no layer 'nrm'"),
        ("block:stem", "no match among 13 layers"),
        ("op:Conv & op:Add", "no match among 13 layers"),
        ("layer:stme", "no match among 13 layers"),
        ("tensor:r9", "no match among"),
        ("output:stme", "no match among"),
    ],
)
def test_a_word_that_cannot_be_is_refused(index: LayerIndex, match: str, got: str) -> None:
    settings = {"th_scale": 0.5}
    with pytest.raises(PlanError) as caught:
        apply_rules(index, LayerChoice(), [Rule(match=match, settings=settings)])
    error = caught.value
    assert error.code == "QD503"
    assert got in error.got
    assert match in error.where
    if "stme" in match:
        assert "stem" in error.expected


def test_a_rule_for_the_wrong_thing_says_what_it_may_hold() -> None:
    with pytest.raises(PlanError, match=r"QD507.*'precision'.*saturation, th_scale"):
        Rule(match="tensor:x", settings={"precision": "int8"})
    with pytest.raises(PlanError, match=r"QD507.*'bounds'.*output:LAYER"):
        Rule(match="stem", settings={"bounds": (-1.0, 1.0)})


def test_settings_of_tensors_add_up_field_by_field(index: LayerIndex) -> None:
    rules = [
        Rule(match="tensor:*", settings={"th_scale": 0.9}),
        Rule(match="output:stem", settings={"saturation": "max", "bounds": (-1.0, 2.0)}),
        Rule(match="tensor:r0", settings={"threshold": (3.0,)}),
    ]
    found = apply_rules(index, LayerChoice(), rules).tensors
    assert found["x"] == TensorSettings(th_scale=0.9, why="rule tensor:*")
    assert found["r0"] == TensorSettings(
        th_scale=0.9,
        saturation="max",
        threshold=(3.0,),
        why="rule tensor:*, rule output:stem, rule tensor:r0",
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"th_scale": 0.0},
        {"threshold": ()},
        {"threshold": (-1.0,)},
        {"bounds": (1.0, 2.0)},
        {"bounds": (0.0, float("inf"))},
        {"saturation": "guess"},
    ],
)
def test_impossible_settings_are_refused_at_their_rule(
    index: LayerIndex, settings: dict[str, object]
) -> None:
    rule = Rule(match="tensor:r0", settings=settings, origin="f.csv line 3")
    with pytest.raises(PlanError) as caught:
        apply_rules(index, LayerChoice(), [rule])
    assert caught.value.code == ("QD501" if "saturation" in settings else "QD507")
    assert caught.value.where == "rule 'tensor:r0' (f.csv line 3)"


def plain_layer(name: str, op_type: str, *reads: str) -> Layer:
    return Layer(
        name=name,
        op_type=op_type,
        activations=tuple(LayerInput(index=i, tensor=t) for i, t in enumerate(reads)),
        weights=(),
        outputs=(f"{name}.out",),
    )


def test_blocks_with_projected_shortcuts_and_blocks_inside_blocks() -> None:
    layers = (
        plain_layer("a", "Conv", "x"),
        plain_layer("b", "Conv", "a.out"),
        plain_layer("short", "Conv", "a.out"),
        plain_layer("s1", "Add", "b.out", "short.out"),
        # A rotation: two products of one tensor, added, with nothing that computes in between.
        plain_layer("cos", "Mul", "s1.out"),
        plain_layer("sin", "Mul", "s1.out"),
        plain_layer("turn", "Add", "cos.out", "sin.out"),
        plain_layer("m", "MatMul", "turn.out"),
        plain_layer("n", "MatMul", "m.out"),
        plain_layer("s2", "Add", "m.out", "n.out"),
        plain_layer("s3", "Add", "turn.out", "s2.out"),
        # A mask from an input of its own.
        plain_layer("masked", "Add", "s3.out", "mask"),
    )
    index = LayerIndex(layers)
    assert find_blocks(layers, index.adjacency) == (
        frozenset({"b", "short", "s1"}),
        frozenset({"m", "n", "s2", "s3"}),
    )
    assert names("block:1", index) == ["m", "n", "s2", "s3"]
