"""Where a model speaks of float16 and bfloat16, and what stands in for bfloat16."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

from qdist.model.rewrite import subgraphs

HALF = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")
"""Attributes that hold an element type."""


def mentions(model: ModelProto, elements: Collection[int]) -> bool:
    """Whether an input, an output, a constant or an attribute is of one of these element types.

    Nothing in a model is of a type that it does not mention.
    """
    functions = (node for function in model.functions for node in function.node)
    if any(_node_mentions(node, elements) for node in functions):
        return True
    return _graph_mentions(model.graph, elements)


def with_element(model: ModelProto, before: int, after: int) -> ModelProto:
    """A copy in which one element type takes the place of another of the same size. The bits of
    constants stay, so their values change: good for questions about types and shapes only."""
    changed = ModelProto.FromString(model.SerializeToString())
    nodes = [node for function in changed.functions for node in function.node]
    _replace_in_graph(changed.graph, before, after)
    _replace_in_nodes(nodes, before, after)
    return changed


def element_of(kind: TypeProto) -> int:
    """The element type of a tensor, or of the tensors in a sequence or optional value."""
    if kind.HasField("sequence_type"):
        return element_of(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return element_of(kind.optional_type.elem_type)
    return int(kind.tensor_type.elem_type)


def set_element(kind: TypeProto, before: int, after: int) -> None:
    """Change the element type of a tensor or sequence where it is ``before``."""
    if kind.HasField("sequence_type"):
        set_element(kind.sequence_type.elem_type, before, after)
    elif kind.HasField("optional_type"):
        set_element(kind.optional_type.elem_type, before, after)
    elif kind.tensor_type.elem_type == before:
        kind.tensor_type.elem_type = after


def _tensors(node: NodeProto) -> Iterator[TensorProto]:
    for entry in node.attribute:
        if entry.type == AttributeProto.TENSOR:
            yield entry.t
        elif entry.type == AttributeProto.SPARSE_TENSOR:
            yield entry.sparse_tensor.values
        yield from entry.tensors


def _node_mentions(node: NodeProto, elements: Collection[int]) -> bool:
    return (
        any(entry.i in elements for entry in node.attribute if entry.name in TYPE_ATTRIBUTES)
        or any(tensor.data_type in elements for tensor in _tensors(node))
        or any(_graph_mentions(body, elements) for body in subgraphs(node))
    )


def _graph_mentions(graph: GraphProto, elements: Collection[int]) -> bool:
    sparse = (entry.values for entry in graph.sparse_initializer)
    return (
        any(element_of(value.type) in elements for value in (*graph.input, *graph.output))
        or any(tensor.data_type in elements for tensor in (*graph.initializer, *sparse))
        or any(_node_mentions(node, elements) for node in graph.node)
    )


def _replace_in_graph(graph: GraphProto, before: int, after: int) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        set_element(value.type, before, after)
    for tensor in (*graph.initializer, *(entry.values for entry in graph.sparse_initializer)):
        if tensor.data_type == before:
            tensor.data_type = after
    _replace_in_nodes(list(graph.node), before, after)


def _replace_in_nodes(nodes: list[NodeProto], before: int, after: int) -> None:
    for node in nodes:
        for entry in node.attribute:
            if entry.name in TYPE_ATTRIBUTES and entry.i == before:
                entry.i = after
        for tensor in _tensors(node):
            if tensor.data_type == before:
                tensor.data_type = after
        for body in subgraphs(node):
            _replace_in_graph(body, before, after)
