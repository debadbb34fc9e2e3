"""Questions about a frozen graph: who makes a tensor, who reads it, of what type it is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.shape_inference
from onnx import ModelProto, NodeProto, TensorProto

from qdist.errors import ModelError
from qdist.model.freeze import FrozenModel
from qdist.model.rewrite import RANDOM, names_read
from qdist.model.session import Execution
from qdist.model.shapes import runtime_types, session_types

FLOAT_TYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
Shape = tuple[int | str | None, ...]
"""Dimensions: a number, a symbol, or None where nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """ONNX element type and, where known, the shape of a tensor."""

    element: int
    shape: Shape | None

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.element in FLOAT_TYPES


class Graph:
    """An index over the main graph of a frozen model. Read-only once built."""

    def __init__(self, model: FrozenModel, execution: Execution | None = None) -> None:
        self.model = model
        self.proto: ModelProto = model.proto()
        self.weights = model.weights()
        self.nodes: dict[str, NodeProto] = {node.name: node for node in self.proto.graph.node}
        self.constants: dict[str, TensorProto] = {
            tensor.name: tensor for tensor in self.proto.graph.initializer
        }
        self.maker: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.graph.node:
            self.maker.update((name, node) for name in node.output if name)
            for name in dict.fromkeys(names_read(node)):
                self.readers[name].append(node)
        self.input_names: list[str] = [value.name for value in self.proto.graph.input]
        self._computed = self._computed_tensors()
        self.output_names: list[str] = [value.name for value in self.proto.graph.output]
        self._types = _inferred_types(self.proto)
        self.execution = execution or Execution()
        self._ask_runtime(self.execution)

    def __reduce__(self) -> tuple[type[Graph], tuple[FrozenModel, Execution]]:
        # The index is made again: it is many times the model's size.
        return Graph, (self.model, self.execution)

    def type_of(self, tensor: str) -> TensorType | None:
        """Type of an activation, graph input or initializer; None where nothing tells."""
        return self._types.get(tensor)

    def is_float(self, tensor: str) -> bool:
        """Whether the tensor is known to hold floating-point numbers."""
        found = self._types.get(tensor)
        return found is not None and found.is_float

    def is_activation(self, tensor: str) -> bool:
        """Whether the tensor is computed from the inputs (or is one). What an operator makes of
        constants alone is none, even where it was too large to be folded."""
        return tensor in self._computed

    def _computed_tensors(self) -> set[str]:
        """What depends on an input, or differs from run to run."""
        found = set(self.input_names)
        for node in self.nodes.values():
            if node.op_type in RANDOM:
                found.update(node.output)
        front = list(found)
        while front:
            new = {name for node in self.readers.get(front.pop(), ()) for name in node.output}
            front.extend(new - found)
            found |= new
        return found - {""}

    def _ask_runtime(self, execution: Execution) -> None:
        """Types that shape inference could not find (contrib operators) come from a session."""
        unknown = [name for name in self.maker if name not in self._types]
        if not unknown:
            return
        for name, (element, shape) in _from_runtime(self.model, unknown, execution).items():
            self._types[name] = TensorType(element=element, shape=shape)


def _from_runtime(
    model: FrozenModel, tensors: list[str], execution: Execution
) -> dict[str, tuple[int, Shape | None]]:
    try:
        return runtime_types(model.proto(), tensors, model.data_folder, execution)
    except ModelError:
        # A kernel that wants its weight as a constant: this session holds all of them.
        return session_types(model.proto(), tensors, model.data_folder, execution)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or ``default``."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def _inferred_types(proto: ModelProto) -> dict[str, TensorType]:
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False)
    graph = inferred.graph
    types: dict[str, TensorType] = {}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        tensor = value.type.tensor_type
        if tensor.elem_type:
            shape = _shape(tensor.shape) if tensor.HasField("shape") else None
            types[value.name] = TensorType(element=tensor.elem_type, shape=shape)
    for weight in graph.initializer:
        types[weight.name] = TensorType(element=weight.data_type, shape=tuple(weight.dims))
    return types


def _shape(shape: onnx.TensorShapeProto) -> Shape:
    return tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in shape.dim
    )
