"""Layers that must agree, on a small model and on the transformer that ships with qdist."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qdist.demo import demo_file
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.groups import (
    LayerGroup,
    disagreements,
    find_groups,
    merged,
    raised_together,
)
from qdist.model.layers import LayerInput
from qdist.model.loading import load_model
from qdist.plan.dialects.knight_rules import SAME_AS_NEIGHBOURS
from qdist.plan.layer_index import LayerIndex, find_index
from tests.unit.test_selectors import plain_layer
from tests.vendor_models import block_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LayerIndex:
    return block_index(tmp_path_factory.mktemp("block"))


def test_concats_sums_and_neighbours(index: LayerIndex) -> None:
    found = find_groups(
        index.layers,
        index.adjacency,
        kinds=("concat", "residual", "attention", "neighbours"),
        tied=SAME_AS_NEIGHBOURS,
    )
    assert found == (
        LayerGroup(
            kind="residual",
            layers=("stem", "block/conv2", "block/sum"),
            tensors=("r0", "c2", "s"),
        ),
        LayerGroup(kind="concat", layers=("left", "right", "cat"), tensors=("a", "b", "cat")),
        LayerGroup(kind="neighbours", layers=("cat", "norm", "head")),
    )


def test_groups_are_merged_where_they_overlap(index: LayerIndex) -> None:
    names = [layer.name for layer in index.choosable]
    groups = find_groups(
        index.layers, index.adjacency, kinds=("concat", "neighbours"), tied=SAME_AS_NEIGHBOURS
    )
    assert merged(groups, names) == (
        ("stem",),
        ("block/conv1",),
        ("block/conv2",),
        ("block/sum",),
        ("left", "right", "cat", "norm", "head"),
        ("prob",),
    )
    assert raised_together(["left", "stem"], groups, names) == {
        "stem",
        *("left", "right", "cat", "norm", "head"),
    }
    bits = dict.fromkeys(names, 8)
    assert list(disagreements(groups, bits)) == []
    assert [(g.kind, a, b) for g, a, b in disagreements(groups, {**bits, "head": 16})] == [
        ("neighbours", "cat", "head")
    ]


def test_the_transformer_has_one_stream() -> None:
    index = find_index(Graph(freeze(load_model(demo_file("digits_vit.onnx")))))
    groups = find_groups(index.layers, index.adjacency)
    (stream,) = [group for group in groups if group.kind == "residual"]
    assert {"/blocks.0/Add", "/blocks.0/Add_1", "/blocks.1/Add"} <= set(stream.layers)
    assert {"/blocks.0/attn/proj/MatMul", "/blocks.0/mlp/fc2/MatMul"} <= set(stream.layers)
    assert "/blocks.0/attn/qkv/MatMul" not in stream.layers
    # Two sums to each of four layers, with what they add, and the positions that it begins with.
    assert len(stream.layers) == 17
    assert len(index.blocks) == 8
    assert index.blocks[0] >= {"/blocks.0/attn/qkv/MatMul", "/blocks.0/attn/Softmax"}


def test_queries_keys_and_values_of_one_source() -> None:
    weight = (LayerInput(index=1, tensor="w"),)
    layers = tuple(
        replace(plain_layer(name, "MatMul", source), weights=weight)
        for name, source in (("q", "n"), ("k", "n"), ("v", "n"), ("other", "o"))
    )
    index = LayerIndex((*layers, plain_layer("scores", "MatMul", "q.out", "k.out")))
    (group,) = find_groups(index.layers, index.adjacency)
    assert group == LayerGroup(kind="attention", layers=("q", "k", "v"), tensors=("n",))
    assert find_groups(index.layers, index.adjacency, among=["q", "other"]) == ()


def test_a_stream_may_begin_with_an_input_and_a_mask_is_none() -> None:
    layers = (
        plain_layer("up", "MatMul", "x"),
        plain_layer("masked", "Add", "up.out", "mask"),
        plain_layer("sum", "Add", "x", "masked.out"),
        plain_layer("up2", "MatMul", "sum.out"),
        plain_layer("masked2", "Add", "up2.out", "mask"),
        plain_layer("sum2", "Add", "sum.out", "masked2.out"),
    )
    index = LayerIndex(layers)
    (stream,) = find_groups(layers, index.adjacency)
    assert stream.layers == ("masked", "sum", "masked2", "sum2")
    assert index.blocks == (
        frozenset({"up", "masked", "sum"}),
        frozenset({"up2", "masked2", "sum2"}),
    )


def test_a_group_of_one_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="a group of"):
        LayerGroup(kind="concat", layers=("a",))
    with pytest.raises(ValueError, match="no kind of group: pairs"):
        find_groups((), LayerIndex(()).adjacency, kinds=("pairs",))
