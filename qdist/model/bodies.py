"""The bodies of ``If``, ``Loop`` and ``Scan``: which tensors they hold, and how to measure them.

A tensor inside a body is named by its path: the control-flow node, the attribute that holds the
body and the tensor, as in ``choice/then_branch/scores``; bodies within bodies make longer paths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.shape_inference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from qdist.model.constants import constants_to_initializers
from qdist.model.graph import Graph, TensorType
from qdist.model.rewrite import RANDOM, names_read
from qdist.model.shapes import session_types
from qdist.model.views import Scope
from qdist.model.weights import Weights

CONTROL_FLOW = ("If", "Loop", "Scan")
_SIZED_BY_VALUES: dict[str, tuple[int, ...]] = {
    "NonZero": (),
    "Compress": (),
    "Unique": (),
    "NonMaxSuppression": (),
    "StringSplit": (),
    "TopK": (1,),
    "Range": (0, 1, 2),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1,),
    "Resize": (2, 3),
    "OneHot": (1,),
}
"""Operators whose output's size depends on values: on those of these inputs, or always."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Body:
    """One body, as a graph that can be asked what the main one can be asked.

    ``proto``: its nodes, with ``Constant`` nodes turned into initializers. ``maker`` knows the
    nodes of this body alone; ``constants`` and types are also those of the graphs around it.
    ``blocked``: why nothing in it can be measured, or None.
    """

    path: str
    node: NodeProto
    proto: GraphProto
    outer: Scope
    maker: dict[str, NodeProto]
    constants: dict[str, TensorProto]
    weights: Weights
    types: dict[str, TensorType]
    computed: frozenset[str]
    blocked: str | None

    def path_of(self, tensor: str) -> str:
        """The path that names one of the body's own tensors."""
        return f"{self.path}/{tensor}"

    def type_of(self, tensor: str) -> TensorType | None:
        """Type of a tensor of this body or of a graph around it."""
        return self.types.get(tensor)

    def is_float(self, tensor: str) -> bool:
        """Whether the tensor is known to hold floating-point numbers."""
        found = self.types.get(tensor)
        return found is not None and found.is_float

    def is_activation(self, tensor: str) -> bool:
        """Whether the tensor depends on the model's inputs."""
        return tensor in self.computed


def find_bodies(graph: Graph) -> tuple[Body, ...]:
    """All bodies of a model, each before those inside it."""
    return tuple(_bodies_in(graph.proto.graph, graph, graph.model.data_folder, graph.proto))


def body_types(graph: Graph) -> dict[str, TensorType]:
    """Types of all tensors inside bodies, by path, as they are handed out: without a shape where a
    ``Loop`` or ``Scan`` lies around, since the values of all steps come flat."""
    return {
        body.path_of(name): found if _keeps_shape(body) else _shapeless(found)
        for body in find_bodies(graph)
        for name in body.maker
        if (found := body.type_of(name)) is not None
    }


def _keeps_shape(body: Body) -> bool:
    scope: Scope = body
    while isinstance(scope, Body):
        if scope.node.op_type != "If":
            return False
        scope = scope.outer
    return True


def owner_of(scope: Scope, tensor: str) -> Scope:
    """The graph that a tensor belongs to which nodes of ``scope`` read."""
    while isinstance(scope, Body) and tensor not in scope.maker:
        if any(tensor == entry.name for entry in (*scope.proto.input, *scope.proto.initializer)):
            break
        scope = scope.outer
    return scope


def prefix_of(scope: Scope) -> str:
    """What stands before a tensor's name in its path."""
    return f"{scope.path}/" if isinstance(scope, Body) else ""


def path_of(scope: Scope, tensor: str) -> str:
    """The path of a tensor that nodes of ``scope`` read or write."""
    return f"{prefix_of(owner_of(scope, tensor))}{tensor}"


def body_attributes(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """Names and graphs of a node's bodies."""
    for entry in node.attribute:
        if entry.type == onnx.AttributeProto.GRAPH:
            yield entry.name, entry.g
        elif entry.type == onnx.AttributeProto.GRAPHS:
            yield from ((f"{entry.name}.{i}", body) for i, body in enumerate(entry.graphs))


def node_labels(graph: GraphProto) -> list[str]:
    """A name for every node that is unique among the nodes of its graph: bodies may hold nodes
    without a name, or several of one name."""
    taken = Counter(node.name for node in graph.node)
    labels = []
    for node in graph.node:
        name = node.name
        if not name or taken[name] > 1:
            first = next((output for output in node.output if output), "none")
            name = f"{name or node.op_type}_{first}"
        labels.append(name)
    return labels


def _bodies_in(proto: GraphProto, scope: Scope, folder: Path, model: ModelProto) -> Iterator[Body]:
    prefix = f"{scope.path}/" if isinstance(scope, Body) else ""
    for node, label in zip(proto.node, node_labels(proto), strict=True):
        for name, inner in body_attributes(node):
            body = _body(f"{prefix}{label}/{name}", node, inner, scope, folder, model)
            yield body
            yield from _bodies_in(inner, body, folder, model)


def _body(
    path: str, node: NodeProto, given: GraphProto, scope: Scope, folder: Path, model: ModelProto
) -> Body:
    shell = ModelProto(ir_version=model.ir_version, graph=given)
    shell.opset_import.extend(model.opset_import)
    constants_to_initializers(shell)
    inner = shell.graph
    for value, known in zip(inner.input, _input_types(node, scope), strict=False):
        if known is not None and not value.type.tensor_type.elem_type:
            value.CopyFrom(helper.make_tensor_value_info(value.name, known.element, known.shape))
    constants = dict(scope.constants) | {tensor.name: tensor for tensor in inner.initializer}
    return Body(
        path=path,
        node=node,
        proto=inner,
        maker={name: made for made in inner.node for name in made.output if name},
        constants=constants,
        weights=Weights(constants.values(), folder),
        types=_types(shell, scope, folder),
        outer=scope,
        computed=_computed(inner, scope),
        blocked=_blocked(node, inner, scope),
    )


def _input_types(node: NodeProto, scope: Scope) -> list[TensorType | None]:
    """What the enclosing graph knows of the values that a body's formal inputs take."""
    known = [scope.type_of(name) for name in node.input]
    if node.op_type == "Loop":
        scalars = [TensorType(element=e, shape=()) for e in (TensorProto.INT64, TensorProto.BOOL)]
        known = known[2:]
    else:
        scalars = []
    # States may change their shape from step to step, and a scan hands out slices.
    return [*scalars, *(_shapeless(found) if found is not None else None for found in known)]


def _shapeless(found: TensorType) -> TensorType:
    return TensorType(element=found.element, shape=None)


def _captured(inner: GraphProto) -> list[str]:
    """What a body reads of the graphs around it."""
    own = {value.name for value in (*inner.input, *inner.initializer)}
    own.update(name for node in inner.node for name in node.output)
    reads = [name for node in inner.node for name in names_read(node)]
    reads += [value.name for value in inner.output]
    # Names that bodies within this one make are theirs, not captured.
    hidden = {name for node in inner.node for name in _made_inside(node)}
    return [name for name in dict.fromkeys(reads) if name not in own and name not in hidden]


def _made_inside(node: NodeProto) -> Iterator[str]:
    for _, body in body_attributes(node):
        yield from (value.name for value in (*body.input, *body.initializer))
        for inner in body.node:
            yield from inner.output
            yield from _made_inside(inner)


def _types(shell: ModelProto, scope: Scope, folder: Path) -> dict[str, TensorType]:
    """Types of a body's tensors and of those that it captures: from shape inference on the body
    as a model of its own, then from the runtime, which knows contrib operators too."""
    alone = ModelProto.FromString(shell.SerializeToString())
    types: dict[str, TensorType] = {}
    all_known = True
    for name in _captured(alone.graph):
        found = scope.type_of(name)
        if found is None or not found.element:
            all_known = False
            continue
        types[name] = found
        alone.graph.input.append(helper.make_tensor_value_info(name, found.element, found.shape))
    inferred = onnx.shape_inference.infer_shapes(alone).graph
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        element, shape = value.type.tensor_type.elem_type, value.type.tensor_type.shape
        if element:
            known = value.type.tensor_type.HasField("shape")
            dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in shape.dim)
            types[value.name] = TensorType(element=element, shape=dims if known else None)
    for tensor in alone.graph.initializer:
        types[tensor.name] = TensorType(element=tensor.data_type, shape=tuple(tensor.dims))
    made = [name for node in alone.graph.node for name in node.output if name]
    unknown = [name for name in made if name not in types]
    if unknown and all_known:
        types.update(_asked(alone, unknown, folder))
    return types


def _asked(alone: ModelProto, unknown: list[str], folder: Path) -> Iterator[tuple[str, TensorType]]:
    for name, (element, _) in session_types(alone, unknown, folder).items():
        yield name, TensorType(element=element, shape=None)


def _computed(inner: GraphProto, scope: Scope) -> frozenset[str]:
    """What depends on the model's inputs: the formal inputs do, as steps and states change."""
    found = {value.name for value in inner.input}
    for node in inner.node:
        reads = names_read(node)
        if node.op_type in RANDOM or any(n in found or scope.is_activation(n) for n in reads):
            found.update(name for name in node.output if name)
    found.update(name for name in _captured(inner) if scope.is_activation(name))
    return frozenset(found)


def _blocked(node: NodeProto, inner: GraphProto, scope: Scope) -> str | None:
    if isinstance(scope, Body) and scope.blocked is not None:
        return scope.blocked
    named = f"{node.op_type} {node.name or next(iter(node.output), '')}".strip()
    if node.op_type not in CONTROL_FLOW or node.domain not in ("", "ai.onnx"):
        return f"inside {named}, which hands out nothing of what it computes"
    if _inside_scan(node, scope) and _changes_size(inner):
        return f"inside {named}: its size may change from step to step"
    return None


def _inside_scan(node: NodeProto, scope: Scope) -> bool:
    while isinstance(scope, Body) and node.op_type != "Scan":
        node, scope = scope.node, scope.outer
    return node.op_type == "Scan"


def _changes_size(inner: GraphProto) -> bool:
    constant = {tensor.name for tensor in inner.initializer}
    for node in inner.node:
        if node.op_type in CONTROL_FLOW:
            return True
        sizes = _SIZED_BY_VALUES.get(node.op_type)
        if sizes is not None and (
            not sizes
            or any(name not in constant for i, name in enumerate(node.input) if name and i in sizes)
        ):
            return True
    return False
