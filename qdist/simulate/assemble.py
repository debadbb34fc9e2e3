"""A frozen graph and a projected plan in, the quantized graph out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto

from qdist.errors import ModelError
from qdist.model import rewrite
from qdist.model.freeze import FrozenModel
from qdist.model.half import widen
from qdist.model.opset import IR_VERSION_OF_OPSET, raise_opset
from qdist.model.precision import HALF, mentions
from qdist.model.session import Execution
from qdist.model.views import VIEWS
from qdist.model.weights import Weights
from qdist.plan.plan import LayerPlan
from qdist.plan.quantizer import Quantizer
from qdist.plan.target import ProjectedPlan
from qdist.simulate.pairs import IntegerWeight, Pairs
from qdist.simulate.split_bias import with_bias_apart


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGraph:
    """A graph whose integer weights are still to be computed.

    ``proto``: the graph; tensors named in ``integer_weights`` have no data yet, others may lie in
    external files below ``data_folder``. ``weights`` reads the float weights.
    """

    proto: ModelProto
    integer_weights: tuple[IntegerWeight, ...]
    weights: Weights
    data_folder: Path


def assemble(frozen: FrozenModel, projected: ProjectedPlan) -> QuantizedGraph:
    """The frozen graph with Q/DQ pairs, and roundings, where the plan says so.

    Opset 13 for 8-bit plans, 19 for float8, 21 when a layer has 4 or 16 bits, blocks, or scales per
    token. Raises QD206, QD208.
    """
    plan = projected.plan
    proto = raised(frozen, plan.opset)
    pairs = Pairs(frozen.weights(), rewrite.tensor_names(proto))
    by_name = {layer.name: layer for layer in plan.layers if layer.is_quantized}
    results = rounded_results(plan.layers)
    held = Held()
    nodes: list[NodeProto] = []
    placed: set[str] = set()
    for node in proto.graph.node:
        layer = by_name.pop(node.name, None)
        if layer is not None:
            nodes.extend(pair_nodes(node, held.without(layer), pairs, placed))
        own = results.get(node.name, {})
        held.note(node, own)
        made = with_bias_apart(node, layer, pairs, placed)
        after = round_results(made[-1], own, pairs)
        nodes.extend((*made, *after))
    if by_name:
        raise _unknown_layers(frozen, list(by_name))
    proto.producer_name = "qdist"
    return finished(frozen, proto, nodes, pairs)


Results = dict[int, Quantizer]
"""Output of a node -> the numbers that it is stored in."""


def results_of(layers: Iterable[LayerPlan]) -> dict[str, Results]:
    """Node -> how its outputs are stored: the last node that is computed together with a layer."""
    last: dict[str, str] = {}
    found: dict[str, Results] = {}
    for layer in layers:
        last[layer.fused_with or layer.name] = layer.name
    for layer in layers:
        if layer.outputs:
            found[last[layer.name]] = {entry.index: entry.quantizer for entry in layer.outputs}
    return found


def rounded_results(layers: Iterable[LayerPlan]) -> dict[str, Results]:
    """`results_of` of the layers that round to a floating-point type. All others are stored where
    the next layer reads them."""
    rounds = {layer.name for layer in layers if layer.choice.bits.rounds is not None}
    hosts = {layer.name: layer.fused_with or layer.name for layer in layers}
    return {name: found for name, found in results_of(layers).items() if hosts[name] in rounds}


def round_results(node: NodeProto, results: Results, pairs: Pairs) -> list[NodeProto]:
    """Give what the node makes another name, and its own to what is left after storing."""
    after: list[NodeProto] = []
    for i, quantizer in results.items():
        name = node.output[i]
        node.output[i] = exact = pairs.free(f"{name}.computed")
        after += pairs.result(exact, name, quantizer)
    return after


class Held:
    """Which tensors are rounded already, so that no layer does it twice."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[Any, ...]] = {}

    def without(self, layer: LayerPlan) -> LayerPlan:
        """The layer without the activations that need no rounding any more."""
        left = tuple(e for e in layer.activations if self._keys.get(e.tensor) != e.quantizer.key)
        return layer if len(left) == len(layer.activations) else replace(layer, activations=left)

    def note(self, node: NodeProto, results: Results) -> None:
        """What the node makes: rounded results, and what only moves such values."""
        moved = self._keys.get(node.input[0]) if node.input and node.op_type in VIEWS else None
        for i, name in enumerate(node.output):
            if i in results:
                self._keys[name] = results[i].key
            elif moved is not None:
                self._keys[name] = moved


def finished(
    frozen: FrozenModel, proto: ModelProto, nodes: list[NodeProto], pairs: Pairs
) -> QuantizedGraph:
    """``proto``, with these nodes and what ``pairs`` collected, as a graph ready to be written."""
    rewrite.set_nodes(proto, nodes)
    proto.graph.initializer.extend(pairs.initializers)
    rewrite.remove_dead(proto)
    proto.ir_version = max(proto.ir_version, IR_VERSION_OF_OPSET.get(rewrite.opset_of(proto), 10))
    return QuantizedGraph(
        proto=proto,
        integer_weights=tuple(pairs.integer_weights),
        weights=pairs.weights,
        data_folder=frozen.data_folder,
    )


def raised(frozen: FrozenModel, opset: int) -> ModelProto:
    """The frozen graph at opset ``opset`` or later, with the same tensor and node names.

    Half precision is written out: layers compute in float32, and what they make is rounded as the
    model says.
    """
    proto = frozen.proto()
    if mentions(proto, HALF):
        widen(proto, frozen.data_folder, Execution())
    proto = raise_opset(proto, opset)
    rewrite.name_nodes(proto)
    return proto


def pair_nodes(
    node: NodeProto, layer: LayerPlan, pairs: Pairs, placed: set[str]
) -> list[NodeProto]:
    """Quantize a node's inputs; the Q/DQ nodes that have to come before it.

    Those of tensors in ``placed`` are there already; the others are added to it.
    """
    new = [name for name in dict.fromkeys(replace_inputs(node, layer, pairs)) if name not in placed]
    placed.update(new)
    return [pair for name in new for pair in pairs.nodes[name]]


def replace_inputs(node: NodeProto, layer: LayerPlan, pairs: Pairs) -> list[str]:
    """Point a node's quantized inputs at their dequantized tensors; returns their names."""
    names = []
    for entry in layer.activations:
        # The tensor itself, or where that is of half precision its values in float32.
        names.append(pairs.activation(node.input[entry.index], entry.quantizer))
        node.input[entry.index] = names[-1]
    for entry in layer.weights:
        names.append(pairs.weight(entry.tensor, entry.quantizer))
        node.input[entry.index] = names[-1]
    return names


def _unknown_layers(frozen: FrozenModel, names: list[str]) -> ModelError:
    return ModelError(
        "QD208",
        where=str(frozen.source),
        got=f"no layer {', '.join(sorted(names)[:3])}",
        expected="every layer of the plan in the model",
        mend="run qdist quantize for this model",
    )
