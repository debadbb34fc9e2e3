"""The bias of a convolution as an Add of its own.

Icraft's search does this to int16 convolutions on Buyi before it turns to float32 (section 3.5 of
the vendor's guide to quantization, mode ``accuracy``). The convolution's result is then stored
without its bias, so its range need not hold both, and the bias has a scale that is not tied to the
weight's. How such an Add is calibrated the guide does not say. Here nothing of the result is
clipped: its range is that of the output's channels, each less its bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qdist.errors import PlanError
from qdist.model.graph import Graph
from qdist.model.layers import Layer
from qdist.model.taps import TapTable
from qdist.plan.activation_range import ActivationRanges
from qdist.plan.choice import LayerChoice
from qdist.plan.plan import BiasAdd, Provenance, QuantizedInput
from qdist.plan.precision import activation_levels
from qdist.plan.range_rule import activation_quantizer
from qdist.plan.weight_quantizers import WeightQuantizers
from qdist.stats.channels import Channels
from qdist.threshold.clip import Threshold

CONVOLUTIONS = ("Conv", "ConvTranspose")
KERNEL, BIAS = 1, 2
"""The inputs that are a convolution's weight and bias."""
SUFFIX = ".before_bias"


class BiasAdds:
    """Finds the Add that the bias of a layer becomes, and says which layers have none."""

    def __init__(
        self,
        graph: Graph,
        taps: TapTable,
        ranges: ActivationRanges,
        weights: WeightQuantizers,
        *,
        layers: Sequence[Layer],
        fused: Mapping[str, str],
        symmetric: bool,
    ) -> None:
        """``fused``: layer -> the layer that it is computed with. ``symmetric``: whether
        activations have zero point 0."""
        self._graph = graph
        self._taps = taps
        self._ranges = ranges
        self._weights = weights
        self._symmetric = symmetric
        self._added = {fused[x.name]: x.name for x in layers if x.name in fused and x.weights}

    def obstacle(self, layer: Layer) -> str | None:
        """Why the layer's bias cannot be an Add of its own; None where it can."""
        found = self._extrema(layer)
        return found if isinstance(found, str) else None

    def _extrema(self, layer: Layer) -> Channels | str:
        """The extrema of the output's channels, or why the layer's bias is not split off."""
        if layer.op_type not in CONVOLUTIONS:
            return f"a {layer.op_type}"
        if [entry.index for entry in layer.weights] != [KERNEL]:
            return f"a {layer.op_type} whose weight is computed"
        name = self._name(layer)
        if not name:
            return f"a {layer.op_type} without a bias of its own"
        if name not in self._graph.constants:
            return "a bias that is computed"
        if layer.name in self._added:
            return f"a bias, and another that {self._added[layer.name]} adds"
        if not np.isfinite(self._graph.weights.read(name)).all():
            return "a bias that is not finite"
        return self._channels(layer) or "an output of whose channels no extrema were measured"

    def of(self, layer: Layer, choice: LayerChoice) -> BiasAdd:
        """The Add of a layer under a choice that splits its bias. Raises QD507 for a layer that
        `obstacle` is about."""
        channels = self._extrema(layer)
        if isinstance(channels, str):
            raise PlanError(
                "QD507",
                where=f"layer {layer.name}, split_bias",
                got=channels,
                expected="a Conv or ConvTranspose with a constant bias, whose output was measured",
                mend="leave split_bias out of this layer's rule",
            )
        name, output = self._name(layer), layer.outputs[0]
        bias = self._graph.weights.read(name)
        statistics = self._ranges.digest(self._taps.row_of(output))
        levels = activation_levels(
            16, symmetric=self._symmetric, range_bits=choice.activation_range_bits
        )
        found = activation_quantizer(range_before(bias, channels), levels, 16)
        return BiasAdd(
            result=QuantizedInput(
                index=0,
                tensor=f"{output}{SUFFIX}",
                quantizer=replace(found, clipped_share=0.0),
                provenance=Provenance(statistics=statistics),
            ),
            bias=QuantizedInput(
                index=BIAS,
                tensor=name,
                quantizer=self._weights.of_bias(name, choice),
            ),
            shape=(bias.size, *[1] * (len(self._kernel(layer)) - 2)),
        )

    def _name(self, layer: Layer) -> str:
        """The tensor that is the layer's bias; empty for none."""
        inputs = self._graph.nodes[layer.name].input
        return inputs[BIAS] if len(inputs) > BIAS else ""

    def _kernel(self, layer: Layer) -> tuple[int, ...]:
        return self._graph.weights.shape(layer.weights[0].tensor)

    def _channels(self, layer: Layer) -> Channels | None:
        """The extrema of the output's channels, where there is one for each value of the bias."""
        row, record = self._taps.row_of(layer.outputs[0]), self._ranges.record
        # A view that stands for the output may have its channels elsewhere.
        if row != layer.outputs[0] or row not in record or record.channel_axis(row) != 1:
            return None
        found = record.channels(row)
        n = int(np.prod(self._graph.weights.shape(self._name(layer)), dtype=np.int64))
        return found if found is not None and found.minimum.size == n else None


def range_before(bias: NDArray[np.floating], channels: Channels) -> Threshold:
    """The range, zero included, of an output before a bias is added to it, from the extrema of the
    output's channels. ``bias``: one number for each channel."""
    offsets = bias.astype(np.float64).ravel()
    # A channel that never held a finite value has its extrema the wrong way round.
    seen = channels.minimum <= channels.maximum
    return Threshold(
        low=float((channels.minimum[seen] - offsets[seen]).min(initial=0.0)),
        high=float((channels.maximum[seen] - offsets[seen]).max(initial=0.0)),
        method="max",
        clipped_share=0.0,
        expected_mse=float("nan"),
    )
