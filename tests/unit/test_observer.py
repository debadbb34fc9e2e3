"""From micro-batches to a record: NaNs by name, phases that hand on, padding, scratch files."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from qdist.data.source import Feeds
from qdist.errors import DataError, ModelError
from qdist.model.graph import Graph
from qdist.model.segments import Segment, cut_at, whole
from qdist.model.session import measuring_session, run
from qdist.model.stretches import Stretches
from qdist.model.taps import find_taps
from qdist.stats.observer import Batch, Observer, ObserverSpec, Padding
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import StatisticsSpec
from tests.onnx_models import EXECUTION, Array, floats, frozen_from, model, normal, value

Cut = Callable[[Graph, Any, Any], tuple[Segment, ...]]


def in_one(graph: Graph, taps: Any, shapes: Any, hands: Sequence[str] = ()) -> tuple[Segment, ...]:
    return (whole(graph, taps, hands=hands),)


def in_many(graph: Graph, taps: Any, shapes: Any, hands: Sequence[str] = ()) -> tuple[Segment, ...]:
    segments = cut_at(graph, taps, shapes, range(100), hands=hands)
    assert len(segments) > 1
    return segments


CUTS = pytest.mark.parametrize("cut", [in_one, in_many])


def batch(names: Sequence[str], *feeds: Feeds) -> Batch:
    return tuple(names), lambda: list(feeds)


# --- NaN --------------------------------------------------------------------------------------


def roots(tmp_path: Path) -> Graph:
    nodes = [
        helper.make_node("Add", ["x", "one"], ["shifted"], "shift"),
        helper.make_node("Sqrt", ["shifted"], ["root"], "sqrt"),
        helper.make_node("ReduceSum", ["root"], ["total"], "sum", keepdims=0),
    ]
    proto = model(nodes, [value("x", ["b", 3])], [value("total", [])], {"one": floats(1)})
    return Graph(frozen_from(proto, tmp_path / "m.onnx"))


def spec_of(graph: Graph, segments: Sequence[Segment], taps: Any, **more: Any) -> ObserverSpec:
    return ObserverSpec(
        segments=tuple(segments),
        data_folder=graph.model.data_folder,
        taps=taps,
        execution=EXECUTION,
        **more,
    )


@CUTS
def test_a_nan_is_an_error_that_names_the_tensor_and_the_very_samples(
    cut: Any, tmp_path: Path
) -> None:
    graph = roots(tmp_path)
    taps = find_taps(graph)
    spec = spec_of(graph, cut(graph, taps, {"x": (4, 3)}), taps)
    x = np.ones((4, 3), np.float32)
    good, x_bad = x.copy(), x.copy()
    x_bad[1, 2] = x_bad[3] = -5
    batches = [batch(["a", "b", "c", "d"], {"x": good}), batch(["e", "f", "g", "h"], {"x": x_bad})]
    with pytest.raises(DataError, match="QD309") as info:
        Observer(spec).observe(batches)
    assert info.value.where == "tensor root, sample f and h"
    assert info.value.got == "4 NaN"
    record = Observer(replace(spec, on_nan="report")).observe(batches)
    assert record.histogram("root").n_nan == 4
    assert record.n_samples == 8


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_a_nan_that_the_model_fails_of_is_named_and_not_what_it_did(
    bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Stretches.__init__.__kwdefaults__ or {}, "stretch_bytes", 1)
    nodes = [
        helper.make_node("Log", ["x"], ["l"], "log"),
        helper.make_node("Abs", ["l"], ["a"], "abs"),
        helper.make_node("Cast", ["a"], ["i"], "cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "i"], ["y"], "gather"),
    ]
    proto = model(nodes, [value("x", ["b"])], [value("y", None)], {"table": normal(4)})
    graph = Graph(frozen_from(proto, tmp_path / "m.onnx"))
    taps = find_taps(graph)
    spec = spec_of(graph, in_one(graph, taps, {"x": (2,)}), taps)
    good = {"x": np.ones(2, np.float32)}
    batches = [batch(["a", "b"], good)] * 3
    with pytest.raises(DataError, match="QD309") as info:
        Observer(spec).observe([*batches, batch(["c", "d"], {"x": np.array([1, bad], np.float32)})])
    assert info.value.where == f"tensor {'x' if np.isnan(bad) else 'l'}, sample d"
    # Where it is no NaN, it is the model's error.
    with pytest.raises(ModelError, match="QD205"):
        Observer(spec).observe([*batches, batch(["c"], {"x": np.array([1e9], np.float32)})])


def test_where_a_tensor_has_no_batch_axis_all_samples_of_its_run_are_named(tmp_path: Path) -> None:
    graph = roots(tmp_path)
    taps = find_taps(graph, ["total"])
    spec = spec_of(graph, in_one(graph, taps, {}), taps)
    x = -5 * np.ones((2, 3), np.float32)
    with pytest.raises(DataError, match="QD309") as info:
        Observer(spec).observe([batch(["a", "b"], {"x": x})])
    assert info.value.where == "tensor total, sample a or b"


# --- phases -----------------------------------------------------------------------------------

WIDTH = 4


def decoder(n_layers: int = 2) -> ModelProto:
    """Attention over a growing past, and a state that goes from the end of a phase to the next."""
    nodes = [helper.make_node("Add", ["x", "state"], ["h0"], "start")]
    constants: dict[str, Array] = {}
    inputs = [value("x", ["b", "s", WIDTH]), value("state", ["b", 1, WIDTH])]
    outputs = []
    for i in range(n_layers):
        for name in "kq":
            constants[f"w{name}{i}"] = normal(WIDTH, WIDTH, seed=10 * i + ord(name))
        nodes += [
            helper.make_node("MatMul", [f"h{i}", f"wk{i}"], [f"k{i}"], f"key{i}"),
            helper.make_node("Concat", [f"past{i}", f"k{i}"], [f"present{i}"], f"cat{i}", axis=1),
            helper.make_node("MatMul", [f"h{i}", f"wq{i}"], [f"q{i}"], f"query{i}"),
            helper.make_node("Transpose", [f"present{i}"], [f"kt{i}"], f"turn{i}", perm=[0, 2, 1]),
            helper.make_node("MatMul", [f"q{i}", f"kt{i}"], [f"s{i}"], f"score{i}"),
            helper.make_node("Softmax", [f"s{i}"], [f"p{i}"], f"soft{i}", axis=-1),
            helper.make_node("MatMul", [f"p{i}", f"present{i}"], [f"a{i}"], f"mix{i}"),
            helper.make_node("Add", [f"h{i}", f"a{i}"], [f"h{i + 1}"], f"res{i}"),
        ]
        inputs.append(value(f"past{i}", ["b", "p", WIDTH]))
        outputs.append(value(f"present{i}", None))
    nodes.append(helper.make_node("ReduceMean", [f"h{n_layers}"], ["new_state"], "end", axes=[1]))
    return model(nodes, inputs, [*outputs, value("new_state", None)], constants)


PASTS = (("past0", "present0"), ("past1", "present1"))
STATE = ("state", "new_state")


def prompts(seed: int, n_steps: int, *, carries_state: bool) -> list[Feeds]:
    """Prefill of three positions, then single ones. What is carried is given at the start only."""
    empty = np.zeros((2, 0, WIDTH), np.float32)
    feeds: list[Feeds] = [
        {
            "x": normal(2, 3, WIDTH, seed=seed),
            "state": np.zeros((2, 1, WIDTH), np.float32),
            "past0": empty,
            "past1": empty,
        }
    ]
    for step in range(n_steps):
        more: Feeds = {"x": normal(2, 1, WIDTH, seed=seed + 100 + step)}
        if not carries_state:
            more["state"] = np.zeros((2, 1, WIDTH), np.float32)
        feeds.append(more)
    return feeds


def unrolled(graph: Graph, feeds: Sequence[Feeds], carry: Any) -> list[Feeds]:
    """All feeds of all phases, with what is carried computed by the model itself."""
    session = measuring_session(graph.model.graph_bytes, graph.model.data_folder, EXECUTION)
    names = graph.output_names
    found: list[Feeds] = []
    carried: Feeds = {}
    for given_feeds in feeds:
        full = {**given_feeds, **carried}
        made = dict(zip(names, run(session, names, full), strict=True))
        carried = {name: made[output] for name, output in carry}
        found.append(full)
    return found


def assert_counts_are_alike(record: CalibrationRecord, expected: CalibrationRecord) -> None:
    assert record.tensors == expected.tensors
    for tensor in record.tensors:
        found, wanted = record.histogram(tensor), expected.histogram(tensor)
        assert np.array_equal(found.bins, wanted.bins)
        assert np.array_equal(found.counts, wanted.counts)
        assert (found.minimum, found.maximum) == (wanted.minimum, wanted.maximum)


@pytest.mark.parametrize("carries_state", [False, True])
@CUTS
def test_phases_are_measured_as_if_all_inputs_had_been_given(
    cut: Any, carries_state: bool, tmp_path: Path
) -> None:
    graph = Graph(frozen_from(decoder(), tmp_path / "m.onnx"))
    taps = find_taps(graph)
    carry = (*PASTS, STATE) if carries_state else PASTS
    hands = [output for _, output in carry]
    feeds = [prompts(seed, seed, carries_state=carries_state) for seed in (0, 2, 1)]
    shapes = [{name: a.shape for name, a in feeds[0][0].items()}]
    spec = spec_of(graph, cut(graph, taps, shapes, hands), taps, carry=carry, spool_bytes=0)
    record = Observer(spec).observe([batch([str(i)] * 2, *f) for i, f in enumerate(feeds)])
    assert record.n_samples == 6
    full = [one for f in feeds for one in unrolled(graph, f, carry)]
    assert len(full) == 6
    plain = Observer(spec_of(graph, in_one(graph, taps, shapes), taps))
    expected = plain.observe([batch(["a", "b"], one) for one in full])
    assert_counts_are_alike(record, expected)


@pytest.mark.parametrize("stretch_bytes", [1, 1 << 20])
def test_a_state_of_one_shape_stays_what_it_was_until_it_is_read(
    stretch_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = Stretches.__init__.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "stretch_bytes", stretch_bytes)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "in"),
        # The new state is made before the old one is read for the last time.
        helper.make_node("Add", ["h", "state"], ["a"], "mix"),
        helper.make_node("Tanh", ["a"], ["new_state"], "keep"),
        helper.make_node("Sub", ["new_state", "state"], ["change"], "change"),
    ]
    ends = [value("x", ["b", WIDTH]), value("state", ["b", WIDTH])]
    outputs = [value("change", None), value("new_state", None)]
    proto = model(nodes, ends, outputs, {"w": normal(WIDTH, WIDTH)})
    graph = Graph(frozen_from(proto, tmp_path / "m.onnx"))
    taps = find_taps(graph)
    shapes = {"x": (2, WIDTH), "state": (2, WIDTH)}
    segments = in_one(graph, taps, shapes, ["new_state"])
    spec = spec_of(graph, segments, taps, carry=(STATE,), statistics=StatisticsSpec(n_values=1))
    feeds = [[{"x": normal(2, WIDTH, seed=10 * i + k)} for k in range(5)] for i in range(3)]
    for first, *_ in feeds:
        first["state"] = np.zeros((2, WIDTH), np.float32)
    record = Observer(spec).observe([batch([str(i)] * 2, *f) for i, f in enumerate(feeds)])
    full = [one for f in feeds for one in unrolled(graph, f, (STATE,))]
    # One at a time, each in a session that has seen no other.
    expected = reduce(
        CalibrationRecord.merge,
        (Observer(spec).observe([batch(["a", "b"], one)]) for one in full),
    )
    assert_counts_are_alike(record, expected)


@given(
    positions=st.lists(st.integers(1, 20), max_size=5),
    carries_state=st.booleans(),
    n_steps=st.lists(st.integers(0, 2), min_size=1, max_size=3),
)
@settings(max_examples=20)
def test_phases_give_the_same_record_wherever_the_model_is_cut(
    positions: list[int],
    carries_state: bool,
    n_steps: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    graph = Graph(frozen_from(decoder(), tmp_path_factory.mktemp("m") / "m.onnx"))
    taps = find_taps(graph)
    carry = (*PASTS, STATE) if carries_state else PASTS
    hands = [output for _, output in carry]
    batches = [
        batch(["a", "b"], *prompts(i, n, carries_state=carries_state))
        for i, n in enumerate(n_steps)
    ]
    shapes = {name: a.shape for name, a in batches[0][1]()[0].items()}
    digests = {
        Observer(spec_of(graph, segments, taps, carry=carry)).observe(batches).digest
        for segments in (
            in_one(graph, taps, shapes, hands),
            cut_at(graph, taps, shapes, positions, hands=hands),
        )
    }
    assert len(digests) == 1


# --- padding ----------------------------------------------------------------------------------


@CUTS
def test_padded_positions_count_nowhere(cut: Any, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Exp", ["r"], ["e"], "exp"),
        helper.make_node("Cast", ["mask"], ["m"], "cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["m"], ["n"], "sum", keepdims=0),
        helper.make_node("Div", ["e", "n"], ["y"], "div"),
    ]
    proto = model(
        nodes,
        [value("x", ["b", "s", 7]), value("mask", ["b", "s"], TensorProto.INT64)],
        [value("y", ["b", "s", 7])],
    )
    graph = Graph(frozen_from(proto, tmp_path / "m.onnx"))
    taps = find_taps(graph)
    segments = cut(graph, taps, {"x": (2, 5, 7), "mask": (2, 5)})
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    x = normal(2, 5, 7)
    x[mask == 0] = 1e9
    spec = spec_of(graph, segments, taps, padding=Padding(mask="mask"), on_nan="report")
    record = Observer(spec).observe([batch(["a", "b"], {"x": x, "mask": mask})])
    for tensor in ("x", "r", "e", "y"):
        assert record.histogram(tensor).n_values == 7 * 7
    assert record.histogram("x").maximum == float(x[mask == 1].max())
    assert record.histogram("e").n_infinite == 0


# --- the specification, and what is left behind -----------------------------------------------


def test_a_spec_refuses_what_does_not_fit_together(tmp_path: Path) -> None:
    graph = roots(tmp_path)
    taps = find_taps(graph)
    (segment,) = in_one(graph, taps, {})
    with pytest.raises(ValueError, match="on_nan"):
        spec_of(graph, [segment], taps, on_nan="ignore")
    with pytest.raises(ValueError, match="segments measure 4 tensors, the taps are 1"):
        spec_of(graph, [segment], find_taps(graph, ["root"]))
    with pytest.raises(ValueError, match="hands out total"):
        spec_of(graph, [segment], taps, carry=(("x", "total"),))


def test_a_spec_crosses_processes(tmp_path: Path) -> None:
    graph = roots(tmp_path)
    taps = find_taps(graph)
    spec = spec_of(graph, in_many(graph, taps, {"x": (2, 3)}), taps)
    again = pickle.loads(pickle.dumps(spec))
    batches = [batch(["a", "b"], {"x": np.abs(normal(2, 3))})]
    assert Observer(again).observe(batches).digest == Observer(spec).observe(batches).digest


def test_no_scratch_file_stays_and_samples_are_loaded_once(tmp_path: Path) -> None:
    graph = roots(tmp_path)
    taps = find_taps(graph)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    spec = spec_of(
        graph,
        in_many(graph, taps, {"x": (2, 3)}),
        taps,
        spool_bytes=0,
        spool_folder=scratch,
    )
    loaded = []

    def load(i: int, low: float) -> list[Feeds]:
        loaded.append(i)
        return [{"x": np.full((2, 3), low, np.float32)}]

    observer = Observer(spec)
    observer.observe([(("a", "b"), partial(load, i, 1.0)) for i in range(3)])
    assert loaded == [0, 1, 2]
    assert list(scratch.iterdir()) == []
    with pytest.raises(DataError):
        observer.observe([(("a", "b"), lambda: load(9, -9.0))])
    assert list(scratch.iterdir()) == []


def test_no_micro_batch_gives_the_empty_record(tmp_path: Path) -> None:
    graph = roots(tmp_path)
    taps = find_taps(graph)
    for segments in (in_one(graph, taps, {}), in_many(graph, taps, {"x": (2, 3)})):
        record = Observer(spec_of(graph, segments, taps)).observe([])
        assert record.n_samples == 0
        assert record.tensors == taps.tensors
