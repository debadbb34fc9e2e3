"""Models in float16 and bfloat16: computed in float32, rounded where the model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto

from qdist.errors import ModelError
from qdist.model.taps import find_taps, tapped_graph
from tests.onnx_models import Array, integers, model, normal, value
from tests.tapped import assert_taps_change_nothing, graph_of, node, tapped_values

DTYPES: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
}
HALF = [TensorProto.FLOAT16, TensorProto.BFLOAT16]
_ERF_GELU = [
    node("Mul", ["h", "root"], ["h2"], "h2"),
    node("Erf", ["h2"], ["erf"], "erf"),
    node("Add", ["erf", "one"], ["erf1"], "erf1"),
    node("Mul", ["h", "erf1"], ["gelu2"], "gelu2"),
    node("Mul", ["gelu2", "half"], ["gelu"], "gelu"),
]
BLOCK: list[NodeProto] = [
    node("Gather", ["table", "ids"], ["x"], "embed"),
    node("LayerNormalization", ["x", "g", "b"], ["n1"], "norm1"),
    *(node("MatMul", ["n1", f"w{c}"], [c], c) for c in "qkv"),
    node("Transpose", ["k"], ["kt"], "turn", perm=[0, 2, 1]),
    node("MatMul", ["q", "kt"], ["scores"], "scores"),
    node("Mul", ["scores", "scale"], ["scaled"], "scaled"),
    node("Softmax", ["scaled"], ["p"], "softmax"),
    node("MatMul", ["p", "v"], ["mixed"], "mix"),
    node("MatMul", ["mixed", "wo"], ["o"], "out"),
    node("Add", ["x", "o"], ["r"], "residual"),
    node("LayerNormalization", ["r", "g", "b"], ["n2"], "norm2"),
    node("MatMul", ["n2", "w1"], ["h"], "fc1"),
    *_ERF_GELU,
    node("MatMul", ["gelu", "w2"], ["f"], "fc2"),
    node("Add", ["r", "f"], ["y"], "sum"),
]
IDS = integers([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def transformer(element: int, nodes: list[NodeProto] | None = None) -> ModelProto:
    """A block of a transformer that reads token numbers; weights and activations in one type."""
    shapes = {"table": (16, 8), "g": (8,), "b": (8,), "wo": (8, 8), "w1": (8, 16), "w2": (16, 8)}
    shapes |= {f"w{c}": (8, 8) for c in "qkv"}
    constants: dict[str, Array] = {n: normal(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    constants |= {"scale": np.array(0.35), "root": np.array(0.7), "one": np.array(1.0)}
    constants["half"] = np.array(0.5)
    typed = {name: array.astype(DTYPES[element]) for name, array in constants.items()}
    return model(
        nodes or BLOCK,
        [value("ids", ["n", "s"], TensorProto.INT64)],
        [value("y", None, element)],
        typed,
        opset=17,
    )


def rounded(values: Array, element: int) -> Array:
    """As float32 numbers that the type can hold."""
    return values.astype(DTYPES[element]).astype(np.float32)


@pytest.mark.parametrize("element", HALF)
@pytest.mark.parametrize("mode", ["all", "compute", ["norm?", "y"]])
def test_every_choice_of_taps_works_in_half_precision(
    element: int, mode: Any, tmp_path: Path
) -> None:
    graph = graph_of(transformer(element), tmp_path)
    taps = find_taps(graph, mode)
    single = graph_of(transformer(TensorProto.FLOAT), tmp_path)
    assert taps.tensors == find_taps(single, mode).tensors
    found = tapped_values(graph, taps, {"ids": IDS})
    wide = tapped_values(single, find_taps(single, mode), {"ids": IDS})
    for name, array in found.items():
        np.testing.assert_array_equal(rounded(array, element), array.astype(np.float32))
        off = np.abs(array.astype(np.float32) - wide[name]).max()
        assert off <= (0.01 if element == TensorProto.FLOAT16 else 0.1) * np.abs(wide[name]).max()


@pytest.mark.parametrize("element", HALF)
def test_no_tap_changes_the_bits_of_another(element: int, tmp_path: Path) -> None:
    graph = graph_of(transformer(element), tmp_path)
    assert len(assert_taps_change_nothing(graph, {"ids": IDS})) >= 18


@pytest.mark.parametrize("element", HALF)
def test_each_operator_reads_what_was_rounded(element: int, tmp_path: Path) -> None:
    """Every tensor is the rounded result of float32 arithmetic on rounded tensors."""
    graph = graph_of(transformer(element), tmp_path)
    every = find_taps(graph)
    found = {k: v.astype(np.float32) for k, v in tapped_values(graph, every, {"ids": IDS}).items()}
    weights = {name: graph.weights.read_float32(name) for name in graph.constants}
    expected = {
        "scaled": found["scores"] * weights["scale"],
        "r": found["x"] + found["o"],
        "h2": found["h"] * weights["root"],
        "erf1": found["erf"] + weights["one"],
        "gelu2": found["h"] * found["erf1"],
        "y": found["r"] + found["f"],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], rounded(values, element))


@pytest.mark.parametrize("element", HALF)
def test_inputs_in_half_precision(element: int, tmp_path: Path) -> None:
    proto = model(
        [node("Mul", ["x", "x"], ["m"], "mul"), node("Exp", ["m"], ["y"], "exp")],
        [value("x", ["n", 4], element)],
        [value("y", None, element)],
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    # NumPy has no bfloat16 to feed: float32 goes in.
    x = rounded(normal(3, 4), element)
    fed = x if element == TensorProto.BFLOAT16 else x.astype(np.float16)
    found = tapped_values(graph, taps, {"x": fed})
    np.testing.assert_array_equal(found["m"].astype(np.float32), rounded(x * x, element))


@pytest.mark.parametrize("element", HALF)
def test_random_numbers_scatters_and_moves(element: int, tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["table", "ids"], ["x"], "embed"),
        node("Reshape", ["x", "flat"], ["rows"], "rows"),
        node("Slice", ["rows", "low", "high"], ["some"], "some"),
        node("ScatterND", ["rows", "places", "some"], ["added"], "scatter", reduction="add"),
        node("ScatterND", ["added", "places", "some"], ["set"], "put"),
        node("Concat", ["set", "some"], ["joined"], "join", axis=0),
        node("RandomUniformLike", ["joined"], ["noise"], "noise", dtype=element, seed=1.0),
        node("Add", ["joined", "noise"], ["y"], "sum"),
    ]
    proto = transformer(element, nodes)
    extra = {"flat": integers([-1, 8]), "low": integers([0]), "high": integers([3])}
    extra["places"] = integers([[1], [1], [2]])
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in extra.items()
    )
    graph = graph_of(proto, tmp_path)
    found = tapped_values(graph, find_taps(graph), {"ids": IDS})
    found = {name: array.astype(np.float32) for name, array in found.items()}
    x, some = found["x"].reshape(-1, 8), found["some"]
    np.testing.assert_array_equal(found["added"][2], rounded(x[2] + some[2], element))
    np.testing.assert_array_equal(found["set"][1], some[1])
    np.testing.assert_array_equal(found["y"], rounded(found["joined"] + found["noise"], element))


def test_single_precision_graphs_are_left_as_they_are(tmp_path: Path) -> None:
    graph = graph_of(transformer(TensorProto.FLOAT), tmp_path)
    taps = find_taps(graph, ["y"])
    tapped = ModelProto.FromString(tapped_graph(graph, taps))
    assert list(tapped.graph.node) == list(graph.proto.graph.node)


def contributed(element: int) -> ModelProto:
    """A model with an operator whose types only the runtime knows."""
    nodes = [
        node("Gather", ["table", "ids"], ["x"], "embed"),
        node("QuickGelu", ["x"], ["z"], "gelu", domain="com.microsoft"),
        node("Neg", ["z"], ["y"], "neg"),
    ]
    proto = transformer(element, nodes)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return proto


@pytest.mark.parametrize("element", HALF)
def test_contributed_operators_in_half_precision(element: int, tmp_path: Path) -> None:
    graph = graph_of(contributed(element), tmp_path)
    taps = find_taps(graph)
    assert [(point.tensor, point.dtype) for point in taps.points] == [
        (name, "float16" if element == TensorProto.FLOAT16 else "bfloat16")
        for name in ("x", "z", "y")
    ]
    found = assert_taps_change_nothing(graph, {"ids": IDS})
    x, z = (found[name].astype(np.float32) for name in "xz")
    np.testing.assert_array_equal(z, rounded(z, element))
    np.testing.assert_allclose(z, x / (1 + np.exp(-1.702 * x)), rtol=0.01, atol=1e-3)


def test_what_the_runtime_cannot_compute_is_said(tmp_path: Path) -> None:
    """Beside float16 nothing can stand in for bfloat16, for which the runtime has few kernels."""
    proto = contributed(TensorProto.BFLOAT16)
    proto.graph.input.append(value("other", [1], TensorProto.FLOAT16))
    with pytest.raises(ModelError, match="QD205") as caught:
        graph_of(proto, tmp_path)
    assert "Could not find an implementation" in caught.value.got
    assert "float32" in caught.value.mend


def test_weights_in_bfloat16_under_activations_in_float32(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["w"], ["wide"], "widen", to=TensorProto.FLOAT),
        node("MatMul", ["x", "wide"], ["y"], "fc"),
    ]
    w = normal(4, 4).astype(ml_dtypes.bfloat16)
    graph = graph_of(model(nodes, [value("x", [2, 4])], [value("y", None)], {"w": w}), tmp_path)
    taps = find_taps(graph)
    assert taps.tensors == ("x", "y")
    x = normal(2, 4, seed=1)
    found = tapped_values(graph, taps, {"x": x})["y"]
    np.testing.assert_allclose(found, x @ w.astype(np.float32), rtol=1e-5, atol=1e-6)
