"""Tensors inside the bodies of ``If``, ``Loop`` and ``Scan``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from qdist.model.bodies import body_types
from qdist.model.freeze import freeze
from qdist.model.graph import Graph
from qdist.model.loading import load_model
from qdist.model.taps import find_taps
from tests.onnx_models import Array, floats, integers, model, normal, value
from tests.tapped import (
    assert_taps_change_nothing,
    body,
    graph_of,
    node,
    tapped_values,
    untapped_outputs,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
SILERO = SHARED / "assets/models/silero_vad_16k_op15.onnx"
BOOL, INT64 = TensorProto.BOOL, TensorProto.INT64


def choice() -> ModelProto:
    """An If whose branches hold tensors of different ranks, and reuse one another's names."""
    then = body(
        [
            node("MatMul", ["x", "w"], ["h"]),
            node("Relu", ["h"], ["a"]),
            node("Reshape", ["a", "flat"], ["y_"]),
        ],
        [],
        ["y_"],
    )
    other = body(
        [
            node("Neg", ["x"], ["h"]),
            node("ReduceMax", ["h"], ["top"]),
            node("Add", ["h", "top"], ["z"]),
            node("Reshape", ["z", "flat"], ["y_"]),
        ],
        [],
        ["y_"],
    )
    return model(
        [node("If", ["flag"], ["y"], "choice", then_branch=then, else_branch=other)],
        [value("x", ["n", 4]), value("flag", [], BOOL)],
        [value("y", None)],
        {"w": normal(4, 4), "flat": integers([-1])},
    )


def steps(*, empty_name: bool = False) -> ModelProto:
    """A Loop with a state, a stacked output, and a tensor that grows from step to step."""
    inner = body(
        [
            node("Add", ["s", "x"], ["sum"]),
            node("Tanh", ["sum"], ["s_next"]),
            node("Unsqueeze", ["i", "zero"], ["size"]),
            node("Add", ["size", "one"], ["more"]),
            node("Expand", ["half", "more"], ["grown"]),
            node("Cos", ["grown"], ["cosine"]),
            node("Transpose", ["sum"], ["turned"]),
            node("Identity", ["go"], ["go_on"]),
            node("ReduceSum", ["s_next"], ["stacked"], keepdims=0),
        ],
        [value("i", [], INT64), value("go", [], BOOL), value("s", None)],
        ["go_on", "s_next", "stacked"],
        {"zero": integers([0]), "one": integers([1]), "half": floats(0.5)},
        {"go_on": BOOL},
    )
    return model(
        [
            node(
                "Loop", ["n", "", "x"], ["last", "sums"], "" if empty_name else "loop", body=inner
            ),
            node("Neg", ["last"], ["y"], "neg"),
            node("Abs", ["sums"], ["z"], "abs"),
        ],
        [value("x", ["b", 3]), value("n", [], INT64)],
        [value("y", None), value("z", None)],
    )


def test_each_branch_holds_its_own_tensors(tmp_path: Path) -> None:
    graph = graph_of(choice(), tmp_path)
    taps = find_taps(graph)
    inside = {"then_branch/h", "then_branch/a"}
    inside |= {"else_branch/h", "else_branch/top", "else_branch/z"}
    assert set(taps.tensors) == {"x", "y", *(f"choice/{name}" for name in inside)}
    assert taps.aliases == {
        "choice/then_branch/y_": "choice/then_branch/a",
        "choice/else_branch/y_": "choice/else_branch/z",
    }
    assert taps.untapped == {}
    x = normal(2, 4)
    weight = graph.weights.read("w")
    for flag in (True, False):
        found = tapped_values(graph, taps, {"x": x, "flag": np.array(flag)})
        ran, idle = ("then", "else") if flag else ("else", "then")
        assert all(v.size == 0 for name, v in found.items() if f"{idle}_branch" in name)
        expected = x @ weight if flag else -x
        np.testing.assert_allclose(found[f"choice/{ran}_branch/h"], expected, rtol=1e-5)
        np.testing.assert_array_equal(
            found["y"], found[f"choice/{ran}_branch/{'a' if flag else 'z'}"].ravel()
        )


@pytest.mark.parametrize("flag", [True, False])
def test_taps_in_branches_change_no_bit(flag: bool, tmp_path: Path) -> None:
    graph = graph_of(choice(), tmp_path)
    feeds = {"x": normal(2, 4), "flag": np.array(flag)}
    together = assert_taps_change_nothing(graph, feeds)
    np.testing.assert_array_equal(together["y"], untapped_outputs(graph, feeds)["y"])


@pytest.mark.parametrize("n_steps", [0, 1, 5])
def test_a_loop_hands_out_what_all_its_steps_held(n_steps: int, tmp_path: Path) -> None:
    graph = graph_of(steps(), tmp_path)
    taps = find_taps(graph)
    x = normal(2, 3)
    feeds: dict[str, Array] = {"x": x, "n": np.array(n_steps)}
    found = assert_taps_change_nothing(graph, feeds)
    sums, states, s = [], [], x
    for _ in range(n_steps):
        sums.append(s + x)
        s = np.tanh(s + x)
        states.append(s)
    flat = np.concatenate([np.zeros(0, np.float32), *(a.ravel() for a in sums)])
    np.testing.assert_allclose(found["loop/body/sum"], flat, rtol=1e-5)
    assert found["loop/body/s_next"].shape == (n_steps * 6,)
    # Its size differs from step to step: 1, 2, 3 ...
    assert found["loop/body/cosine"].shape == (n_steps * (n_steps + 1) // 2,)
    assert taps.aliases["loop/body/turned"] == "loop/body/sum"
    for name, expected in untapped_outputs(graph, feeds).items():
        np.testing.assert_array_equal(found[name], expected)


def test_bodies_without_a_name_have_one(tmp_path: Path) -> None:
    taps = find_taps(graph_of(steps(empty_name=True), tmp_path))
    assert "Loop_last/body/sum" in taps.tensors


def test_a_scan_stacks_its_steps(tmp_path: Path) -> None:
    inner = body(
        [
            node("MatMul", ["row", "w"], ["h"]),
            node("Add", ["s", "h"], ["s_next"]),
            node("Sigmoid", ["s_next"], ["out"]),
        ],
        [value("s", None), value("row", None)],
        ["s_next", "out"],
    )
    proto = model(
        [node("Scan", ["start", "x"], ["last", "y"], "scan", body=inner, num_scan_inputs=1)],
        [value("x", ["t", 2, 3]), value("start", [2, 4])],
        [value("last", None), value("y", None)],
        {"w": normal(3, 4)},
    )
    graph = graph_of(proto, tmp_path)
    feeds = {"x": normal(5, 2, 3), "start": normal(2, 4, seed=1)}
    found = assert_taps_change_nothing(graph, feeds)
    np.testing.assert_array_equal(found["scan/body/out"], found["y"].ravel())
    np.testing.assert_array_equal(found["scan/body/s_next"][-8:], found["last"].ravel())
    assert found["scan/body/h"].size == 5 * 2 * 4


def test_what_may_change_its_size_inside_a_scan_is_named(tmp_path: Path) -> None:
    inner = body(
        [
            node("Compress", ["row", "flags"], ["some"]),
            node("ReduceSum", ["some"], ["out"], keepdims=0),
        ],
        [value("row", None), value("flags", None, BOOL)],
        ["out"],
    )
    proto = model(
        [node("Scan", ["x", "keep"], ["y"], "scan", body=inner, num_scan_inputs=2)],
        [value("x", ["t", 3]), value("keep", ["t", 3], BOOL)],
        [value("y", None)],
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    assert taps.tensors == ("x", "y")
    reason = "inside Scan scan: its size may change from step to step"
    assert taps.untapped == {"scan/body/some": reason, "scan/body/out": reason}
    feeds = {"x": normal(2, 3), "keep": np.array([[True, False, True], [False, False, True]])}
    assert tapped_values(graph, taps, feeds)["y"].shape == (2,)


def test_bodies_within_bodies(tmp_path: Path) -> None:
    """An If in a Loop in an If, with a captured tensor from each level."""
    odd, even = (
        body([node(op, ["mid"], ["v"]), node("Mul", ["v", "x"], ["p"])], [], ["p"])
        for op in ("Exp", "Neg")
    )
    loop = body(
        [
            node("Add", ["s", "outer"], ["mid"]),
            node("Mod", ["i", "two"], ["odd"]),
            node("Cast", ["odd"], ["is_odd"], to=BOOL),
            node("If", ["is_odd"], ["s_next"], "pick", then_branch=odd, else_branch=even),
            node("Identity", ["go"], ["go_on"]),
        ],
        [value("i", [], INT64), value("go", [], BOOL), value("s", None)],
        ["go_on", "s_next"],
        {"two": integers(2)},
        {"go_on": BOOL},
    )
    then = body(
        [node("Cos", ["x"], ["outer"]), node("Loop", ["n", "", "x"], ["r"], "loop", body=loop)],
        [],
        ["r"],
    )
    other = body([node("Identity", ["x"], ["r"])], [], ["r"])
    proto = model(
        [node("If", ["flag"], ["y"], "if", then_branch=then, else_branch=other)],
        [value("x", [2]), value("n", [], INT64), value("flag", [], BOOL)],
        [value("y", None)],
    )
    graph = graph_of(proto, tmp_path)
    inside = "if/then_branch/loop/body/pick/{}_branch/{}"
    taps = find_taps(graph)
    assert {inside.format(b, t) for b in ("then", "else") for t in "vp"} <= set(taps.tensors)
    # The other branch is a view of x, whenever it runs.
    assert taps.aliases["if/else_branch/r"] == "x"
    x = floats([0.1, -0.2])
    feeds: dict[str, Array] = {"x": x, "n": np.array(3), "flag": np.array(True)}
    found = assert_taps_change_nothing(graph, feeds)
    assert found[inside.format("then", "v")].shape == (2,)
    assert found[inside.format("else", "v")].shape == (4,)
    s, kept = x, []
    for i in range(3):
        mid = s + np.cos(x)
        v = np.exp(mid) if i % 2 else -mid
        kept += [v] * (i % 2)
        s = v * x
    np.testing.assert_allclose(found[inside.format("then", "v")], np.ravel(kept), rtol=1e-5)
    np.testing.assert_allclose(found["y"], s, rtol=1e-5)
    for name, array in tapped_values(graph, taps, feeds | {"flag": np.array(False)}).items():
        assert array.size == (2 if name == "y" else 0)


def test_branches_that_are_views_of_one_tensor_make_a_view(tmp_path: Path) -> None:
    then = body([node("Squeeze", ["a"], ["v"])], [], ["v"])
    other = body([node("Identity", ["a"], ["v"])], [], ["v"])
    mixed = body([node("Identity", ["x"], ["v"])], [], ["v"])
    proto = model(
        [
            node("Relu", ["x"], ["a"], "relu"),
            node("If", ["flag"], ["same"], "same", then_branch=then, else_branch=other),
            node("If", ["flag"], ["mixed"], "mixed", then_branch=then, else_branch=mixed),
            node("Neg", ["same"], ["y"], "y"),
            node("Neg", ["mixed"], ["z"], "z"),
        ],
        [value("x", ["n", 1]), value("flag", [], BOOL)],
        [value("y", None), value("z", None)],
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    assert taps.tensors == ("x", "a", "mixed", "y", "z")
    assert taps.row_of("same") == "a"
    for flag in (True, False):
        found = tapped_values(graph, taps, {"x": normal(3, 1), "flag": np.array(flag)})
        np.testing.assert_array_equal(found["a"].ravel(), -found["y"].ravel())


def test_types_of_what_is_handed_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    found = body_types(graph_of(choice(), tmp_path))["choice/then_branch/a"]
    assert (found.element, len(found.shape or ())) == (TensorProto.FLOAT, 2)
    found = body_types(graph_of(steps(), tmp_path / "b"))["loop/body/s_next"]
    assert (found.element, found.shape) == (TensorProto.FLOAT, None)


def test_compute_taps_reach_into_bodies(tmp_path: Path) -> None:
    taps = find_taps(graph_of(choice(), tmp_path), "compute")
    assert taps.tensors == ("x", "y")
    taps = find_taps(graph_of(choice(), tmp_path), ["choice"])
    assert "choice/else_branch/z" in taps.tensors
    assert find_taps(graph_of(choice(), tmp_path), ["*/then_branch/a"]).tensors == (
        "choice/then_branch/a",
    )


def test_contrib_operators_and_half_precision_inside_a_branch(tmp_path: Path) -> None:
    then = body(
        [
            node("FastGelu", ["x"], ["g"], "gelu", domain="com.microsoft"),
            node("Cast", ["g"], ["short"], to=TensorProto.FLOAT16),
            node("Mul", ["short", "short"], ["square"]),
            node("Sqrt", ["square"], ["root"]),
            node("Cast", ["root"], ["out"], to=TensorProto.FLOAT),
        ],
        [],
        ["out"],
    )
    other = body([node("Neg", ["x"], ["out"])], [], ["out"])
    proto = model(
        [node("If", ["flag"], ["y"], "if", then_branch=then, else_branch=other)],
        [value("x", [64]), value("flag", [], BOOL)],
        [value("y", None)],
        domains={"com.microsoft": 1},
    )
    graph = graph_of(proto, tmp_path)
    taps = find_taps(graph)
    kinds = {point.tensor.removeprefix("if/then_branch/"): point.dtype for point in taps.points}
    assert (kinds["g"], kinds["short"], kinds["root"]) == ("float32", "float16", "float16")
    found = assert_taps_change_nothing(graph, {"x": normal(64), "flag": np.array(True)})
    short = found["if/then_branch/short"]
    assert short.dtype == np.float32
    square = (short * short).astype(np.float16)
    np.testing.assert_array_equal(found["if/then_branch/square"], square.astype(np.float32))
    np.testing.assert_array_equal(found["y"], np.sqrt(square.astype(np.float32)).astype(np.float16))


@pytest.mark.skipif(not SILERO.exists(), reason="needs the shared models")
def test_a_real_model_with_a_recurrent_layer_inside_nested_branches() -> None:
    graph = Graph(freeze(load_model(SILERO)))
    taps = find_taps(graph)
    lstm = "/model/decoder/If_1/then_branch//model/decoder/rnn/LSTM"
    assert f"{lstm}_output_0" in taps.tensors
    assert "(LSTM): not measured" in taps.untapped[lstm]
    feeds: dict[str, Array] = {
        "input": normal(2, 512) * 0.1,
        "state": normal(2, 2, 128, seed=1),
        "sr": np.array(16000),
    }
    found = assert_taps_change_nothing(graph, feeds)
    assert found[f"{lstm}_output_0"].shape == (1, 1, 2, 128)
    for name, expected in untapped_outputs(graph, feeds).items():
        np.testing.assert_array_equal(found[taps.row_of(name)].reshape(expected.shape), expected)
    # Every float activation, at whatever depth, is answered for.
    assert all(source in taps.tensors for source in taps.aliases.values())
