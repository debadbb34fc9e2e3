"""The layers that read a tensor, as the threshold method ``auto`` wants to know them.

Known are matmuls, fully connected layers and convolutions: with a constant on the other side, its
squared entries per input channel; with an activation there, its mean square, which is the same for
all channels. Their outputs' mean squares come from the record. Everything else passes errors on as
they are or has no weights to tell, and counts as unknown.

An output channel counts by its own range, where that was measured: what reads it can scale it by
anything (a normalization does; so does the next layer, with the inverse in its weights), so an
error means something as a share of its channel, however small the channel's values are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from qdist.model.graph import Graph, attribute
from qdist.model.layers import Layer
from qdist.model.taps import TapTable
from qdist.stats.record import CalibrationRecord
from qdist.threshold.consumer import Consumer
from qdist.threshold.sentinel import split_sentinels


def consumers_of(
    row: str, graph: Graph, layers: Iterable[Layer], taps: TapTable, record: CalibrationRecord
) -> tuple[Consumer, ...]:
    """The known readers of the tensors that share ``row``, in the order of layers."""
    nodes = {node.output[0]: node for node in graph.proto.graph.node if node.output}
    found = []
    for layer in layers:
        node = nodes.get(layer.outputs[0]) if layer.outputs else None
        if node is None or layer.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        reader = _Reader(layer=layer, node=node, graph=graph, taps=taps, record=record)
        for entry in layer.activations:
            if taps.row_of(entry.tensor) == row:
                consumer = reader.of(row, entry.index)
                found += [] if consumer is None else [consumer]
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """A matmul, fully connected layer or convolution, with its node."""

    layer: Layer
    node: NodeProto
    graph: Graph
    taps: TapTable
    record: CalibrationRecord

    def of(self, row: str, index: int) -> Consumer | None:
        """The layer as a reader of ``row`` at an input, or None where nothing tells its weights."""
        weights = {entry.index: entry.tensor for entry in self.layer.weights}
        other = 1 - index
        if index not in (0, 1) or (other not in weights and len(self.layer.activations) != 2):
            return None
        if other not in weights:
            return self._of_activation(index)
        found = self._of_weight(weights[other], other)
        return None if found is None else _with_channels(found, row, self.record)

    def _of_weight(self, name: str, other: int) -> Consumer | None:
        """A product with a constant, which is the input ``other``."""
        weight = self.graph.weights.read(name).astype(np.float32, copy=False)
        is_conv = self.layer.op_type == "Conv"
        groups = int(attribute(self.node, "group", 1)) if is_conv else 1
        if weight.ndim < 2 or not weight.size or (is_conv and other != 1):
            return None
        if is_conv:
            input_axis, output_axis = 1, 0
        else:
            is_gemm = self.layer.op_type == "Gemm"
            turned = is_gemm and bool(attribute(self.node, f"trans{'AB'[other]}", 0))
            # The right operand has its inputs in the rows, the left one in the columns.
            rows_are_inputs = (other == 1) != turned
            input_axis, output_axis = (-2, -1) if rows_are_inputs else (-1, -2)
        # Outputs of a left operand do not lie along the axis whose channels are measured.
        widths = self._output_widths(weight.shape[output_axis]) if other == 1 else None
        square = self._output_square()
        if widths is not None:
            shape = [1] * weight.ndim
            shape[output_axis] = -1
            weight = (weight / widths.reshape(shape)).astype(np.float32)
            square = None if square is None else square / float(np.mean(widths**2))
        return Consumer.of_weight(
            self.layer.name,
            weight,
            input_axis,
            output_axis,
            groups=groups,
            output_square=square,
        )

    def _output_widths(self, n: int) -> NDArray[np.float64] | None:
        """How wide the range of each of ``n`` output channels is, float64[n] > 0; None where it is
        not known. A channel that is always the same has the width of the widest."""
        row = self.taps.row_of(self.layer.outputs[0])
        channels = self.record.channels(row) if row in self.record else None
        if channels is None or channels.minimum.size != n:
            return None
        widths = channels.maximum.astype(np.float64) - channels.minimum
        known = np.isfinite(widths) & (widths > 0)
        return np.where(known, widths, widths[known].max()) if known.any() else None

    def _of_activation(self, index: int) -> Consumer | None:
        """A product of two activations: what the other one weighs, as often as an output sums."""
        if self.layer.op_type != "MatMul":
            return None
        type_ = self.graph.type_of(self.node.input[index])
        shape = type_.shape if type_ is not None else None
        summed = shape[-1 if index == 0 else -2] if shape is not None and len(shape) > 1 else None
        square = self._mean_square(self.node.input[1 - index])
        if square is None or square <= 0 or not isinstance(summed, int) or summed < 1:
            return None
        return Consumer(
            name=self.layer.name,
            gains=np.array([summed * square]),
            output_square=self._output_square(),
        )

    def _output_square(self) -> float | None:
        """Mean square of the output without its bias, taken as independent of the rest."""
        square = self._mean_square(self.layer.outputs[0])
        if square is None:
            return None
        if len(self.node.input) > 2 and self.node.input[2]:
            if self.node.input[2] not in self.graph.constants:
                return None
            bias = self.graph.weights.read(self.node.input[2]).astype(np.float64)
            square -= float(np.mean(bias**2)) if bias.size else 0.0
        return square if square > 0 else None

    def _mean_square(self, tensor: str) -> float | None:
        """Of an activation without its masked values; None where it was not measured."""
        row = self.taps.row_of(tensor)
        if row not in self.record:
            return None
        return split_sentinels(self.record.histogram(row).finite).body.second_moment


def _with_channels(found: Consumer, row: str, record: CalibrationRecord) -> Consumer:
    """With the row's extrema per channel, where it has as many channels as the layer inputs."""
    channels = record.channels(row)
    if channels is None or channels.minimum.size != found.gains.size:
        return found
    return replace(
        found,
        minimum=channels.minimum.astype(np.float64),
        maximum=channels.maximum.astype(np.float64),
    )
