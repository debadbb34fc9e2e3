"""Which axis of a measured tensor counts its channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qdist.model.graph import Graph
from qdist.model.taps import TapTable

_CHANNELS_SECOND = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "ConvInteger",
        "QLinearConv",
        "MaxPool",
        "AveragePool",
        "LpPool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "GlobalLpPool",
        "BatchNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "LRN",
    }
)
"""Operators that read [N, C, ...] whatever the rank."""


def channel_axes(
    graph: Graph, taps: TapTable, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, int]:
    """The channel axis of the measured tensors that have one, by tensor.

    1 where a convolution, pooling or normalization over [N, C, ...] makes or reads the tensor, and
    for 4 axes and more (images, heads); the last of 2 or 3 axes (tokens); none for fewer. A tensor
    of unknown rank has none. ``shapes``: what is known beside the graph's own types, such as
    `Shapes.dims`.
    """
    known = shapes or {}
    axes = {}
    for tensor in taps.tensors:
        found = graph.type_of(tensor)
        shape = known.get(tensor, found.shape if found is not None else None)
        if shape is None or len(shape) < 2:
            continue
        convolved = len(shape) > 2 and _is_convolved(graph, tensor)
        axes[tensor] = 1 if convolved or len(shape) > 3 else len(shape) - 1
    return axes


def _is_convolved(graph: Graph, tensor: str) -> bool:
    maker = graph.maker.get(tensor)
    if maker is not None and maker.op_type in _CHANNELS_SECOND:
        return True
    return any(
        reader.op_type in _CHANNELS_SECOND and reader.input[0] == tensor
        for reader in graph.readers.get(tensor, ())
    )
