"""Picking single places of a short last axis: the halves of a rotary embedding, real and imaginary
parts, boxes' corners.

ONNX Runtime's ``Gather`` copies such places one element at a time, at some 7 ns each. ``Split`` and
``Squeeze`` move the same bits at 0.6 ns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdist.model.rewrite import opset_of, set_nodes, tensor_names
from qdist.model.shapes import Shapes

_MOST_PLACES = 4
"""An axis of more is no short one: all of it is moved for one place."""
_LEAST_ELEMENTS = 1 << 12
"""Fewer are picked sooner than another node begins."""


def split_picks(model: ModelProto, shapes: Shapes) -> int:
    """Let ``Split`` do what ``Gather`` does with one index on a short last axis of float32.

    Mutates the model; no tensor changes its name or a bit. Returns how many were replaced.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    picked: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in model.graph.node:
        place = _place(node, weights, shapes)
        if place is not None:
            picked.setdefault(node.input[0], []).append((node, place))
    if not picked:
        return 0
    names = _new_names(model)
    gone = {node.output[0] for found in picked.values() for node, _ in found}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if not gone.intersection(node.output):
            nodes.append(node)
        elif node.input[0] in picked:
            # The first of them; the others' outputs come a little sooner than they did.
            found = picked.pop(node.input[0])
            nodes += _split(model, found, _dims(shapes, node.input[0]), names)
    set_nodes(model, nodes)
    return len(gone)


def _dims(shapes: Shapes, tensor: str) -> tuple[int, ...]:
    return tuple(shapes.dims.get(tensor, ()))


def _place(node: NodeProto, weights: Mapping[str, TensorProto], shapes: Shapes) -> int | None:
    """The place that a node picks; None where it does anything else."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx"):
        return None
    data, indices = node.input
    dims = _dims(shapes, data)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    index = weights.get(indices)
    if (
        len(dims) < 2
        or axis not in (len(dims) - 1, -1)
        or not 2 <= dims[-1] <= _MOST_PLACES
        or math.prod(dims) < _LEAST_ELEMENTS
        or shapes.elements.get(data) != TensorProto.FLOAT
        or index is None
        or len(index.dims) != 0
        or index.data_location == TensorProto.EXTERNAL
    ):
        return None
    return int(numpy_helper.to_array(index)) % dims[-1]


def _split(
    model: ModelProto,
    picks: list[tuple[NodeProto, int]],
    dims: tuple[int, ...],
    names: Iterator[str],
) -> list[NodeProto]:
    """The nodes that pick the same places of the same tensor."""
    data, axis, opset = picks[0][0].input[0], len(dims) - 1, opset_of(model)
    parts = [next(names) for _ in range(dims[-1])]
    count = {"num_outputs": dims[-1]} if opset >= 18 else {}
    nodes = [helper.make_node("Split", [data], parts, next(names), axis=axis, **count)]
    axes: list[str] = []
    if opset >= 13:
        axes = [next(names)]
        model.graph.initializer.append(numpy_helper.from_array(np.array([axis]), axes[0]))
    for node, place in picks:
        own = {} if axes else {"axes": [axis]}
        nodes.append(
            helper.make_node("Squeeze", [parts[place], *axes], [node.output[0]], node.name, **own)
        )
    return nodes


def _new_names(model: ModelProto) -> Iterator[str]:
    """Names of tensors and nodes that the graph does not have."""
    taken = tensor_names(model) | {node.name for node in model.graph.node}
    n = 0
    while True:
        name = f"picked_{n}"
        n += 1
        if name not in taken:
            yield name
