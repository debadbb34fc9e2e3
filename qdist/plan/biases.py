"""How large the constants are that layers add to what they multiply and sum.

Where weight and bias share a scale, or the bias has few bits, a target has to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qdist.model.graph import Graph, attribute
from qdist.model.layers import Layer

_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")
_LARGEST = 1 << 20
"""No bias has more values; constants that are added to whole tensors do."""


def find_bias_bounds(
    graph: Graph, layers: Sequence[Layer], fused: Mapping[str, str]
) -> dict[str, tuple[float, ...]]:
    """Layer -> the largest magnitude that is added to each of its output channels, or one for all:
    its own bias and those of the Adds that are computed together with it."""
    found: dict[str, NDArray[np.float64]] = {}
    for layer in layers:
        host = fused.get(layer.name, layer.name)
        node = graph.nodes[layer.name]
        if node.op_type in _WITH_BIAS and len(node.input) > 2 and node.input[2]:
            name, factor = node.input[2], float(attribute(node, "beta", 1.0))
        elif node.op_type == "Add" and layer.name in fused and len(layer.weights) == 1:
            name, factor = layer.weights[0].tensor, 1.0
        else:
            continue
        if name not in graph.constants or np.prod(graph.weights.shape(name)) > _LARGEST:
            continue
        bounds = np.abs(graph.weights.read(name).astype(np.float64)).ravel() * abs(factor)
        before = found.get(host, np.zeros(1))
        if (bounds.size and 1 in (bounds.size, before.size)) or bounds.size == before.size:
            found[host] = before + bounds
    return {name: tuple(map(float, bounds)) for name, bounds in found.items()}
