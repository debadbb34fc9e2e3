"""Statistics and choices in, plan out.

A planner reads each histogram and each weight once and remembers the ranges, so that a search can
ask for hundreds of plans. It never runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qdist.errors import StoreError
from qdist.model.graph import Graph
from qdist.model.layers import Layer, LayerInput, find_layers
from qdist.model.taps import TapTable
from qdist.plan.choice import LayerChoice
from qdist.plan.fusion import find_fusions
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.precision import activation_levels, weight_levels
from qdist.plan.quantizer import Quantizer
from qdist.plan.scope import left_out
from qdist.plan.weight_range import weight_quantizer
from qdist.stats.record import CalibrationRecord
from qdist.threshold.clip import scale_and_zero
from qdist.threshold.registry import find_threshold
from qdist.threshold.sentinel import LEAST_GAP, LEAST_MAGNITUDE, split_sentinels


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What holds for the whole model: the scope (`scope.SCOPES`), whether activations are
    symmetric, and parameters of the threshold method."""

    scope: str = "all"
    symmetric: bool = False
    saturation_parameters: Mapping[str, Any] = field(default_factory=dict)


class Planner:
    """Makes plans for one model and one record."""

    def __init__(
        self,
        graph: Graph,
        record: CalibrationRecord,
        taps: TapTable,
        settings: PlanSettings | None = None,
    ) -> None:
        self.graph = graph
        self.layers: tuple[Layer, ...] = find_layers(graph)
        self.fused = find_fusions(graph, self.layers)
        self._record = record
        self.taps = taps
        self.settings = settings or PlanSettings()
        self._left_out = left_out(self.layers, self.settings.scope)
        self._activations: dict[tuple[str, int, str], Quantizer | str] = {}
        self._weights: dict[tuple[Any, ...], Quantizer | str] = {}

    def choosable(self) -> tuple[Layer, ...]:
        """The layers whose choice changes anything: in scope and not fused into another."""
        return tuple(
            layer
            for layer in self.layers
            if layer.name not in self._left_out and layer.name not in self.fused
        )

    def plan(
        self,
        choices: Mapping[str, LayerChoice],
        why: Mapping[str, str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> QuantizationPlan:
        """The plan for one choice per layer name. Raises QD406 when a row was not measured."""
        layers = tuple(
            self._layer(layer, choices[layer.name], (why or {}).get(layer.name, "default"))
            for layer in self.layers
        )
        return QuantizationPlan(
            model_digest=self.graph.model.digest,
            statistics_digest=self._record.digest,
            layers=layers,
            notes=notes,
        )

    def weight_elements(self, layer: Layer) -> int:
        """How many weight values a matmul- or conv-like layer has; 0 for any other."""
        if not layer.is_compute:
            return 0
        return sum(
            int(np.prod(self.graph.weights.shape(w.tensor), dtype=np.int64)) for w in layer.weights
        )

    def _layer(self, layer: Layer, choice: LayerChoice, why: str) -> LayerPlan:
        left: dict[str, str] = {}
        activations: list[QuantizedInput] = []
        weights: list[QuantizedInput] = []
        reason = self._left_out.get(layer.name)
        if layer.name in self.fused:
            reason = f"computed with {self.fused[layer.name]}"
        if reason is None and choice.bits.is_float:
            reason = "precision float32"
        for entry in (*layer.activations, *layer.weights):
            is_weight = entry in layer.weights
            found: Quantizer | str
            if reason is not None:
                found = reason
            elif is_weight:
                found = self._weight(layer, entry, choice)
            else:
                found = self._activation(entry.tensor, choice)
            if isinstance(found, str):
                left[entry.tensor] = found
            else:
                kept = QuantizedInput(index=entry.index, tensor=entry.tensor, quantizer=found)
                (weights if is_weight else activations).append(kept)
        return LayerPlan(
            name=layer.name,
            op_type=layer.op_type,
            choice=choice,
            activations=tuple(activations),
            weights=tuple(weights),
            why=why,
            left_float=left,
            fused_with=self.fused.get(layer.name),
        )

    def _activation(self, tensor: str, choice: LayerChoice) -> Quantizer | str:
        bits = choice.bits.activation_bits
        if bits is None:
            return f"precision {choice.precision}"
        row = self.taps.row_of(tensor)
        key = (row, bits, choice.saturation)
        if key not in self._activations:
            self._activations[key] = self._find_activation(row, bits, choice.saturation)
        return self._activations[key]

    def _find_activation(self, row: str, bits: int, method: str) -> Quantizer | str:
        found = self.graph.type_of(row)
        if found is not None and found.element != 1:
            return "not a float32 tensor"
        if row not in self._record:
            raise StoreError(
                "QD406",
                where=f"tensor {row}",
                got="no histogram",
                expected="every tensor that the plan quantizes to be measured",
                mend="run qdist calibrate with calibration.taps=all, "
                "or set quantization.scope=compute",
            )
        histogram = self._record.histogram(row)
        split = split_sentinels(histogram.finite)
        if split.n_sentinels or histogram.n_infinite:
            n = int(split.n_sentinels) + histogram.n_infinite
            return f"holds {n} values that mean masked, not magnitudes"
        if split.body.is_empty:
            return "never held a value in calibration"
        levels = activation_levels(bits, symmetric=self.settings.symmetric)
        threshold = find_threshold(split.body, levels, method, self.settings.saturation_parameters)
        scale, zero = scale_and_zero(threshold.low, threshold.high, levels)
        return Quantizer(
            bits=bits,
            low=levels.low,
            high=levels.high,
            scales=(scale,),
            zero_points=(zero,),
            axis=None,
            method=method,
            bounds=(threshold.low, threshold.high),
            clipped_share=threshold.clipped_share,
            expected_mse=threshold.expected_mse,
        )

    def _weight(self, layer: Layer, entry: LayerInput, choice: LayerChoice) -> Quantizer | str:
        bits = choice.bits.weight_bits
        if bits is None:
            return f"precision {choice.precision}"
        if not layer.is_compute:
            # Operands of pointwise layers are activations that happen to be constant.
            bits = choice.bits.activation_bits or bits
        axis = entry.channel_axis if choice.granularity == "channel" else None
        key = (entry.tensor, bits, axis, choice.weight_method)
        if key not in self._weights:
            self._weights[key] = self._find_weight(entry.tensor, bits, axis, choice.weight_method)
        return self._weights[key]

    def _find_weight(
        self, tensor: str, bits: int, axis: int | None, method: str
    ) -> Quantizer | str:
        found = self.graph.type_of(tensor)
        if found is not None and found.element != 1:
            return "not a float32 tensor"
        values = self.graph.weights.read(tensor)
        if values.size == 1:
            return "a single number"
        if not np.isfinite(values).all() or _holds_sentinels(values):
            return "holds values that mean masked, not magnitudes"
        return weight_quantizer(values, weight_levels(bits), bits, axis, method)


def _holds_sentinels(values: np.ndarray[Any, Any]) -> bool:
    if float(values.min(initial=0.0)) > -LEAST_MAGNITUDE:
        return False
    far = values <= -LEAST_MAGNITUDE
    body = float(np.abs(values[~far]).max(initial=0.0))
    return float(-values[far].max()) >= LEAST_GAP * body
