"""Tensors on the way into a Softmax that carry a mask.

Masks are written as infinities or as large negatives that overflow to infinity in half precision.
There they are what the model means; anywhere else an infinity is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from qdist.model.bodies import Body, find_bodies, owner_of, path_of, prefix_of
from qdist.model.graph import Graph, attribute
from qdist.model.views import Scope

LEAST_MASK = 1e3
"""Masks in use start at 1e4."""
_LARGEST_READ = 1 << 24
"""Elements of a constant that are looked through for masks; larger ones are none."""

_MASK_INPUTS = {
    ("", "Attention"): 3,
    ("com.microsoft", "Attention"): 5,
    ("com.microsoft", "MultiHeadAttention"): 5,
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): 4,
    ("com.microsoft", "GroupQueryAttention"): 10,
    ("com.microsoft", "PackedMultiHeadAttention"): 6,
    ("com.microsoft", "BiasSoftmax"): 1,
}
"""Operators with a Softmax inside, and which input is added to its scores."""
_ADDING = ("Add", "Sub", "Where", "Sum", "Min", "Max")
_PASSING = frozenset(
    {
        *_ADDING,
        "Cast",
        "CastLike",
        "Clip",
        "Concat",
        "DepthToSpace",
        "Div",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Mul",
        "Neg",
        "Pad",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
    }
)
"""Operators through which a mask passes; a matrix product makes scores, which are none."""


def sentinel_paths(graph: Graph) -> dict[str, str]:
    """Activation (by its path, inside a body) -> the node whose Softmax reads it masked.

    Infinities and large negatives in these mean "masked": they are counted and reported, and no
    error. They are the sum of scores and mask, the mask and what it is made of, not the scores.
    """
    scopes: list[Graph | Body] = [graph, *find_bodies(graph)]
    reached, added = _before_softmax(scopes)
    holding = {path for path in added if path in graph.input_names}
    found: dict[str, str] = {}
    for scope in scopes:
        for node in _nodes(scope):
            if not any(f"{prefix_of(scope)}{name}" in reached for name in node.output):
                continue
            reads = _passed_on(scope, node)
            if not (
                any(path_of(scope, name) in holding or _is_mask(scope, name) for name in reads)
                or _fills_with_mask(node)
            ):
                continue
            holding.update(f"{prefix_of(scope)}{name}" for name in node.output if name)
    activations = [*graph.input_names]
    for scope in scopes:
        made = (name for node in _nodes(scope) for name in node.output)
        activations += [f"{prefix_of(scope)}{n}" for n in made if n and scope.is_activation(n)]
    for path in activations:
        if path in holding and path in reached:
            found[path] = reached[path]
    return found


def _before_softmax(scopes: list[Graph | Body]) -> tuple[dict[str, str], set[str]]:
    """Tensors that reach a Softmax through operators that pass a mask on -> that Softmax; and those
    that are added to something on the way."""
    reached: dict[str, str] = {}
    added: set[str] = set()
    front: list[tuple[Scope, str, str]] = []
    for start in scopes:
        for node in _nodes(start):
            for tensor, is_mask in _into_softmax(start, node):
                front.append((start, tensor, node.name or node.op_type))
                if is_mask:
                    added.add(path_of(start, tensor))
    while front:
        scope, tensor, softmax = front.pop()
        owner = owner_of(scope, tensor)
        path = path_of(owner, tensor)
        first = path not in reached
        reached.setdefault(path, softmax)
        node = owner.maker.get(tensor)
        if node is None:
            continue
        reads = _passed_on(owner, node)
        below = {path_of(owner, name) for name in reads}
        new = below - added if node.op_type in _ADDING or path in added else set()
        added |= new
        if first or new:
            front += [(owner, name, softmax) for name in reads]
    return reached, added


def _into_softmax(scope: Scope, node: NodeProto) -> Iterator[tuple[str, bool]]:
    """What a node takes the Softmax of; and whether that is nothing but a mask."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    index = _MASK_INPUTS.get((domain, node.op_type))
    if index is not None and len(node.input) > index and node.input[index]:
        yield node.input[index], True
    if node.op_type in ("Softmax", "LogSoftmax", "BiasSoftmax"):
        yield node.input[0], False
    elif node.op_type == "Exp":
        # A Softmax written out takes the maximum off first.
        shift = scope.maker.get(node.input[0])
        if shift is not None and shift.op_type == "Sub":
            top = scope.maker.get(shift.input[1])
            if top is not None and top.op_type == "ReduceMax" and top.input[0] == shift.input[0]:
                yield node.input[0], False


def _passed_on(scope: Scope, node: NodeProto) -> list[str]:
    """The inputs from which a node passes a mask on."""
    if node.op_type not in _PASSING:
        return []
    # The bounds of a Clip are no values.
    given = node.input[:1] if node.op_type == "Clip" else node.input
    return [name for name in given if name and scope.is_float(name)]


def _is_mask(scope: Scope, name: str) -> bool:
    """Whether a tensor is a constant that masks, or that masks are multiplied from."""
    if name not in scope.constants or name in scope.maker:
        return False
    if np.prod(scope.weights.shape(name), dtype=np.int64) > _LARGEST_READ:
        return False
    return _masks(scope.weights.read_float32(name))


def _fills_with_mask(node: NodeProto) -> bool:
    filling = attribute(node, "value") if node.op_type == "ConstantOfShape" else None
    return isinstance(filling, TensorProto) and _masks(numpy_helper.to_array(filling))


def _masks(values: NDArray[Any]) -> bool:
    # Positive ones are subtracted.
    return bool((np.abs(np.asarray(values, np.float32)) >= LEAST_MASK).any())


def _nodes(scope: Graph | Body) -> Iterator[NodeProto]:
    yield from (scope.proto if isinstance(scope, Body) else scope.proto.graph).node
