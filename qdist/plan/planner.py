"""Statistics and choices in, plan out.

A planner reads each histogram and each weight once and remembers the ranges, so that a search can
ask for hundreds of plans. It never runs the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qdist.digest import digest_arrays
from qdist.errors import ModelError, PlanError, StoreError
from qdist.model.graph import FLOAT_TYPES, Graph
from qdist.model.layers import VIEWS, Layer, LayerInput
from qdist.model.taps import TapTable
from qdist.plan.choice import LayerChoice
from qdist.plan.layer_index import find_index
from qdist.plan.plan import LayerPlan, Provenance, QuantizationPlan, QuantizedInput
from qdist.plan.precision import activation_levels, weight_levels
from qdist.plan.quantizer import Quantizer
from qdist.plan.range_rule import FIXED, RangeRule, activation_quantizer, fixed_weight
from qdist.plan.rules import Rule
from qdist.plan.selector import select_layers, select_tensors
from qdist.plan.tensor_settings import TensorSettings
from qdist.plan.weight_range import weight_quantizer
from qdist.stats.histogram import Density
from qdist.stats.record import CalibrationRecord
from qdist.threshold.blocks import mean_threshold
from qdist.threshold.registry import find_threshold
from qdist.threshold.sentinel import LEAST_GAP, LEAST_MAGNITUDE, split_sentinels


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What holds for the whole model: the scope (`scope.SCOPES`), whether activations are
    symmetric, parameters of the threshold method, what rules say about single tensors, and for
    layers that a rule is about, which (unless a plan is told otherwise)."""

    scope: str = "all"
    symmetric: bool = False
    saturation_parameters: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorSettings] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)


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
        self.settings = settings or PlanSettings()
        self.index = find_index(graph, self.settings.scope)
        self.layers: tuple[Layer, ...] = self.index.layers
        self.fused = self.index.fused
        self._record = record
        self._blocks = tuple(blocks)
        self.taps = taps
        self._left_out = self.index.left_out
        self._settings = _by_row(self.settings.tensors, taps)
        self._activations: dict[tuple[str, int, RangeRule], Quantizer | str] = {}
        self._weights: dict[tuple[Any, ...], Quantizer | str] = {}
        self._digests: dict[str, str] = {}

    def with_rules(
        self, tensors: Mapping[str, TensorSettings], why: Mapping[str, str] | None = None
    ) -> Planner:
        """The planner of the same model and record with other settings of single tensors, and
        other rules that layers' choices come from."""
        settings = replace(self.settings, tensors=dict(tensors), why=dict(why or {}))
        other = Planner(self.graph, self._record, self.taps, settings, self._blocks)
        if settings.tensors == self.settings.tensors:
            # Ranges depend on nothing else that differs.
            other._activations, other._weights = self._activations, self._weights
        return other

    @property
    def record(self) -> CalibrationRecord:
        """The statistics that ranges come from."""
        return self._record

    def choosable(self) -> tuple[Layer, ...]:
        """The layers whose choice changes anything: in scope and not fused into another."""
        return self.index.choosable

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
        known = {**self.settings.why, **(why or {})}
        layers = tuple(
            self._layer(layer, choices[layer.name], known.get(layer.name, "default"))
            for layer in self.layers
        )
        if not any(layer.is_quantized for layer in layers):
            self._refuse_float(layers, choices)
        return QuantizationPlan(
            model_digest=self.graph.model.digest,
            statistics_digest=self._record.digest,
            layers=layers,
            notes=(*notes, *_method_notes(layers), *_fusion_notes(layers)),
        )

    def check_rules(self, rules: Iterable[Rule]) -> None:
        """Raise QD503 for a rule without effect: every layer that it matches is computed with
        another, or stays float though the rule asks for more; or no layer that can be quantized
        reads any of its tensors."""
        read = {
            self._row(name)
            for layer in self.choosable()
            for entry in (*layer.activations, *layer.weights)
            for name in (entry.tensor, *self.index.moved_from(entry.tensor))
        }
        for rule in rules:
            if rule.is_of_tensors:
                self._check_tensor_rule(rule, read)
                continue
            matched = select_layers(rule.match, self.index)
            idle = {
                layer.name: reason
                for layer in matched
                if (reason := self._idle(layer.name, rule)) is not None
            }
            if not idle or len(idle) < len(matched):
                continue
            name, reason = next(iter(idle.items()))
            host = self.fused.get(name)
            raise PlanError(
                "QD503",
                where=rule.place,
                got=f"no effect on the {len(idle)} layers that match, such as {name}",
                expected=f"{name} is {reason}; write the rule for {host}"
                if host is not None
                else f"a layer that is quantized; {name} stays float: {reason}",
                mend="correct or remove the rule; qdist show lists the layers",
            )

    def _check_tensor_rule(self, rule: Rule, read: set[str]) -> None:
        names = select_tensors(rule.match, self.index)
        if names and not any(self._row(name) in read for name in names):
            raise PlanError(
                "QD503",
                where=rule.place,
                got=f"no effect on the {len(names)} tensors that match, such as {names[0]}",
                expected="a tensor that a quantized layer reads",
                mend="write the rule for such a tensor, or remove it",
            )

    def _row(self, tensor: str) -> str:
        """The tensor that was measured in place of this one; a weight is its own."""
        return self.taps.row_of(tensor)

    def _idle(self, name: str, rule: Rule) -> str | None:
        """Why the rule means nothing to the layer, or None."""
        if name in self.fused:
            return f"computed with {self.fused[name]}"
        if rule.settings.get("precision") == "float32":
            return None
        return self._left_out.get(name)

    def densities(self, plan: QuantizationPlan) -> dict[str, Density]:
        """The measured values of every activation that the plan quantizes, by its name."""
        names = {entry.tensor for layer in plan.layers for entry in layer.activations}
        return {
            name: split_sentinels(self._record.histogram(self._row(name)).finite).body
            for name in names
            if self._row(name) in self._record
        }

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
                kept = QuantizedInput(
                    index=entry.index,
                    tensor=entry.tensor,
                    quantizer=found,
                    provenance=self._provenance(entry.tensor, is_weight=is_weight),
                )
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

    def _provenance(self, tensor: str, *, is_weight: bool) -> Provenance:
        row = tensor if is_weight else self._row(tensor)
        settings = self._ruled(tensor)
        rule = "" if settings is None else settings.why
        if is_weight or row not in self._record:
            return Provenance(rule=rule)
        if row not in self._digests:
            histogram = self._record.histogram(row)
            self._digests[row] = digest_arrays(
                [("bins", histogram.bins), ("counts", histogram.counts)]
            )
        return Provenance(rule=rule, statistics=self._digests[row])

    def _ruled(self, tensor: str) -> TensorSettings | None:
        """What rules say about a tensor, or else about what its values were moved from."""
        if not self._settings:
            return None
        for name in (tensor, *self.index.moved_from(tensor)):
            found = self._settings.get(self._row(name))
            if found is not None:
                return found
        return None

    def _activation(self, tensor: str, choice: LayerChoice) -> Quantizer | str:
        bits = choice.bits.activation_bits
        if bits is None:
            return f"precision {choice.precision}"
        row = self._row(tensor)
        rule = RangeRule.of(choice, self._ruled(tensor), where=f"tensor {tensor}", bits=bits)
        bits = min(bits, rule.most_bits or bits)
        key = (row, bits, rule)
        if key not in self._activations:
            self._activations[key] = self._find_activation(row, bits, rule)
        return self._activations[key]

    def _find_activation(self, row: str, bits: int, rule: RangeRule) -> Quantizer | str:
        found = self.graph.type_of(row)
        if found is not None and found.element != 1:
            return "not a float32 tensor"
        levels = activation_levels(bits, symmetric=self.settings.symmetric)
        if row not in self._record:
            if rule.bounds is not None:
                return activation_quantizer(rule.without_statistics(levels), levels, bits)
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
        parameters = self.settings.saturation_parameters
        if rule.is_fixed:
            threshold = rule.fixed(split.body, levels)
        elif self._blocks:
            histograms = [block.histogram(row) for block in self._blocks]
            threshold = mean_threshold(histograms, levels, rule.method, parameters).threshold
        else:
            threshold = find_threshold(split.body, levels, rule.method, parameters)
        threshold = rule.scaled(threshold, split.body, levels)
        return activation_quantizer(threshold, levels, bits)

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
        found = self._weights[key]
        settings = self._settings.get(entry.tensor)
        if settings is None or isinstance(found, str):
            return found
        return fixed_weight(found, settings, where=f"weight {entry.tensor}")

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


def _by_row(tensors: Mapping[str, TensorSettings], taps: TapTable) -> dict[str, TensorSettings]:
    """Settings by the tensor that was measured: a view shares the range of its source."""
    found: dict[str, TensorSettings] = {}
    for name, settings in tensors.items():
        row = taps.row_of(name)
        found[row] = settings.over(found.get(row, TensorSettings()))
    return found


def _method_notes(layers: Iterable[LayerPlan]) -> list[str]:
    """Where another threshold method was used than the one chosen."""
    pairs = {
        (layer.choice.saturation, entry.quantizer.method, entry.quantizer.bits)
        for layer in layers
        for entry in layer.activations
    }
    return [
        f"{asked} needs more bins than levels: {used} is used for {bits}-bit layers"
        for asked, used, bits in sorted(pairs)
        if asked != used and used != FIXED
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
