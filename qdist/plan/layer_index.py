"""The layers of a model as rules see them: in order, with their neighbours and blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from qdist.model.adjacency import Adjacency, find_adjacency
from qdist.model.blocks import find_blocks
from qdist.model.graph import Graph
from qdist.model.layers import Layer, data_inputs, find_layers
from qdist.plan.fusion import find_fusions
from qdist.plan.precision import precision
from qdist.plan.scope import NO_INTEGER_FORM, left_out


class LayerIndex:
    """What rules and vendors' files ask of a model. Read-only once built.

    ``fused``: layer -> the layer that it is computed with. ``left_out``: layer -> why the scope
    leaves it float. ``graph``: None for layers without one, whose neighbours are then those that
    share a tensor.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        graph: Graph | None = None,
        fused: Mapping[str, str] | None = None,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.by_name = {layer.name: layer for layer in layers}
        self.fused = dict(fused or {})
        self.left_out = dict(left_out or {})
        self.graph = graph

    @cached_property
    def adjacency(self) -> Adjacency:
        """Which layers feed which."""
        if self.graph is None:
            return Adjacency(self.layers, fused=self.fused)
        return find_adjacency(self.graph, self.layers, self.fused)

    @cached_property
    def blocks(self) -> tuple[frozenset[str], ...]:
        """The residual blocks in order, each as names of layers, fused ones included."""
        hosts = find_blocks(self.layers, self.adjacency)
        return tuple(
            frozenset(n for n in self.by_name if self.adjacency.host(n) in block) for block in hosts
        )

    def can_have(self, layer: Layer, name: str) -> bool:
        """Whether a precision means something to the layer: any to those with a choice, and a
        floating-point type to those that have no integer form."""
        return self.why_float(layer.name, name) is None

    def why_float(self, layer: str, asked: str | None) -> str | None:
        """Why the layer of this name cannot have the precision ``asked`` (None: any that is not a
        floating-point type), or None where it can. Raises QD506."""
        if layer in self.fused:
            return f"computed with {self.fused[layer]}"
        reason = self.left_out.get(layer)
        if reason is None or asked is None or not reason.endswith(NO_INTEGER_FORM):
            return reason
        return reason if precision(asked).rounds is None else None

    def is_choosable(self, layer: Layer) -> bool:
        """Whether a choice for the layer changes anything: in scope, and not fused."""
        return layer.name not in self.left_out and layer.name not in self.fused

    @cached_property
    def choosable(self) -> tuple[Layer, ...]:
        """The layers whose choice changes anything."""
        return tuple(layer for layer in self.layers if self.is_choosable(layer))

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Activation -> the layers that read it under this name and can have a choice."""
        found: dict[str, dict[str, None]] = {}
        for layer in self.choosable:
            for entry in layer.activations:
                found.setdefault(entry.tensor, {})[layer.name] = None
        return {name: tuple(layers) for name, layers in found.items()}

    def moved_from(self, tensor: str) -> tuple[str, ...]:
        """The tensors that this one holds values of, the nearest first, as long as nodes that are
        no layers (Split, Slice, Reshape ...) do nothing but move them."""
        found: list[str] = []
        while self.graph is not None:
            node = self.graph.maker.get(tensor)
            if node is None or node.name in self.by_name:
                break
            names = [n for n in data_inputs(node) if self.graph.is_activation(n)]
            if len(names) != 1 or not self.graph.is_float(names[0]):
                break
            tensor = names[0]
            found.append(tensor)
        return tuple(found)

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """The names of `tensors`."""
        return frozenset(self.tensors)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor that a layer reads or makes, once, in order; weights included."""
        found: dict[str, None] = {}
        for layer in self.layers:
            found.update(dict.fromkeys(e.tensor for e in (*layer.activations, *layer.weights)))
            found.update(dict.fromkeys(layer.outputs))
        return tuple(found)


def find_index(graph: Graph, scope: str = "all") -> LayerIndex:
    """The layers of a model under a scope (`qdist.plan.scope.SCOPES`)."""
    layers = find_layers(graph)
    return LayerIndex(
        layers,
        graph=graph,
        fused=find_fusions(graph, layers),
        left_out=left_out(layers, scope),
    )
