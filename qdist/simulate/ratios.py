"""Where the scales of an activation that has several lie in what is computed with it.

A scale along an axis that the result keeps is a factor of the accumulators there: channels of a
depthwise convolution, of a pointwise operator, heads of a batch of matrices. A scale along an axis
that is summed over cannot leave the sum; it goes into the weight, as Icraft normalizes, and the
weight gets scales of its own. Icraft's document says so of every operator, and shows it for a
convolution; for targets without cuts it is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from qdist.model.graph import attribute
from qdist.plan.plan import LayerPlan
from qdist.plan.quantizer import Quantizer

POINTWISE = ("Add", "Sub", "Mul")
MATRICES = ("MatMul", "Gemm")
CONVOLUTIONS = ("Conv", "ConvTranspose")


def along(values: Sequence[float], axis: int, dtype: Any = np.float64) -> NDArray[Any]:
    """Values along an axis counted from the end (below 0), to broadcast with any tensor that has
    it: dtype[n, 1, ...]."""
    return np.asarray(values, dtype).reshape(-1, *[1] * (-axis - 1))


def shaped_scales(quantizer: Quantizer, rank: int) -> NDArray[np.float64]:
    """The scales of a tensor of so many axes, to broadcast with it."""
    if quantizer.axis is None:
        return np.asarray(quantizer.scales[0])
    return along(quantizer.scales, quantizer.axis - rank)


def kept_axis(node: NodeProto, index: int, axis: int) -> int | None:
    """The axis of the result, from its end, along which an axis of input ``index`` lies, from its
    end too; None where the layer sums along it. Of pointwise and matrix operators."""
    if node.op_type in POINTWISE or axis < -2:
        return axis
    name = ("transA", "transB")[index]
    turned = node.op_type == "Gemm" and bool(attribute(node, name, 0))
    found = -3 - axis if turned else axis
    return found if found == (-2, -1)[index] else None


def is_depthwise(node: NodeProto, weight: Sequence[int]) -> bool:
    """Whether a Conv with a weight of this shape reads one channel for each of its results."""
    return node.op_type == "Conv" and weight[1] == 1 and attribute(node, "group", 1) > 1


def ratios_of(
    node: NodeProto, layer: LayerPlan, weight: Sequence[int], ranks: Sequence[int]
) -> NDArray[np.float64] | None:
    """The ratios of the activation at each place of the weight that reads it, shaped to broadcast
    with the weight; None where none lie along what is summed, or there is no weight to hold them.
    ``weight``: its shape. ``ranks``: of both inputs."""
    if len(layer.activations) != 1 or len(layer.weights) != 1:
        return None
    entry = layer.activations[0]
    quantizer = entry.quantizer
    if quantizer.axis is None or node.op_type in POINTWISE:
        return None
    scales = np.asarray(quantizer.scales, np.float64)
    n_spatial = len(weight) - 2
    if node.op_type == "Conv":
        groups = int(attribute(node, "group", 1))
        every = np.repeat(scales.reshape(groups, -1), weight[0] // groups, axis=0)
        return every.reshape(*every.shape, *[1] * n_spatial)
    if node.op_type == "ConvTranspose":
        return scales.reshape(-1, 1, *[1] * n_spatial)
    if kept_axis(node, entry.index, quantizer.axis - ranks[entry.index]) is not None:
        return None
    # The other factor's axis that is summed over.
    other = layer.weights[0].index
    name = ("transA", "transB")[other]
    turned = node.op_type == "Gemm" and bool(attribute(node, name, 0))
    return along(quantizer.scales, (-1, -2)[other] if not turned else (-2, -1)[other])


def no_ratios(
    node: NodeProto, layer: LayerPlan, weight: Sequence[int], ranks: Sequence[int]
) -> str | None:
    """Why a layer of which an input has several scales is not computed in whole numbers; None where
    it is. ``weight``: the shape of its weight, if any. ``ranks``: of both inputs, 0: unknown."""
    axes = {e.index: e.quantizer.axis for e in (*layer.activations, *layer.weights)}
    sources = [e for e in layer.activations if e.quantizer.axis is not None]
    if not sources and node.op_type not in POINTWISE:
        return None
    if node.op_type in CONVOLUTIONS:
        return _no_convolution(node, layer, weight)
    if any(rank == 0 for rank in ranks):
        return "an activation has several scales, and its rank is not known"
    if node.op_type in MATRICES and min(ranks) < 2:
        return "an activation has several scales, and the other factor is a vector"
    kept: set[int | None] = {
        kept_axis(node, i, axis - ranks[i]) for i, axis in axes.items() if axis is not None
    }
    if None in kept:
        if len(layer.activations) != 1:
            return "an activation has several scales along what is summed"
        # The weight takes them, and its own scales are new.
        return None
    if len(kept) > 1:
        return "its inputs have several scales along different axes"
    return None


def _no_convolution(node: NodeProto, layer: LayerPlan, weight: Sequence[int]) -> str | None:
    if not layer.weights or len(weight) < 3 or layer.activations[0].quantizer.axis != 1:
        return "an activation has several scales along what is summed"
    if node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1:
        return "an activation has several scales, and the weight groups"
    return None


def accumulator_scales(
    node: NodeProto, layer: LayerPlan, ranks: Sequence[int]
) -> NDArray[np.float64]:
    """The scale of the accumulators, shaped to broadcast with them, where no ratio lies along what
    is summed. ``ranks``: of both inputs; of those with one scale, any number."""
    scale = np.asarray(1.0)
    for entry in (*layer.activations, *layer.weights):
        quantizer = entry.quantizer
        if quantizer.axis is None:
            scale = scale * quantizer.scales[0]
        elif node.op_type in CONVOLUTIONS:
            # Every group of a transposed convolution has the same scales.
            n = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
            values = np.tile(np.asarray(quantizer.scales, np.float64), n)
            scale = scale * values.reshape(-1, *[1] * (ranks[1] - 2))
        else:
            axis = kept_axis(node, entry.index, quantizer.axis - ranks[entry.index])
            scale = scale * along(quantizer.scales, -1 if axis is None else axis)
    return np.asarray(scale * attribute(node, "alpha", 1.0) if node.op_type == "Gemm" else scale)
