from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from qdist.demo import demo_file
from qdist.errors import ModelError
from qdist.model import constants
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.graph import Graph
from qdist.model.layers import Layer, find_layers
from qdist.model.loading import load_model
from qdist.model.session import measuring_session, run
from qdist.model.taps import find_taps
from qdist.model.views import view_source
from tests.onnx_models import (
    EXECUTION,
    Array,
    floats,
    integers,
    model,
    normal,
    value,
)
from tests.tapped import assert_taps_change_nothing, graph_of, node, tapped_values

MICROSOFT = "com.microsoft"


def layers_of(graph: Graph) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(graph)}


def chain(nodes: Sequence[NodeProto], constants: dict[str, Array], shape: list[Any]) -> ModelProto:
    """A model from ``x`` to ``y``."""
    return model(nodes, [value("x", shape)], [value("y", None)], constants, opset=17)


# Which layers there are, and what they read.


@pytest.mark.parametrize(
    ("layer", "x", "weight", "axis"),
    [
        (node("Conv", ["x", "w"], ["y"], "n"), [1, 4, 5, 5], (6, 4, 3, 3), 0),
        (node("Conv", ["x", "w"], ["y"], "n", group=4), [1, 4, 5, 5], (4, 1, 3, 3), 0),
        (node("ConvTranspose", ["x", "w"], ["y"], "n"), [1, 4, 5, 5], (4, 6, 3, 3), 1),
        (node("MatMul", ["x", "w"], ["y"], "n"), [2, 4], (4, 6), 1),
        (node("MatMul", ["x", "w"], ["y"], "n"), [2, 3, 4], (2, 4, 6), 2),
        (node("MatMul", ["x", "w"], ["y"], "n"), [2, 4], (4,), None),
        (node("MatMul", ["w", "x"], ["y"], "n"), [4, 2], (6, 4), 0),
        (node("MatMul", ["w", "x"], ["y"], "n"), [3, 4, 2], (3, 6, 4), 1),
        (node("Gemm", ["x", "w"], ["y"], "n"), [2, 4], (4, 6), 1),
        (node("Gemm", ["x", "w"], ["y"], "n", transB=1), [2, 4], (6, 4), 0),
        (node("Gemm", ["w", "x"], ["y"], "n"), [4, 2], (6, 4), 0),
        (node("Gemm", ["w", "x"], ["y"], "n", transA=1), [4, 2], (4, 6), 1),
        (node("Add", ["w", "x"], ["y"], "n"), [2, 4], (4,), None),
    ],
)
def test_weights_have_the_axis_of_their_output_channels(
    layer: NodeProto, x: list[int], weight: tuple[int, ...], axis: int | None, tmp_path: Path
) -> None:
    graph = graph_of(chain([layer], {"w": normal(*weight)}, x), tmp_path)
    (found,) = find_layers(graph)
    (entry,) = found.weights
    (activation,) = found.activations
    place = list(layer.input).index("w")
    assert (entry.tensor, entry.index, entry.channel_axis) == ("w", place, axis)
    assert (activation.tensor, activation.index) == ("x", 1 - place)
    assert found.is_compute == (layer.op_type != "Add")
    if axis is not None:
        # A channel of the weight alone decides a channel of the output.
        session = measuring_session(graph.model.graph_bytes, tmp_path, EXECUTION)
        (base,) = run(session, None, {"x": normal(*x)})
        changed = normal(*weight)
        changed[(slice(None),) * axis + (0,)] += 1
        proto = chain([layer], {"w": changed}, x)
        session = measuring_session(proto.SerializeToString(), tmp_path, EXECUTION)
        (moved,) = run(session, None, {"x": normal(*x)})
        assert 0 < np.mean(moved != base) <= 1 / min(weight[axis], 4) + 1e-9


def test_biases_and_shapes_are_no_weights(tmp_path: Path) -> None:
    graph = graph_of(
        chain(
            [
                node("Gemm", ["x", "w", "b"], ["g"], "gemm"),
                node("Reshape", ["g", "shape"], ["r"], "reshape"),
                node("Conv", ["r", "k", "kb"], ["c"], "conv"),
                node("Clip", ["c", "low", "high"], ["y"], "clip"),
            ],
            {
                "w": normal(4, 6),
                "b": normal(6),
                "shape": integers([2, 1, 2, 3]),
                "k": normal(3, 1, 1, 1),
                "kb": normal(3),
                "low": floats(0),
                "high": floats(6),
            },
            [2, 4],
        ),
        tmp_path,
    )
    found = layers_of(graph)
    assert list(found) == ["gemm", "conv", "clip"]
    assert [w.tensor for layer in found.values() for w in layer.weights] == ["w", "k"]
    assert [a.tensor for a in found["conv"].activations] == ["r"]


def test_layers_are_float_and_compute_something(tmp_path: Path) -> None:
    proto = model(
        [
            node("Gather", ["table", "ids"], ["e"], "embedding"),
            node("Transpose", ["e"], ["t"], "transpose", perm=[0, 2, 1]),
            node("Softmax", ["t"], ["s"], "softmax"),
            node("Add", ["ids", "one"], ["next"], "integers"),
            node("Cast", ["next"], ["f"], "cast", to=TensorProto.FLOAT),
            node("Where", ["flag", "s", "t"], ["y"], "where"),
            node("Concat", ["f", "f"], ["z"], "concat", axis=0),
        ],
        [value("ids", ["b", 3], TensorProto.INT64), value("flag", [], TensorProto.BOOL)],
        [value("y", None), value("z", None)],
        {"table": normal(10, 4), "one": integers(1)},
    )
    found = layers_of(graph_of(proto, tmp_path))
    assert list(found) == ["softmax", "where", "concat"]
    assert [(a.index, a.tensor) for a in found["where"].activations] == [(1, "s"), (2, "t")]
    assert [a.index for a in found["concat"].activations] == [0, 1]


# Statistics of written-out normalizations.


def layer_norm(root: str) -> list[NodeProto]:
    square = node("Pow", ["d", "two"], ["p"], "square")
    if root == "mul":
        square = node("Mul", ["d", "d"], ["p"], "square")
    end = [node("Sqrt", ["v"], ["s"], "root"), node("Div", ["d", "s"], ["n"], "normed")]
    if root == "power":
        end = [node("Pow", ["v", "minus"], ["s"], "root"), node("Mul", ["d", "s"], ["n"], "normed")]
    return [
        node("ReduceMean", ["x"], ["m"], "mean", axes=[-1]),
        node("Sub", ["x", "m"], ["d"], "centred"),
        square,
        node("ReduceMean", ["p"], ["q"], "variance", axes=[-1]),
        node("Add", ["q", "eps"], ["v"], "safe"),
        *end,
        node("Mul", ["n", "gamma"], ["g"], "gain"),
        node("Add", ["g", "beta"], ["h"], "shift"),
        node("MatMul", ["h", "w"], ["y"], "after"),
    ]


NORM_CONSTANTS: dict[str, Array] = {
    "two": floats(2),
    "minus": floats(-0.5),
    "eps": floats(1e-5),
    "gamma": normal(8),
    "beta": normal(8, seed=1),
    "w": normal(8, 8),
}


@pytest.mark.parametrize("root", ["sqrt", "mul", "power"])
def test_written_out_layer_norm_is_marked_from_its_mean_to_its_quotient(
    root: str, tmp_path: Path
) -> None:
    found = layers_of(graph_of(chain(layer_norm(root), NORM_CONSTANTS, ["b", 8]), tmp_path))
    marked = [name for name, layer in found.items() if layer.is_statistics]
    assert marked == ["mean", "centred", "square", "variance", "safe", "root", "normed"]


def test_written_out_rms_norm_is_marked_and_the_pooling_before_it_is_not(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMean", ["x"], ["pooled"], "pooling", axes=[1]),
        node("Mul", ["pooled", "pooled"], ["p"], "square"),
        node("ReduceMean", ["p"], ["q"], "mean of squares", axes=[-1]),
        node("Add", ["q", "eps"], ["v"], "safe"),
        node("Sqrt", ["v"], ["s"], "root"),
        node("Div", ["one", "s"], ["r"], "reciprocal"),
        node("Mul", ["pooled", "r"], ["n"], "normed"),
        node("Mul", ["gamma", "n"], ["y"], "gain"),
    ]
    constants = {**NORM_CONSTANTS, "one": floats(1)}
    found = layers_of(graph_of(chain(nodes, constants, ["b", 5, 8]), tmp_path))
    marked = {name for name, layer in found.items() if layer.is_statistics}
    assert marked == {"square", "mean of squares", "safe", "root", "reciprocal", "normed"}


def test_ordinary_pooling_powers_and_gates_are_not_marked(tmp_path: Path) -> None:
    nodes = [
        # Squeeze and excitation.
        node("ReduceMean", ["x"], ["m"], "squeeze", axes=[2, 3], keepdims=1),
        node("Conv", ["m", "k"], ["c"], "excite"),
        node("Sigmoid", ["c"], ["s"], "gate"),
        node("Mul", ["x", "s"], ["g"], "scaled"),
        # Generalised-mean pooling.
        node("Pow", ["g", "three"], ["p"], "cube"),
        node("ReduceMean", ["p"], ["q"], "pool", axes=[2, 3]),
        node("Pow", ["q", "third"], ["r"], "cube root"),
        # A mean that is taken off another tensor.
        node("ReduceMean", ["r"], ["a"], "mean", axes=[1], keepdims=1),
        node("Sub", ["r", "a"], ["y"], "centred"),
    ]
    constants: dict[str, Array] = {
        "k": normal(4, 4, 1, 1),
        "three": floats(3),
        "third": floats(1 / 3),
    }
    found = layers_of(graph_of(chain(nodes, constants, ["b", 4, 5, 5]), tmp_path))
    assert len(found) == len(nodes)
    assert [name for name, layer in found.items() if layer.is_statistics] == []


@pytest.mark.parametrize(
    ("layer", "activations", "weights"),
    [
        (node("LSTM", ["x", "w", "r", "b", "", "h", "c"], ["y"], "n"), "x h c", "w r"),
        (node("GRU", ["x", "w", "r", "b", "", "h"], ["y"], "n"), "x h", "w r"),
        (node("RNN", ["x", "w", "r", "b"], ["y"], "n"), "x", "w r"),
        (node("Einsum", ["x", "h"], ["y"], "n", equation="a,b->ab"), "x h", ""),
        (node("MatMulNBits", ["x", "q", "s"], ["y"], "n", domain=MICROSOFT), "x", ""),
        (node("FusedMatMul", ["x", "w"], ["y"], "n", domain=MICROSOFT), "x", "w"),
        (node("FusedMatMul", ["x", "h"], ["y"], "n", domain=MICROSOFT), "x h", ""),
        (
            node("Attention", ["x", "w", "b", "", "h", "c"], ["y"], "n", domain=MICROSOFT),
            "x h",
            "w",
        ),
        (node("Attention", ["x", "h", "c", "m"], ["y"], "n"), "x h c", ""),
        (
            node(
                "GroupQueryAttention",
                ["x", "h", "c", "p", "q", "l", "t"],
                ["y"],
                "n",
                domain=MICROSOFT,
            ),
            "x h c p",
            "",
        ),
        (
            node(
                "MultiHeadAttention",
                ["x", "h", "c", "b", "", "m", "p"],
                ["y"],
                "n",
                domain=MICROSOFT,
            ),
            "x h c p",
            "",
        ),
        (node("MoE", ["x", "h", "w", "b", "r"], ["y"], "n", domain=MICROSOFT), "x", "w r"),
        (node("SkipLayerNormalization", ["x", "h", "s"], ["y"], "n", domain=MICROSOFT), "x h", ""),
    ],
)
def test_operators_of_sequences_and_contrib_operators_read_their_data(
    layer: NodeProto, activations: str, weights: str, tmp_path: Path
) -> None:
    """Of which sizes the operands are is another matter: only who reads what."""
    inputs = [value(name, None) for name in "xhcmp" if name in layer.input]
    constants = {name: normal(2, 4, 4) for name in "wrbs" if name in layer.input}
    integer = {name: integers([0]) for name in "qlt" if name in layer.input}
    proto = model([layer], inputs, [value("y", None)], constants | integer, opset=23)
    proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    frozen = FrozenModel(
        graph_bytes=proto.SerializeToString(),
        data_folder=tmp_path,
        digest="",
        source=tmp_path / "model.onnx",
        source_digest="",
        n_source_bytes=0,
    )
    (found,) = find_layers(Graph(frozen))
    assert [entry.tensor for entry in found.activations] == activations.split()
    assert [entry.tensor for entry in found.weights] == weights.split()
    assert found.is_compute == (layer.op_type != "SkipLayerNormalization")


# Taps.


def test_views_share_the_tap_of_their_source(tmp_path: Path) -> None:
    proto = model(
        [
            node("Transpose", ["x"], ["t"], "t", perm=[0, 2, 1]),
            node("Reshape", ["t", "flat"], ["r"], "r"),
            node("Relu", ["r"], ["a"], "relu"),
            node("Unsqueeze", ["a", "zero"], ["u"], "u"),
            node("Squeeze", ["u", "zero"], ["s"], "s"),
            node("Flatten", ["s"], ["f"], "f"),
            node("Slice", ["f", "zero", "one"], ["cut"], "slice"),
            node("Identity", ["f"], ["y"], "y"),
            node("Neg", ["cut"], ["z"], "neg"),
        ],
        [value("x", ["b", 3, 4])],
        [value("y", None), value("z", None)],
        {"flat": integers([0, -1]), "zero": integers([0]), "one": integers([1])},
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    assert taps.tensors == ("x", "a", "cut", "z")
    assert taps.aliases == {"t": "x", "r": "x", "u": "a", "s": "a", "f": "a", "y": "a"}
    assert [p.tensor for p in taps.points if p.is_input] == ["x"]
    assert taps.row_of("r") == "x"
    assert taps.row_of("cut") == "cut"
    assert view_source(graph, "f") == "a"
    # An alias holds the very values of its source.
    wanted = [name for pair in taps.aliases.items() for name in pair if name != "x"]
    tapped = graph.model.proto()
    del tapped.graph.output[:]
    tapped.graph.output.extend(value(name, None) for name in dict.fromkeys(wanted))
    session = measuring_session(tapped.SerializeToString(), tmp_path, EXECUTION)
    x = normal(2, 3, 4)
    found = dict(zip(dict.fromkeys(wanted), run(session, None, {"x": x}), strict=True)) | {"x": x}
    for alias, source in taps.aliases.items():
        np.testing.assert_array_equal(np.sort(found[alias], None), np.sort(found[source], None))


def test_tensors_from_nowhere_are_tapped_too(tmp_path: Path) -> None:
    proto = model(
        [
            node("RandomNormal", [], ["noise"], "noise", shape=[2, 2]),
            node("Flatten", ["noise"], ["f"], "flatten"),
            node("MatMul", ["x", "f"], ["y"], "matmul"),
        ],
        [value("x", [1, 2])],
        [value("y", [1, 2])],
    )
    taps = find_taps(graph_of(proto, tmp_path))
    assert taps.tensors == ("x", "noise", "y")
    assert taps.aliases == {"f": "noise"}


def test_only_float_inputs_are_tapped(tmp_path: Path) -> None:
    proto = model(
        [
            node("Gather", ["x", "ids"], ["g"], "gather"),
            node("Where", ["mask", "g", "zero"], ["y"], "where"),
        ],
        [
            value("x", ["n", 4]),
            value("ids", ["k"], TensorProto.INT64),
            value("mask", ["k", 4], TensorProto.BOOL),
        ],
        [value("y", None)],
        {"zero": floats(0)},
    )
    taps = find_taps(graph_of(proto, tmp_path))
    assert [(p.tensor, p.dtype, p.is_input) for p in taps.points] == [
        ("x", "float32", True),
        ("g", "float32", False),
        ("y", "float32", False),
    ]


def test_compute_taps_are_what_compute_layers_read_and_the_outputs(tmp_path: Path) -> None:
    proto = chain(
        [
            node("Relu", ["x"], ["a"], "relu"),
            node("Neg", ["a"], ["b"], "neg"),
            node("Transpose", ["b"], ["t"], "transpose", perm=[1, 0]),
            node("MatMul", ["w", "t"], ["m"], "matmul"),
            node("Exp", ["m"], ["e"], "exp"),
            node("Abs", ["e"], ["y"], "abs"),
        ],
        {"w": normal(4, 4)},
        [3, 4],
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph, "compute")
    assert taps.tensors == ("b", "y")
    assert taps.aliases == {"t": "b"}
    assert find_taps(graph).tensors == ("x", "a", "b", "m", "e", "y")
    with pytest.raises(ValueError, match="every"):
        find_taps(graph, "every")


def test_types_of_contrib_operators_come_from_the_runtime(tmp_path: Path) -> None:
    proto = model(
        [
            node("MatMul", ["x", "w"], ["h"], "matmul"),
            node("FastGelu", ["h"], ["g"], "gelu", domain="com.microsoft"),
            node("Relu", ["g"], ["y"], "relu"),
        ],
        [value("x", ["b", 4])],
        [value("y", None)],
        {"w": normal(4, 4)},
        domains={"com.microsoft": 1},
    )
    graph = graph_of(proto, tmp_path)
    assert graph.is_float("g")
    assert find_taps(graph).tensors == ("x", "h", "g", "y")
    assert list(layers_of(graph)) == ["matmul", "gelu", "relu"]


def test_model_without_floats_is_refused(tmp_path: Path) -> None:
    proto = model(
        [node("Add", ["x", "x"], ["y"], "add")],
        [value("x", [2], TensorProto.INT64)],
        [value("y", [2], TensorProto.INT64)],
    )
    with pytest.raises(ModelError, match="QD209"):
        find_taps(graph_of(proto, tmp_path))


@pytest.fixture(scope="module")
def vit() -> FrozenModel:
    return freeze(load_model(demo_file("digits_vit.onnx")))


def test_one_tap_more_changes_no_bit_of_the_others(vit: FrozenModel) -> None:
    assert len(assert_taps_change_nothing(Graph(vit), {"images": normal(4, 1, 8, 8)})) >= 40


def test_taps_of_the_frozen_model_are_the_tensors_that_the_model_outputs(vit: FrozenModel) -> None:
    graph = Graph(vit)
    feeds = {"images": normal(4, 1, 8, 8)}
    taps = find_taps(graph)
    session = measuring_session(vit.graph_bytes, vit.data_folder, EXECUTION)
    (expected,) = run(session, ["logits"], feeds)
    found = tapped_values(graph, taps, feeds)[taps.row_of("logits")]
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    # Nothing is tapped twice, and every float tensor is answered for.
    assert len(set(taps.tensors)) == len(taps.tensors)
    floats_of = {name for name in graph.maker if graph.is_float(name)}
    assert floats_of <= {*taps.tensors, *taps.aliases}
    assert set(taps.aliases.values()) <= set(taps.tensors)


# Constants that were too large to be folded.


def test_what_is_made_of_constants_alone_is_no_activation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "FOLD_LIMIT_BYTES", 0)
    monkeypatch.setattr(constants, "FOLD_TOTAL_BYTES", 0)
    proto = chain(
        [
            node("Expand", ["w", "shape"], ["large"], "expand"),
            node("Transpose", ["large"], ["turned"], "turn", perm=[1, 0]),
            node("Sqrt", ["turned"], ["root"], "root"),
            node("MatMul", ["x", "turned"], ["h"], "first"),
            node("MatMul", ["h", "root"], ["g"], "second"),
            node("RandomNormalLike", ["w"], ["noise"], "noise"),
            node("Add", ["g", "noise"], ["y"], "noisy"),
        ],
        {"w": np.abs(normal(1, 4)), "shape": integers([4, 4])},
        [2, 4],
    )
    graph = graph_of(proto, tmp_path)
    assert {"large", "turned", "root"} <= set(graph.maker)
    assert not any(graph.is_activation(name) for name in ("w", "large", "turned", "root"))
    layers = layers_of(graph)
    assert set(layers) == {"first", "second", "noisy"}
    for name, read, unfolded in (("first", "x", "turned"), ("second", "h", "root")):
        (activation,) = layers[name].activations
        assert (activation.index, activation.tensor) == (0, read)
        assert [(e.index, e.tensor) for e in layers[name].unfolded] == [(1, unfolded)]
    assert [e.tensor for e in layers["noisy"].activations] == ["g", "noise"]
    taps = find_taps(graph)
    assert set(taps.tensors) == {"x", "h", "g", "noise", "y"}
    assert not taps.aliases


def test_bfloat16_activations_are_tapped_as_float32(tmp_path: Path) -> None:
    proto = chain(
        [
            node("Cast", ["x"], ["short"], "short", to=TensorProto.BFLOAT16),
            node("Cast", ["short"], ["long"], "long", to=TensorProto.FLOAT),
            node("Neg", ["long"], ["y"], "neg"),
        ],
        {},
        ["n", 8],
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    assert taps.tensors == ("x", "short", "y")
    # A cast to more bits keeps every value.
    assert taps.aliases == {"long": "short"}
    x = normal(4, 8)
    values = tapped_values(graph, taps, {"x": x})
    assert values["short"].dtype == np.float32
    np.testing.assert_array_equal(values["short"], -values["y"])
    assert not np.array_equal(values["short"], x)
    assert not (values["short"].view(np.uint32) & 0xFFFF).any()
