"""Running a graph in stretches: where it is divided, what it keeps, what it refuses."""

from __future__ import annotations

import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from qdist.errors import ModelError
from qdist.model import bound, stretches
from qdist.model.bound import Turn
from qdist.model.graph import Graph
from qdist.model.segments import whole
from qdist.model.session import measuring_session, run
from qdist.model.shapes import Shapes, concrete_shapes
from qdist.model.stretches import Stretches, Undivided
from qdist.model.taps import find_taps
from tests.onnx_models import EXECUTION, Array, frozen_from, model, normal, value

N_LAYERS = 6
WIDTH = 32
ROW_BYTES = 4 * WIDTH


def chain(*, tied: bool = False) -> ModelProto:
    """Layers of a matrix product and a Tanh, each with a weight of its own unless ``tied``."""
    nodes, weights = [], {}
    for i in range(N_LAYERS):
        weight = "w" if tied else f"w{i}"
        weights[weight] = normal(WIDTH, WIDTH, seed=i) / np.float32(WIDTH**0.5)
        nodes.append(helper.make_node("Add", [f"h{i}", "x"], [f"a{i}"], f"add{i}"))
        nodes.append(helper.make_node("MatMul", [f"a{i}", weight], [f"m{i}"], f"matmul{i}"))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"h{i + 1}"], f"tanh{i}"))
    nodes[0].input[0] = "x"
    ends = [value("x", ["b", WIDTH])], [value(f"h{N_LAYERS}", ["b", WIDTH])]
    return model(nodes, *ends, weights)


def graph_bytes(folder: Path, **more: bool) -> tuple[bytes, list[str]]:
    """A chain with all its taps; their outputs."""
    graph = Graph(frozen_from(chain(**more), folder / "model.onnx"))
    taps = find_taps(graph)
    segment = whole(graph, taps)
    return segment.graph_bytes, [point.output for point in taps.points if not point.is_input]


def test_each_stretch_puts_out_as_many_bytes_as_it_should(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=4 * 3 * ROW_BYTES)
    assert len(runner) == 0
    feeds = {"x": normal(4, WIDTH)}
    sizes = [sum(a.nbytes for a in part.arrays.values()) for part in runner.parts(feeds)]
    assert len(sizes) == len(runner) == N_LAYERS
    assert all(size == 4 * 3 * ROW_BYTES for size in sizes)
    # What was divided for a batch of 4 stays so for one of 40.
    assert len(list(runner.parts({"x": normal(40, WIDTH)}))) == N_LAYERS


def test_few_bytes_are_one_stretch(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    runner = Stretches(data, outputs, None, EXECUTION)
    (part,) = runner.parts({"x": normal(4, WIDTH)})
    assert sorted(part.arrays) == sorted(outputs)


def test_nothing_is_kept_alive_that_nobody_reads_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory that is bound stays.
    monkeypatch.setattr(stretches, "_BOUND_BYTES", 0)
    data, outputs = graph_bytes(tmp_path)
    runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
    alive: dict[str, weakref.ref[object]] = {}
    most = 0
    for part in runner.parts({"x": normal(4, WIDTH)}):
        alive |= {name: weakref.ref(array) for name, array in part.arrays.items()}
        part.arrays.clear()
        most = max(most, sum(ref() is not None for ref in alive.values()))
    assert set(alive) == set(outputs)
    # The one that the next stretch reads.
    assert most == 1
    assert all(ref() is None for ref in alive.values())


def all_of(runner: Stretches, feeds: dict[str, Array]) -> dict[str, bytes]:
    """What comes out, as bytes."""
    return {
        name: array.tobytes() for part in runner.parts(feeds) for name, array in part.arrays.items()
    }


def test_feeds_shaped_like_those_before_run_on_memory_that_stays(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
    one = measuring_session(data, None, EXECUTION)
    # Of the first feeds, shapes are inferred; others show theirs when they run.
    assert all(part.is_fixed for part in runner.parts({"x": normal(7, WIDTH)}))
    assert not any(part.is_fixed for part in runner.parts({"x": normal(4, WIDTH)}))
    parts = list(runner.parts({"x": normal(4, WIDTH)}))
    assert len(parts) == len(runner)
    assert all(part.is_fixed for part in parts)
    places = [{n: a.ctypes.data for n, a in part.arrays.items()} for part in parts]
    for seed in range(3):
        feeds = {"x": normal(4, WIDTH, seed=seed)}
        expected = dict(zip(outputs, run(one, outputs, feeds), strict=True))
        for known, place, part in zip(parts, places, runner.parts(feeds), strict=True):
            assert part is known
            for name, array in part.arrays.items():
                assert array.ctypes.data == place[name]
                assert array.tobytes() == expected[name].tobytes()
    # Three layers' outputs would do; all of them are many more.
    every = {at for place in places for at in place.values()}
    assert len(every) < len(outputs) // 2
    # Another shape takes memory of its own; the one before comes back to where it was.
    other, same = {"x": normal(5, WIDTH)}, {"x": normal(4, WIDTH, seed=9)}
    assert not any(part.is_fixed for part in runner.parts(other))
    assert [id(part) for part in runner.parts(same)] == [id(part) for part in parts]


def test_outputs_that_are_large_or_empty_are_not_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, outputs = graph_bytes(tmp_path)
    # Feeds count too.
    for rows, most in ((4, 2 * ROW_BYTES), (400, 400 * ROW_BYTES), (0, 1 << 20)):
        monkeypatch.setattr(stretches, "_BOUND_BYTES", most)
        runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
        for _ in range(3):
            assert not any(part.is_fixed for part in runner.parts({"x": normal(rows, WIDTH)}))


def test_a_shape_that_depends_on_values_ends_the_binding_and_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], "abs"),
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("NonZero", ["r"], ["where"], "where"),
        helper.make_node("Cast", ["where"], ["w"], "cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["w"], ["s"], "sum", keepdims=0),
        helper.make_node("Add", ["a", "s"], ["y"], "add"),
    ]
    proto = model(nodes, [value("x", ["b"])], [value(n, None) for n in "awy"], {})
    outputs = ["a", "w", "y"]
    data = proto.SerializeToString()
    one = measuring_session(data, None, EXECUTION)
    runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
    first = np.array([1, -2, 3], np.float32)
    for x in (first, first, -first, first, first):
        found = all_of(runner, {"x": x})
        expected = run(one, outputs, {"x": x})
        assert found == {n: a.tobytes() for n, a in zip(outputs, expected, strict=True)}
    assert len(runner) > 1
    assert capfd.readouterr().err == ""


def test_a_number_that_is_fed_stays_a_number() -> None:
    nodes = [
        helper.make_node("Gather", ["t", "k"], ["g"], "gather"),
        helper.make_node("Shape", ["g"], ["s"], "shape"),
        helper.make_node("Size", ["s"], ["rank"], "size"),
        helper.make_node("Cast", ["rank"], ["r"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Add", ["t", "r"], ["y"], "add"),
    ]
    ends = [value("t", ["n"]), value("k", [], TensorProto.INT64)], [value("y", ["n"])]
    data = model(nodes, *ends, {}).SerializeToString()
    runner = Stretches(data, ["y"], None, EXECUTION)
    t = normal(3)
    for _ in range(3):
        assert all_of(runner, {"t": t, "k": np.array(1)}) == {"y": t.tobytes()}


def test_feeds_that_lie_otherwise_in_memory_are_taken_as_they_are(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
    x = normal(WIDTH, WIDTH)
    plain, turned = {"x": np.ascontiguousarray(x.T)}, {"x": x.T}
    expected = all_of(runner, plain)
    for _ in range(3):
        assert all_of(runner, turned) == expected


def test_what_was_inferred_wrongly_is_seen_when_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, outputs = graph_bytes(tmp_path)
    real = concrete_shapes

    def wrong(*arguments: Any) -> Shapes:
        found = real(*arguments)
        dims = {**found.dims, outputs[4]: (3, *found.dims[outputs[4]][1:])}
        return Shapes(elements=found.elements, dims=dims, unknown=found.unknown)

    monkeypatch.setattr(stretches, "concrete_shapes", wrong)
    runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
    one = measuring_session(data, None, EXECUTION)
    feeds = {"x": normal(4, WIDTH)}
    expected = {n: a.tobytes() for n, a in zip(outputs, run(one, outputs, feeds), strict=True)}
    for _ in range(2):
        assert all_of(runner, feeds) == expected
    # By then it is known.
    assert all(part.is_fixed for part in runner.parts(feeds))
    assert all_of(runner, feeds) == expected


def test_a_failing_run_on_bound_memory_is_an_error_of_the_model() -> None:
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], "abs"),
        helper.make_node("Gather", ["table", "i"], ["g"], "gather"),
        helper.make_node("Add", ["a", "g"], ["y"], "add"),
    ]
    ends = [value("x", ["b"]), value("i", ["b"], TensorProto.INT64)], [value("y", ["b"])]
    proto = model(nodes, *ends, {"table": normal(4)})
    runner = Stretches(proto.SerializeToString(), ["y"], None, EXECUTION, stretch_bytes=1)
    good = {"x": normal(2), "i": np.array([0, 3])}
    expected = [all_of(runner, good) for _ in range(2)]
    with pytest.raises(ModelError, match="QD205"):
        all_of(runner, {"x": normal(2), "i": np.array([0, 4])})
    assert all_of(runner, good) == expected[0] == expected[1]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 30), max_size=3)), max_size=8),
    st.integers(1, 5),
)
def test_what_is_read_at_one_time_lies_apart(
    turns: list[tuple[int, list[int]]], n_floats: int
) -> None:
    made: list[str] = []
    chain_of: list[Turn] = []
    for i, (n_outputs, reads) in enumerate(turns):
        outputs = [f"t{i}_{k}" for k in range(n_outputs)]
        names = tuple(dict.fromkeys(made[r % len(made)] for r in reads)) if made else ()
        chain_of.append(
            Turn(session=Any, reads=names, outputs=outputs, wanted=(), sends=(), last=())
        )
        made += outputs
    dtype = np.dtype(np.float32)
    forms = [{n: ((n_floats * (1 + len(n)), 7), dtype) for n in t.outputs} for t in chain_of]
    places, n_bytes = bound.places_of(chain_of, forms)
    assert sorted(places) == sorted(made)
    sizes = {n: 4 * 7 * dims[0] for one in forms for n, (dims, _) in one.items()}
    alive: dict[str, int] = {}
    for i, turn in enumerate(chain_of):
        later = {name for other in chain_of[i:] for name in other.reads}
        alive = {n: at for n, at in alive.items() if n in later}
        alive |= {n: places[n] for n in turn.outputs}
        spans = sorted((at, at + sizes[n]) for n, at in alive.items())
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert all(at % 256 == 0 for at, _ in spans)
        assert all(stop <= n_bytes for _, stop in spans)


def test_a_large_weight_inside_the_graph_is_not_held_by_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, outputs = graph_bytes(tmp_path, tied=True)
    feeds = {"x": normal(4, WIDTH)}

    def divided() -> int:
        runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
        list(runner.parts(feeds))
        return len(runner)

    assert divided() > N_LAYERS
    monkeypatch.setattr(stretches, "_REPEATED_BYTES", (N_LAYERS - 1) * WIDTH * ROW_BYTES)
    assert divided() > N_LAYERS
    monkeypatch.setattr(stretches, "_REPEATED_BYTES", (N_LAYERS - 1) * WIDTH * ROW_BYTES - 1)
    assert divided() == 1


def test_a_sample_that_does_not_fit_is_an_error_of_the_model(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    with pytest.raises(ModelError, match="QD205"):
        list(Stretches(data, outputs, None, EXECUTION).parts({"x": normal(4, WIDTH + 1)}))


def test_an_undivided_one_gives_all_at_once(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    session = measuring_session(data, None, EXECUTION)
    feeds = {"x": normal(4, WIDTH), "not read": normal(1)}
    (part,) = Undivided(session, ["x"], outputs[:3]).parts(feeds)
    expected = run(session, outputs[:3], {"x": feeds["x"]})
    assert [part.arrays[name].tobytes() for name in outputs[:3]] == [a.tobytes() for a in expected]
