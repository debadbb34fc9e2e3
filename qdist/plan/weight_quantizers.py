"""The quantizer of each weight that a layer reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.model.graph import FLOAT_TYPES, Graph
from qdist.model.layers import Layer, LayerInput
from qdist.model.precision import HALF
from qdist.numbers.dtype import DTYPES, DType, FloatType, IntegerType
from qdist.plan.choice import LayerChoice
from qdist.plan.element import ELEMENTS, element_of
from qdist.plan.granularity import Granularity, summed_axis
from qdist.plan.precision import weight_levels
from qdist.plan.quantizer import Quantizer, rounding_to
from qdist.plan.range_rule import fixed_weight
from qdist.plan.tensor_rules import TensorRules
from qdist.plan.weight_range import (
    block_quantizer,
    float_quantizer,
    group_quantizer,
    unsigned,
    weight_quantizer,
)
from qdist.threshold.sentinel import LEAST_GAP, LEAST_MAGNITUDE

_Key = tuple[str, str, int | None, int | None, Granularity, int | None, str, str]


class WeightQuantizers:
    """Finds quantizers of weights. Each weight is read, and its ranges are found, once for what
    they depend on."""

    def __init__(self, graph: Graph, rules: TensorRules) -> None:
        self._graph = graph
        self._rules = rules
        self._known: dict[_Key, Quantizer | str] = {}

    def of(self, layer: Layer, entry: LayerInput, choice: LayerChoice) -> Quantizer | str:
        """The quantizer of a layer's weight under a choice, or why it stays float.

        Raises QD507 for settings of the weight that a plan has no place for.
        """
        kind = choice.bits.weight_type
        if kind is None:
            return f"precision {choice.precision}"
        if not layer.is_compute:
            if choice.bits.is_weight_only:
                return f"precision {choice.precision} is for what is multiplied and summed"
            # Operands of pointwise layers are activations that happen to be constant.
            kind = DTYPES[(choice.bits.activation or kind.name).removeprefix("u")]
        grain = choice.weight_grain
        axis = entry.channel_axis if grain.kind != "tensor" else None
        along = None
        if grain.kind == "block":
            along = summed_axis(layer.op_type, axis, len(self._graph.weights.shape(entry.tensor)))
        method = choice.weight_method
        parameters = repr(sorted(choice.weight_parameters.items()))
        how = (choice.weight_range_bits, method, parameters)
        key = (entry.tensor, kind.name, axis, along, grain, *how)
        if key not in self._known:
            self._known[key] = self._found(entry.tensor, kind, axis, along, choice)
        found = self._known[key]
        settings = self._rules.of(entry.tensor)
        if isinstance(found, str) or found.is_float:
            return found
        if settings is not None and found.blocks is None:
            found = fixed_weight(found, settings, where=f"weight {entry.tensor}")
        return unsigned(found, kind) if isinstance(kind, IntegerType) else found

    def of_bias(self, tensor: str, choice: LayerChoice) -> Quantizer:
        """The quantizer of a finite bias that is an Add's input: one scale, in as many bits as the
        weights."""
        kind = choice.bits.weight_type
        if not isinstance(kind, IntegerType):
            raise ValueError(f"precision {choice.precision} has no integer weights")
        return weight_quantizer(
            self._graph.weights.read(tensor).astype(np.float32),
            weight_levels(kind.bits, choice.weight_range_bits),
            kind.bits,
            None,
            choice.weight_method,
            choice.weight_parameters,
        )

    def _found(
        self, tensor: str, kind: DType, axis: int | None, along: int | None, choice: LayerChoice
    ) -> Quantizer | str:
        """``axis``: of the channels; ``along``: of the blocks."""
        element = element_of(self._graph, tensor)
        if element not in ELEMENTS:
            return "not a float32 tensor"
        values = self._graph.weights.read(tensor)
        if values.size == 0:
            return "holds no values"
        if element in HALF:
            values = values.astype(np.float32)
        if isinstance(kind, FloatType) and kind.bits > 8:
            if element in HALF:
                return f"{FLOAT_TYPES[element]} already"
            return rounding_to(kind, saturates=True)
        if values.size == 1:
            return "a single number"
        if not np.isfinite(values).all() or _holds_sentinels(values):
            return "holds values that mean masked, not magnitudes"
        if isinstance(kind, FloatType):
            return float_quantizer(
                values, kind, axis, choice.weight_method, choice.weight_parameters
            )
        bits, method, grain = kind.bits, choice.weight_method, choice.weight_grain
        parameters = choice.weight_parameters
        # Constants of pointwise layers may be wider than the layer's weights.
        levels = weight_levels(bits, choice.weight_range_bits)
        if along is not None:
            return block_quantizer(values, levels, bits, along, grain.size, method, parameters)
        if grain.kind == "group" and axis is not None:
            return group_quantizer(values, levels, bits, axis, grain.size, method, parameters)
        return weight_quantizer(values, levels, bits, axis, method, parameters)


def _holds_sentinels(values: NDArray[Any]) -> bool:
    if float(values.min(initial=0.0)) > -LEAST_MAGNITUDE:
        return False
    far = values <= -LEAST_MAGNITUDE
    body = float(np.abs(values[~far]).max(initial=0.0))
    return float(-values[far].max()) >= LEAST_GAP * body
