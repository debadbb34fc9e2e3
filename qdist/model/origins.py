"""Where the values of a tensor come from, through views and the branches of ``If``."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

from qdist.model.bodies import Body, node_labels, prefix_of
from qdist.model.graph import Graph
from qdist.model.views import Scope, is_view

Place = tuple[Scope, str]
"""A tensor and the graph that makes it."""


class Origins:
    """Answers for one model, from its bodies."""

    def __init__(self, graph: Graph, bodies: Iterable[Body]) -> None:
        self._bodies = {body.path: body for body in bodies}
        self._layers: dict[tuple[str, str], str] = {}
        scopes = [("", graph.proto.graph.node, node_labels(graph.proto.graph))]
        scopes += [
            (f"{path}/", body.proto.node, node_labels(body.proto))
            for path, body in self._bodies.items()
        ]
        for prefix, nodes, labels in scopes:
            for node, label in zip(nodes, labels, strict=True):
                self._layers.update(((prefix, name), f"{prefix}{label}") for name in node.output)

    def of(self, scope: Scope, tensor: str) -> str:
        """The name (a path, inside a body) of the tensor whose values ``tensor``, made in
        ``scope``, merely rearranges; its own where it computes anew.

        A view inside a branch holds its source's values whenever the branch runs; an ``If`` whose
        branches are views of one tensor always holds them. Not so in a ``Loop``, which repeats.
        """
        found, name = self._origin((scope, tensor))
        return f"{prefix_of(found)}{name}"

    def _origin(self, place: Place) -> Place:
        while (before := self._before(*place)) is not None:
            place = before
        return place

    def _before(self, scope: Scope, tensor: str) -> Place | None:
        node = scope.maker.get(tensor)
        if node is None:
            return None
        if is_view(scope, node, tensor):
            return _home(scope, node.input[0])
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            return self._common_source(scope, node, tensor)
        return None

    def _common_source(self, scope: Scope, node: NodeProto, tensor: str) -> Place | None:
        layer = self._layers[prefix_of(scope), tensor]
        index = list(node.output).index(tensor)
        found: list[Place] = []
        for attribute in ("then_branch", "else_branch"):
            body = self._bodies[f"{layer}/{attribute}"]
            place = _home(body, body.proto.output[index].name)
            if place is None:
                return None
            source, name = self._origin(place)
            if source is body or any(source is not seen or name != n for seen, n in found):
                return None
            found.append((source, name))
        return found[0]


def _home(scope: Scope, name: str) -> Place | None:
    """The graph that makes a tensor which ``scope`` reads, unless a loop lies in between."""
    while isinstance(scope, Body) and name not in scope.maker:
        is_own = any(name == entry.name for entry in (*scope.proto.input, *scope.proto.initializer))
        if is_own or scope.node.op_type != "If":
            return None
        scope = scope.outer
    return (scope, name) if scope.is_activation(name) else None
