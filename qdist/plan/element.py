"""The element types of the tensors that are quantized."""

from __future__ import annotations

from onnx import TensorProto

from qdist.model.graph import Graph
from qdist.model.precision import HALF

ELEMENTS = HALF | {TensorProto.FLOAT}
"""ONNX element types of the tensors that are quantized."""


def element_of(graph: Graph, tensor: str) -> int:
    """The ONNX element type of a tensor; float32 where nothing tells."""
    found = graph.type_of(tensor)
    return TensorProto.FLOAT if found is None else found.element
