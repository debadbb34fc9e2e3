"""Layers that a chip computes together with the one before.

Between a matmul and its bias, or a convolution and its ReLU, no chip rounds to 8 bits; quantizing
there would charge the model an error that never happens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdist.model.graph import Graph
from qdist.model.layers import Layer

_ACTIVATIONS = frozenset({"Relu", "Clip"})
_BEFORE_ACTIVATION = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "BatchNormalization"}
)
_BEFORE_BIAS = frozenset({"MatMul", "Conv", "ConvTranspose"})


def find_fusions(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
    """Layer -> the layer that it is computed with. Chains end at the first of them."""
    by_output = {name: layer for layer in layers for name in layer.outputs}
    fused: dict[str, str] = {}
    for layer in layers:
        if len(layer.activations) != 1:
            continue
        tensor = layer.activations[0].tensor
        before = by_output.get(tensor)
        if before is None or not _is_private(graph, tensor):
            continue
        if layer.op_type in _ACTIVATIONS:
            fits = before.op_type in _BEFORE_ACTIVATION
        else:
            fits = before.op_type in _BEFORE_BIAS and _is_bias(graph, layer)
        if fits:
            fused[layer.name] = fused.get(before.name, before.name)
    return fused


def _is_private(graph: Graph, tensor: str) -> bool:
    """Whether one node alone reads the tensor."""
    return len(graph.readers.get(tensor, ())) == 1 and tensor not in graph.output_names


def _is_bias(graph: Graph, layer: Layer) -> bool:
    """An Add of a constant with at most one dimension that is not 1."""
    if layer.op_type != "Add" or len(layer.weights) != 1:
        return False
    shape = graph.weights.shape(layer.weights[0].tensor)
    return int(np.sum(np.asarray(shape) > 1)) <= 1
