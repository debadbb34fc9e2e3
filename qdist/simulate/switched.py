"""One graph of which any set of layers can be quantized: every layer has a switch.

A switch is a bool input of the graph, without dimensions; where it is true, the layer reads its
inputs as they are after storing, else as they were. So one session answers what quantizing this or
that layer does to the model's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, TensorProto, helper

from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.plan.plan import LayerPlan
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import QuantizedGraph, finished, pair_nodes, raised
from qdist.simulate.pairs import Pairs
from qdist.simulate.split_bias import with_bias_apart

SUFFIX = ".switch"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchedGraph:
    """``switches``: quantized layer -> the input that switches it, in the order of the graph."""

    graph: QuantizedGraph
    switches: dict[str, str]


def switched_graph(frozen: FrozenModel, projected: ProjectedPlan) -> SwitchedGraph:
    """The frozen graph with a switch for every layer that the plan quantizes.

    All off it computes what the frozen graph does, bit for bit. Results that a layer rounds to a
    floating-point type are not rounded here; what it reads is. Raises QD206.
    """
    plan = projected.plan
    proto = raised(frozen, plan.opset)
    taken = rewrite.tensor_names(proto)
    pairs = Pairs(frozen.weights(), taken)
    by_name = {layer.name: layer for layer in plan.layers if layer.is_quantized}
    nodes: list[NodeProto] = []
    placed: set[str] = set()
    switches: dict[str, str] = {}
    for node in proto.graph.node:
        layer = by_name.get(node.name)
        if layer is not None:
            plain = list(node.input)
            nodes.extend(pair_nodes(node, layer, pairs, placed))
            switch = pairs.free(f"{node.name}{SUFFIX}")
            switches[node.name] = switch
            proto.graph.input.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, []))
            nodes.extend(_choices(node, plain, switch))
            nodes.extend(_bias_choice(node, layer, switch, pairs, placed))
        nodes.append(node)
    return SwitchedGraph(graph=finished(frozen, proto, nodes, pairs), switches=switches)


def _choices(node: NodeProto, plain: list[str], switch: str) -> list[NodeProto]:
    """Nodes that choose between each quantized input of ``node`` and the plain one, which it is
    made to read."""
    made: list[NodeProto] = []
    for i, (stored, name) in enumerate(zip(node.input, plain, strict=True)):
        if stored == name:
            continue
        chosen = f"{switch}.{i}"
        made.append(helper.make_node("Where", [switch, stored, name], [chosen], chosen))
        node.input[i] = chosen
    return made


def _bias_choice(
    node: NodeProto, layer: LayerPlan, switch: str, pairs: Pairs, placed: set[str]
) -> list[NodeProto]:
    """For a layer whose bias is split off: ``node`` is made a choice between what it is with the
    bias apart and what it was, and these come before it. Nothing for any other layer."""
    apart = with_bias_apart(node, layer, pairs, placed)
    if len(apart) == 1:
        return []
    output = node.output[0]
    whole = NodeProto.FromString(node.SerializeToString())
    apart[-1].output[0], whole.output[0] = f"{switch}.apart", f"{switch}.whole"
    whole.name = f"{node.name}.whole"
    chosen = [switch, apart[-1].output[0], whole.output[0]]
    node.CopyFrom(helper.make_node("Where", chosen, [output], f"{switch}.bias"))
    return [*apart, whole]
