"""Element types of every tensor of a model, those inside the bodies of control flow included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.shape_inference
from onnx import GraphProto, ModelProto, TensorProto, helper

from qdist.errors import ModelError
from qdist.model.rewrite import names_read, subgraphs
from qdist.model.session import Execution
from qdist.model.shapes import runtime_types, session_types, weightless

_ROUNDS = 4
"""How often inference and the runtime take turns. Each turn passes one kind of operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """Element types that one graph's nodes see.

    ``types``: by tensor, those of the graphs around included; 0 or missing where nothing tells.
    ``constants``: initializers, those around included. ``inner``: the same for the bodies of the
    graph's nodes, by the node's position and the body's number among the node's.
    """

    types: Mapping[str, int]
    constants: frozenset[str]
    inner: Mapping[tuple[int, int], Elements]

    def of(self, tensor: str) -> int:
        """The element type of a tensor; 0 where it is unknown or no tensor."""
        return self.types.get(tensor, TensorProto.UNDEFINED)


def find_elements(
    model: ModelProto,
    folder: Path | None,
    execution: Execution,
    known: Callable[[str], int] | None = None,
) -> Elements:
    """Types from shape inference; of operators that it does not know, from ONNX Runtime.

    ``model`` has no local functions. ``known``: of tensors of the main graph, 0 where it is not,
    asked before the runtime is. Raises QD205 where the runtime refuses the graph.
    """
    light = weightless(model, folder)
    made = [name for node in light.graph.node for name in node.output if name]
    declared: set[str] = set()
    inferred = _inferred(light)
    for _ in range(_ROUNDS):
        types = _types_in(inferred.graph)
        lacking = [name for name in made if name not in types and name not in declared]
        found = {name: known(name) for name in lacking} if known is not None else {}
        unknown = [name for name in lacking if not found.get(name)]
        if unknown:
            found.update(_from_runtime(model, unknown, folder, execution))
        if not found:
            break
        declared.update(found)
        light.graph.value_info.extend(
            helper.make_tensor_value_info(name, element, None)
            for name, element in found.items()
            if element
        )
        inferred = _inferred(light)
    outer = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return _Reader(light, execution).read(inferred.graph, outer, frozenset(outer))


class _Reader:
    """Walks a graph whose types were inferred, bodies included."""

    def __init__(self, model: ModelProto, execution: Execution) -> None:
        self._model = model
        self._execution = execution

    def read(
        self, graph: GraphProto, outer: Mapping[str, int], constants: frozenset[str]
    ) -> Elements:
        types = {**outer, **_types_in(graph)}
        own = frozenset(tensor.name for tensor in graph.initializer)
        inner = {
            (position, number): self.read(body, self._body_types(body, types), constants | own)
            for position, node in enumerate(graph.node)
            for number, body in enumerate(subgraphs(node))
        }
        return Elements(types=types, constants=constants | own, inner=inner)

    def _body_types(self, body: GraphProto, outer: Mapping[str, int]) -> dict[str, int]:
        """Types around a body and of what inference does not know in it."""
        types = {**outer, **_types_in(body)}
        made = [name for node in body.node for name in node.output if name]
        unknown = [name for name in made if name not in types]
        reads = dict.fromkeys(name for node in body.node for name in names_read(node))
        own = {*made, *_given(body)}
        captured = [name for name in reads if name not in own and name in types]
        formal = [value.name for value in body.input]
        if not unknown or not all(types.get(name) for name in (*captured, *formal)):
            return dict(outer)
        alone = ModelProto(ir_version=self._model.ir_version, graph=body)
        alone.opset_import.extend(self._model.opset_import)
        alone.graph.input.extend(
            helper.make_tensor_value_info(name, types[name], None) for name in captured
        )
        found = session_types(alone, unknown, None, self._execution)
        return {**outer, **{name: element for name, (element, _) in found.items()}}


def _from_runtime(
    model: ModelProto, tensors: list[str], folder: Path | None, execution: Execution
) -> dict[str, int]:
    try:
        found = runtime_types(model, tensors, folder, execution)
    except ModelError:
        # A kernel that wants its weight as a constant: this session holds all of them.
        found = session_types(model, tensors, folder, execution)
    return {name: element for name, (element, _) in found.items()}


def _inferred(model: ModelProto) -> ModelProto:
    return onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False)


def _types_in(graph: GraphProto) -> dict[str, int]:
    types = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        # A sequence is no tensor, but something is known of it.
        if value.type.WhichOneof("value") and (
            not value.type.HasField("tensor_type") or value.type.tensor_type.elem_type
        ):
            types[value.name] = int(value.type.tensor_type.elem_type)
    types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    return types


def _given(graph: GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
