from __future__ import annotations

import pickle
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdist.demo import demo_file
from qdist.errors import ModelError
from qdist.model import constants, rewrite, session
from qdist.model.difference import _relative_l2, frozen_difference
from qdist.model.freeze import FrozenModel, freeze
from qdist.model.loading import load_model
from qdist.model.opset import raise_opset
from qdist.model.session import measuring_session, run
from qdist.model.weights import Weights, external_range
from qdist.simulate.assemble import raised
from tests.onnx_models import EXECUTION, Array, floats, frozen_from, integers, model, normal, value


def node(op_type: str, inputs: list[str], outputs: list[str], name: str = "", **kw: Any) -> Any:
    return helper.make_node(op_type, inputs, outputs, name, **kw)


def outputs_as_given(proto: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """ONNX Runtime with its own defaults, on the model before anything was done to it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return list(ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds))


def outputs_frozen(frozen: FrozenModel, feeds: dict[str, Array]) -> list[Array]:
    return run(measuring_session(frozen.graph_bytes, frozen.data_folder, EXECUTION), None, feeds)


def check_equal(
    proto: ModelProto, path: Path, feeds: dict[str, Array], tolerance: float = 1e-5
) -> FrozenModel:
    frozen = frozen_from(proto, path / "model.onnx")
    onnx.checker.check_model(frozen.proto(), full_check=True)
    assert frozen_difference(frozen, feeds, EXECUTION) <= tolerance
    for expected, found in zip(
        outputs_as_given(proto, feeds), outputs_frozen(frozen, feeds), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, strict=True)
    return frozen


def types(frozen: FrozenModel) -> list[str]:
    return [entry.op_type for entry in frozen.proto().graph.node]


def norm_constants(n: int) -> dict[str, Array]:
    return {
        "gamma": normal(n, seed=11) + 1,
        "beta": normal(n, seed=12),
        "mean": normal(n, seed=13),
        "variance": np.abs(normal(n, seed=14)) + 0.1,
    }


NORM = ["gamma", "beta", "mean", "variance"]

FOLDABLE: dict[str, tuple[NodeProto, dict[str, Array], Array]] = {
    "conv": (
        node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        {"w": normal(6, 4, 3, 3), "b": normal(6)},
        normal(2, 4, 5, 5),
    ),
    "conv without bias": (
        node("Conv", ["x", "w"], ["c"], "conv"),
        {"w": normal(6, 4, 3, 3)},
        normal(2, 4, 5, 5),
    ),
    "conv with empty bias": (
        node("Conv", ["x", "w", ""], ["c"], "conv"),
        {"w": normal(6, 4, 3, 3)},
        normal(2, 4, 5, 5),
    ),
    "depthwise": (
        node("Conv", ["x", "w"], ["c"], "conv", group=6),
        {"w": normal(6, 1, 3, 3)},
        normal(2, 6, 5, 5),
    ),
    "transposed conv": (
        node("ConvTranspose", ["x", "w", "b"], ["c"], "conv", strides=[2, 2]),
        {"w": normal(4, 6, 3, 3), "b": normal(6)},
        normal(2, 4, 5, 5),
    ),
    "gemm": (
        node("Gemm", ["x", "w", "b"], ["c"], "gemm"),
        {"w": normal(4, 6), "b": normal(6)},
        normal(3, 4),
    ),
    "gemm transB": (
        node("Gemm", ["x", "w", "b"], ["c"], "gemm", transB=1),
        {"w": normal(6, 4), "b": normal(1)},
        normal(3, 4),
    ),
}


@pytest.mark.parametrize("case", FOLDABLE)
@pytest.mark.parametrize("opset", [9, 13, 17])
def test_batch_normalization_goes_into_the_layer_before(
    case: str, opset: int, tmp_path: Path
) -> None:
    layer, weights, x = FOLDABLE[case]
    rank = x.ndim
    norm = node("BatchNormalization", ["c", *NORM], ["y"], "norm", epsilon=1e-3)
    proto = model(
        [layer, norm],
        [value("x", x.shape)],
        [value("y", [None] * rank)],
        {**weights, **norm_constants(6)},
        opset=opset,
    )
    frozen = check_equal(proto, tmp_path, {"x": x})
    assert types(frozen) == [layer.op_type]
    assert "1 batch normalizations folded" in " ".join(frozen.notes)
    (only,) = frozen.proto().graph.node
    assert (only.name, list(only.output)) == (layer.name, ["y"])
    assert len(frozen.weights().names()) == 2


@pytest.mark.parametrize(
    ("layer", "weight", "x"),
    [
        (
            node("ConvTranspose", ["x", "w"], ["c"], "conv", group=2),
            normal(4, 3, 3, 3),
            normal(1, 4, 5, 5),
        ),
        (node("Gemm", ["x", "w"], ["c"], "gemm", alpha=0.5), normal(4, 6), normal(2, 4)),
        (node("MatMul", ["x", "w"], ["c"], "matmul"), normal(4, 6), normal(2, 4)),
    ],
    ids=["grouped transposed conv", "scaled gemm", "matmul"],
)
def test_batch_normalization_stays_where_it_cannot_be_folded(
    layer: NodeProto, weight: Array, x: Array, tmp_path: Path
) -> None:
    proto = model(
        [layer, node("BatchNormalization", ["c", *NORM], ["y"], "norm")],
        [value("x", x.shape)],
        [value("y", [None] * x.ndim)],
        {"w": weight, **norm_constants(6)},
    )
    frozen = check_equal(proto, tmp_path, {"x": x}, tolerance=0)
    assert types(frozen) == [layer.op_type, "BatchNormalization"]


@pytest.mark.parametrize("also", ["an output", "another reader", "a body"])
def test_batch_normalization_stays_when_the_layer_before_is_read_elsewhere(
    also: str, tmp_path: Path
) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv"),
        node("BatchNormalization", ["c", *NORM], ["y"], "norm"),
    ]
    outputs = [value("y", [None] * 4)]
    inputs = [value("x", [1, 4, 5, 5])]
    feeds: dict[str, Array] = {"x": normal(1, 4, 5, 5)}
    if also == "an output":
        outputs.append(value("c", [None] * 4))
    elif also == "another reader":
        nodes.append(node("Relu", ["c"], ["z"], "relu"))
        outputs.append(value("z", [None] * 4))
    else:
        nodes.append(branch("flag", "z", "c", "y"))
        outputs.append(value("z", [None] * 4))
        inputs.append(value("flag", [], TensorProto.BOOL))
        feeds["flag"] = np.array(True)
    proto = model(nodes, inputs, outputs, {"w": normal(6, 4, 3, 3), **norm_constants(6)})
    frozen = check_equal(proto, tmp_path, feeds, tolerance=0)
    assert "BatchNormalization" in types(frozen)


def test_two_layers_of_one_weight_fold_different_normalizations(tmp_path: Path) -> None:
    more = {f"{name}2": array * 0.5 for name, array in norm_constants(4).items()}
    proto = model(
        [
            node("Conv", ["x", "w"], ["a"]),
            node("BatchNormalization", ["a", *NORM], ["b"]),
            node("Conv", ["b", "w"], ["c"]),
            node("BatchNormalization", ["c", *(f"{n}2" for n in NORM)], ["y"]),
        ],
        [value("x", [1, 4, 5, 5])],
        [value("y", [None] * 4)],
        {"w": normal(4, 4, 1, 1), **norm_constants(4), **more},
    )
    assert types(check_equal(proto, tmp_path, {"x": normal(1, 4, 5, 5)})) == ["Conv", "Conv"]


def test_batch_normalization_in_training_mode_is_not_folded() -> None:
    proto = model(
        [
            node("Conv", ["x", "w"], ["c"], "conv"),
            node("BatchNormalization", ["c", *NORM], ["y"], "norm", training_mode=1),
        ],
        [value("x", [1, 4, 5, 5])],
        [value("y", [None] * 4)],
        {"w": normal(6, 4, 3, 3), **norm_constants(6)},
        opset=15,
    )
    assert rewrite.fold_batch_normalization(proto, Weights(proto.graph.initializer, None)) == 0


def branch(flag: str, output: str, then: str, otherwise: str, *, op_type: str = "Neg") -> Any:
    """An If that reads ``then`` or ``otherwise`` from outside its bodies."""
    bodies = [
        helper.make_graph(
            [node(op_type, [name], [f"{output}_{side}"])],
            side,
            [],
            [value(f"{output}_{side}", None)],
        )
        for side, name in (("then", then), ("else", otherwise))
    ]
    return node(
        "If", [flag], [output], f"if_{output}", then_branch=bodies[0], else_branch=bodies[1]
    )


@pytest.mark.parametrize("flag", [True, False])
def test_bodies_keep_what_they_capture(flag: bool, tmp_path: Path) -> None:
    """Through an Identity chain, a Dropout and a constant that is computed."""
    proto = model(
        [
            node("Identity", ["x"], ["i1"]),
            node("Identity", ["i1"], ["i2"]),
            node("Relu", ["i2"], ["r"], "relu"),
            node("Dropout", ["r"], ["d"]),
            node("Transpose", ["w"], ["wt"]),
            node("MatMul", ["d", "wt"], ["m"], "matmul"),
            branch("flag", "z", "d", "wt"),
            node("Add", ["m", "z"], ["y"], "add"),
        ],
        [value("x", [4, 4]), value("flag", [], TensorProto.BOOL)],
        [value("y", [None, None])],
        {"w": normal(4, 4)},
    )
    feeds = {"x": normal(4, 4, seed=3), "flag": np.array(flag)}
    frozen = check_equal(proto, tmp_path, feeds, tolerance=0)
    assert types(frozen) == ["Relu", "MatMul", "If", "Add"]
    assert set(rewrite.names_read(frozen.proto().graph.node[2])) >= {"flag", "r", "wt"}


def test_identities_and_dropouts_vanish_but_outputs_keep_their_names(tmp_path: Path) -> None:
    proto = model(
        [
            node("Identity", ["x"], ["a"]),
            node("Dropout", ["a", "ratio"], ["b"]),
            node("Relu", ["b"], ["c"], "relu"),
            node("Identity", ["c"], ["y1"]),
            node("Dropout", ["c"], ["d"]),
            node("Identity", ["d"], ["e"]),
            node("Neg", ["e"], ["y2"], "neg"),
            node("Identity", ["x"], ["y3"]),
        ],
        [value("x", [2, 3])],
        [value(name, [2, 3]) for name in ("y1", "y2", "y3")],
        {"ratio": floats(0.5)},
    )
    frozen = check_equal(proto, tmp_path, {"x": normal(2, 3)}, tolerance=0)
    assert types(frozen) == ["Relu", "Identity", "Neg", "Identity"]
    assert [list(n.input) for n in frozen.proto().graph.node] == [["x"], ["c"], ["c"], ["x"]]
    assert [o.name for o in frozen.proto().graph.output] == ["y1", "y2", "y3"]
    assert frozen.weights().names() == []


def test_dropout_whose_mask_is_read_or_that_trains_stays() -> None:
    proto = model(
        [
            node("Dropout", ["x"], ["a", "mask"]),
            node("Dropout", ["a", "", "training"], ["b"]),
            node("Dropout", ["b", "", "not_training"], ["c"]),
            node("Relu", ["c"], ["y"]),
            node("Not", ["mask"], ["z"]),
        ],
        [value("x", [2, 3])],
        [value("y", [2, 3]), value("z", [2, 3], TensorProto.BOOL)],
        {"training": np.array(True), "not_training": np.array(False)},
    )
    rewrite.remove_identities(proto)
    assert [n.op_type for n in proto.graph.node] == ["Dropout", "Dropout", "Relu", "Not"]
    assert list(proto.graph.node[2].input) == ["b"]


def sparse_eye() -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(
        numpy_helper.from_array(floats([1, 2, 3]), "values"),
        numpy_helper.from_array(integers([0, 4, 8]), "indices"),
        [3, 3],
    )


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value": numpy_helper.from_array(normal(2, 2))}, normal(2, 2)),
        ({"value_float": 1.5}, floats(1.5)),
        ({"value_floats": [1.5, -2.0]}, floats([1.5, -2.0])),
        ({"value_int": 7}, integers(7)),
        ({"value_ints": [1, 2, 3]}, integers([1, 2, 3])),
        ({"value_string": "a"}, np.array("a", object)),
        ({"value_strings": ["a", "bc"]}, np.array(["a", "bc"], object)),
        ({"sparse_value": sparse_eye()}, np.diag(floats([1, 2, 3]))),
    ],
    ids=lambda entry: next(iter(entry)) if isinstance(entry, dict) else "",
)
def test_constants_of_every_kind_become_initializers(
    attribute: dict[str, Any], expected: Array, tmp_path: Path
) -> None:
    array = np.asarray(expected)
    element = helper.np_dtype_to_tensor_dtype(array.dtype)
    proto = model(
        [node("Constant", [], ["c"], **attribute), node("Relu", ["x"], ["y"], "relu")],
        [value("x", [1])],
        [value("y", [1]), value("c", array.shape, element)],
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    assert types(frozen) == ["Relu"]
    (tensor,) = frozen.proto().graph.initializer
    assert (tensor.name, tensor.data_type, tuple(tensor.dims)) == ("c", element, array.shape)
    found = numpy_helper.to_array(tensor)
    if array.dtype == object:
        found = np.vectorize(lambda s: s.decode() if isinstance(s, bytes) else s, otypes=[object])(
            found
        )
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(outputs_frozen(frozen, {"x": normal(1)})[1], array)


def test_sparse_weights_become_ordinary_ones(tmp_path: Path) -> None:
    by_coordinates = helper.make_sparse_tensor(
        numpy_helper.from_array(floats([5, 6]), "w2"),
        numpy_helper.from_array(integers([[0, 1], [2, 2]]), "i"),
        [3, 3],
    )
    flat = sparse_eye()
    flat.values.name = "w1"
    proto = model(
        [node("MatMul", ["x", "w1"], ["h"]), node("MatMul", ["h", "w2"], ["y"])],
        [value("x", [1, 3])],
        [value("y", [1, 3])],
    )
    proto.graph.sparse_initializer.extend([flat, by_coordinates])
    frozen = check_equal(proto, tmp_path, {"x": normal(1, 3)}, tolerance=0)
    weights = frozen.weights()
    np.testing.assert_array_equal(weights.read("w1"), np.diag([1, 2, 3]))
    np.testing.assert_array_equal(weights.read("w2"), [[0, 5, 0], [0, 0, 0], [0, 0, 6]])


def test_what_depends_on_constants_alone_is_computed_once(tmp_path: Path) -> None:
    proto = model(
        [
            node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            node("Mul", ["wt", "two"], ["scaled"]),
            node("Shape", ["w"], ["shape"]),
            node("MatMul", ["x", "scaled"], ["h"], "matmul"),
            node("Reshape", ["h", "shape"], ["y"], "reshape"),
            node("Split", ["w"], ["s1", "s2"], axis=0),
            node("Neg", ["s1"], ["z"]),
        ],
        [value("x", [5, 5])],
        [value("y", [None, None]), value("z", [None, None])],
        {"w": normal(6, 5), "two": floats(2)},
    )
    frozen = check_equal(proto, tmp_path, {"x": normal(5, 5)}, tolerance=1e-6)
    assert types(frozen) == ["MatMul", "Reshape"]
    np.testing.assert_array_equal(frozen.weights().read("scaled"), normal(6, 5).T * 2)
    assert set(frozen.weights().names()) == {"scaled", "shape", "z"}


def test_random_and_sequence_constants_are_not_folded(tmp_path: Path) -> None:
    proto = model(
        [
            node("SplitToSequence", ["w"], ["sequence"], axis=0),
            node("SequenceAt", ["sequence", "one"], ["row"]),
            node("Add", ["x", "row"], ["h"], "add"),
            node("RandomUniformLike", ["x"], ["noise"], seed=1.0),
            node("RandomNormalLike", ["w"], ["noise2"], seed=1.0),
            node("Shape", ["noise2"], ["shape"]),
            node("Mul", ["h", "noise"], ["y"], "mul"),
        ],
        [value("x", [1, 4])],
        [value("y", [None, None]), value("shape", [2], TensorProto.INT64)],
        {"w": normal(3, 4), "one": integers(1)},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    assert types(frozen) == [n.op_type for n in proto.graph.node]
    (found, _) = outputs_frozen(frozen, {"x": normal(1, 4)})
    assert found.shape == (1, 4)


def test_large_external_weights_stay_where_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proto = model(
        [
            node("Transpose", ["w1"], ["t1"], "t1"),
            node("Transpose", ["w2"], ["t2"], "t2"),
            node("Transpose", ["w3"], ["t3"], "t3"),
            node("MatMul", ["x", "t1"], ["a"], "m1"),
            node("MatMul", ["a", "t2"], ["b"], "m2"),
            node("MatMul", ["b", "t3"], ["y"], "m3"),
        ],
        [value("x", [1, 8])],
        [value("y", [1, 8])],
        {"w1": normal(8, 8), "w2": normal(8, 8, seed=1), "w3": normal(8, 8, seed=2)},
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    feeds = {"x": normal(1, 8)}
    n_bytes = 8 * 8 * 4
    for limit, total, n_left in ((n_bytes, 3 * n_bytes, 0), (n_bytes, 2 * n_bytes, 1), (9, 9, 3)):
        monkeypatch.setattr(constants, "FOLD_LIMIT_BYTES", limit)
        monkeypatch.setattr(constants, "FOLD_TOTAL_BYTES", total)
        frozen = freeze(load_model(path))
        assert types(frozen).count("Transpose") == n_left
        noted = [f"{n_left} constant operators on large tensors stay in the graph"]
        assert list(frozen.notes) == (noted if n_left else [])
        assert frozen_difference(frozen, feeds, EXECUTION) <= 1e-6


def from_shape(op_type: str) -> ModelProto:
    """A small file of which ``op_type`` makes 100 x 100 numbers, and one more of them sums."""
    makers = {
        "ConstantOfShape": [
            node("Mul", ["shape", "one"], ["scaled"]),
            node("ConstantOfShape", ["scaled"], ["large"], "large"),
        ],
        "Expand": [node("Expand", ["dot", "shape"], ["large"], "large")],
        "Tile": [node("Tile", ["dot", "shape"], ["large"], "large")],
        "Range": [
            node("ReduceProd", ["shape"], ["end"], keepdims=0),
            node("Range", ["zero", "end", "step"], ["whole"], "large"),
            node("Cast", ["whole"], ["large"], "cast", to=TensorProto.FLOAT),
        ],
    }
    return model(
        [
            *makers[op_type],
            node("ReduceSum", ["large"], ["sum"], "sum", keepdims=0),
            node("Add", ["x", "sum"], ["y"], "add"),
        ],
        [value("x", [1])],
        [value("y", [1])],
        {
            "shape": integers([100, 100]),
            "one": integers([1]),
            "dot": floats([[1]]),
            "zero": integers(0),
            "step": integers(1),
        },
    )


@pytest.mark.parametrize("op_type", ["ConstantOfShape", "Expand", "Tile", "Range"])
def test_constants_made_large_by_a_small_shape_are_not_folded(
    op_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proto = from_shape(op_type)
    frozen = check_equal(proto, tmp_path, {"x": normal(1)})
    assert types(frozen) == ["Add"]
    monkeypatch.setattr(constants, "FOLD_LIMIT_BYTES", 30_000)
    frozen = check_equal(proto, tmp_path, {"x": normal(1)})
    assert types(frozen)[0] == op_type
    assert types(frozen)[-2:] == ["ReduceSum", "Add"]
    assert len(frozen.graph_bytes) < 2000
    assert frozen.notes == ("1 constant operators on large tensors stay in the graph",)


def test_large_constants_are_not_even_computed(tmp_path: Path) -> None:
    proto = from_shape("ConstantOfShape")
    for tensor in proto.graph.initializer:
        if tensor.name == "shape":
            tensor.CopyFrom(numpy_helper.from_array(integers([1 << 20, 1 << 20]), "shape"))
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    assert types(frozen) == ["ConstantOfShape", "ReduceSum", "Add"]


def test_constants_of_unknown_size_are_bounded_by_their_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proto = model(
        [
            node("NonZero", ["w"], ["places"], "places"),
            node("ReduceSum", ["places"], ["sum"], keepdims=0),
            node("Add", ["x", "sum"], ["y"], "add"),
        ],
        [value("x", [1], TensorProto.INT64)],
        [value("y", [1], TensorProto.INT64)],
        {"w": normal(10, 10)},
    )
    feeds = {"x": integers([3])}
    assert types(check_equal(proto, tmp_path, feeds)) == ["Add"]
    monkeypatch.setattr(constants, "FOLD_LIMIT_BYTES", 1000)
    assert types(check_equal(proto, tmp_path, feeds)) == ["NonZero", "ReduceSum", "Add"]


def test_results_in_place_of_large_weights_in_the_graph_are_folded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "FOLD_LIMIT_BYTES", 100)
    proto = model(
        [
            node("Transpose", ["w"], ["t"], "once"),
            node("Transpose", ["w"], ["u"], "twice"),
            node("MatMul", ["x", "t"], ["h"]),
            node("MatMul", ["h", "u"], ["y"]),
        ],
        [value("x", [1, 8])],
        [value("y", [1, 8])],
        {"w": normal(8, 8)},
    )
    frozen = check_equal(proto, tmp_path, {"x": normal(1, 8)})
    assert [n.name for n in frozen.proto().graph.node if n.op_type == "Transpose"] == ["twice"]


def test_copies_of_weights_that_stay_count_towards_the_total(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proto = model(
        [
            node("Transpose", ["w"], ["t"], "turn"),
            node("MatMul", ["x", "t"], ["h"]),
            node("MatMul", ["h", "w"], ["y"]),
        ],
        [value("x", [1, 8])],
        [value("y", [1, 8])],
        {"w": normal(8, 8)},
    )
    for total, n_left in ((256, 0), (255, 1)):
        monkeypatch.setattr(constants, "FOLD_TOTAL_BYTES", total)
        frozen = check_equal(proto, tmp_path, {"x": normal(1, 8)})
        assert types(frozen).count("Transpose") == n_left


def test_names_are_unique_stable_and_kept_where_there_are_any(tmp_path: Path) -> None:
    proto = model(
        [
            node("Relu", ["x"], ["a"], "act"),
            node("Neg", ["a"], ["b"], "act"),
            node("Abs", ["b"], ["c"]),
            node("Neg", ["c"], ["d"], "Abs_c"),
            node("Exp", ["d"], ["e"], "act_1"),
            node("Neg", ["e"], ["y"], "act"),
        ],
        [value("x", [2])],
        [value("y", [2])],
    )
    # ONNX Runtime itself refuses a graph with repeated names, so the frozen one alone can run.
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    x = normal(2)
    np.testing.assert_array_equal(outputs_frozen(frozen, {"x": x})[0], -np.exp(-np.maximum(x, 0)))
    names = [n.name for n in frozen.proto().graph.node]
    assert names == ["act", "act_2", "Abs_c_1", "Abs_c", "act_1", "act_3"]
    assert [n.name for n in frozen_from(proto, tmp_path / "b.onnx").proto().graph.node] == names


def test_initializers_that_are_inputs_too_are_constants(tmp_path: Path) -> None:
    proto = model(
        [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", *NORM], ["y"])],
        [value("x", [1, 4, 5, 5]), value("w", [6, 4, 3, 3]), *(value(n, [6]) for n in NORM)],
        [value("y", [None] * 4)],
        {"w": normal(6, 4, 3, 3), **norm_constants(6)},
        opset=8,
    )
    proto.ir_version = 3
    frozen = check_equal(proto, tmp_path, {"x": normal(1, 4, 5, 5)})
    assert [i.name for i in frozen.proto().graph.input] == ["x"]
    assert types(frozen) == ["Conv"]


@pytest.mark.parametrize("opset", [9, 11])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, None])
def test_softmax_keeps_its_meaning_over_opset_13(
    opset: int, axis: int | None, tmp_path: Path
) -> None:
    """Up to opset 12 it flattens to two dimensions at ``axis``, which is 1 by default."""
    chosen = {} if axis is None else {"axis": axis}
    proto = model(
        [
            node("Softmax", ["x"], ["s"], "softmax", **chosen),
            node("LogSoftmax", ["s"], ["y"], "log", **chosen),
        ],
        [value("x", ["b", 3, 4])],
        [value("y", ["b", 3, 4])],
        opset=opset,
    )
    frozen = check_equal(proto, tmp_path, {"x": normal(2, 3, 4)}, tolerance=1e-6)
    assert frozen.notes == (f"opset raised from {opset} to 13",)
    assert rewrite.opset_of(frozen.proto()) == 13
    assert {"softmax", "log"} <= {n.name for n in frozen.proto().graph.node}


@pytest.mark.parametrize("flag", [True, False])
def test_softmax_in_a_body_keeps_its_meaning_too(flag: bool, tmp_path: Path) -> None:
    proto = model(
        [branch("flag", "y", "x", "r", op_type="Softmax"), node("Relu", ["x"], ["r"])][::-1],
        [value("x", [2, 3, 4]), value("flag", [], TensorProto.BOOL)],
        [value("y", [2, 3, 4])],
        opset=11,
    )
    feeds = {"x": normal(2, 3, 4), "flag": np.array(flag)}
    check_equal(proto, tmp_path, feeds, tolerance=1e-6)


def test_recurrent_layers_with_absent_outputs_survive(tmp_path: Path) -> None:
    proto = model(
        [
            node("LSTM", ["x", "w", "r"], ["", "h"], "lstm", hidden_size=4),
            node("Dropout", ["h"], ["d"]),
            node("Relu", ["d"], ["y"], "relu"),
        ],
        [value("x", [5, 1, 3])],
        [value("y", [1, 1, 4])],
        {"w": normal(1, 16, 3), "r": normal(1, 16, 4)},
        opset=11,
    )
    frozen = check_equal(proto, tmp_path, {"x": normal(5, 1, 3)}, tolerance=0)
    assert [(n.name, list(n.output)) for n in raised(frozen, 21).graph.node] == [
        ("lstm", ["", "h"]),
        ("relu", ["y"]),
    ]


@pytest.mark.parametrize("name", ["digits_vit.onnx", "digits_cnn.onnx"])
def test_raising_to_opset_21_keeps_nodes_tensors_and_results(name: str) -> None:
    frozen = freeze(load_model(demo_file(name)))
    before, after = frozen.proto(), raised(frozen, 21)
    assert rewrite.opset_of(before) < rewrite.opset_of(after) == 21
    names = {n.name: (n.op_type, list(n.output)) for n in after.graph.node}
    for entry in before.graph.node:
        assert names[entry.name] == (entry.op_type, list(entry.output))
    assert len(names) == len(after.graph.node)
    feeds = {"images": normal(3, 1, 8, 8)}
    session = measuring_session(after.SerializeToString(), frozen.data_folder, EXECUTION)
    for expected, found in zip(
        outputs_frozen(frozen, feeds), run(session, None, feeds), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_raising_keeps_external_data_and_foreign_domains(tmp_path: Path) -> None:
    proto = model(
        [
            node("MatMul", ["x", "w"], ["h"], "matmul"),
            node("Gelu", ["h"], ["y"], "gelu", domain="com.microsoft"),
        ],
        [value("x", ["b", 8])],
        [value("y", ["b", 8])],
        {"w": normal(8, 8)},
        opset=11,
        domains={"com.microsoft": 1},
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    frozen = freeze(load_model(path))
    assert frozen_difference(frozen, {"x": normal(2, 8)}, EXECUTION) == 0
    for graph in (frozen.proto(), raised(frozen, 21)):
        (weight,) = graph.graph.initializer
        assert weight.data_location == TensorProto.EXTERNAL
        assert not weight.raw_data
        assert {e.domain for e in graph.opset_import} == {"", "com.microsoft"}


def test_freezing_twice_gives_one_digest_and_freezing_the_frozen_changes_nothing(
    tmp_path: Path,
) -> None:
    given = load_model(demo_file("digits_vit.onnx"))
    frozen = freeze(given)
    assert freeze(given) == frozen
    path = tmp_path / "frozen.onnx"
    path.write_bytes(frozen.graph_bytes)
    again = freeze(load_model(path))
    assert again.graph_bytes == frozen.graph_bytes
    raised_path = tmp_path / "raised.onnx"
    onnx.save(raised(frozen, 21), raised_path)
    later = freeze(load_model(raised_path))
    assert rewrite.opset_of(later.proto()) == 21
    assert frozen_difference(later, {"images": normal(2, 1, 8, 8)}, EXECUTION) == 0
    assert [n.name for n in later.proto().graph.node] == [n.name for n in frozen.proto().graph.node]


def test_one_weight_more_or_less_is_another_digest(tmp_path: Path) -> None:
    digests = set()
    for seed in (0, 0, 1):
        proto = model(
            [node("MatMul", ["x", "w"], ["y"])],
            [value("x", ["b", 4])],
            [value("y", ["b", 4])],
            {"w": normal(4, 4, seed=seed)},
        )
        digests.add(frozen_from(proto, tmp_path / "model.onnx").digest)
    assert len(digests) == 2


def test_the_fingerprint_tells_arm_processors_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for features in ("fp asimd", "fp asimd asimddp i8mm bf16 sve sve2"):
        text = f"processor\t: 0\nFeatures\t: {features}\n"
        monkeypatch.setattr(session, "open", lambda *_, t=text, **__: StringIO(t), raising=False)
        found.append(session.fingerprint(EXECUTION)["cpu_flags"])
    assert found == [["asimd"], ["asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"]]


def test_remarks_and_unused_bytes_are_no_part_of_the_digest(tmp_path: Path) -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["y"]), node("MatMul", ["x", "v"], ["unread"])],
        [value("x", ["b", 4])],
        [value("y", ["b", 4])],
        {"w": normal(4, 4), "v": normal(4, 4, seed=1)},
    )
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    file, before = load_model(path), freeze(load_model(path))
    given = onnx.load(path, load_external_data=False)
    given.doc_string, given.producer_version = "exported at 10:31", "2"
    given.graph.input[0].doc_string = "pixels"
    given.graph.initializer[0].doc_string = "a weight"
    onnx.save(given, path)
    assert load_model(path).digest != file.digest
    assert freeze(load_model(path)) == replace(
        before, source_digest=load_model(path).digest, n_source_bytes=load_model(path).n_bytes
    )
    data = bytearray((tmp_path / "data").read_bytes())
    for name, is_another in (("w", True), ("v", False)):
        (tensor,) = (t for t in given.graph.initializer if t.name == name)
        place = external_range(tensor, tmp_path)
        assert place is not None
        changed = bytearray(data)
        changed[place.offset + place.n_bytes - 1] ^= 1
        (tmp_path / "data").write_bytes(changed)
        assert (freeze(load_model(path)).digest != before.digest) == is_another


def test_recursive_local_functions_are_refused(tmp_path: Path) -> None:
    proto = model(
        [node("F", ["x"], ["y"], domain="my")],
        [value("x", [4])],
        [value("y", [4])],
        domains={"my": 1},
    )
    imports = [helper.make_opsetid("", 13), helper.make_opsetid("my", 1)]
    body = [node("F", ["a"], ["c"], domain="my")]
    proto.functions.append(helper.make_function("my", "F", ["a"], ["c"], body, imports))
    with pytest.raises(ModelError, match="recursive") as caught:
        frozen_from(proto, tmp_path / "model.onnx")
    assert caught.value.code == "QD202"


def test_frozen_model_is_picklable_and_its_graphs_are_copies() -> None:
    frozen = freeze(load_model(demo_file("digits_cnn.onnx")))
    assert pickle.loads(pickle.dumps(frozen)) == frozen
    del frozen.proto().graph.node[:]
    assert frozen.proto().graph.node


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "local",
        "Block",
        ["a", "w"],
        ["c"],
        [node("MatMul", ["a", "w"], ["b"], "inner"), node("Relu", ["b"], ["c"])],
        [helper.make_opsetid("", 17)],
    )
    proto = model(
        [
            node("Block", ["x", "w1"], ["h"], "first", domain="local"),
            node("Block", ["h", "w2"], ["y"], "second", domain="local"),
        ],
        [value("x", ["b", 4])],
        [value("y", ["b", 4])],
        {"w1": normal(4, 4), "w2": normal(4, 4, seed=1)},
        opset=17,
        domains={"local": 1},
    )
    proto.functions.append(function)
    frozen = check_equal(proto, tmp_path, {"x": normal(2, 4)}, tolerance=0)
    assert types(frozen) == ["MatMul", "Relu"] * 2
    assert len({n.name for n in frozen.proto().graph.node}) == 4
    assert "local functions were inlined" in frozen.notes
    assert not frozen.proto().functions


def test_what_no_output_needs_is_dropped(tmp_path: Path) -> None:
    proto = model(
        [
            node("MatMul", ["x", "w"], ["y"], "used"),
            node("MatMul", ["x", "dead"], ["a"], "unused"),
            node("Relu", ["a"], ["b"], "unused too"),
            node("TopK", ["y", "k"], ["v", "i"], "half"),
        ],
        [value("x", ["b", 4]), value("spare", [1])],
        [value("y", ["b", 4]), value("i", ["b", 2], TensorProto.INT64)],
        {"w": normal(4, 4), "dead": normal(4, 4), "k": integers([2])},
    )
    frozen = check_equal(proto, tmp_path, {"x": normal(2, 4), "spare": normal(1)}, tolerance=0)
    assert [n.name for n in frozen.proto().graph.node] == ["used", "half"]
    assert frozen.weights().names() == ["w", "k"]
    assert [i.name for i in frozen.proto().graph.input] == ["x", "spare"]


def test_outputs_without_a_shape_get_the_inferred_one(tmp_path: Path) -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["y"], "matmul"), node("Relu", ["x"], ["z"], "relu")],
        [value("x", ["b", 4])],
        [value("y", None), value("z", ["b", "other name"])],
        {"w": normal(4, 3)},
    )
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(proto)
    frozen = check_equal(proto, tmp_path, {"x": normal(2, 4)}, tolerance=0)
    y, z = (o.type.tensor_type.shape.dim for o in frozen.proto().graph.output)
    assert [(d.dim_param, d.dim_value) for d in y] == [("b", 0), ("", 3)]
    assert len(z) == 2


def test_remarks_of_the_exporter_are_left_behind(tmp_path: Path) -> None:
    proto = model([node("Relu", ["x"], ["y"])], [value("x", [2])], [value("y", [2])])
    proto.graph.node[0].doc_string = "/home/someone/model.py:12"
    proto.graph.doc_string = proto.doc_string = "/home/someone"
    proto.metadata_props.add(key="author", value="someone")
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    assert b"someone" not in frozen.graph_bytes


def test_constants_that_cannot_be_computed_are_refused_by_name(tmp_path: Path) -> None:
    proto = model(
        [node("Reshape", ["w", "shape"], ["r"]), node("Add", ["x", "r"], ["y"])],
        [value("x", [1])],
        [value("y", None)],
        {"w": normal(2, 3), "shape": integers([4, 2])},
    )
    with pytest.raises(ModelError) as caught:
        frozen_from(proto, tmp_path / "model.onnx")
    assert caught.value.code == "QD205"
    assert "eshape" in caught.value.got


def test_model_that_onnx_runtime_refuses_says_so(tmp_path: Path) -> None:
    proto = model(
        [node("NoSuchOperator", ["x"], ["y"], domain="nowhere")],
        [value("x", [1])],
        [value("y", [1])],
        domains={"nowhere": 1},
    )
    frozen = frozen_from(proto, tmp_path / "model.onnx")
    with pytest.raises(ModelError) as caught:
        frozen_difference(frozen, {"x": normal(1)}, EXECUTION)
    assert caught.value.code == "QD205"
    assert "NoSuchOperator" in caught.value.got


def test_model_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    proto = model(
        [node("Upsample", ["x"], ["y"], scales=[1.0, 1.0, 2.0, 2.0])],
        [value("x", [1, 1, 2, 2])],
        [value("y", None)],
        opset=8,
    )
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError) as caught:
        frozen_from(proto, tmp_path / "model.onnx")
    assert caught.value.code == "QD206"
    assert caught.value.where == "opset 8 to 13"


def test_model_of_foreign_operators_alone_is_refused(tmp_path: Path) -> None:
    proto = model([node("Relu", ["x"], ["y"])], [value("x", [1])], [value("y", [1])])
    proto.opset_import[0].domain = "ai.onnx.ml"
    with pytest.raises(ModelError, match="QD202"):
        frozen_from(proto, tmp_path / "model.onnx")


def test_opset_is_never_lowered() -> None:
    proto = model([node("Relu", ["x"], ["y"])], [value("x", [1])], [value("y", [1])], opset=18)
    assert raise_opset(proto, 13) is proto


def test_a_change_of_the_result_is_refused(tmp_path: Path) -> None:
    frozen = frozen_from(
        model(
            [node("MatMul", ["x", "w"], ["y"])],
            [value("x", ["b", 4])],
            [value("y", ["b", 4])],
            {"w": normal(4, 4)},
        ),
        tmp_path / "model.onnx",
    )
    proto = frozen.proto()
    changed = numpy_helper.to_array(proto.graph.initializer[0]) * 1.001
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed.astype(np.float32), "w"))
    bad = FrozenModel(
        graph_bytes=proto.SerializeToString(),
        data_folder=frozen.data_folder,
        digest=frozen.digest,
        source=frozen.source,
        source_digest=frozen.source_digest,
        n_source_bytes=frozen.n_source_bytes,
    )
    with pytest.raises(ModelError, match="QD207"):
        frozen_difference(bad, {"x": normal(2, 4)}, EXECUTION)


def test_difference_counts_what_is_not_a_number() -> None:
    inf, nan = np.inf, np.nan
    e = floats([1, nan, inf, -inf])
    assert _relative_l2(e, e.copy()) == 0
    assert _relative_l2(e, floats([1, nan, inf, inf])) == inf
    assert _relative_l2(e, floats([nan, nan, inf, -inf])) == inf
    assert _relative_l2(e, floats([1, 0, inf, -inf])) == inf
    assert _relative_l2(floats([1, 2]), floats([1])) == inf
    assert _relative_l2(floats([3, 4, nan]), floats([3, 4.5, nan])) == pytest.approx(0.1)
    assert _relative_l2(np.zeros(2, np.float32), floats([0, 0.25])) == 0.25
    assert _relative_l2(np.array([True]), np.array([False])) == 1
