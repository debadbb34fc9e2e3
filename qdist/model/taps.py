"""Which tensors are measured.

A tap is one extra output of the frozen graph. Operators that only rearrange values share their
source's distribution, so the source is tapped once and the alias table says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from qdist.errors import ModelError
from qdist.model.graph import FLOAT_TYPES, Graph
from qdist.model.layers import find_layers, view_source
from qdist.model.rewrite import subgraphs

MODES = ("all", "compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class TapPoint:
    """One measured tensor: its name, its source dtype, and whether it is a model input."""

    tensor: str
    dtype: str
    is_input: bool

    @property
    def output(self) -> str:
        """The tapped graph's output that holds the values. NumPy has no bfloat16 to hand out, so
        those leave as float32, which is exact."""
        return f"{self.tensor}.float32" if self.dtype == "bfloat16" else self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TapTable:
    """The measured tensors in graph order, and which other tensors they stand for.

    ``aliases`` maps a tensor to the tapped one that holds the same values; ``untapped`` names
    what could not be measured and why.
    """

    points: tuple[TapPoint, ...]
    aliases: dict[str, str]
    untapped: dict[str, str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the measured tensors: the rows of every record."""
        return tuple(point.tensor for point in self.points)

    def row_of(self, tensor: str) -> str:
        """The measured tensor that answers for ``tensor``."""
        return self.aliases.get(tensor, tensor)


def find_taps(graph: Graph, mode: str = "all") -> TapTable:
    """The taps of a model: ``all`` distinct float activations, or what ``compute`` layers read
    and the model's outputs. Raises QD209 when there are none.
    """
    if mode not in MODES:
        raise ValueError(f"taps must be one of {MODES}, got {mode!r}")
    candidates = [name for name in graph.input_names if graph.is_float(name)]
    candidates += [
        name for name in graph.maker if graph.is_float(name) and graph.is_activation(name)
    ]
    aliases = {name: source for name in candidates if (source := view_source(graph, name)) != name}
    wanted = {name for name in candidates if name not in aliases}
    if mode == "compute":
        read = {
            entry.tensor
            for layer in find_layers(graph)
            if layer.is_compute
            for entry in layer.activations
        }
        wanted &= {aliases.get(name, name) for name in read | set(graph.output_names)}
    if not wanted:
        raise ModelError(
            "QD209",
            where=str(graph.model.source),
            got="no floating-point activation",
            expected="a float model",
            mend="give the float model, not one that is already quantized to integers",
        )
    points = []
    for name in candidates:
        if name in wanted:
            found = graph.type_of(name)
            dtype = FLOAT_TYPES[found.element] if found is not None else "float32"
            points.append(TapPoint(tensor=name, dtype=dtype, is_input=name in graph.input_names))
    kept = {name: source for name, source in aliases.items() if source in wanted}
    return TapTable(points=tuple(points), aliases=kept, untapped=_inside_bodies(graph))


def tapped_graph(graph: Graph, taps: TapTable) -> bytes:
    """The frozen graph with the taps' `TapPoint.output` as its only outputs, serialized."""
    proto = graph.model.proto()
    del proto.graph.output[:]
    for point in taps.points:
        if not point.is_input:
            found = graph.type_of(point.tensor)
            element = found.element if found is not None else onnx.TensorProto.FLOAT
            if point.output != point.tensor:
                element = onnx.TensorProto.FLOAT
                proto.graph.node.append(
                    onnx.helper.make_node("Cast", [point.tensor], [point.output], to=element)
                )
            proto.graph.output.append(
                onnx.helper.make_tensor_value_info(point.output, element, None)
            )
    return proto.SerializeToString()


def _inside_bodies(graph: Graph) -> dict[str, str]:
    untapped = {}
    for node in graph.proto.graph.node:
        for body in subgraphs(node):
            for inner in body.node:
                for name in inner.output:
                    untapped[name] = f"inside the body of {node.op_type} {node.name}"
    return untapped
