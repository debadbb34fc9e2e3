"""Single rewriting steps on a graph. Each mutates the model it is given and says what it did.

Every step is deterministic: the same graph gives the same bytes, since the digest of the result is
part of a calibration's identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
import onnx.shape_inference
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    numpy_helper,
)

from qdist.errors import ModelError
from qdist.model.weights import Weights

RANDOM = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
    }
)
"""Operators whose outputs are no constants, whatever they read."""


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an ``If``, ``Loop`` or ``Scan``."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def names_read(node: NodeProto) -> Iterator[str]:
    """Tensor names a node reads, those captured by its subgraphs included."""
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        for inner in body.node:
            yield from names_read(inner)
        yield from (output.name for output in body.output)


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that may lie in an external file: those of the main graph first, then those in
    attributes, in the bodies of control flow and in local functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
    for body in subgraphs(node):
        yield from _graph_tensors(body)


def tensor_names(model: ModelProto) -> set[str]:
    """Names of all tensors of the main graph."""
    names = {name for node in model.graph.node for name in node.output}
    names.update(value.name for value in model.graph.input)
    names.update(tensor.name for tensor in model.graph.initializer)
    return names


def set_nodes(model: ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Replace all nodes of the main graph."""
    # Copies first: clearing the field invalidates the originals.
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def drop_initializer_inputs(model: ModelProto) -> None:
    """Initializers that are graph inputs too (IR version 3) become plain constants."""
    constant = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constant]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 8)


def name_nodes(model: ModelProto) -> None:
    """Every node gets a unique, stable name; those that have one already keep it."""
    taken: Counter[str] = Counter(node.name for node in model.graph.node if node.name)
    seen: set[str] = set()
    for node in model.graph.node:
        base = node.name or f"{node.op_type}_{next(iter(node.output), 'none')}"
        name, n = base, 1
        while name in seen or (name != node.name and taken[name]):
            name, n = f"{base}_{n}", n + 1
        node.name = name
        seen.add(name)


def remove_identities(model: ModelProto) -> None:
    """``Identity`` and inference-time ``Dropout`` vanish, unless they make a graph output."""
    outputs = {value.name for value in model.graph.output}
    constant = {tensor.name: tensor for tensor in model.graph.initializer}
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        _rename_inputs(node, renamed)
        if _is_identity(node, constant) and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    set_nodes(model, kept)


def fold_batch_normalization(model: ModelProto, weights: Weights) -> int:
    """``BatchNormalization`` right after Conv, ConvTranspose or Gemm goes into the weights.

    The new weights are computed in float64 and rounded once. Returns how many were folded.
    """
    readers = Counter(name for node in model.graph.node for name in names_read(node))
    readers.update(value.name for value in model.graph.output)
    maker = {name: node for node in model.graph.node for name in node.output}
    gone: set[int] = set()
    for node in model.graph.node:
        if node.op_type != "BatchNormalization" or _uses_batch_statistics(node):
            continue
        source = maker.get(node.input[0])
        if source is None or readers[node.input[0]] != 1:
            continue
        axis = _out_channel_axis(source)
        parameters = [*source.input[1:], *node.input[1:5]]
        if axis is None or not all(name in weights for name in parameters if name):
            continue
        _scale_into(model, source, node, weights, axis)
        source.output[0] = node.output[0]
        gone.add(id(node))
    set_nodes(model, [node for node in model.graph.node if id(node) not in gone])
    return len(gone)


def remove_dead(model: ModelProto) -> None:
    """Nodes and initializers that no output depends on are dropped."""
    wanted = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(name in wanted for name in node.output):
            kept.append(node)
            wanted.update(names_read(node))
    set_nodes(model, reversed(kept))
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    del model.graph.value_info[:]


def complete_outputs(model: ModelProto) -> None:
    """Outputs without a shape get the inferred one: ONNX Runtime runs a model that lacks it, but
    the ONNX checker refuses it."""
    if all(value.type.tensor_type.HasField("shape") for value in model.graph.output):
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    for value, found in zip(model.graph.output, inferred, strict=True):
        if found.type.tensor_type.HasField("shape"):
            value.type.CopyFrom(found.type)


def strip_documentation(model: ModelProto) -> None:
    """Exporters' remarks, names and local paths do not count as the model."""
    model.doc_string = model.producer_name = model.producer_version = ""
    model.domain, model.model_version = "", 0
    del model.metadata_props[:]
    _strip_graph(model.graph)


def _strip_graph(graph: GraphProto) -> None:
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for entry in (graph, *graph.node, *values):
        entry.doc_string = ""
        del entry.metadata_props[:]
    for node in graph.node:
        for body in subgraphs(node):
            _strip_graph(body)


def _rename_inputs(node: NodeProto, renamed: dict[str, str]) -> None:
    for i, name in enumerate(node.input):
        if name in renamed:
            node.input[i] = renamed[name]
    for body in subgraphs(node):
        for inner in body.node:
            _rename_inputs(inner, renamed)
        for value in body.output:
            value.name = renamed.get(value.name, value.name)


def _is_identity(node: NodeProto, constant: dict[str, TensorProto]) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type != "Dropout" or (len(node.output) > 1 and node.output[1]):
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    training = constant.get(node.input[2])
    return training is not None and not bool(numpy_helper.to_array(training))


def _uses_batch_statistics(norm: NodeProto) -> bool:
    training = any(a.name == "training_mode" and a.i for a in norm.attribute)
    return training or sum(1 for name in norm.output if name) > 1


def _out_channel_axis(node: NodeProto) -> int | None:
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        grouped = "group" in attributes and attributes["group"].i != 1
        return None if grouped else 1
    if node.op_type == "Gemm":
        plain = all(attributes[k].f == 1.0 for k in ("alpha", "beta") if k in attributes)
        transposed = "transB" in attributes and attributes["transB"].i == 1
        return (0 if transposed else 1) if plain else None
    return None


def _scale_into(
    model: ModelProto, conv: NodeProto, norm: NodeProto, weights: Weights, axis: int
) -> None:
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    gamma, beta, mean, variance = (
        np.asarray(weights.read(name), np.float64) for name in norm.input[1:5]
    )
    weight = weights.read(conv.input[1])
    factor = gamma / np.sqrt(variance + epsilon)
    shape = [1] * weight.ndim
    shape[axis] = -1
    bias = np.zeros_like(mean)
    if len(conv.input) > 2 and conv.input[2]:
        bias = np.asarray(weights.read(conv.input[2]), np.float64)
    new_weight = (np.asarray(weight, np.float64) * factor.reshape(shape)).astype(weight.dtype)
    new_bias = ((bias - mean) * factor + beta).astype(weight.dtype)
    names = (f"{conv.name}.folded_weight", f"{conv.name}.folded_bias")
    model.graph.initializer.append(numpy_helper.from_array(new_weight, names[0]))
    model.graph.initializer.append(numpy_helper.from_array(new_bias, names[1]))
    inputs = [conv.input[0], *names]
    del conv.input[:]
    conv.input.extend(inputs)


def opset_of(model: ModelProto) -> int:
    """The version of the default operator set. Raises QD202 when the model imports none."""
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    raise ModelError(
        "QD202",
        where="opset_import",
        got="no default operator set",
        expected="a model of the ai.onnx domain",
        mend="export the model with the standard ONNX operators",
    )
