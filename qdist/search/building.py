"""The search problem of a model: its layers, groups, options and costs, before any measurement;
and the plans whose twins measure every option at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from qdist.evaluate.compare import Deviation
from qdist.model.graph import Graph
from qdist.model.groups import LayerGroup, find_groups, merged
from qdist.model.layers import Layer
from qdist.numbers.dtype import DTYPES
from qdist.plan.bias_adds import BIAS
from qdist.plan.choice import LayerChoice
from qdist.plan.dialects.knight_rules import closure
from qdist.plan.layer_index import LayerIndex
from qdist.plan.planner import Planner
from qdist.plan.target import Target
from qdist.search.costs import (
    FLOAT_BITS,
    Costs,
    Edge,
    bit_operations,
    stored_type,
    weight_bytes,
)
from qdist.search.latency import LatencyTable, missing_latency
from qdist.search.problem import SearchLayer, SearchProblem
from qdist.search.space import SpaceSettings, options_of
from qdist.search.trial import Choices
from qdist.simulate.split_bias import SUFFIX

GROUPINGS = ("none", "groups", "knight")


def build_problem(
    planner: Planner,
    target: Target,
    plain: Mapping[str, LayerChoice],
    space: SpaceSettings,
    *,
    pinned: Collection[str] = (),
    together: str = "groups",
    unit: str = "bytes",
    table: LatencyTable | None = None,
) -> SearchProblem:
    """The problem without sensitivities.

    ``pinned``: layers that keep their plain choice. ``together``: ``groups`` (concats, residual
    sums and matmuls that read one tensor have one precision), ``knight`` (where one layer is
    raised, so is what Knight's rules ask for) or ``none``. ``unit``: of `Costs`; ``table``: for
    ``latency``. Raises QD512.
    """
    index = planner.index
    free = [layer for layer in index.choosable if layer.name not in pinned]
    names = [layer.name for layer in free]
    options = {
        layer.name: options_of(
            layer,
            plain[layer.name],
            index,
            target,
            space,
            can_split_bias=space.split_bias and planner.can_split_bias(layer),
        )
        for layer in free
    }
    groups: tuple[LayerGroup, ...] = ()
    if together == "groups":
        groups = find_groups(index.layers, index.adjacency, among=names)
    costs = _Costing(planner, unit, table)
    positions = {layer.name: i for i, layer in enumerate(index.layers)}
    layers = tuple(
        SearchLayer(
            name=layer.name,
            op_type=layer.op_type,
            position=positions[layer.name],
            n_weights=_n_weights(planner, layer),
            n_multiplies=n_multiplies(planner.graph, layer),
            sources=index.adjacency.parents[layer.name],
        )
        for layer in free
    )
    return SearchProblem(
        plain=dict(plain),
        layers=layers,
        groups=merged(groups, names),
        options=options,
        implied=_implied(index, names) if together == "knight" else (),
        costs=costs.costs(plain, options),
    )


def measuring_choices(problem: SearchProblem) -> tuple[dict[str, LayerChoice], ...]:
    """Assignments that between them give every layer each of its options; layers with fewer keep
    the plain one."""
    n = max((len(options) for options in problem.options.values()), default=0)
    return tuple(
        {
            **problem.plain,
            **{name: options[i] for name, options in problem.options.items() if i < len(options)},
        }
        for i in range(n)
    )


def measured(
    problem: SearchProblem,
    choices: Sequence[Choices],
    deviations: Sequence[Mapping[str, Deviation]],
) -> dict[str, dict[LayerChoice, float]]:
    """The problem's ``sensitivity``, of what was measured for `measuring_choices`."""
    found: dict[str, dict[LayerChoice, float]] = {}
    for assignment, deviation in zip(choices, deviations, strict=True):
        for layer in problem.layers:
            if layer.name in deviation:
                known = found.setdefault(layer.name, {})
                known[assignment[layer.name]] = deviation[layer.name].relative_l2
    return found


def n_multiplies(graph: Graph, layer: Layer) -> int:
    """Multiply-accumulates of a matmul- or conv-like layer for one sample, with 1 for sizes that
    are not fixed; 0 for other layers."""
    if not layer.is_compute or not layer.outputs:
        return 0
    made = _elements(graph, layer.outputs[0])
    if not layer.weights:
        return made * _last(graph, layer.activations[0].tensor)
    shape = graph.weights.shape(layer.weights[0].tensor)
    n = int(np.prod(shape, dtype=np.int64))
    if layer.op_type == "Conv":
        return made * n // max(1, shape[0])
    if layer.op_type == "ConvTranspose":
        return _elements(graph, layer.activations[0].tensor) * n // max(1, shape[0])
    return made * n // max(1, _last(graph, layer.outputs[0]))


class _Costing:
    """What each choice of a layer costs in one unit."""

    def __init__(self, planner: Planner, unit: str, table: LatencyTable | None) -> None:
        if unit == "latency" and table is None:
            raise ValueError("latency needs a table")
        self._planner = planner
        self._graph = planner.graph
        self._unit = unit
        self._table = table

    def costs(
        self,
        plain: Mapping[str, LayerChoice],
        options: Mapping[str, tuple[LayerChoice, ...]],
    ) -> Costs:
        """Of all layers that can have a choice, and of the edges between them."""
        layers = {
            layer.name: {
                choice: self._of(layer, choice)
                for choice in options.get(layer.name, (plain[layer.name],))
            }
            for layer in self._planner.choosable()
        }
        return Costs(unit=self._unit, layers=layers, edges=tuple(self._edges(layers)))

    def _of(self, layer: Layer, choice: LayerChoice) -> float:
        multiplies = n_multiplies(self._graph, layer)
        added = self._of_bias_add(layer, choice) if choice.splits_bias else 0.0
        if self._unit == "bytes":
            n = _n_weights(self._planner, layer)
            return weight_bytes(choice, n, self._n_scales(layer, choice)) + added if n else 0.0
        if self._unit == "bit_operations":
            return bit_operations(choice, multiplies) + added
        work = multiplies or _elements(self._graph, layer.outputs[0])
        return self._microseconds(layer.name, layer.op_type, choice, work) + added

    def _of_bias_add(self, layer: Layer, choice: LayerChoice) -> float:
        """The Add that the layer's bias becomes: its constant and the scale of that; a
        multiplication for each element, as Icraft's vector unit rescales what it adds; or the
        table's Add."""
        made = _elements(self._graph, layer.outputs[0])
        if self._unit == "bytes":
            bias = self._graph.nodes[layer.name].input[BIAS]
            return weight_bytes(choice, int(np.prod(self._graph.weights.shape(bias))), 1)
        if self._unit == "bit_operations":
            return bit_operations(choice, made)
        return self._microseconds(f"{layer.name}{SUFFIX}", "Add", choice, made)

    def _microseconds(self, name: str, op_type: str, choice: LayerChoice, work: int) -> float:
        assert self._table is not None
        us = self._table.of_layer(name, op_type, choice.precision, work)
        if us is None:
            raise missing_latency(self._table, name, op_type, choice.precision)
        return us

    def _n_scales(self, layer: Layer, choice: LayerChoice) -> int:
        grain = choice.weight_grain
        if grain.kind == "group":
            return grain.size
        if grain.kind == "block":
            return _n_weights(self._planner, layer) // grain.size
        if grain.kind == "channel" and layer.weights:
            shape = self._graph.weights.shape(layer.weights[0].tensor)
            is_conv = layer.op_type in ("Conv", "ConvTranspose")
            return int(shape[0 if is_conv else -1]) if shape else 1
        return 1

    def _edges(self, layers: Mapping[str, Mapping[LayerChoice, float]]) -> list[Edge]:
        """Between layers that can have a choice. Bytes of weights know no conversion."""
        if self._unit == "bytes":
            return []
        adjacency = self._planner.index.adjacency
        found = []
        for reader in layers:
            for source in adjacency.parents[reader]:
                if source in layers:
                    kinds = ({stored_type(c) for c in layers[name]} for name in (source, reader))
                    n = _elements(self._graph, adjacency.outputs(source)[0])
                    conversion = self._conversion(n, *kinds)
                    found.append(
                        Edge(source=source, reader=reader, n_elements=n, conversion=conversion)
                    )
        return found

    def _conversion(
        self, n: int, sources: set[str], readers: set[str]
    ) -> dict[tuple[str, str], float]:
        pairs = [(a, b) for a in sorted(sources) for b in sorted(readers) if a != b]
        if self._table is not None:
            known = self._table.conversions(n)
            return {pair: known[pair] for pair in pairs if pair in known}
        # One multiplication for each element, of what is there and what is to be.
        return {(a, b): float(n * _bits(a) * _bits(b)) for a, b in pairs}


def _bits(kind: str) -> int:
    return DTYPES[kind].bits if kind in DTYPES else FLOAT_BITS


def _n_weights(planner: Planner, layer: Layer) -> int:
    return planner.weight_elements(layer)


def _elements(graph: Graph, tensor: str) -> int:
    """Of one sample, as far as shapes tell."""
    kind = graph.type_of(tensor)
    shape = None if kind is None else kind.shape
    return int(np.prod([n for n in shape or () if isinstance(n, int)], dtype=np.int64))


def _last(graph: Graph, tensor: str) -> int:
    kind = graph.type_of(tensor)
    size = kind.shape[-1] if kind is not None and kind.shape else 1
    return size if isinstance(size, int) else 1


def _implied(index: LayerIndex, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(layer, other): where Knight's rules raise the other with the one."""
    free = set(names)
    return tuple(
        (name, other)
        for name in names
        for other in sorted(closure(index, {name}) & free)
        if other != name
    )
