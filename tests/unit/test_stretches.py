"""Running a graph in stretches: where it is divided, what it keeps, what it refuses."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, helper

from qdist.errors import ModelError
from qdist.model import stretches
from qdist.model.graph import Graph
from qdist.model.segments import whole
from qdist.model.session import measuring_session, run
from qdist.model.stretches import Stretches, Undivided
from qdist.model.taps import find_taps
from tests.onnx_models import EXECUTION, frozen_from, model, normal, value

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
    sizes = [sum(a.nbytes for a in part.values()) for part in runner.parts(feeds)]
    assert len(sizes) == len(runner) == N_LAYERS
    assert all(size == 4 * 3 * ROW_BYTES for size in sizes)
    # What was divided for a batch of 4 stays so for one of 40.
    assert len(list(runner.parts({"x": normal(40, WIDTH)}))) == N_LAYERS


def test_few_bytes_are_one_stretch(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    runner = Stretches(data, outputs, None, EXECUTION)
    (part,) = runner.parts({"x": normal(4, WIDTH)})
    assert sorted(part) == sorted(outputs)


def test_nothing_is_kept_alive_that_nobody_reads_any_more(tmp_path: Path) -> None:
    data, outputs = graph_bytes(tmp_path)
    runner = Stretches(data, outputs, None, EXECUTION, stretch_bytes=1)
    alive: dict[str, weakref.ref[object]] = {}
    most = 0
    for part in runner.parts({"x": normal(4, WIDTH)}):
        alive |= {name: weakref.ref(array) for name, array in part.items()}
        part.clear()
        most = max(most, sum(ref() is not None for ref in alive.values()))
    assert set(alive) == set(outputs)
    # The one that the next stretch reads.
    assert most == 1
    assert all(ref() is None for ref in alive.values())


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
    assert [part[name].tobytes() for name in outputs[:3]] == [a.tobytes() for a in expected]
