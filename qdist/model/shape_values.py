"""What a graph computes with shapes, once they are known.

Shape inference follows shapes through most operators that compute with them, but not through all:
an integer division in between (half of a head's size) and everything behind it is unknown. Where
all that goes in is known, ONNX Runtime computes what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from qdist.errors import ModelError
from qdist.model.rewrite import RANDOM, set_nodes, subgraphs
from qdist.model.session import Execution, measuring_options, open_session, run

Dims = tuple[int | str | None, ...]
"""Dimensions: a number, a symbol, or None where nothing is known."""
Types = Mapping[str, tuple[int, Dims | None]]

_MOST_ELEMENTS = 64
"""More are no shape."""


def is_concrete(dims: Dims | None) -> TypeGuard[tuple[int, ...]]:
    """Whether every dimension is a number."""
    return dims is not None and all(isinstance(n, int) and n >= 0 for n in dims)


def compute_shapes(
    model: ModelProto, types: Types, execution: Execution | None
) -> dict[str, tuple[int, Dims]]:
    """Replace what follows from known shapes alone by its value.

    ``types``: element types and dimensions by tensor, as far as they are known. Returns those of
    what was replaced.
    """
    known = {tensor.name for tensor in model.graph.initializer}
    shapes: dict[str, NDArray[Any]] = {}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        given = _shape_of(node, types)
        if given is not None:
            shapes[node.output[0]] = given
            known.add(node.output[0])
        elif _is_computable(node, known, types):
            nodes.append(node)
            known.update(name for name in node.output if name)
    if not shapes:
        return {}
    values = {**shapes, **_computed(model, nodes, shapes, execution)}
    set_nodes(model, [node for node in model.graph.node if values.keys().isdisjoint(node.output)])
    made = [numpy_helper.from_array(value, name) for name, value in values.items()]
    model.graph.initializer.extend(made)
    return {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in made}


def _shape_of(node: NodeProto, types: Types) -> NDArray[np.int64] | None:
    """What a ``Shape`` gives; None where that is unknown or another node."""
    if node.op_type != "Shape" or node.domain not in ("", "ai.onnx"):
        return None
    _, dims = types.get(node.input[0], (0, None))
    if not is_concrete(dims):
        return None
    ends = {attribute.name: attribute.i for attribute in node.attribute}
    return np.array(dims[ends.get("start", 0) : ends.get("end", len(dims))], np.int64)


def _is_computable(node: NodeProto, known: set[str], types: Types) -> bool:
    return (
        node.domain in ("", "ai.onnx")
        and node.op_type not in RANDOM
        and not any(subgraphs(node))
        and all(name in known for name in node.input if name)
        and all(_is_small(name, types) for name in node.output if name)
    )


def _is_small(tensor: str, types: Types) -> bool:
    element, dims = types.get(tensor, (0, None))
    return element in _PLAIN and is_concrete(dims) and math.prod(dims) <= _MOST_ELEMENTS


_PLAIN = frozenset(
    {
        TensorProto.INT64,
        TensorProto.INT32,
        TensorProto.UINT64,
        TensorProto.UINT32,
        TensorProto.BOOL,
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
    }
)
"""Element types that shapes are computed in, floats included."""


def _computed(
    model: ModelProto,
    nodes: list[NodeProto],
    shapes: Mapping[str, NDArray[Any]],
    execution: Execution | None,
) -> dict[str, NDArray[Any]]:
    """What the nodes put out; nothing where ONNX Runtime refuses one of them."""
    read = {name for node in nodes for name in node.input}
    names = [name for node in nodes for name in node.output if name]
    if not names:
        return {}
    part = ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.graph.name = "shapes"
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in read)
    part.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in shapes.items() if name in read
    )
    part.graph.output.extend(ValueInfoProto(name=name) for name in names)
    execution = execution or Execution()
    options = measuring_options(execution)
    # What it refuses here (a division by zero in a branch that is never taken) is no news.
    options.log_severity_level = 4
    try:
        session = open_session(part.SerializeToString(), None, execution, options)
        return dict(zip(names, run(session, names, {}), strict=True))
    except ModelError:
        return {}
