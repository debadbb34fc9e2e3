"""Consecutive steps of a graph as a graph of their own.

Its weights lie where they always lay: nothing is copied but what is inside the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from qdist.model.flow import Flow

_UNSPEAKABLE = frozenset(
    {TensorProto.UNDEFINED, TensorProto.BFLOAT16}
    | {
        element
        for name, element in TensorProto.DataType.items()
        if name.startswith(("FLOAT8", "FLOAT4", "FLOAT6", "INT4", "UINT4", "INT2", "UINT2"))
    }
)
"""Element types that do not leave a session as plain arrays: no cut where one of them crosses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Steps ``start..stop`` of a flow.

    ``model`` reads ``feeds`` (inputs of the model) and ``receives`` (made by earlier steps). Its
    outputs are ``hands``, which are outputs of the model, and ``sends``, which later steps read;
    one that is both stands in both, and once among the graph's outputs.
    """

    model: ModelProto
    feeds: tuple[str, ...]
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    hands: tuple[str, ...]


def part_of(flow: Flow, start: int, stop: int, elements: Mapping[str, int]) -> Part:
    """``elements``: ONNX element types, of what crosses the two cuts at least."""
    steps = flow.steps[start:stop]
    made = {name for step in steps for name in step.makes}
    feeds = tuple(dict.fromkeys(name for step in steps for name in step.inputs))
    reads = dict.fromkeys(name for step in steps for name in step.reads)
    receives = tuple(name for name in reads if name not in made)
    hands = tuple(name for name in flow.kept if name in made)
    sends = tuple(
        name for step in steps for name in step.makes if flow.last_reader.get(name, -1) >= stop
    )
    model = _nodes_and_weights(flow, start, stop)
    model.graph.input.extend(flow.inputs[name] for name in feeds)
    model.graph.input.extend(_value(name, elements) for name in receives)
    model.graph.output.extend(flow.kept[name] for name in hands)
    model.graph.output.extend(_value(name, elements) for name in sends if name not in hands)
    return Part(model=model, feeds=feeds, receives=receives, sends=sends, hands=hands)


def can_cross(names: Iterable[str], elements: Mapping[str, int]) -> bool:
    """Whether all these tensors can leave a session and enter another."""
    return all(elements.get(name, TensorProto.UNDEFINED) not in _UNSPEAKABLE for name in names)


def _value(name: str, elements: Mapping[str, int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, elements[name], None)


def _nodes_and_weights(flow: Flow, start: int, stop: int) -> ModelProto:
    """Nodes and initializers of some steps, with the constants that they read."""
    steps = flow.steps[start:stop]
    constants = {name for step in steps for name in step.constants}
    weights = {name for step in steps for name in step.weights}
    part = ModelProto(ir_version=flow.model.ir_version, producer_name="qdist")
    part.opset_import.extend(flow.model.opset_import)
    part.functions.extend(flow.model.functions)
    part.graph.name = f"steps_{start}_{stop}"
    # Nodes keep their order: what is made of constants stands where it is read, and runs there.
    made = constants.union(name for step in steps for name in step.makes)
    part.graph.node.extend(
        node for node in flow.model.graph.node if not made.isdisjoint(node.output)
    )
    part.graph.initializer.extend(
        tensor for tensor in flow.model.graph.initializer if tensor.name in weights
    )
    return part
