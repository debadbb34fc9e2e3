"""Where the values of a tensor end up, for the threshold method ``auto``.

A MaxPool, a Pad or a Concat hands values on as they are. What it reads is best stored in the steps
of what it makes: rounding twice to the same steps is rounding once, and only what survives the
pooling is worth a step at all. A Softmax makes nearly all of its result of the largest scores: one
that is clipped loses its place, while rounding moves a probability by a small share of itself. So
scores keep their top. A square root turns squares back into magnitudes: what it reads, alone or in
a sum, counts by its root.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from qdist.model.graph import Graph, attribute
from qdist.model.taps import TapTable
from qdist.threshold.root import Root

PASSING = frozenset({"MaxPool", "Pad", "Concat"})
"""Operators whose output holds values of their inputs, and at most a constant beside them."""
_SCALING = frozenset({"Mul", "Div", "Add", "Sub"})
"""Operators on the way to a Softmax, as far as they keep what is largest."""


class Destinations:
    """Of each row of a record: the row whose range it had best take over, and whether its values
    are scores of a Softmax."""

    def __init__(self, graph: Graph, taps: TapTable) -> None:
        self._graph = graph
        self._taps = taps
        self._tensors: dict[str, list[str]] = {}
        for name in (*graph.input_names, *graph.maker):
            self._tensors.setdefault(taps.row_of(name), []).append(name)
        self._scores = frozenset(self._before_softmax())
        self._roots = dict(self._before_root())

    def row(self, row: str) -> str:
        """The row whose values decide: that of what the only reader makes, where it hands values
        on, and so forth; else the row itself."""
        found, seen = row, {row}
        while True:
            below = self._handed_on(found)
            if below is None or below in seen:
                return found
            seen.add(below)
            found = below

    def holds_scores(self, row: str) -> bool:
        """Whether a Softmax is taken of the values, scaled by a positive number or not."""
        return row in self._scores

    def root(self, row: str) -> Root | None:
        """The square root that is all that reads the values, alone or in a sum with others."""
        return self._roots.get(row)

    def _handed_on(self, row: str) -> str | None:
        node = self._only_reader(row)
        if (
            node is None
            or node.op_type not in PASSING
            or (node.op_type == "Pad" and not self._pads_inside(node))
        ):
            return None
        return self._taps.row_of(node.output[0])

    def _only_reader(self, row: str) -> NodeProto | None:
        """The one node that reads the values; None where there are more, or where they leave the
        model."""
        names = self._tensors.get(row, [])
        if not names or any(name in self._graph.output_names for name in names):
            return None
        own = set(names)
        readers = {
            id(node): node
            for name in names
            for node in self._graph.readers.get(name, ())
            # A view's result is another name of the row.
            if not own & set(node.output)
        }
        return next(iter(readers.values())) if len(readers) == 1 else None

    def _before_root(self) -> Iterator[tuple[str, Root]]:
        front = [
            (node.input[0], node, Root(name=node.name or node.output[0]))
            for node in self._graph.proto.graph.node
            if node.op_type == "Sqrt"
        ]
        while front:
            tensor, reader, root = front.pop()
            row = self._taps.row_of(tensor)
            if not self._graph.is_activation(tensor) or self._only_reader(row) is not reader:
                continue
            yield row, root
            node = self._graph.maker.get(row)
            if node is not None and node.op_type in ("Add", "Sum"):
                front += [(name, node, root) for name in node.input]

    def _pads_inside(self, node: NodeProto) -> bool:
        """Whether nothing but zeros, or copies of the values, is added around them."""
        if attribute(node, "mode", b"constant") not in (b"constant", "constant"):
            return True
        if len(node.input) < 3 or not node.input[2]:
            return float(attribute(node, "value", 0.0)) == 0.0
        name = node.input[2]
        return name in self._graph.constants and not self._graph.weights.read(name).any()

    def _before_softmax(self) -> Iterator[str]:
        front = [
            node.input[0]
            for node in self._graph.proto.graph.node
            if node.op_type in ("Softmax", "LogSoftmax")
        ]
        seen: set[str] = set()
        while front:
            row = self._taps.row_of(front.pop())
            if row in seen:
                continue
            seen.add(row)
            yield row
            node = self._graph.maker.get(row)
            if node is not None and node.op_type in _SCALING:
                front += self._kept_in_order(node)

    def _kept_in_order(self, node: NodeProto) -> list[str]:
        """The inputs whose largest values are the largest of what the node makes."""
        graph = self._graph
        first = [node.input[0]] if graph.is_activation(node.input[0]) else []
        if node.op_type in ("Add", "Sub"):
            second = [node.input[1]] if graph.is_activation(node.input[1]) else []
            return first + (second if node.op_type == "Add" else [])
        if node.op_type == "Mul" and not first:
            other, kept = node.input[0], [node.input[1]]
        else:
            other, kept = node.input[1], first
        if other not in graph.constants:
            return []
        return kept if bool((graph.weights.read(other) > 0).all()) else []
