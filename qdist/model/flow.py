"""The work of a graph as a list of steps, and what crosses between them.

What depends on constants alone is no step: whoever reads it brings its own copy along, as with the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto

from qdist.model.rewrite import RANDOM, names_read, subgraphs
from qdist.model.weights import n_bytes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One node that depends on the inputs of the model.

    ``reads``: tensors of earlier steps; ``inputs``: inputs of the model; ``weights``: initializers;
    ``constants``: what nodes on constants alone make. ``makes``: its outputs. Each name once.
    ``n_own_bytes``: tensors in its attributes and bodies.
    """

    node: NodeProto
    reads: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    constants: tuple[str, ...]
    makes: tuple[str, ...]
    n_own_bytes: int


class Flow:
    """A model as steps 0..n in the order of its nodes, which is topological. Read-only.

    ``kept``: the outputs of the model, all of which are held until a run ends. A *cut* at ``p``
    lies before step ``p``.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.weights: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.inputs = {value.name: value for value in model.graph.input}
        self.kept = {value.name: value for value in model.graph.output}
        self.constant_nodes: dict[str, NodeProto] = {}
        """Nodes on constants alone, by each of their outputs."""
        self.maker: dict[str, int] = {}
        """The step that makes a tensor."""
        self.steps: list[Step] = []
        for node in model.graph.node:
            self._add(node)
        self.last_reader: dict[str, int] = {}
        for position, step in enumerate(self.steps):
            self.last_reader.update(dict.fromkeys((*step.reads, *step.inputs), position))

    def _add(self, node: NodeProto) -> None:
        names = dict.fromkeys(names_read(node))
        makes = tuple(name for name in node.output if name)
        reads = tuple(name for name in names if name in self.maker)
        inputs = tuple(name for name in names if name in self.inputs)
        fixed = not reads and not inputs and node.op_type not in RANDOM
        if fixed and self.kept.keys().isdisjoint(makes):
            self.constant_nodes.update(dict.fromkeys(makes, node))
            return
        constants = self._closure([name for name in names if name in self.constant_nodes])
        weights = [name for name in names if name in self.weights]
        for name in constants:
            weights.extend(n for n in names_read(self.constant_nodes[name]) if n in self.weights)
        self.maker.update(dict.fromkeys(makes, len(self.steps)))
        self.steps.append(
            Step(
                node=node,
                reads=reads,
                inputs=inputs,
                weights=tuple(dict.fromkeys(weights)),
                constants=tuple(constants),
                makes=makes,
                n_own_bytes=_own_bytes(node),
            )
        )

    def _closure(self, names: list[str]) -> dict[str, None]:
        """The constant tensors among ``names`` and all that they are made of."""
        found: dict[str, None] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.update(dict.fromkeys(n for n in self.constant_nodes[name].output if n))
                read = names_read(self.constant_nodes[name])
                waiting.extend(n for n in read if n in self.constant_nodes)
        return found

    def crossing(self) -> list[list[str]]:
        """For each cut 0..n, the tensors made before it that a step behind it reads."""
        n = len(self.steps)
        found: list[list[str]] = [[] for _ in range(n + 1)]
        for name, made in self.maker.items():
            for cut in range(made + 1, self.last_reader.get(name, made) + 1):
                found[cut].append(name)
        return found


def _own_bytes(node: NodeProto) -> int:
    total = 0
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            total += n_bytes_of(attribute.t)
        total += sum(n_bytes_of(tensor) for tensor in attribute.tensors)
    for body in subgraphs(node):
        total += sum(n_bytes_of(tensor) for tensor in body.initializer)
        total += sum(_own_bytes(inner) for inner in body.node)
    return total
