"""Residual blocks: what lies between a tensor and the sum that adds it back.

A block is found from the graph alone, so that models without telling names have blocks too: an
``Add`` of two activations, of which one is computed from the other (identity shortcut) or both
from a common ancestor (projected shortcut), with a matmul- or conv-like layer on the way.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from qdist.model.adjacency import Adjacency
from qdist.model.layers import Layer

_BOTH = 3
"""Both sides of a sum, as bits."""


def find_blocks(layers: Sequence[Layer], adjacency: Adjacency) -> tuple[frozenset[str], ...]:
    """The blocks in the order of the graph, each as the hosts of its layers, its sum included.

    A block inside another is part of that one.
    """
    found: list[frozenset[str]] = []
    order = {layer.name: i for i, layer in enumerate(layers)}
    compute = {adjacency.host(layer.name) for layer in layers if layer.is_compute}
    for layer in layers:
        if is_sum(layer) and adjacency.host(layer.name) == layer.name:
            block = _block(layer, adjacency, order)
            if block & compute:
                found.append(block)
    return tuple(
        block for i, block in enumerate(found) if not any(block < other for other in found[i + 1 :])
    )


def is_sum(layer: Layer) -> bool:
    """Whether the layer adds two different activations."""
    tensors = {entry.tensor for entry in layer.activations}
    return layer.op_type == "Add" and len(tensors) == 2


def adds_back(layer: Layer, adjacency: Adjacency) -> bool:
    """Whether a sum adds an input of the model, or an embedding, to what is made of it.

    A mask is added too, but to what is not made of it, or time and again.
    """
    made_by = {entry.tensor: adjacency.makers(entry.tensor) for entry in layer.activations}
    given = [tensor for tensor, makers in made_by.items() if not makers]
    if len(given) != 1:
        return False
    (others,) = (makers for makers in made_by.values() if makers)
    readers = set(adjacency.readers(given[0]))
    above = adjacency.before(others)
    # A sum that reads it higher up would be where a mask was added before.
    return bool(readers & above) and not any(name in adjacency.sums for name in readers & above)


def _block(layer: Layer, adjacency: Adjacency, order: dict[str, int]) -> frozenset[str]:
    tensors = [entry.tensor for entry in layer.activations]
    one, other = (set(adjacency.makers(tensor)) for tensor in tensors)
    if not one or not other:
        if not adds_back(layer, adjacency):
            return frozenset()
        start = set(adjacency.readers(tensors[0] if not one else tensors[1]))
        return frozenset(adjacency.after(start) & adjacency.before([layer.name]))
    above, root = _above(one, other, adjacency, order)
    if root is None:
        return frozenset()
    inside = {root}
    for name in sorted(above, key=order.__getitem__):
        if any(parent in inside for parent in adjacency.parents[name]):
            inside.add(name)
    return frozenset(inside - {root} | {layer.name})


def _above(
    one: set[str], other: set[str], adjacency: Adjacency, order: dict[str, int]
) -> tuple[set[str], str | None]:
    """What lies between two sets of layers and the last layer that both come from, and that layer
    (which may be in one of the sets); None where they have nothing in common.

    The latest of the layers not yet seen comes first, so nothing above the block is looked at.
    """
    sides: dict[str, int] = {}
    for side, names in ((1, one), (2, other)):
        for name in names:
            sides[name] = sides.get(name, 0) | side
    front = [-order[name] for name in sides]
    heapq.heapify(front)
    names_of = {order[name]: name for name in sides}
    above: set[str] = set()
    while front:
        name = names_of[-heapq.heappop(front)]
        if sides[name] == _BOTH:
            return above, name
        above.add(name)
        for parent in adjacency.parents[name]:
            if parent not in sides:
                heapq.heappush(front, -order[parent])
                names_of[order[parent]] = parent
            sides[parent] = sides.get(parent, 0) | sides[name]
    return above, None
