"""Picking single places of a short last axis: the halves of a rotary embedding, real and imaginary
parts, boxes' corners.

ONNX Runtime's ``Gather`` copies such places one element at a time, at some 7 ns each. ``Split`` and
``Squeeze`` move the same bits at 0.6 ns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdist.model.rewrite import names_read, opset_of, set_nodes, tensor_names
from qdist.model.shapes import Shapes, inferred_types, weightless

_MOST_PLACES = 4
"""An axis of more is no short one: all of it is moved for one place."""
_LEAST_ELEMENTS = 1 << 12
"""Fewer are picked sooner than another node begins."""


def split_picks(model: ModelProto, shapes: Shapes, folder: Path | None = None) -> int:
    """Let ``Split`` do what ``Gather`` does with one index on a short last axis of float32.

    ``shapes``: for some inputs, such as are to come. An axis whose size depends on them is left
    alone. ``folder``: where external data lies. Mutates the model; no tensor changes its name or a
    bit. Returns how many were replaced.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found: list[tuple[NodeProto, int]] = []
    for node in model.graph.node:
        place = _place(node, weights, shapes)
        if place is not None:
            found.append((node, place))
    if not found:
        return 0
    always = inferred_types(weightless(model, folder))
    picked: dict[str, list[tuple[NodeProto, int]]] = {}
    for node, place in found:
        dims = always.get(node.input[0], (0, None))[1]
        if dims and isinstance(dims[-1], int):
            picked.setdefault(node.input[0], []).append((node, place))
    names = _new_names(model)
    gone = {node.output[0] for same in picked.values() for node, _ in same}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if not gone.intersection(node.output):
            nodes.append(node)
        elif node.input[0] in picked:
            # The first of them; the others' outputs come a little sooner than they did.
            same = picked.pop(node.input[0])
            nodes += _split(model, same, _dims(shapes, node.input[0]), names)
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
    place = int(numpy_helper.to_array(index))
    # What is out of bounds is for ONNX Runtime to refuse.
    return place % dims[-1] if -dims[-1] <= place < dims[-1] else None


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
    """Names of tensors and nodes that neither the graph nor a body has."""
    taken = tensor_names(model) | {node.name for node in model.graph.node}
    taken.update(name for node in model.graph.node for name in names_read(node))
    n = 0
    while True:
        name = f"picked_{n}"
        n += 1
        if name not in taken:
            yield name
