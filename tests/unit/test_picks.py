"""Picks of single places of a short last axis: the same bits from other nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, helper, numpy_helper

from qdist.errors import ModelError
from qdist.model import picks
from qdist.model.picks import split_picks
from qdist.model.session import measuring_session, run
from qdist.model.shapes import concrete_shapes
from qdist.model.stretches import Stretches
from tests.onnx_models import EXECUTION, model, normal, value

N_ROWS = 1 << 12


def pick(place: int, data: str = "h", axis: int = -1) -> NodeProto:
    """A node that picks a place; its index is the constant ``i<place>``."""
    name = f"{data}_{place}_{axis}"
    return helper.make_node("Gather", [data, f"i{place}"], [f"y_{name}"], name, axis=axis)


def picking(
    nodes: list[NodeProto], opset: int, n: int | str, *, index_dims: tuple[int, ...] = ()
) -> ModelProto:
    """``h`` and ``k`` made of the input, whose last axis is declared ``n``, picks of them, and
    something that reads these."""
    first = [
        helper.make_node("Neg", ["x"], ["h"], "neg"),
        helper.make_node("Abs", ["x"], ["k"], "abs"),
    ]
    outputs = [value(node.output[0], None) for node in nodes]
    last = [
        helper.make_node("Neg", [node.output[0]], [f"n{i}"], f"last{i}")
        for i, node in enumerate(nodes)
    ]
    outputs += [value(node.output[0], None) for node in last]
    indices: dict[str, Any] = {
        f"i{place}": np.full(index_dims, place, np.int64) for place in range(-4, 9)
    }
    proto = model([*first, *nodes, *last], [value("x", ["b", "r", n])], outputs, indices)
    proto.opset_import[0].version = opset
    return proto


def both(proto: ModelProto, n: int) -> tuple[int, list[bytes], list[bytes]]:
    """How many were replaced; what came out before and after."""
    feeds = {"x": normal(2, N_ROWS // 4, n, seed=n)}
    feeds["x"].reshape(-1)[:4] = (np.nan, np.inf, -0.0, 1e-42)
    names = [output.name for output in proto.graph.output]

    def found() -> list[bytes]:
        session = measuring_session(proto.SerializeToString(), None, EXECUTION)
        return [array.tobytes() for array in run(session, names, feeds)]

    before = found()
    shapes = concrete_shapes(proto, {"x": feeds["x"].shape}, None, EXECUTION)
    return split_picks(proto, shapes), before, found()


@pytest.mark.parametrize("opset", [11, 13, 18])
@given(
    n=st.integers(2, 4),
    chosen=st.lists(st.tuples(st.integers(-4, 3), st.sampled_from("hk")), min_size=1, max_size=6),
)
@settings(max_examples=15)
def test_picks_put_out_the_same_bits(opset: int, n: int, chosen: list[tuple[int, str]]) -> None:
    # Places are counted from the end too.
    chosen = list(dict.fromkeys((max(-n, min(place, n - 1)), data) for place, data in chosen))
    nodes = [pick(place, data, axis=2 if place == 0 else -1) for place, data in chosen]
    proto = picking(nodes, opset, n)
    n_picked, before, after = both(proto, n)
    assert n_picked == len(chosen)
    assert before == after
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Gather") == 0
    assert kinds.count("Split") == len({data for _, data in chosen})


@pytest.mark.parametrize(
    ("nodes", "n", "dims"),
    [
        pytest.param([pick(1)], 8, (), id="a long axis"),
        pytest.param([pick(1, axis=1)], 2, (), id="another axis"),
        pytest.param([pick(1)], 2, (1,), id="the axis stays"),
    ],
)
def test_what_picks_otherwise_is_left_alone(
    nodes: list[NodeProto], n: int, dims: tuple[int, ...]
) -> None:
    proto = picking(nodes, 17, n, index_dims=dims)
    given_bytes = proto.SerializeToString()
    assert both(proto, n)[0] == 0
    assert proto.SerializeToString() == given_bytes


def test_an_axis_that_another_sample_may_have_longer_is_left_alone() -> None:
    proto = picking([pick(1)], 17, "n")
    assert both(proto, 2)[0] == 0
    runner = Stretches(proto.SerializeToString(), ["y_h_1_-1"], None, EXECUTION)
    for n in (2, 2, 3, 4, 2):
        x = normal(2, N_ROWS, n, seed=n)
        (part,) = runner.parts({"x": x})
        assert np.array_equal(part.arrays["y_h_1_-1"], -x[..., 1])


@pytest.mark.parametrize("place", [3, -4])
def test_a_place_that_is_not_there_is_refused_as_it_was(place: int) -> None:
    proto = picking([pick(place)], 17, 3)
    shapes = concrete_shapes(proto, {"x": (2, N_ROWS, 3)}, None, EXECUTION)
    assert split_picks(proto, shapes) == 0
    runner = Stretches(proto.SerializeToString(), [f"y_h_{place}_-1"], None, EXECUTION)
    with pytest.raises(ModelError, match="QD205"):
        list(runner.parts({"x": normal(2, N_ROWS, 3)}))


def test_names_of_bodies_are_left_to_them() -> None:
    inner = [
        helper.make_node("Neg", ["y_h_1_-1"], ["picked_0"], "minus"),
        helper.make_node("Abs", ["picked_0"], ["picked_1"], "plus"),
    ]
    body = helper.make_graph(inner, "body", [], [value("picked_1", None)])
    proto = picking([pick(1)], 17, 2)
    proto.graph.node.append(
        helper.make_node("If", ["yes"], ["chosen"], "if", then_branch=body, else_branch=body)
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.output.append(value("chosen", None))
    n_picked, before, after = both(proto, 2)
    assert n_picked == 1
    assert before == after


def test_few_elements_are_picked_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picks, "_LEAST_ELEMENTS", N_ROWS + 1)
    assert both(picking([pick(1)], 17, 2), 2)[0] == 0
    monkeypatch.setattr(picks, "_LEAST_ELEMENTS", N_ROWS)
    assert both(picking([pick(1)], 17, 2), 2)[0] == 1
