"""Which tensors carry a mask into a Softmax."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto

from qdist.model.masks import sentinel_paths
from qdist.model.taps import find_taps
from tests.onnx_models import Array, floats, integers, model, normal, value
from tests.tapped import body, graph_of, node, tapped_values

BOOL = TensorProto.BOOL
SCORES = [
    node("MatMul", ["x", "w"], ["q"], "q"),
    node("Transpose", ["x"], ["kt"], "turn", perm=[1, 0]),
    node("MatMul", ["q", "kt"], ["qk"], "scores"),
    node("Div", ["qk", "root"], ["s"], "scale"),
]
AFTER = [node("Softmax", ["m"], ["p"], "softmax"), node("MatMul", ["p", "x"], ["y"], "mix")]
INF = float("inf")


def masked(nodes: list[NodeProto], constants: dict[str, Array], tmp_path: Path) -> dict[str, str]:
    """Attention whose masked scores ``m`` the given nodes make of the scores ``s``."""
    inputs = [value("x", [4, 4]), value("keep", [4, 4], BOOL), value("bias", [4, 4])]
    read = {name for made in nodes for name in made.input}
    used = [entry for entry in inputs if entry.name == "x" or entry.name in read]
    everything = {"w": normal(4, 4), "root": floats(2.0)} | constants
    proto = model([*SCORES, *nodes, *AFTER], used, [value("y", None)], everything)
    return sentinel_paths(graph_of(proto, tmp_path))


@pytest.mark.parametrize("low", [-INF, -3.4e38, -1e9, -65504.0, -1e4])
def test_a_constant_mask_that_is_added(low: float, tmp_path: Path) -> None:
    causal = np.triu(np.full((4, 4), low, np.float32), 1)
    causal[np.tril_indices(4)] = 0
    found = masked([node("Add", ["s", "c"], ["m"], "mask")], {"c": causal}, tmp_path)
    assert found == {"m": "softmax"}


def test_scores_that_are_no_mask(tmp_path: Path) -> None:
    assert masked([node("Add", ["s", "c"], ["m"], "bias")], {"c": normal(4, 4)}, tmp_path) == {}
    assert masked([node("Identity", ["s"], ["m"], "none")], {}, tmp_path) == {}
    # The bounds of a Clip are no values.
    bounded = [node("Clip", ["s", "low", "high"], ["m"], "clip")]
    assert masked(bounded, {"low": floats(-1e4), "high": floats(1e4)}, tmp_path) == {}


def test_a_mask_made_of_a_flag(tmp_path: Path) -> None:
    made = [
        node("Cast", ["keep"], ["k"], "cast", to=TensorProto.FLOAT),
        node("Sub", ["one", "k"], ["drop"], "drop"),
        node("Mul", ["drop", "low"], ["added"], "low"),
        node("Reshape", ["added", "shape"], ["view"], "view"),
        node("Add", ["s", "view"], ["m"], "mask"),
    ]
    constants: dict[str, Array] = {
        "one": floats(1),
        "low": floats(-3.4e38),
        "shape": integers([4, 4]),
    }
    found = masked(made, constants, tmp_path)
    assert set(found) == {"added", "view", "m"}


def test_a_choice_between_scores_and_infinity(tmp_path: Path) -> None:
    found = masked(
        [node("Where", ["keep", "s", "low"], ["m"], "where")], {"low": floats(-INF)}, tmp_path
    )
    assert set(found) == {"m"}


def test_a_mask_that_the_user_gives(tmp_path: Path) -> None:
    found = masked([node("Add", ["s", "bias"], ["m"], "mask")], {}, tmp_path)
    assert set(found) == {"bias", "m"}


def test_a_mask_that_is_filled_in(tmp_path: Path) -> None:
    low = TensorProto(data_type=TensorProto.FLOAT, dims=[1], float_data=[-INF])
    made = [
        node("Shape", ["s"], ["size"], "size"),
        node("ConstantOfShape", ["size"], ["full"], "fill", value=low),
        node("Where", ["keep", "zero", "full"], ["added"], "choose"),
        node("Add", ["s", "added"], ["m"], "mask"),
    ]
    assert set(masked(made, {"zero": floats(0)}, tmp_path)) == {"full", "added", "m"}


def test_a_softmax_that_is_written_out(tmp_path: Path) -> None:
    nodes = [
        *SCORES,
        node("Add", ["s", "bias"], ["m"], "mask"),
        node("ReduceMax", ["m"], ["top"], "top", axes=[1]),
        node("Sub", ["m", "top"], ["shifted"], "shift"),
        node("Exp", ["shifted"], ["e"], "exp"),
        node("ReduceSum", ["e", "axis"], ["sum"], "sum"),
        node("Div", ["e", "sum"], ["y"], "share"),
    ]
    constants: dict[str, Array] = {"w": normal(4, 4), "root": floats(2.0), "axis": integers([1])}
    inputs = [value("x", [4, 4]), value("bias", [4, 4])]
    graph = graph_of(model(nodes, inputs, [value("y", None)], constants), tmp_path)
    assert set(sentinel_paths(graph)) == {"bias", "m", "shifted"}


def test_a_mask_of_a_contrib_operator(tmp_path: Path) -> None:
    nodes = [
        node("Mul", ["bias", "low"], ["added"], "low"),
        node(
            "MultiHeadAttention",
            ["q", "k", "v", "", "", "added"],
            ["y"],
            "mha",
            domain="com.microsoft",
            num_heads=1,
        ),
    ]
    inputs = [value(name, [1, 4, 8]) for name in "qkv"] + [value("bias", [1, 1, 4, 4])]
    proto = model(
        nodes, inputs, [value("y", None)], {"low": floats(1e4)}, domains={"com.microsoft": 1}
    )
    graph = graph_of(proto, tmp_path)
    assert sentinel_paths(graph) == {"bias": "mha", "added": "mha"}
    assert find_taps(graph).untapped["mha"].startswith("internal to mha (MultiHeadAttention)")
    assert find_taps(graph, "compute").tensors == ("q", "k", "v", "y")


def test_a_mask_inside_a_branch(tmp_path: Path) -> None:
    then = body(
        [node("Add", ["s", "bias"], ["m"]), node("Softmax", ["m"], ["p"], "soft")], [], ["p"]
    )
    other = body([node("Softmax", ["s"], ["p"], "plain")], [], ["p"])
    nodes = [*SCORES, node("If", ["flag"], ["y"], "if", then_branch=then, else_branch=other)]
    inputs = [value("x", [4, 4]), value("bias", [4, 4]), value("flag", [], BOOL)]
    constants = {"w": normal(4, 4), "root": floats(2.0)}
    graph = graph_of(model(nodes, inputs, [value("y", None)], constants), tmp_path)
    assert sentinel_paths(graph) == {"bias": "soft", "if/then_branch/m": "soft"}


def test_infinities_are_found_nowhere_else(tmp_path: Path) -> None:
    """On a real run: the tensors that hold infinities are those that are named, and no others."""
    causal = np.triu(np.full((4, 4), -INF, np.float32), 1)
    causal[np.tril_indices(4)] = 0
    constants = {"w": normal(4, 4), "root": floats(2.0), "c": causal}
    nodes = [*SCORES, node("Add", ["s", "c"], ["m"], "mask"), *AFTER]
    graph = graph_of(model(nodes, [value("x", [4, 4])], [value("y", None)], constants), tmp_path)
    found = tapped_values(graph, find_taps(graph), {"x": normal(4, 4, seed=2)})
    infinite = {name for name, array in found.items() if np.isinf(array).any()}
    assert infinite == set(sentinel_paths(graph)) == {"m"}
    assert not any(np.isnan(array).any() for array in found.values())
