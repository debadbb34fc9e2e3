"""What is known of a layer before it is computed, and why it is not computed in whole numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.shape_inference
from onnx import NodeProto

from qdist.model.freeze import FrozenModel
from qdist.model.graph import attribute
from qdist.model.weights import Weights
from qdist.numbers.table import TABLE_OPERATORS
from qdist.plan.plan import LayerPlan
from qdist.plan.target import CUT_GRID, Target
from qdist.simulate.ratios import CONVOLUTIONS, MATRICES, no_ratios
from qdist.simulate.rows import LONGEST_ROW

PRODUCTS = (*MATRICES, *CONVOLUTIONS, "Mul")
SUMS = ("Add", "Sub")
NORM = "BatchNormalization"


class LayerFacts:
    """Shapes, constants and tables of a graph's layers.

    ``weights``: the constants. ``biases``: layer -> the Add of a constant that is computed together
    with it.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        target: Target,
        weights: Weights,
        biases: Mapping[str, NodeProto],
    ) -> None:
        self._frozen = frozen
        self._target = target
        self._weights = weights
        self._biases = biases
        self._shapes: dict[str, tuple[int, ...]] | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the target multiplies with ``m * 2**-n``."""
        return self._target.scale_grid == CUT_GRID

    def obstacle(self, node: NodeProto, layer: LayerPlan) -> str | None:
        """Why the layer is not computed in whole numbers."""
        if node.op_type == NORM:
            return self._no_norm(node, layer)
        if node.op_type not in (*PRODUCTS, *SUMS):
            return self._no_table(node, layer)
        entries = {e.index: e.quantizer for e in (*layer.activations, *layer.weights)}
        if set(entries) != {0, 1}:
            return "an input stays float"
        if any(q.is_float for q in entries.values()):
            return "its numbers are floating-point"
        if any(q.is_dynamic for q in entries.values()):
            return "an activation has several scales, found while the model runs"
        if any(q.blocks is not None for q in entries.values()):
            return "a weight has a scale for every block"
        if any(e.quantizer.axis is not None for e in layer.outputs):
            return "its output has several scales"
        if node.op_type in CONVOLUTIONS and node.input[1] not in self._weights:
            return "its weight is computed"
        reason = no_ratios(node, layer, self.weight_shape(layer), self.ranks(node))
        if reason is not None:
            return reason
        if node.op_type in SUMS or node.op_type == "Mul" or layer.bias_add is not None:
            return None if layer.outputs else "its output was not measured"
        if not all(name in self._weights for name in self.bias_names(node)):
            return "its bias is computed"
        return None

    def _no_table(self, node: NodeProto, layer: LayerPlan) -> str | None:
        """Why the layer is not looked up in a table."""
        known = node.op_type in TABLE_OPERATORS and node.domain in ("", "ai.onnx")
        if not known or self.table_bits(layer) is None:
            return f"{node.op_type} is a function, or moves values"
        if not layer.activations or not layer.outputs:
            return "its input or output stays float"
        source = layer.activations[0].quantizer
        if source.is_float or source.is_dynamic or source.axis is not None:
            return "an activation has several scales, or floating-point numbers"
        if source.bits <= 8:
            # Its float result, stored, is what a table of all its levels holds.
            return "its table would hold every level"
        return self._no_row(node) if node.op_type == "LayerNormalization" else None

    def table_bits(self, layer: LayerPlan) -> int | None:
        """The length of the layer's tables: its own, or the target's."""
        if self._target.table_bits is None:
            return None
        return layer.choice.table_bits or self._target.table_bits

    def _no_row(self, node: NodeProto) -> str | None:
        """Why a layer normalization is not computed from a table."""
        if not all(name in self._weights for name in node.input[1:] if name):
            return "its parameters are computed"
        if any(node.output[1:]):
            return "its statistics are read"
        shape, gain = self.shape(node.input[0]), self._weights.shape(node.input[1])
        n_axes = len(self.row_axes(node, len(shape)))
        if not shape or tuple(gain) != shape[len(shape) - n_axes :]:
            return "the length of its rows is not known"
        if int(np.prod(gain)) > LONGEST_ROW:
            return f"its rows are longer than {LONGEST_ROW} numbers"
        return None

    @staticmethod
    def row_axes(node: NodeProto, rank: int) -> tuple[int, ...]:
        """The axes that a layer normalization works along, counted from the end."""
        axis = int(attribute(node, "axis", -1))
        return tuple(range(axis if axis < 0 else axis - rank, 0))

    def _no_norm(self, node: NodeProto, layer: LayerPlan) -> str | None:
        """Why a batch normalization is not computed in whole numbers."""
        if not self.is_cut:
            return f"{node.op_type} has no documented integer form here"
        if not layer.activations or not layer.outputs or layer.activations[0].quantizer.is_float:
            return "its input or output stays float"
        source = layer.activations[0].quantizer
        if source.is_dynamic or source.axis not in (None, 1):
            return "an activation has several scales, not one for each channel"
        if not all(name in self._weights for name in node.input[1:5]):
            return "its parameters are computed"
        return None if self.rank(node.input[0]) >= 2 else "its rank is not known"

    def rank(self, tensor: str) -> int:
        """How many axes a tensor has; 0 where nothing tells."""
        return len(self.shape(tensor))

    def ranks(self, node: NodeProto) -> tuple[int, int]:
        """How many axes both factors have; 0 where nothing tells."""
        if node.op_type in CONVOLUTIONS and node.input[1] in self._weights:
            n_axes = len(self.kernel(node))
            return n_axes, n_axes
        first, second = (
            len(self._weights.shape(name))
            if name in self._weights
            else 2
            if node.op_type == "Gemm"
            else self.rank(name)
            for name in node.input[:2]
        )
        return first, second

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The axes of a tensor, 0 for a length that is not fixed; none where nothing tells."""
        if self._shapes is None:
            graph = onnx.shape_inference.infer_shapes(self._frozen.proto()).graph
            self._shapes = {
                value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
                for value in (*graph.input, *graph.value_info)
            }
        return self._shapes.get(tensor, ())

    def bias_names(self, node: NodeProto) -> list[str]:
        """The constants that are added to what a layer multiplies and sums."""
        names = list(node.input[2:3])
        bias = self._biases.get(node.name)
        if bias is not None:
            names += [n for n in bias.input if n != node.output[0]]
        return [name for name in names if name]

    def weight_shape(self, layer: LayerPlan) -> tuple[int, ...]:
        """Of the layer's weight, if any."""
        return self._weights.shape(layer.weights[0].tensor) if layer.weights else ()

    def kernel(self, node: NodeProto) -> tuple[int, ...]:
        """The shape of a convolution's weight."""
        return self._weights.shape(node.input[1])
