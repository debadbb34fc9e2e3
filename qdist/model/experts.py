"""Experts of a mixture: layers that see only the tokens that a router sends them.

How many rows reach such a layer depends on the data: positions come from ``NonZero`` (or the like),
rows are gathered at them, pass through the expert and are scattered back. An expert that saw few
tokens has ranges that rest on little, and one that saw none has no ranges at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import GraphProto, NodeProto

from qdist.model.bodies import Body, find_bodies, node_labels, owner_of, path_of
from qdist.model.graph import Graph, attribute
from qdist.model.layers import data_inputs, is_multiplier
from qdist.model.origins import Origins
from qdist.model.taps import TapTable
from qdist.model.views import Scope

LEAST_TOKENS = 32
"""An expert that saw fewer gets a note."""

_SELECTING = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression"})
"""Operators whose number of results depends on values."""
_GATHERING = frozenset({"Gather", "GatherND", "GatherElements"})
_POSITIONS_END = frozenset({"Shape", "Size", "If", "Loop", "Scan"})
_SCATTERING = frozenset({"ScatterND", "ScatterElements", "Scatter"})
_WHOLE_EXPERTS = frozenset({"MoE", "QMoE"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A matmul-like layer on rows that the data select.

    ``layer`` and the tensors are named by their paths. ``reads``: the selected rows, as the layer
    reads them; ``entered``: the tensor that rows are selected from, and ``selected``: the rows as
    they were taken, which all layers of one expert share. ``width``: values in one row of
    ``reads``, where the weights tell; ``entered_width``: likewise of ``entered``.
    ``is_branch``: the layer is in a branch of ``If`` and sees all rows or none; ``reads`` is then
    what it makes, and ``selected`` the branch.
    """

    layer: str
    reads: str
    entered: str
    selected: str
    width: int | None
    entered_width: int | None
    is_branch: bool = False


def routed(graph: Graph) -> dict[str, Expert]:
    """Matmul-like layers that see a number of rows that depends on the data, by name, in graph
    order: those on selected rows, and those in branches that only some data take."""
    bodies = find_bodies(graph)
    if not bodies and not any(node.op_type in _SELECTING for node in graph.proto.graph.node):
        return {}
    tracer = _Tracer(Origins(graph, bodies))
    tracer.trace(graph, graph.proto.graph)
    for body in bodies:
        tracer.trace(body, body.proto)
    return tracer.experts


def expert_notes(
    graph: Graph,
    taps: TapTable,
    n_values: Callable[[str], int | None],
    n_channels: Callable[[str], int | None] = lambda tensor: None,
    *,
    least_tokens: int = LEAST_TOKENS,
) -> list[str]:
    """Which experts saw no tokens or fewer than ``least_tokens``, and which cannot be counted.

    ``n_values``: how many values of a measured tensor (a name in ``taps.tensors``) were counted,
    None where it was not measured. ``n_channels``: the size of its last axis, or None; asked only
    where the layer's weights do not tell.
    """
    experts = routed(graph)
    groups: dict[str, list[Expert]] = {}
    for expert in experts.values():
        groups.setdefault(expert.selected, []).append(expert)
    n_routes: dict[str, int] = {}
    for group in groups.values():
        if not group[0].is_branch:
            n_routes[group[0].entered] = n_routes.get(group[0].entered, 0) + 1
    notes = []
    for group in groups.values():
        first = group[0]
        is_expert = not first.is_branch and n_routes[first.entered] > 1
        n_tokens, n_entered = tokens_seen(first, taps, n_values, n_channels)
        if n_tokens is None or n_tokens >= least_tokens:
            continue
        kind = "expert" if is_expert else "layer"
        notes.append(_note(kind, [expert.layer for expert in group], n_tokens, n_entered))
    notes += [
        f"{node.name} ({node.op_type}): how many tokens each of its experts saw is not known"
        for node in graph.proto.graph.node
        if node.op_type in _WHOLE_EXPERTS
    ]
    return notes


def _note(kind: str, layers: list[str], n_tokens: int, n_entered: int | None) -> str:
    more = len(layers) - 1
    name = layers[0] + (f" and {more} more of its layers" if more else "")
    of = f" of {n_entered:,}" if n_entered is not None else ""
    outcome = "are not measured" if n_tokens == 0 else "rest on little"
    whose = "their" if more else "its"
    return f"{kind} {name} saw {n_tokens:,} tokens{of}: {whose} ranges {outcome}"


def tokens_seen(
    expert: Expert,
    taps: TapTable,
    n_values: Callable[[str], int | None],
    n_channels: Callable[[str], int | None] = lambda tensor: None,
) -> tuple[int | None, int | None]:
    """How many tokens an expert saw, and of how many; None where that was not measured."""
    return (
        _n_tokens(expert.reads, expert.width, taps, n_values, n_channels),
        _n_tokens(expert.entered, expert.entered_width, taps, n_values, n_channels),
    )


def _n_tokens(
    tensor: str,
    width: int | None,
    taps: TapTable,
    n_values: Callable[[str], int | None],
    n_channels: Callable[[str], int | None],
) -> int | None:
    row = taps.row_of(tensor)
    if row not in taps.tensors or (total := n_values(row)) is None:
        return None
    if total == 0:
        return 0
    width = width or n_channels(row)
    return total // width if width else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    """What one selection took, and from where."""

    entered: str
    selected: str
    entered_width: int | None


class _Tracer:
    """Follows positions and rows through one graph after another, the outer ones first."""

    def __init__(self, origins: Origins) -> None:
        self.experts: dict[str, Expert] = {}
        self._origins = origins
        self._positions: set[str] = set()
        self._rows: dict[str, _Route] = {}

    def trace(self, scope: Graph | Body, proto: GraphProto) -> None:
        """Add the layers of one graph."""
        prefix = f"{scope.path}/" if isinstance(scope, Body) else ""
        for node, label in zip(proto.node, node_labels(proto), strict=True):
            if is_multiplier(node):
                self._add(scope, node, f"{prefix}{label}")
            if node.op_type in _POSITIONS_END:
                continue
            made = [name for name in node.output if name]
            floats = [name for name in made if scope.is_float(name)]
            if node.op_type in _SELECTING or self._reads_positions(scope, node):
                self._positions.update(f"{prefix}{n}" for n in made if n not in floats)
            route = self._route(scope, node)
            if route is not None:
                self._rows.update((f"{prefix}{name}", route) for name in floats)

    def _reads_positions(self, scope: Scope, node: NodeProto) -> bool:
        return any(path_of(scope, name) in self._positions for name in node.input if name)

    def _route(self, scope: Scope, node: NodeProto) -> _Route | None:
        """The selection whose rows a node's outputs hold."""
        data = node.input[0] if node.input else ""
        selects = node.op_type in _SELECTING or (
            node.op_type in _GATHERING and path_of(scope, node.input[1]) in self._positions
        )
        if selects and scope.is_float(data) and scope.is_activation(data):
            return _Route(
                entered=self._origin(scope, data),
                selected=path_of(scope, node.output[0]),
                entered_width=_last_axis(scope, data),
            )
        if node.op_type in _SCATTERING:
            return self._rows.get(path_of(scope, data))
        if node.op_type.startswith("Reduce") and _drops_rows(scope, node):
            return None
        routes = {self._rows.get(path_of(scope, name)): None for name in node.input if name}
        found = [route for route in routes if route is not None]
        # Rows of several selections put together are no longer those of one.
        return found[0] if found and (len(found) == 1 or node.op_type != "Concat") else None

    def _add(self, scope: Graph | Body, node: NodeProto, layer: str) -> None:
        read = [n for n in data_inputs(node) if scope.is_activation(n)]
        for name in read:
            route = self._rows.get(path_of(scope, name))
            if route is not None:
                self.experts[layer] = Expert(
                    layer=layer,
                    reads=path_of(scope, name),
                    entered=route.entered,
                    selected=route.selected,
                    width=_width_read(scope, node) or _last_axis(scope, name),
                    entered_width=route.entered_width,
                )
                return
        if read and isinstance(scope, Body) and _is_taken_by_data(scope):
            # What a branch reads from outside was measured whether or not the branch ran.
            self.experts[layer] = Expert(
                layer=layer,
                reads=scope.path_of(node.output[0]),
                entered=self._origin(scope, read[0]),
                selected=scope.path,
                is_branch=True,
                width=_width_made(scope, node) or _last_axis(scope, node.output[0]),
                entered_width=_width_read(scope, node) or _last_axis(scope, read[0]),
            )

    def _origin(self, scope: Scope, name: str) -> str:
        owner = owner_of(scope, name)
        return self._origins.of(owner, name) if name in owner.maker else path_of(scope, name)


def _is_taken_by_data(body: Body) -> bool:
    return body.node.op_type == "If" and body.outer.is_activation(body.node.input[0])


def _last_axis(scope: Scope, name: str) -> int | None:
    found = scope.type_of(name)
    size = found.shape[-1] if found is not None and found.shape else None
    return size if isinstance(size, int) and size > 0 else None


def _width_read(scope: Scope, node: NodeProto) -> int | None:
    return _weight_axis(scope, node, 1 if attribute(node, "transB", 0) else 0)


def _width_made(scope: Scope, node: NodeProto) -> int | None:
    return _weight_axis(scope, node, 0 if attribute(node, "transB", 0) else 1)


def _weight_axis(scope: Scope, node: NodeProto, axis: int) -> int | None:
    """The size of one of the last two axes of the matrix that a node multiplies with."""
    if node.op_type not in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"):
        return None
    if node.input[1] not in scope.constants:
        return None
    shape = scope.weights.shape(node.input[1])
    return shape[axis - 2] if len(shape) >= 2 else None


def _drops_rows(scope: Scope, node: NodeProto) -> bool:
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1] in scope.constants:
        axes = scope.weights.read(node.input[1]).ravel().tolist()
    return axes is None or 0 in axes
