"""Every quantized layer beside its float self, both fed by the float activations.

One run of this graph gives the error that each layer adds on its own, for all layers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
from onnx import NodeProto

from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.plan.plan import LayerPlan
from qdist.plan.target import ProjectedPlan
from qdist.simulate.assemble import (
    QuantizedGraph,
    Results,
    finished,
    pair_nodes,
    raised,
    round_results,
)
from qdist.simulate.pairs import Pairs
from qdist.simulate.split_bias import with_bias_apart

SUFFIX = ".twin"


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinGraph:
    """``graph`` has, for each entry of ``outputs`` (layer -> its first output that is used), the
    float tensor of that name and the twin's of the name with `SUFFIX`."""

    graph: QuantizedGraph
    outputs: dict[str, str]


def twin_graph(frozen: FrozenModel, projected: ProjectedPlan) -> TwinGraph:
    """The frozen graph with a quantized twin of every quantized layer. Raises QD206."""
    plan = projected.plan
    proto = raised(frozen, plan.opset)
    pairs = Pairs(frozen.weights(), rewrite.tensor_names(proto))
    by_name = {layer.name: layer for layer in plan.layers if layer.is_quantized}
    nodes: list[NodeProto] = []
    placed: set[str] = set()
    outputs: dict[str, str] = {}
    for node in proto.graph.node:
        nodes.append(node)
        layer = by_name.get(node.name)
        if layer is None:
            continue
        twin = twin_of(node)
        nodes.extend(pair_nodes(twin, layer, pairs, placed))
        made = with_bias_apart(twin, layer, pairs, placed)
        after = round_results(made[-1], own_results(node, layer), pairs)
        nodes.extend((*made, *after))
        outputs[layer.name] = next(name for name in node.output if name)
    del proto.graph.output[:]
    for name in outputs.values():
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
        proto.graph.output.append(onnx.ValueInfoProto(name=name + SUFFIX))
    return TwinGraph(graph=finished(frozen, proto, nodes, pairs), outputs=outputs)


def own_results(node: NodeProto, layer: LayerPlan) -> Results:
    """How the twin's results are rounded: as those of the last layer that is computed together with
    it, since rounding changes nothing about ReLU and Clip."""
    kinds = [entry.quantizer for entry in layer.outputs if layer.choice.bits.rounds is not None]
    return {i: kinds[0] for i, name in enumerate(node.output) if name and kinds}


def twin_of(node: NodeProto, suffix: str = SUFFIX) -> NodeProto:
    """A copy of a node whose name and results end in ``suffix``."""
    twin = NodeProto.FromString(node.SerializeToString())
    twin.name += suffix
    renamed = [name + suffix if name else "" for name in twin.output]
    del twin.output[:]
    twin.output.extend(renamed)
    return twin


def only(projected: ProjectedPlan, names: set[str]) -> ProjectedPlan:
    """The projected plan with every layer outside ``names`` left float."""
    layers = tuple(
        layer if layer.name in names else _float(layer) for layer in projected.plan.layers
    )
    return replace(projected, plan=replace(projected.plan, layers=layers))


def _float(layer: LayerPlan) -> LayerPlan:
    return replace(layer, activations=(), weights=(), bias_add=None)
