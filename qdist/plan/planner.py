"""Statistics and choices in, plan out.

A planner reads each histogram and each weight once and remembers the ranges, so that a search can
ask for hundreds of plans. It never runs the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qdist.errors import ModelError, PlanError, StoreError
from qdist.model.graph import FLOAT_TYPES, Graph
from qdist.model.layers import VIEWS, Layer, LayerInput, find_layers
from qdist.model.taps import TapTable
from qdist.plan.choice import LayerChoice
from qdist.plan.consumers import consumers_of
from qdist.plan.fusion import find_fusions
from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.precision import activation_levels, weight_levels
from qdist.plan.quantizer import Quantizer
from qdist.plan.rules import Rule
from qdist.plan.scope import left_out
from qdist.plan.weight_range import weight_quantizer
from qdist.stats import grid
from qdist.stats.histogram import Histogram
from qdist.stats.record import CalibrationRecord
from qdist.threshold.blocks import mean_threshold
from qdist.threshold.clip import scale_and_zero
from qdist.threshold.consumer import Consumer
from qdist.threshold.registry import applicable, find_threshold, resolve
from qdist.threshold.sentinel import LEAST_GAP, LEAST_MAGNITUDE, keep_masked, split_sentinels

MASKED = ("float", "quantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What holds for the whole model: the scope (`scope.SCOPES`), whether activations are
    symmetric, and parameters of the threshold method.

    ``masked``: what becomes of scores of which some are masked: they stay ``float``, or what only a
    Softmax reads is quantized (``quantize``), with a range that leaves masked ones no weight."""

    scope: str = "all"
    symmetric: bool = False
    saturation_parameters: Mapping[str, Any] = field(default_factory=dict)
    masked: str = "float"

    def __post_init__(self) -> None:
        if self.masked not in MASKED:
            raise ValueError(f"masked must be one of {MASKED}, got {self.masked!r}")


class Planner:
    """Makes plans for one model and one record."""

    def __init__(
        self,
        graph: Graph,
        record: CalibrationRecord,
        taps: TapTable,
        settings: PlanSettings | None = None,
        blocks: Sequence[CalibrationRecord] = (),
    ) -> None:
        """``blocks``: records of equal blocks of the samples; ranges are then means over them."""
        self.graph = graph
        self.layers: tuple[Layer, ...] = find_layers(graph)
        self.fused = find_fusions(graph, self.layers)
        self._record = record
        self._blocks = tuple(blocks)
        self.taps = taps
        self.settings = settings or PlanSettings()
        self._left_out = left_out(self.layers, self.settings.scope)
        self._activations: dict[tuple[str, int, str], Quantizer | str] = {}
        self._weights: dict[tuple[Any, ...], Quantizer | str] = {}
        self._consumers: dict[str, tuple[Consumer, ...]] = {}

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
        """The plan for one choice per layer name.

        Raises QD406 when a row was not measured, QD209 when no layer can be quantized though the
        choices ask for it.
        """
        layers = tuple(
            self._layer(layer, choices[layer.name], (why or {}).get(layer.name, "default"))
            for layer in self.layers
        )
        if not any(layer.is_quantized for layer in layers):
            self._refuse_float(layers, choices)
        return QuantizationPlan(
            model_digest=self.graph.model.digest,
            statistics_digest=self._record.digest,
            layers=layers,
            notes=(
                *notes,
                *_method_notes(layers),
                *self._auto_notes(layers),
                *_fusion_notes(layers),
            ),
        )

    def check_rules(self, rules: Iterable[Rule]) -> None:
        """Raise QD503 for a rule without effect: every layer that it matches is computed with
        another, or stays float though the rule asks for more."""
        for rule in rules:
            idle = {
                layer.name: reason
                for layer in self.layers
                if rule.matches(layer) and (reason := self._idle(layer.name, rule)) is not None
            }
            if not idle or len(idle) < sum(rule.matches(layer) for layer in self.layers):
                continue
            name, reason = next(iter(idle.items()))
            host = self.fused.get(name)
            raise PlanError(
                "QD503",
                where=f"rule {rule.match!r}",
                got=f"no effect on the {len(idle)} layers that match, such as {name}",
                expected=f"{name} is {reason}; write the rule for {host}"
                if host is not None
                else f"a layer that is quantized; {name} stays float: {reason}",
                mend="correct or remove the rule; qdist show lists the layers",
            )

    def _idle(self, name: str, rule: Rule) -> str | None:
        """Why the rule means nothing to the layer, or None."""
        if name in self.fused:
            return f"computed with {self.fused[name]}"
        if rule.settings.get("precision") == "float32":
            return None
        return self._left_out.get(name)

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
        for entry in layer.unfolded:
            left[entry.tensor] = reason or self._unfolded(entry.tensor)
        for entry in (*layer.activations, *layer.weights):
            is_weight = entry in layer.weights
            found: Quantizer | str
            if reason is not None:
                found = reason
            elif layer.op_type == "Div" and entry.index == 1:
                # What rounds to 0 would make infinities and NaN of ordinary values.
                found = "a divisor"
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

    def _unfolded(self, tensor: str) -> str:
        op_type = self.graph.maker[tensor].op_type
        kind = "large weight" if op_type in VIEWS else "constant"
        return f"a {kind} behind {op_type}, not folded"

    def _refuse_float(
        self, layers: Iterable[LayerPlan], choices: Mapping[str, LayerChoice]
    ) -> None:
        """Raise QD209 if any layer that has a choice was to be quantized."""
        asked = self.choosable() or self.layers
        if all(choices[layer.name].bits.is_float for layer in asked):
            return
        inputs = [e.tensor for layer in asked for e in (*layer.activations, *layer.weights)]
        types = {self.graph.type_of(name) for name in inputs}
        names = sorted({FLOAT_TYPES.get(t.element, "?") for t in types if t is not None})
        reasons = dict.fromkeys(r for layer in layers for r in layer.left_float.values())
        is_other = bool(names) and "float32" not in names
        raise ModelError(
            "QD209",
            where=str(self.graph.model.source),
            got=f"a {' and '.join(names)} model, of which no layer is quantized"
            if is_other
            else f"no layer with a quantized input ({'; '.join(list(reasons)[:3])})",
            expected="a float32 model with layers that can be quantized",
            mend="export the model in float32"
            if is_other
            else "widen quantization.scope, change the rules, or use the float model",
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
        n_masked = int(split.n_sentinels) + histogram.n_infinite
        if n_masked and not self._may_quantize_masks(row, histogram):
            return f"holds {n_masked} values that mean masked, not magnitudes"
        if split.body.is_empty:
            return "never held a value in calibration"
        levels = activation_levels(bits, symmetric=self.settings.symmetric)
        parameters = applicable(method, self.settings.saturation_parameters)
        if self._blocks:
            histograms = [block.histogram(row) for block in self._blocks]
            threshold = mean_threshold(histograms, levels, method, parameters).threshold
        else:
            readers = self._readers(row) if resolve(method)[0] == "auto" else ()
            threshold = find_threshold(split.body, levels, method, parameters, readers)
        if n_masked:
            threshold = keep_masked(threshold, split.body, levels)
        scale, zero = scale_and_zero(threshold.low, threshold.high, levels)
        return Quantizer(
            bits=bits,
            low=levels.low,
            high=levels.high,
            scales=(scale,),
            zero_points=(zero,),
            axis=None,
            method=threshold.method,
            bounds=(threshold.low, threshold.high),
            clipped_share=threshold.clipped_share,
            expected_mse=threshold.expected_mse,
        )

    def _may_quantize_masks(self, row: str, histogram: Histogram) -> bool:
        """Whether a row with masked values may be quantized: if asked to, and if nothing but a
        Softmax reads it. An infinity above is no mask."""
        if self.settings.masked != "quantize":
            return False
        readers = [
            layer.op_type
            for layer in self.layers
            if any(self.taps.row_of(entry.tensor) == row for entry in layer.activations)
        ]
        n_above = int(histogram.counts[histogram.bins == grid.POSITIVE_INFINITY].sum())
        return bool(readers) and set(readers) <= {"Softmax", "LogSoftmax"} and not n_above

    def _auto_notes(self, layers: Iterable[LayerPlan]) -> list[str]:
        """What ``auto`` chose, and for how many tensors it knew no layer that reads them."""
        chosen = {
            self.taps.row_of(entry.tensor): entry.quantizer.method
            for layer in layers
            if resolve(layer.choice.saturation)[0] == "auto"
            for entry in layer.activations
        }
        if not chosen:
            return []
        counts = ", ".join(f"{n} {name}" for name, n in Counter(chosen.values()).most_common())
        n_alone = sum(not self._consumers.get(row) for row in chosen)
        alone = f"; {n_alone} by the error in the tensor alone" if n_alone else ""
        return [f"auto chose, by the layers that read the tensors: {counts}{alone}"]

    def _readers(self, row: str) -> tuple[Consumer, ...]:
        """The layers that read a row, in scope or not: what they compute suffers all the same."""
        if row not in self._consumers:
            self._consumers[row] = consumers_of(
                row, self.graph, self.layers, self.taps, self._record
            )
        return self._consumers[row]

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
        if values.size == 0:
            return "holds no values"
        if values.size == 1:
            return "a single number"
        if not np.isfinite(values).all() or _holds_sentinels(values):
            return "holds values that mean masked, not magnitudes"
        return weight_quantizer(values, weight_levels(bits), bits, axis, method)


def _method_notes(layers: Iterable[LayerPlan]) -> list[str]:
    """Where another threshold method was used than the one chosen."""
    pairs = {
        (resolve(layer.choice.saturation)[0], entry.quantizer.method, entry.quantizer.bits)
        for layer in layers
        for entry in layer.activations
    }
    return [
        f"{asked} needs more bins than levels: {used} is used for {bits}-bit layers"
        for asked, used, bits in sorted(pairs)
        if asked not in (used, "auto") and used != "fixed"
    ]


def _fusion_notes(layers: Iterable[LayerPlan]) -> list[str]:
    """Rules for layers that another rule, or the default, decides about."""
    by_name = {layer.name: layer for layer in layers}
    notes = []
    for layer in by_name.values():
        host = by_name.get(layer.fused_with or "")
        if host is not None and layer.why.startswith("rule ") and layer.choice != host.choice:
            notes.append(f"{layer.why} has no effect on {layer.name}: computed with {host.name}")
    return notes


def _holds_sentinels(values: np.ndarray[Any, Any]) -> bool:
    if float(values.min(initial=0.0)) > -LEAST_MAGNITUDE:
        return False
    far = values <= -LEAST_MAGNITUDE
    body = float(np.abs(values[~far]).max(initial=0.0))
    return float(-values[far].max()) >= LEAST_GAP * body
