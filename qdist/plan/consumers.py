"""The layers that read a tensor, as the threshold method ``auto`` wants to know them.

Known are matmuls, fully connected layers and convolutions: with a constant on the other side, its
squared entries per input channel; with an activation there, its mean square, which is the same for
all channels. Their outputs' mean squares come from the record. Everything else passes errors on as
they are or has no weights to tell, and counts as unknown.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
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
        for entry in layer.activations:
            if taps.row_of(entry.tensor) == row:
                consumer = _consumer(row, entry.index, layer, node, graph, taps, record)
                found += [] if consumer is None else [consumer]
    return tuple(found)


def _consumer(
    row: str,
    index: int,
    layer: Layer,
    node: NodeProto,
    graph: Graph,
    taps: TapTable,
    record: CalibrationRecord,
) -> Consumer | None:
    weights = {entry.index: entry.tensor for entry in layer.weights}
    other = 1 - index
    if index not in (0, 1) or (other not in weights and len(layer.activations) != 2):
        return None
    if other not in weights:
        return _of_activations(row, index, layer, node, graph, taps, record)
    weight = graph.weights.read(weights[other]).astype(np.float32, copy=False)
    groups = int(attribute(node, "group", 1)) if layer.op_type == "Conv" else 1
    if weight.ndim < 2 or (layer.op_type == "Conv" and other != 1):
        return None
    if layer.op_type == "Conv":
        input_axis, output_axis = 1, 0
    else:
        turned = layer.op_type == "Gemm" and bool(attribute(node, f"trans{'AB'[other]}", 0))
        # The right operand has its inputs in the rows, the left one in the columns.
        rows_are_inputs = (other == 1) != turned
        input_axis, output_axis = (-2, -1) if rows_are_inputs else (-1, -2)
    found = Consumer.of_weight(
        layer.name,
        weight,
        input_axis,
        output_axis,
        groups=groups,
        output_square=_output_square(layer, node, graph, taps, record),
    )
    return _with_channels(found, row, record)


def _with_channels(found: Consumer, row: str, record: CalibrationRecord) -> Consumer:
    """With the row's extrema per channel, where it has as many channels as the layer inputs."""
    channels = record.channels(row)
    if channels is None or channels.minimum.size != found.gains.size:
        return found
    return Consumer(
        name=found.name,
        gains=found.gains,
        minimum=channels.minimum.astype(np.float64),
        maximum=channels.maximum.astype(np.float64),
        output_square=found.output_square,
        mean_gain=found.mean_gain,
    )


def _of_activations(
    row: str,
    index: int,
    layer: Layer,
    node: NodeProto,
    graph: Graph,
    taps: TapTable,
    record: CalibrationRecord,
) -> Consumer | None:
    """A product of two activations: what the other one weighs, as often as an output sums."""
    if layer.op_type != "MatMul":
        return None
    other = taps.row_of(node.input[1 - index])
    type_ = graph.type_of(node.input[index])
    shape = type_.shape if type_ is not None else None
    summed = shape[-1 if index == 0 else -2] if shape is not None and len(shape) > 1 else None
    if other not in record or not isinstance(summed, int) or summed < 1:
        return None
    square = split_sentinels(record.histogram(other).finite).body.second_moment
    if square <= 0:
        return None
    return Consumer(
        name=layer.name,
        gains=np.array([summed * square]),
        output_square=_output_square(layer, node, graph, taps, record),
    )


def _output_square(
    layer: Layer, node: NodeProto, graph: Graph, taps: TapTable, record: CalibrationRecord
) -> float | None:
    """Mean square of the output without its bias, taken as independent of the rest."""
    output = taps.row_of(layer.outputs[0])
    if output not in record:
        return None
    square = split_sentinels(record.histogram(output).finite).body.second_moment
    if len(node.input) > 2 and node.input[2]:
        if node.input[2] not in graph.constants:
            return None
        bias = graph.weights.read(node.input[2]).astype(np.float64)
        square -= float(np.mean(bias**2)) if bias.size else 0.0
    return square if square > 0 else None
