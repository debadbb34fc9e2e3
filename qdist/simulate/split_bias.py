"""Biases that are Adds of their own: a convolution without its bias, stored, and the Add."""

from __future__ import annotations

from onnx import NodeProto, helper

from qdist.plan.bias_adds import BIAS
from qdist.plan.plan import LayerPlan
from qdist.simulate.pairs import Pairs

SUFFIX = ".bias_add"
"""Of the name of the Add."""


def without_bias(node: NodeProto, output: str) -> NodeProto:
    """A copy of a convolution that has no bias and gives ``output``."""
    bare = NodeProto.FromString(node.SerializeToString())
    del bare.input[BIAS:]
    bare.output[0] = output
    return bare


def with_bias_apart(
    node: NodeProto, layer: LayerPlan | None, pairs: Pairs, placed: set[str]
) -> list[NodeProto]:
    """What computes a node whose inputs are quantized already, the last of which gives its output:
    the node itself, or where its bias is split off the convolution without it, a Q/DQ pair, and the
    Add of the stored bias.

    Pairs of tensors in ``placed`` are there already; the others are added to it.
    """
    add = None if layer is None else layer.bias_add
    if add is None:
        return [node]
    bare = without_bias(node, pairs.free(add.result.tensor))
    stored = pairs.activation(bare.output[0], add.result.quantizer)
    bias = pairs.weight(add.bias.tensor, add.bias.quantizer, add.shape)
    before = [] if bias in placed else pairs.nodes[bias]
    placed.add(bias)
    total = helper.make_node("Add", [stored, bias], [node.output[0]], f"{node.name}{SUFFIX}")
    return [*before, bare, *pairs.nodes[stored], total]
