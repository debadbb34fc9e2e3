"""Which operators only rearrange the values of their first input.

A tensor that such an operator makes holds exactly the values that its source holds, each as often,
so that one measurement answers for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from qdist.model.graph import TensorType, attribute
from qdist.model.weights import Weights


class Scope(Protocol):
    """What can be asked of a graph: the main one, or a body of control flow."""

    @property
    def maker(self) -> Mapping[str, NodeProto]:
        """Tensor -> the node of this very graph that makes it."""

    @property
    def constants(self) -> Mapping[str, TensorProto]:
        """The initializers that nodes of this graph can read."""

    @property
    def weights(self) -> Weights:
        """The values of `constants`."""

    def type_of(self, tensor: str) -> TensorType | None:
        """Type of a tensor that nodes of this graph can read; None where nothing tells."""

    def is_float(self, tensor: str) -> bool:
        """Whether the tensor is known to hold floating-point numbers."""

    def is_activation(self, tensor: str) -> bool:
        """Whether the tensor depends on the model's inputs."""


VIEWS = frozenset(
    {
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "DepthToSpace",
        "SpaceToDepth",
    }
)
"""Operators whose output holds exactly the values of their first input, in another order."""

_CONTRIB_VIEWS = frozenset({"ExpandDims"})
_DEFAULT_DOMAINS = ("", "ai.onnx")
_UNBOUNDED = np.iinfo(np.int32).max
"""Exporters write this, or more, for "to the end"."""
_SMALL = 64
"""No list of axes, bounds or paddings is longer."""
_WIDENING = {
    TensorProto.FLOAT16: (TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.BFLOAT16: (TensorProto.FLOAT, TensorProto.DOUBLE),
    TensorProto.FLOAT: (TensorProto.DOUBLE,),
}
"""Casts that keep every value."""


def view_source(graph: Scope, tensor: str) -> str:
    """The tensor whose values ``tensor`` merely rearranges; itself where it computes anew."""
    while (node := graph.maker.get(tensor)) is not None and is_view(graph, node, tensor):
        source = node.input[0]
        if not graph.is_activation(source):
            break
        tensor = source
    return tensor


def is_view(graph: Scope, node: NodeProto, output: str) -> bool:
    """Whether ``output`` of ``node`` holds exactly the values of the node's first input.

    Beside the operators that always do: a slice, pad, tile or expansion that neither drops nor
    adds an element, a concatenation of one tensor, a split into one part, dropout outside of
    training and a cast that keeps every value.
    """
    if node.domain == "com.microsoft":
        return node.op_type in _CONTRIB_VIEWS
    if node.domain not in _DEFAULT_DOMAINS or not node.input or output != node.output[0]:
        return False
    if node.op_type in VIEWS or node.op_type == "ReverseSequence":
        return True
    if node.op_type == "Concat":
        return len(node.input) == 1
    if node.op_type == "Split":
        return len(node.output) == 1
    if node.op_type == "Dropout":
        return not _given(node, 2) or _is_false(_constant(graph, node, 2))
    if node.op_type in ("Cast", "CastLike"):
        return _keeps_values(graph, node)
    if node.op_type == "Slice":
        return _takes_everything(graph, node)
    if node.op_type == "Pad":
        pads = _constant(graph, node, 1)
        return pads is not None and not pads.any()
    if node.op_type == "Tile":
        repeats = _constant(graph, node, 1)
        return repeats is not None and bool((repeats == 1).all())
    return node.op_type == "Expand" and _adds_nothing(graph, node)


def _given(node: NodeProto, index: int) -> bool:
    return len(node.input) > index and bool(node.input[index])


def _constant(graph: Scope, node: NodeProto, index: int) -> NDArray[np.generic] | None:
    """A short constant operand, or None."""
    if not _given(node, index) or node.input[index] not in graph.constants:
        return None
    name = node.input[index]
    if np.prod(graph.weights.shape(name), dtype=np.int64) > _SMALL:
        return None
    return graph.weights.read(name)


def _is_false(flag: NDArray[np.generic] | None) -> bool:
    return flag is not None and not flag.any()


def _keeps_values(graph: Scope, node: NodeProto) -> bool:
    before = graph.type_of(node.input[0])
    after = graph.type_of(node.output[0])
    if node.op_type == "Cast":
        target = int(attribute(node, "to", TensorProto.UNDEFINED))
    else:
        target = after.element if after is not None else TensorProto.UNDEFINED
    if before is None or target == TensorProto.UNDEFINED:
        return False
    return target == before.element or target in _WIDENING.get(before.element, ())


def _takes_everything(graph: Scope, node: NodeProto) -> bool:
    starts, ends = _constant(graph, node, 1), _constant(graph, node, 2)
    if starts is None or ends is None or not starts.size:
        return False
    axes: list[int] = list(range(starts.size))
    if _given(node, 3):
        if (found := _constant(graph, node, 3)) is None:
            return False
        axes = [int(a) for a in found.ravel()]
    steps: list[int] = [1] * starts.size
    if _given(node, 4):
        if (found := _constant(graph, node, 4)) is None:
            return False
        steps = [int(s) for s in found.ravel()]
    bounds = zip(starts.ravel(), ends.ravel(), axes, steps, strict=True)
    return all(
        _covers(int(start), int(end), step, _dimension(graph, node.input[0], axis))
        for start, end, axis, step in bounds
    )


def _dimension(graph: Scope, tensor: str, axis: int) -> int | None:
    """How long an axis is, where that is fixed."""
    found = graph.type_of(tensor)
    if found is None or found.shape is None or not -len(found.shape) <= axis < len(found.shape):
        return None
    size = found.shape[axis]
    return size if isinstance(size, int) else None


def _covers(start: int, end: int, step: int, size: int | None) -> bool:
    """Whether a slice takes every element of an axis, forwards or backwards."""
    least = _UNBOUNDED if size is None else size
    if step == 1:
        at_start = start == 0 or (size is not None and start <= -size)
        return at_start and end >= least
    if step == -1:
        at_end = start == -1 or start >= least - (size is not None)
        return at_end and end < -least
    return False


def _adds_nothing(graph: Scope, node: NodeProto) -> bool:
    shape = _constant(graph, node, 1)
    if shape is not None and (shape == 1).all():
        return True
    before, after = graph.type_of(node.input[0]), graph.type_of(node.output[0])
    if before is None or after is None or before.shape is None or after.shape is None:
        return False
    sizes = [size for size in (*before.shape, *after.shape) if isinstance(size, int)]
    if len(sizes) < len(before.shape) + len(after.shape):
        return False
    return bool(np.prod(sizes[: len(before.shape)]) == np.prod(sizes[len(before.shape) :]))
