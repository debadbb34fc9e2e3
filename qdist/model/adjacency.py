"""Which layers feed which, with what only moves data in between left out.

Layers that a chip computes together count as one, under the name of the first of them (its
*host*), as in a plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qdist.model.graph import Graph
from qdist.model.layers import Layer, data_inputs


class Adjacency:
    """Parents and children of layers. Read-only once built.

    ``layers``: in topological order. ``sources``: tensor -> the layers whose values it holds, for
    tensors that no layer makes (what a Reshape or Split makes of them). ``roots``: tensor -> the
    input, or looked-up embedding, that it holds unchanged. ``fused``: layer -> host.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        sources: Mapping[str, tuple[str, ...]] | None = None,
        fused: Mapping[str, str] | None = None,
        roots: Mapping[str, str] | None = None,
    ) -> None:
        self._fused = dict(fused or {})
        self._maker = {name: layer.name for layer in layers for name in layer.outputs}
        self._sources = dict(sources or {})
        self._roots = dict(roots or {})
        self._readers: dict[str, dict[str, None]] = {}
        self.sums: set[str] = set()
        """The hosts that are additions, of two activations or of a constant."""
        self._outputs: dict[str, tuple[str, ...]] = {}
        self.parents: dict[str, tuple[str, ...]] = {}
        """Host -> the hosts whose values it reads, in the order of its inputs."""
        self.children: dict[str, tuple[str, ...]] = {}
        """Host -> the hosts that read its values, in the order of the graph."""
        parents: dict[str, dict[str, None]] = {}
        for layer in layers:
            host = self.host(layer.name)
            if layer.op_type == "Add" and host == layer.name:
                self.sums.add(host)
            # The outputs of the last member are those of the whole.
            self._outputs[host] = layer.outputs
            found = parents.setdefault(host, {})
            for entry in layer.activations:
                root = self._roots.get(entry.tensor, entry.tensor)
                self._readers.setdefault(root, {})[host] = None
                found.update(dict.fromkeys(p for p in self.makers(entry.tensor) if p != host))
        children: dict[str, dict[str, None]] = {name: {} for name in parents}
        for name, feeding in parents.items():
            for parent in feeding:
                children[parent][name] = None
        self.parents = {name: tuple(found) for name, found in parents.items()}
        self.children = {name: tuple(found) for name, found in children.items()}

    def host(self, layer: str) -> str:
        """The layer that this one is computed with, or the layer itself."""
        return self._fused.get(layer, layer)

    def outputs(self, layer: str) -> tuple[str, ...]:
        """What a layer, with all that is computed with it, gives."""
        return self._outputs[self.host(layer)]

    def makers(self, tensor: str) -> tuple[str, ...]:
        """The hosts whose values a tensor holds; none for an input of the model."""
        maker = self._maker.get(tensor)
        names = (maker,) if maker is not None else self._sources.get(tensor, ())
        return tuple(dict.fromkeys(self.host(name) for name in names))

    def readers(self, tensor: str) -> tuple[str, ...]:
        """The hosts that read a tensor, or the input or embedding that it holds."""
        return tuple(self._readers.get(self._roots.get(tensor, tensor), ()))

    def before(self, layers: Iterable[str]) -> set[str]:
        """These layers' hosts and all that they depend on."""
        return self._reach(layers, self.parents)

    def after(self, layers: Iterable[str]) -> set[str]:
        """These layers' hosts and all that depends on them."""
        return self._reach(layers, self.children)

    def _reach(self, layers: Iterable[str], step: Mapping[str, tuple[str, ...]]) -> set[str]:
        front = [self.host(name) for name in layers]
        found = set(front)
        while front:
            new = set(step.get(front.pop(), ())) - found
            found |= new
            front.extend(new)
        return found


def find_adjacency(
    graph: Graph, layers: Sequence[Layer], fused: Mapping[str, str] | None = None
) -> Adjacency:
    """The adjacency of a model's layers. Integers (shapes, indices) connect nothing."""
    made = {name: layer.name for layer in layers for name in layer.outputs}
    sources: dict[str, tuple[str, ...]] = {}
    roots: dict[str, str] = {}
    for node in graph.proto.graph.node:
        if not node.output or node.output[0] in made:
            continue
        found: dict[str, None] = {}
        root = ""
        for name in data_inputs(node):
            if graph.is_activation(name) and graph.is_float(name):
                root = root or roots.get(name, name)
            if name in made:
                found[made[name]] = None
            else:
                found.update(dict.fromkeys(sources.get(name, ())))
        for name in node.output:
            if name and graph.is_float(name):
                sources[name] = tuple(found)
                if not found:
                    roots[name] = root or name
    return Adjacency(layers, sources, fused, roots)
