"""Half precision, computed in single precision and rounded where the model says.

ONNX Runtime has few float16 kernels on CPUs and hardly any for bfloat16. For float16 it computes
in float32 between two nodes and leaves out the rounding in between, unless the tensor in between
is an output: so one more tap, or a cut, would change the bits of every tensor after it. Written out
as casts, the rounding is always done, and bfloat16 runs at all.

NumPy has no bfloat16, so no tensor of that type enters or leaves a session: an activation of
bfloat16 becomes one of float32 whose values were rounded to bfloat16. Weights stay as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from qdist.model.elements import Elements, find_elements
from qdist.model.precision import HALF, TYPE_ATTRIBUTES, element_of, mentions, set_element
from qdist.model.rewrite import drop_initializer_inputs, set_nodes, subgraphs
from qdist.model.session import Execution

_BFLOAT16 = TensorProto.BFLOAT16
_FLOAT = TensorProto.FLOAT
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_MOVES = _CONTROL_FLOW | frozenset(
    {
        "Cast",
        "CastLike",
        "Compress",
        "Concat",
        "ConcatFromSequence",
        "Constant",
        "ConstantOfShape",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "IsInf",
        "IsNaN",
        "Reshape",
        "ReverseSequence",
        "ScatterElements",
        "ScatterND",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceInsert",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "SplitToSequence",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that move values and have kernels for every type: they run as they are."""


def carried(element: int) -> int:
    """The element type in which a tensor of the model enters and leaves a widened graph."""
    return _FLOAT if element == _BFLOAT16 else element


def widen(
    model: ModelProto,
    folder: Path | None,
    execution: Execution,
    known: Callable[[str], int] | None = None,
) -> None:
    """Rewrite ``model`` so that every operator on half precision computes in float32 and rounds its
    results.

    Tensors of the main graph keep their names; what is bfloat16 is float32 then (`carried`), inputs
    and outputs included, which are rounded on the way in. ``model`` has no local functions;
    external data lies in ``folder``. ``known``: element types of tensors of the main graph, 0 where
    it does not know one. A model without half precision stays as it is. Raises QD205 where the
    runtime is asked for a type and refuses the graph.
    """
    if mentions(model, HALF):
        widen_typed(model, find_elements(model, folder, execution, known))


def widen_typed(model: ModelProto, elements: Elements) -> None:
    """As `widen`, where the element types are known."""
    _widen(model.graph, elements, "")
    _own_outputs(model, elements)
    _round_inputs(model)


def widened(model: ModelProto, folder: Path | None, execution: Execution) -> ModelProto:
    """A model, as given by a user or frozen, as it is run: functions inlined, rounding written out.

    The model itself where nothing in it is of half precision. Raises QD205.
    """
    if not mentions(model, HALF):
        return model
    copy = ModelProto.FromString(model.SerializeToString())
    if copy.functions:
        copy = onnx.inliner.inline_local_functions(copy)
    drop_initializer_inputs(copy)
    widen(copy, folder, execution)
    return copy


def _widen(graph: GraphProto, found: Elements, prefix: str) -> None:
    scope = _Scope(found, prefix)
    for position, given in enumerate(list(graph.node)):
        node = NodeProto.FromString(given.SerializeToString())
        for number, body in enumerate(subgraphs(node)):
            label = f"{node.name or node.op_type}.{position}.{number}"
            _widen(body, found.inner[position, number], f"{prefix}{label}/")
            _own_types(body, found.inner[position, number], f"{prefix}{label}/")
        scope.add(node)
    del graph.node[:]
    graph.node.extend(scope.nodes)
    del graph.value_info[:]


class _Scope:
    """The nodes of one graph or body, rewritten one after another."""

    def __init__(self, found: Elements, prefix: str) -> None:
        self.nodes: list[NodeProto] = []
        self._found = found
        self._prefix = prefix
        self._wide: dict[str, str] = {}

    def add(self, node: NodeProto) -> None:
        """Append ``node``, which is changed, and the casts that it needs."""
        half = [name for name in (*node.input, *node.output) if self._found.of(name) in HALF]
        after: list[NodeProto] = []
        if node.op_type == "SequenceEmpty":
            _make_single(node, {_BFLOAT16})
        elif half and self._computes(node):
            after = self._compute(node)
        elif half:
            after = self._move(node)
        self.nodes += [node, *after]

    def _computes(self, node: NodeProto) -> bool:
        if node.op_type in ("Cast", "CastLike"):
            return self._found.of(node.output[0]) == _BFLOAT16
        return node.op_type not in _MOVES or _reduces(node)

    def _compute(self, node: NodeProto) -> list[NodeProto]:
        """Operands become float32; what comes after the node rounds its results."""
        for i, name in enumerate(node.input):
            node.input[i] = self._single(name)
        after = []
        for i, name in enumerate(node.output):
            element = self._found.of(name)
            if element in HALF:
                node.output[i] = exact = f"{self._prefix}{name}.exact"
                after += _rounding(exact, name, element, self._prefix)
        _make_single(node, HALF)
        return after

    def _move(self, node: NodeProto) -> list[NodeProto]:
        """Activations of bfloat16 are float32 already; constants are not."""
        own = [name for name in node.input if self._is_weight(name)]
        reads = [name for name in node.input if self._found.of(name) == _BFLOAT16]
        if node.op_type in _CONTROL_FLOW or len(own) < len(reads):
            for i, name in enumerate(node.input):
                if name in own:
                    node.input[i] = self._single(name)
            return []
        after = []
        # Only what is taken out of the weights is cast, not all of them.
        for i, name in enumerate(node.output):
            if self._found.of(name) == _BFLOAT16:
                node.output[i] = f"{self._prefix}{name}.bfloat16"
                after.append(_cast(node.output[i], name, _FLOAT))
        return after

    def _single(self, name: str) -> str:
        """The tensor that holds the values of ``name`` in float32, if these are half precision."""
        element = self._found.of(name)
        if element not in HALF or (element == _BFLOAT16 and not self._is_weight(name)):
            return name
        if name not in self._wide:
            self._wide[name] = f"{self._prefix}{name}.wide"
            self.nodes.append(_cast(name, self._wide[name], _FLOAT))
        return self._wide[name]

    def _is_weight(self, name: str) -> bool:
        return name in self._found.constants and self._found.of(name) == _BFLOAT16


def _rounding(source: str, target: str, element: int, prefix: str) -> list[NodeProto]:
    if element != _BFLOAT16:
        return [_cast(source, target, element)]
    between = f"{prefix}{target}.bfloat16"
    return [_cast(source, between, element), _cast(between, target, _FLOAT)]


def _cast(source: str, target: str, element: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}.cast", to=element)


def _reduces(node: NodeProto) -> bool:
    """Whether a scatter computes with what it scatters."""
    return any(entry.name == "reduction" and entry.s != b"none" for entry in node.attribute)


def _make_single(node: NodeProto, elements: Collection[int]) -> None:
    for entry in node.attribute:
        is_type = entry.name in TYPE_ATTRIBUTES and entry.type == AttributeProto.INT
        if is_type and entry.i in elements:
            entry.i = _FLOAT


def _own_types(body: GraphProto, found: Elements, prefix: str) -> None:
    """What enters and leaves a body is float32 where it was bfloat16."""
    for value in (*body.input, *body.output):
        set_element(value.type, _BFLOAT16, _FLOAT)
    for number, value in enumerate(body.output):
        if value.name in found.constants and found.of(value.name) == _BFLOAT16:
            # A body's outputs go by their place, so this one may get another name.
            given, value.name = value.name, f"{prefix}{value.name}.out{number}"
            body.node.append(_cast(given, value.name, _FLOAT))


def _own_outputs(model: ModelProto, found: Elements) -> None:
    """Outputs of type bfloat16 become float32; those that are constants are cast."""
    for value in model.graph.output:
        name = value.name
        set_element(value.type, _BFLOAT16, _FLOAT)
        for tensor in model.graph.initializer:
            if tensor.name == name and tensor.data_type == _BFLOAT16:
                tensor.name = f"{name}.bfloat16"
                _rename(model.graph, name, tensor.name)
                model.graph.node.append(_cast(tensor.name, name, _FLOAT))


def _round_inputs(model: ModelProto) -> None:
    first: list[NodeProto] = []
    for value in model.graph.input:
        if element_of(value.type) != _BFLOAT16:
            continue
        given, rounded = value.name, f"{value.name}.rounded"
        set_element(value.type, _BFLOAT16, _FLOAT)
        _rename(model.graph, given, rounded)
        first += _rounding(given, rounded, _BFLOAT16, "")
    if first:
        set_nodes(model, [*first, *model.graph.node])


def _rename(graph: GraphProto, before: str, after: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == before:
                node.input[i] = after
        for body in subgraphs(node):
            _rename(body, before, after)
            for value in body.output:
                if value.name == before:
                    value.name = after
