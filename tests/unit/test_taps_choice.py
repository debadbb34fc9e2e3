"""Which tensors a list of names and patterns chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdist.errors import ModelError
from qdist.model.graph import Graph
from qdist.model.taps import find_taps
from tests.onnx_models import floats, integers, model, normal, value
from tests.tapped import graph_of, node


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    recurrent = ["dec/y", "dec/h", "dec/c"]
    proto = model(
        [
            node("MatMul", ["x", "w"], ["enc/h[0]"], "enc/fc"),
            node("Reshape", ["enc/h[0]", "flat"], ["enc/r"], "enc/view"),
            node("Relu", ["enc/r"], ["enc/a"], "enc/relu"),
            node("Shape", ["enc/a"], ["size"], "shape_of"),
            node("Tile", ["seed", "size"], ["tiled"], "tile"),
            node("LSTM", ["seq", "lw", "lr"], recurrent, "dec/lstm", hidden_size=2),
            node("Add", ["enc/a", "tiled"], ["out"], "join"),
            node("ReduceMax", ["dec/y"], ["top"], "top"),
        ],
        [value("x", [2, 4]), value("seq", [3, 1, 2])],
        [value("out", None), value("top", None), value("dec/h", None)],
        {
            "w": normal(4, 4),
            "flat": integers([-1]),
            "seed": floats([0.5]),
            "lw": normal(1, 8, 2),
            "lr": normal(1, 8, 2),
        },
    )
    return graph_of(proto, tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["out"], ["out"]),
        (["out", "x"], ["x", "out"]),
        # An alias taps its source.
        (["enc/r"], ["enc/h[0]"]),
        # A name may hold what a pattern would take for its own.
        (["enc/h[0]"], ["enc/h[0]"]),
        # A layer: what it reads and writes.
        (["enc/relu"], ["enc/h[0]", "enc/a"]),
        (["join"], ["enc/a", "tiled", "out"]),
        (["dec/lstm"], ["seq", "dec/y", "dec/h", "dec/c"]),
        # Patterns, of tensors and of layers.
        (["dec/*"], ["seq", "dec/y", "dec/h", "dec/c"]),
        (["dec/?"], ["dec/y", "dec/h", "dec/c"]),
        (["*fc"], ["x", "enc/h[0]"]),
        (["enc/relu", "t*p"], ["enc/h[0]", "enc/a", "dec/y", "top"]),
    ],
)
def test_names_and_patterns(graph: Graph, names: list[str], expected: list[str]) -> None:
    taps = find_taps(graph, names)
    assert list(taps.tensors) == expected
    assert set(taps.aliases.values()) <= set(expected)
    # A choice is a part of all: the same rows, in the same order.
    every = find_taps(graph)
    assert [point for point in every.points if point in taps.points] == list(taps.points)


@pytest.mark.parametrize(
    ("name", "got", "mend"),
    [
        ("enc/rely", "nothing of that name", "enc/relu"),
        ("dec/lstn", "nothing of that name", "dec/lstm"),
        ("nothing/*", "nothing of that name", "qdist show"),
        ("w", "a constant", ""),
        ("size", "does not hold floating-point", ""),
    ],
)
def test_a_name_that_fits_nothing_is_refused(graph: Graph, name: str, got: str, mend: str) -> None:
    with pytest.raises(ModelError, match="QD208") as caught:
        find_taps(graph, ["out", name])
    assert name in caught.value.where
    assert got in caught.value.got
    assert mend in caught.value.mend


def test_choices_that_cannot_be_meant(graph: Graph) -> None:
    with pytest.raises(ValueError, match="every"):
        find_taps(graph, "every")
    with pytest.raises(ValueError, match="at least one"):
        find_taps(graph, [])


def test_what_an_operator_keeps_to_itself_is_named(graph: Graph) -> None:
    taps = find_taps(graph)
    assert set(taps.untapped) == {"dec/lstm"}
    assert taps.untapped["dec/lstm"].startswith("internal to dec/lstm (LSTM): not measured")
    assert "seq" in find_taps(graph, "compute").tensors
    with pytest.raises(ModelError, match="QD208"):
        find_taps(graph, ["dec/lstm/*"])
