"""Statistics and choices in, plan out.

A planner reads each histogram and each weight once and remembers the ranges, so that a search can
ask for hundreds of plans. It never runs the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qdist.errors import ModelError
from qdist.model.graph import FLOAT_TYPES, Graph, attribute
from qdist.model.layers import VIEWS, Layer, LayerInput
from qdist.model.taps import TapTable
from qdist.plan.activation_quantizers import ActivationQuantizers
from qdist.plan.activation_range import ActivationRanges
from qdist.plan.bias_adds import BiasAdds
from qdist.plan.biases import find_bias_bounds
from qdist.plan.choice import LayerChoice
from qdist.plan.granularity import MATRIX_PRODUCTS
from qdist.plan.idle_rules import check_rules
from qdist.plan.layer_index import find_index
from qdist.plan.notes import pinning_notes, plan_notes, smoothing_notes
from qdist.plan.passing import find_passing
from qdist.plan.plan import LayerPlan, Provenance, QuantizationPlan, QuantizedInput
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.quantizer import Quantizer
from qdist.plan.rules import Rule
from qdist.plan.tensor_rules import TensorRules
from qdist.plan.tensor_settings import TensorSettings
from qdist.plan.weight_quantizers import WeightQuantizers
from qdist.stats.histogram import Density
from qdist.stats.record import CalibrationRecord
from qdist.threshold.sentinel import split_sentinels

__all__ = ["PlanSettings", "Planner"]

_PER_TENSOR: dict[str, Any] = {"activation_granularity": "tensor"}


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
        self._last = self._last_results()
        self._rules = TensorRules(self.settings.tensors, self.index, taps)
        self._ranges = ActivationRanges(
            graph, record, taps, self.layers, self.settings, self._blocks
        )
        self._passing = find_passing(graph)
        self._bias_bounds = find_bias_bounds(graph, self.layers, self.fused)
        self._activations = ActivationQuantizers(graph, taps, self._ranges, self._rules)
        self._weights = WeightQuantizers(graph, self._rules)
        self._bias_adds = self._found_bias_adds()

    def with_rules(
        self, tensors: Mapping[str, TensorSettings], why: Mapping[str, str] | None = None
    ) -> Planner:
        """The planner of the same model and record with other settings of single tensors, and
        other rules that layers' choices come from."""
        settings = replace(self.settings, tensors=dict(tensors), why=dict(why or {}))
        other = Planner(self.graph, self._record, self.taps, settings, self._blocks)
        if settings.tensors == self.settings.tensors:
            # Ranges depend on nothing else that differs.
            other._ranges = self._ranges
            other._activations, other._weights = self._activations, self._weights
            other._bias_adds = self._bias_adds
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
        choices ask for it, QD507 for a bias that cannot be split off.
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
            passing=self._passing,
            smoothing=self.graph.model.smoothing,
            notes=(
                *notes,
                *smoothing_notes(self.graph.model.smoothing),
                *plan_notes(layers, self.taps, self._ranges.asked),
                *pinning_notes(layers, self.taps, self._ranges.pinnings),
            ),
        )

    def check_rules(self, rules: Iterable[Rule]) -> None:
        """Raise QD503 for a rule without effect, see `qdist.plan.idle_rules`."""
        check_rules(rules, self.index, self.taps)

    def can_split_bias(self, layer: Layer) -> bool:
        """Whether the layer's bias may become an Add of its own."""
        return self._bias_adds.obstacle(layer) is None

    def densities(self, plan: QuantizationPlan) -> dict[str, Density]:
        """The measured values of every activation that the plan quantizes, by its name."""
        names = {entry.tensor for layer in plan.layers for entry in layer.activations}
        rows = {name: self.taps.row_of(name) for name in names}
        return {
            name: split_sentinels(self._record.histogram(row).finite).body
            for name, row in rows.items()
            if row in self._record
        }

    def weight_elements(self, layer: Layer) -> int:
        """How many weight values a matmul- or conv-like layer has; 0 for any other."""
        if not layer.is_compute:
            return 0
        return sum(
            int(np.prod(self.graph.weights.shape(w.tensor), dtype=np.int64)) for w in layer.weights
        )

    def _layer(self, layer: Layer, choice: LayerChoice, why: str) -> LayerPlan:
        reason = self.index.why_float(layer.name, choice.precision)
        if reason is None and choice.bits.is_float:
            reason = "precision float32"
        left = {entry.tensor: reason or self._unfolded(entry.tensor) for entry in layer.unfolded}
        activations: list[QuantizedInput] = []
        weights: list[QuantizedInput] = []
        for entry in (*layer.activations, *layer.weights):
            is_weight = entry in layer.weights
            found = reason or self._quantizer(layer, entry, choice, is_weight=is_weight)
            if isinstance(found, str):
                left[entry.tensor] = found
                continue
            kept = QuantizedInput(
                index=entry.index,
                tensor=entry.tensor,
                quantizer=found,
                provenance=self._provenance(entry.tensor, is_weight=is_weight),
            )
            (weights if is_weight else activations).append(kept)
        splits = choice.splits_bias and bool(activations or weights)
        return LayerPlan(
            name=layer.name,
            op_type=layer.op_type,
            choice=choice,
            activations=tuple(activations),
            weights=tuple(weights),
            why=why,
            left_float=left,
            fused_with=self.fused.get(layer.name),
            outputs=self._outputs(layer, choice) if activations or weights else (),
            is_depthwise=self._is_depthwise(layer),
            bias_bounds=() if splits else self._bias_bounds.get(layer.name, ()),
            bias_add=self._bias_adds.of(layer, choice) if splits else None,
        )

    def _found_bias_adds(self) -> BiasAdds:
        return BiasAdds(
            self.graph,
            self.taps,
            self._ranges,
            self._weights,
            layers=self.layers,
            fused=self.fused,
            symmetric=self.settings.symmetric,
        )

    def _quantizer(
        self, layer: Layer, entry: LayerInput, choice: LayerChoice, *, is_weight: bool
    ) -> Quantizer | str:
        """The quantizer of an input of a layer that can have the choice, or why it stays float."""
        if layer.op_type == "Div" and entry.index == 1 and not _is_wide(choice):
            # What rounds to 0 would make infinities and NaN of ordinary values.
            return "a divisor"
        if is_weight:
            return self._weights.of(layer, entry, choice)
        return self._activations.of(entry.tensor, _for_input(layer, entry, choice))

    def _is_depthwise(self, layer: Layer) -> bool:
        if layer.op_type not in ("Conv", "ConvTranspose") or not layer.weights:
            return False
        first, second = self.graph.weights.shape(layer.weights[0].tensor)[:2]
        groups = attribute(self.graph.nodes[layer.name], "group", 1)
        return bool(groups > 1 and groups == first and second == 1)

    def _last_results(self) -> dict[str, tuple[str, ...]]:
        """Layer -> the results of the last one that is computed together with it."""
        last = {layer.name: layer.outputs for layer in self.layers if layer.name not in self.fused}
        last.update({self.fused[x.name]: x.outputs for x in self.layers if x.name in self.fused})
        return last

    def _outputs(self, layer: Layer, choice: LayerChoice) -> tuple[QuantizedInput, ...]:
        """How results are stored, where that is known: any of a floating-point type, else those
        that were measured."""
        found = []
        for index, tensor in enumerate(self._last[layer.name]):
            if choice.bits.activation is None or not self.graph.is_float(tensor):
                continue
            measured = self.taps.row_of(tensor) in self._record
            if measured or choice.bits.rounds is not None:
                quantizer = self._activations.of(tensor, replace(choice, **_PER_TENSOR))
                if not isinstance(quantizer, str):
                    found.append(QuantizedInput(index=index, tensor=tensor, quantizer=quantizer))
        return tuple(found)

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
        is_other = bool(names) and not {"float32", "float16", "bfloat16"} & set(names)
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
        settings = self._rules.of(tensor)
        rule = "" if settings is None else settings.why
        statistics = None if is_weight else self._ranges.digest(self.taps.row_of(tensor))
        return Provenance(rule=rule, statistics=statistics)


def _for_input(layer: Layer, entry: LayerInput, choice: LayerChoice) -> LayerChoice:
    """The choice for one activation: rows of the second factor of a matrix product are not what is
    summed over, so no integer unit could have a scale for each."""
    is_second = layer.op_type in MATRIX_PRODUCTS and entry.index == 1
    is_token = choice.activation_granularity == "token"
    return replace(choice, **_PER_TENSOR) if is_second and is_token else choice


def _is_wide(choice: LayerChoice) -> bool:
    """Whether nothing that float32 holds vanishes in the layer's numbers."""
    kind = choice.bits.rounds
    return kind is not None and kind.is_wide
