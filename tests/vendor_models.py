"""A small model with everything that vendors' files have rules about, and its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import ModelProto, helper

from qdist.model.graph import Graph
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.reading import Before
from qdist.plan.layer_index import LayerIndex, find_index
from tests.onnx_models import frozen_from, model, normal, value

GOLDEN = Path(__file__).parent / "golden"


def block_model() -> ModelProto:
    """x -> stem Conv, Relu -> residual block (Conv, Relu, Conv, Add) -> two branches -> Concat ->
    Reshape -> LayerNormalization -> MatMul, bias Add -> Softmax.

    As layers: stem (with relu0), conv1 (with relu1), conv2, sum, left, right, cat, norm, head (with
    bias), prob.
    """
    node = helper.make_node
    return model(
        [
            node("Conv", ["x", "w0"], ["c0"], name="stem", pads=[1, 1, 1, 1]),
            node("Relu", ["c0"], ["r0"], name="relu0"),
            node("Conv", ["r0", "w1"], ["c1"], name="block/conv1", pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"], name="block/relu1"),
            node("Conv", ["r1", "w2"], ["c2"], name="block/conv2", pads=[1, 1, 1, 1]),
            node("Add", ["r0", "c2"], ["s"], name="block/sum"),
            node("Conv", ["s", "w3"], ["a"], name="left"),
            node("Sigmoid", ["s"], ["b"], name="right"),
            node("Concat", ["a", "b"], ["cat"], name="cat", axis=1),
            node("Reshape", ["cat", "shape"], ["flat"], name="view"),
            node("LayerNormalization", ["flat", "gain", "shift"], ["n"], name="norm"),
            node("MatMul", ["n", "w4"], ["m"], name="head"),
            node("Add", ["m", "offset"], ["h"], name="bias"),
            node("Softmax", ["h"], ["p"], name="prob"),
        ],
        [value("x", [1, 3, 4, 4])],
        [value("p", [1, 5])],
        {
            "w0": normal(4, 3, 3, 3, seed=1),
            "w1": normal(4, 4, 3, 3, seed=2),
            "w2": normal(4, 4, 3, 3, seed=3),
            "w3": normal(4, 4, 1, 1, seed=4),
            "shape": np.array([1, 128], np.int64),
            "gain": normal(128, seed=5),
            "shift": normal(128, seed=6),
            "w4": normal(128, 5, seed=7),
            "offset": normal(5, seed=8),
        },
        opset=17,
    )


def block_index(folder: Path, scope: str = "all") -> LayerIndex:
    """The layers of `block_model`."""
    return find_index(Graph(frozen_from(block_model(), folder / "block.onnx")), scope)


def before(index: LayerIndex, choice: LayerChoice | None = None, **other: LayerChoice) -> Before:
    """One choice for all layers, but for those given by keyword or name."""
    choices = {layer.name: choice or LayerChoice() for layer in index.layers}
    assert set(other) <= set(choices)
    return Before(index=index, choices={**choices, **other})
