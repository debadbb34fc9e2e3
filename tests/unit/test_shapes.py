"""Concrete shapes of all tensors, with the weights left where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from qdist.model.session import run, scoring_session
from qdist.model.shapes import SMALL_BYTES, concrete_shapes, runtime_types, weightless
from tests.onnx_models import EXECUTION, Array, integers, model, normal, value


def test_every_shape_is_the_one_that_the_runtime_makes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "zero"], ["b"], "batch"),
        helper.make_node("Unsqueeze", ["b", "axes"], ["b1"], "one"),
        helper.make_node("Concat", ["b1", "minus"], ["to"], "to_shape", axis=0),
        helper.make_node("Reshape", ["x", "to"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "w"], ["m"], "matmul"),
        helper.make_node("Cast", ["m"], ["h"], "half", to=TensorProto.FLOAT16),
    ]
    constants: dict[str, Array] = {
        "zero": integers(0),
        "axes": integers([0]),
        "minus": integers([-1]),
        "w": normal(48, 40),
    }
    proto = model(nodes, [value("x", ["b", 3, 4, 4])], [value("h", None, 10)], constants)
    shapes = concrete_shapes(proto, {"x": (5, 3, 4, 4)})
    assert shapes.unknown == ()
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in ("s", "to", "flat", "m"))
    path = tmp_path / "all.onnx"
    onnx.save(proto, path)
    names = ["s", "to", "flat", "m", "h"]
    for name, array in zip(
        names, run(scoring_session(path, EXECUTION), names, {"x": normal(5, 3, 4, 4)}), strict=True
    ):
        assert shapes.dims[name] == array.shape
        assert shapes.n_bytes(name) == array.nbytes
        assert shapes.n_elements(name) == array.size
    assert shapes.n_bytes("w") == 48 * 40 * 4
    assert shapes.n_bytes("nowhere") is None


def test_operators_that_onnx_does_not_know_are_asked_of_the_runtime() -> None:
    nodes = [
        helper.make_node("Gelu", ["x"], ["g"], "gelu", domain="com.microsoft"),
        helper.make_node("MatMul", ["g", "w"], ["m"], "matmul"),
        helper.make_node("FusedMatMul", ["m", "w"], ["f"], "fused", domain="com.microsoft"),
        helper.make_node("Relu", ["f"], ["y"], "relu"),
    ]
    proto = model(
        nodes,
        [value("x", ["b", "s", 64])],
        [value("y", None)],
        {"w": normal(64, 64)},
        domains={"com.microsoft": 1},
    )
    shapes = concrete_shapes(proto, {"x": (2, 7, 64)})
    assert shapes.unknown == ()
    assert {shapes.dims[name] for name in "gmfy"} == {(2, 7, 64)}
    assert runtime_types(proto, ["f"])["f"][0] == TensorProto.FLOAT


DIVIDED = [helper.make_node("Div", ["d", "two"], ["half"], "half")]
SHIFTED = [
    helper.make_node("Cast", ["d"], ["u"], "unsigned", to=TensorProto.UINT64),
    helper.make_node("BitShift", ["u", "one_bit"], ["half"], "half", direction="RIGHT"),
]


@pytest.mark.parametrize("half", [DIVIDED, SHIFTED], ids=["divided", "shifted"])
def test_shapes_that_are_computed_from_shapes_are_known(half: list[NodeProto]) -> None:
    # As exporters write it: a last axis becomes pairs, by half the width of a head.
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Shape", ["r"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "first"], ["b"], "batch"),
        helper.make_node("Gather", ["s", "last"], ["d"], "width"),
        *half,
        helper.make_node("Cast", ["half"], ["h64"], "cast", to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["b", "zero"], ["b1"], "b1"),
        helper.make_node("Unsqueeze", ["h64", "zero"], ["h1"], "h1"),
        helper.make_node("Concat", ["b1", "h1", "pair"], ["to"], "to", axis=0),
        helper.make_node("Reshape", ["r", "to"], ["pairs"], "pairs"),
        # What follows is known once the pairs are.
        helper.make_node("Shape", ["pairs"], ["s2"], "shape2", start=1),
        helper.make_node("Div", ["s2", "two"], ["s3"], "less"),
        helper.make_node("Expand", ["one", "s3"], ["ones"], "ones"),
    ]
    constants: dict[str, Array] = {
        "first": integers(0),
        "last": integers(1),
        "two": integers(2),
        "one_bit": np.array(1, np.uint64),
        "zero": integers([0]),
        "pair": integers([2]),
        "one": np.ones((), np.float32),
    }
    proto = model(nodes, [value("x", ["b", "d"])], [value("pairs", None)], constants)
    before = proto.SerializeToString()
    shapes = concrete_shapes(proto, {"x": (3, 8)}, None, EXECUTION)
    assert shapes.dims["pairs"] == (3, 4, 2)
    assert shapes.dims["ones"] == (2, 1)
    assert shapes.unknown == ()
    assert proto.SerializeToString() == before


def test_outputs_that_are_computed_from_shapes_keep_their_own() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Div", ["s", "two"], ["half"], "half"),
        helper.make_node("Concat", ["half", "one"], ["to"], "to", axis=0),
        helper.make_node("Reshape", ["x", "to"], ["y"], "y"),
        helper.make_node("Slice", ["y", "zero", "one"], ["first"], "first"),
    ]
    constants = {"two": integers(2), "one": integers([4]), "zero": integers([0])}
    outputs = [value(n, None, TensorProto.INT64) for n in ("s", "to")]
    proto = model(nodes, [value("x", ["b", "d"])], [*outputs, value("first", None)], constants)
    shapes = concrete_shapes(proto, {"x": (4, 8)}, None, EXECUTION)
    assert {n: shapes.dims[n] for n in ("s", "half", "to", "y")} == {
        "s": (2,),
        "half": (2,),
        "to": (3,),
        "y": (2, 4, 4),
    }
    assert shapes.unknown == ()


def test_what_the_runtime_refuses_to_compute_stays_unknown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], "shape"),
        helper.make_node("Sub", ["s", "s"], ["none"], "none"),
        helper.make_node("Div", ["s", "none"], ["to"], "to"),
        helper.make_node("Reshape", ["x", "to"], ["y"], "y"),
        helper.make_node("Relu", ["x"], ["r"], "relu"),
    ]
    outputs = [value("y", None), value("r", None)]
    proto = model(nodes, [value("x", ["b", "d"])], outputs, {})
    shapes = concrete_shapes(proto, {"x": (3, 8)}, None, EXECUTION)
    assert shapes.unknown == ("y",)
    assert shapes.dims["r"] == (3, 8)
    assert capfd.readouterr().err == ""


def test_what_depends_on_values_stays_unknown_and_is_named() -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["n"], "nonzero"),
        helper.make_node("Cast", ["n"], ["c"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Relu", ["x"], ["r"], "relu"),
    ]
    proto = model(nodes, [value("x", ["b", 4])], [value("c", None), value("r", None)])
    shapes = concrete_shapes(proto, {"x": (2, 4)})
    assert shapes.unknown == ("n", "c")
    assert shapes.n_bytes("c") is None
    assert shapes.dims["r"] == (2, 4)


def test_declared_shapes_of_other_inputs_do_not_stand_in_the_way() -> None:
    proto = model(
        [helper.make_node("Relu", ["x"], ["y"], "relu")], [value("x", [1, 4])], [value("y", [1, 4])]
    )
    assert concrete_shapes(proto, {"x": (3, 4)}).dims["y"] == (3, 4)


def test_large_weights_are_never_looked_for(tmp_path: Path) -> None:
    """The external file holds the small constant only; the 4 TB weight beside it is not there."""
    to = integers([-1, 1_000_000])
    (tmp_path / "data").write_bytes(to.tobytes())
    proto = model(
        [
            helper.make_node("Reshape", ["x", "to"], ["r"], "reshape"),
            helper.make_node("MatMul", ["r", "w"], ["y"], "matmul"),
        ],
        [value("x", ["b", 1000, 1000])],
        [value("y", None)],
    )
    for name, element, dims, n_bytes in (
        ("w", TensorProto.FLOAT, [1_000_000, 1_000_000], 4 * 10**12),
        ("to", TensorProto.INT64, [2], to.nbytes),
    ):
        tensor = proto.graph.initializer.add(name=name, data_type=element, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", "data"), ("offset", "0"), ("length", str(n_bytes))):
            tensor.external_data.add(key=key, value=text)
    shapes = concrete_shapes(proto, {"x": (2, 1000, 1000)}, tmp_path)
    assert shapes.dims["y"] == (2, 1_000_000)
    assert shapes.n_bytes("w") == 4 * 10**12
    light = weightless(proto, tmp_path)
    assert light.ByteSize() < SMALL_BYTES
    assert [tensor.name for tensor in light.graph.initializer] == ["to"]
    assert np.array_equal(onnx.numpy_helper.to_array(light.graph.initializer[0]), to)


@pytest.mark.parametrize("shape", [(1, 2, 3), (4, 2, 3)])
def test_a_weightless_graph_keeps_its_inputs(shape: tuple[int, ...]) -> None:
    proto = model(
        [helper.make_node("Add", ["x", "w"], ["y"], "add")],
        [value("x", ["b", 2, 3])],
        [value("y", None)],
        {"w": normal(2, 3)},
    )
    light = weightless(proto)
    assert [entry.name for entry in light.graph.input] == ["x"]
    assert light.graph.initializer[0].name == "w"
    assert concrete_shapes(proto, {"x": shape}).dims["y"] == shape
