"""A tensor that answers for another holds the very same values, each as often."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto

from qdist.model.session import measuring_session, run
from qdist.model.taps import find_taps
from tests.onnx_models import EXECUTION, Array, floats, integers, model, normal, value
from tests.tapped import graph_of, node

INT_MAX = np.iinfo(np.int64).max
INT_MIN = np.iinfo(np.int64).min
Step = tuple[str, dict[str, Array], dict[str, Any], bool]
"""Operator, further inputs, attributes, and whether the output is an alias of the input."""


def step(op: str, *more: Array, alias: bool = True, **attributes: Any) -> Step:
    return op, {f"c{i}": array for i, array in enumerate(more)}, attributes, alias


STEPS: dict[str, Step] = {
    "transpose": step("Transpose", perm=[2, 0, 1]),
    "reshape": step("Reshape", integers([4, -1])),
    "flatten": step("Flatten", axis=2),
    "squeeze": step("Squeeze"),
    "unsqueeze": step("Unsqueeze", integers([1])),
    "concat of one": step("Concat", axis=1),
    "split into one": step("Split", axis=2),
    "slice to the end": step("Slice", integers([0]), integers([INT_MAX]), integers([2])),
    "slice of the very size": step("Slice", integers([0]), integers([3]), integers([1])),
    "slice from the start, counted from the end": step(
        "Slice", integers([-3]), integers([3]), integers([-2])
    ),
    "slice backwards": step(
        "Slice", integers([-1]), integers([INT_MIN]), integers([2]), integers([-1])
    ),
    "slice of two axes": step("Slice", integers([0, 0]), integers([2, 9])),
    "slice from 1": step("Slice", integers([1]), integers([9]), integers([1]), alias=False),
    "slice before the end": step("Slice", integers([0]), integers([2]), integers([1]), alias=False),
    "slice to -1": step("Slice", integers([0]), integers([-1]), integers([1]), alias=False),
    "every second": step(
        "Slice", integers([0]), integers([9]), integers([2]), integers([2]), alias=False
    ),
    "backwards, without the first": step(
        "Slice", integers([-1]), integers([0]), integers([1]), integers([-1]), alias=False
    ),
    "one axis of two": step("Slice", integers([0, 1]), integers([9, 9]), alias=False),
    "pad with nothing": step("Pad", integers([0] * 6)),
    "pad": step("Pad", integers([0, 0, 1, 0, 0, 0]), alias=False),
    "tile once": step("Tile", integers([1, 1, 1])),
    "tile": step("Tile", integers([1, 2, 1]), alias=False),
    "expand to itself": step("Expand", integers([1])),
    "expand to its own size": step("Expand", integers([2, 1, 4])),
    "expand": step("Expand", integers([5, 1, 1, 1]), alias=False),
    "reverse": step("ReverseSequence", integers([1, 2, 1]), batch_axis=1, time_axis=0),
    "cast to the same": step("Cast", to=TensorProto.FLOAT),
    "cast to more": step("Cast", to=TensorProto.DOUBLE),
    "cast to less": step("Cast", to=TensorProto.FLOAT16, alias=False),
    "relu": step("Relu", alias=False),
    "gather": step("Gather", integers([1, 1]), axis=0, alias=False),
}
"""On a tensor [2, 3, 4]."""


def values_of(folder: Path, nodes: list[NodeProto], constants: dict[str, Array], x: Array) -> Any:
    """The graph, its taps, and what every float tensor of it holds."""
    casts = [entry.i for made in nodes for entry in made.attribute if entry.name == "to"]
    output = value(nodes[-1].output[0], None, casts[-1] if casts else TensorProto.FLOAT)
    proto = model(nodes, [value("x", list(x.shape))], [output], constants)
    graph = graph_of(proto, folder)
    taps = find_taps(graph)
    names = [name for name in graph.maker if graph.is_float(name)]
    whole = graph.model.proto()
    del whole.graph.output[:]
    whole.graph.output.extend(
        value(n, None, found.element) for n in names if (found := graph.type_of(n)) is not None
    )
    session = measuring_session(whole.SerializeToString(), folder, EXECUTION)
    return taps, dict(zip(names, run(session, names, {"x": x}), strict=True)) | {"x": x}


def assert_same_values(alias: Array, source: Array) -> None:
    np.testing.assert_array_equal(
        np.sort(alias.astype(np.float32), None), np.sort(source.astype(np.float32), None)
    )


@pytest.mark.parametrize("name", STEPS)
def test_each_view_is_told_from_what_only_looks_like_one(name: str, tmp_path: Path) -> None:
    op, more, attributes, is_alias = STEPS[name]
    nodes = [node(op, ["x", *more], ["v"], "view", **attributes), node("Identity", ["v"], ["y"])]
    taps, values = values_of(tmp_path, nodes, more, normal(2, 3, 4))
    assert (taps.row_of("v") == "x") == is_alias
    assert taps.row_of("y") == taps.row_of("v")
    if is_alias:
        assert_same_values(values["v"], values["x"])
    else:
        assert not np.array_equal(np.sort(values["v"], None), np.sort(values["x"], None))


@settings(max_examples=40)
@given(data=st.data(), n=st.integers(1, 6))
def test_aliases_hold_the_values_of_their_source(data: st.DataObject, n: int) -> None:
    """Chains of views and of operators that are none, on shapes that change on the way."""
    nodes, constants, shape = [], {}, [2, 3, 4]
    tensor = "x"
    for i in range(n):
        kind = data.draw(st.sampled_from(["turn", "join", "cut", "grow", "pad", "act", "expand"]))
        made, extra, attributes = f"t{i}", f"c{i}", {}
        size = shape[-1]
        reads = [tensor]
        if kind == "turn":
            attributes["perm"] = list(data.draw(st.permutations(range(len(shape)))))
            shape = [shape[axis] for axis in attributes["perm"]]
            op = "Transpose"
        elif kind == "join":
            op, constants[extra] = "Reshape", integers([-1])
            shape, reads = [int(np.prod(shape))], [tensor, extra]
        elif kind == "cut":
            op = "Slice"
            start = data.draw(st.integers(0, min(1, size - 1)))
            end = data.draw(st.sampled_from([size, INT_MAX, max(start + 1, size - 1)]))
            constants[extra], constants[f"e{i}"] = integers([start]), integers([end])
            constants[f"a{i}"] = integers([-1])
            reads = [tensor, extra, f"e{i}", f"a{i}"]
            shape = [*shape[:-1], min(end, size) - start]
        elif kind == "grow":
            op, constants[extra] = "Unsqueeze", integers([0])
            shape, reads = [1, *shape], [tensor, extra]
        elif kind == "pad":
            pads = [0] * (2 * len(shape))
            pads[-1] = data.draw(st.integers(0, 1))
            op, constants[extra] = "Pad", integers(pads)
            shape, reads = [*shape[:-1], size + pads[-1]], [tensor, extra]
        elif kind == "expand":
            times = data.draw(st.integers(1, 2))
            op, constants[extra] = "Tile", integers([times] + [1] * (len(shape) - 1))
            shape, reads = [shape[0] * times, *shape[1:]], [tensor, extra]
        else:
            op = "Sin"
        nodes.append(node(op, reads, [made], f"n{i}", **attributes))
        tensor = made
    with tempfile.TemporaryDirectory() as folder:
        taps, values = values_of(Path(folder), nodes, constants, normal(2, 3, 4))
    assert set(taps.tensors) | set(taps.aliases) == {"x", *(f"t{i}" for i in range(n))}
    for alias, source in taps.aliases.items():
        assert source in taps.tensors
        assert_same_values(values[alias], values[source])


def test_dropout_outside_of_training_is_a_view_and_its_mask_no_activation(tmp_path: Path) -> None:
    nodes = [
        node("Relu", ["x"], ["a"], "relu"),
        node("Dropout", ["a", "ratio", "off"], ["d", "mask"], "drop"),
        node("Cast", ["mask"], ["m"], "cast", to=TensorProto.FLOAT),
        node("Mul", ["d", "m"], ["y"], "mul"),
    ]
    constants = {"ratio": floats(0.5), "off": np.array(False)}
    taps, values = values_of(tmp_path, nodes, constants, normal(2, 3, 4))
    assert taps.row_of("d") == "a"
    assert "mask" not in taps.tensors
    assert "m" in taps.tensors
    assert_same_values(values["d"], values["a"])


def test_training_dropout_is_no_view(tmp_path: Path) -> None:
    nodes = [
        node("Dropout", ["x", "ratio", "on"], ["d"], "drop", seed=1),
        node("Neg", ["d"], ["y"], "neg"),
    ]
    constants = {"ratio": floats(0.5), "on": np.array(True)}
    taps, _ = values_of(tmp_path, nodes, constants, normal(2, 3, 4))
    assert taps.tensors == ("x", "d", "y")


def test_depth_and_space(tmp_path: Path) -> None:
    nodes = [
        node("DepthToSpace", ["x"], ["s"], "to_space", blocksize=2),
        node("SpaceToDepth", ["s"], ["y"], "to_depth", blocksize=2),
    ]
    taps, values = values_of(tmp_path, nodes, {}, normal(1, 8, 2, 2))
    assert taps.tensors == ("x",)
    assert taps.aliases == {"s": "x", "y": "x"}
    assert_same_values(values["s"], values["x"])
