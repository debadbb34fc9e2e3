"""Statistics and choices in, plan out.

A planner reads each histogram and each weight once and remembers the ranges, so that a search can
ask for hundreds of plans. It never runs the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from onnx import TensorProto

from qdist.digest import digest_arrays
from qdist.errors import ModelError, PlanError, StoreError
from qdist.model.channels import channel_axes
from qdist.model.graph import FLOAT_TYPES, Graph, attribute
from qdist.model.layers import VIEWS, Layer, LayerInput
from qdist.model.precision import HALF
from qdist.model.taps import TapTable
from qdist.numbers.dtype import DTYPES, DType, FloatType, IntegerType
from qdist.plan import ranges
from qdist.plan.choice import LayerChoice
from qdist.plan.consumers import consumers_of
from qdist.plan.granularity import MATRIX_PRODUCTS, parse_granularity, summed_axis
from qdist.plan.layer_index import find_index
from qdist.plan.plan import LayerPlan, Provenance, QuantizationPlan, QuantizedInput
from qdist.plan.precision import activation_levels, precision, weight_levels
from qdist.plan.quantizer import Quantizer, rounding_to
from qdist.plan.range_rule import FIXED, RangeRule, activation_quantizer, fixed_weight
from qdist.plan.rules import Rule
from qdist.plan.scope import NO_INTEGER_FORM
from qdist.plan.selector import select_layers, select_tensors
from qdist.plan.tensor_settings import TensorSettings
from qdist.plan.weight_range import (
    block_quantizer,
    float_quantizer,
    group_quantizer,
    weight_quantizer,
)
from qdist.stats import grid
from qdist.stats.histogram import Density, Histogram
from qdist.stats.record import CalibrationRecord
from qdist.threshold.blocks import mean_threshold
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.consumer import Consumer
from qdist.threshold.registry import applicable, find_threshold, resolve
from qdist.threshold.sentinel import LEAST_GAP, LEAST_MAGNITUDE, keep_masked, split_sentinels

MASKED = ("float", "quantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What holds for the whole model: the scope (`scope.SCOPES`), whether activations are
    symmetric, parameters of the threshold method, what rules say about single tensors, and for
    layers that a rule is about, which (unless a plan is told otherwise).

    ``masked``: what becomes of scores of which some are masked: they stay ``float``, or what only a
    Softmax reads is quantized (``quantize``), with a range that leaves masked ones no weight."""

    scope: str = "all"
    symmetric: bool = False
    saturation_parameters: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorSettings] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
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
        self.settings = settings or PlanSettings()
        self.index = find_index(graph, self.settings.scope)
        self.layers: tuple[Layer, ...] = self.index.layers
        self.fused = self.index.fused
        self._record = record
        self._blocks = tuple(blocks)
        self.taps = taps
        self._left_out = self.index.left_out
        self._settings = _by_row(self.settings.tensors, taps)
        self._last = self._last_results()
        self._activations: dict[tuple[Any, ...], Quantizer | str] = {}
        self._weights: dict[tuple[Any, ...], Quantizer | str] = {}
        self._consumers: dict[str, tuple[Consumer, ...]] = {}
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
            notes=(
                *notes,
                *_method_notes(layers),
                *self._auto_notes(layers),
                *_fusion_notes(layers),
            ),
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
        reason = self._left_out.get(name)
        return None if _rounds_anyway(reason, rule.settings.get("precision")) else reason

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
        if _rounds_anyway(reason, choice.precision):
            reason = None
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
            elif layer.op_type == "Div" and entry.index == 1 and not _is_wide(choice):
                # What rounds to 0 would make infinities and NaN of ordinary values.
                found = "a divisor"
            elif is_weight:
                found = self._weight(layer, entry, choice)
            else:
                found = self._activation(entry.tensor, _for_input(layer, entry, choice))
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
            outputs=self._outputs(layer, choice) if activations or weights else (),
            is_depthwise=self._is_depthwise(layer),
        )

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
                quantizer = self._activation(tensor, replace(choice, **_PER_TENSOR))
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
        kind = choice.bits.activation_type
        if kind is None:
            return f"precision {choice.precision}"
        row = self._row(tensor)
        rule = RangeRule.of(choice, self._ruled(tensor), where=f"tensor {tensor}", bits=kind.bits)
        if isinstance(kind, IntegerType) and (rule.most_bits or kind.bits) < kind.bits:
            kind = DTYPES[f"{'' if kind.signed else 'u'}int{rule.most_bits}"]
        # Channels and tokens lie along axes, which a view of the tensor may have elsewhere.
        key = (tensor if rule.granularity != "tensor" else row, kind.name, rule)
        if key not in self._activations:
            self._activations[key] = self._stored_activation(tensor, row, kind, rule)
        return self._activations[key]

    def _stored_activation(
        self, tensor: str, row: str, kind: DType, rule: RangeRule
    ) -> Quantizer | str:
        """The activation in the number type and granularity that were chosen."""
        element = self._element(row)
        if element not in _ELEMENTS:
            return "not a float32 tensor"
        if isinstance(kind, FloatType) and kind.bits > 8:
            if element in HALF:
                return f"{FLOAT_TYPES[element]} already"
            known = self._record.histogram(row).finite if row in self._record else None
            return ranges.rounded(kind, known)
        if isinstance(kind, FloatType):
            method = _NARROW_FLOAT.get(resolve(rule.method)[0], "max")
            threshold = self._threshold(row, 8, replace(rule, method=method))
            return threshold if isinstance(threshold, str) else ranges.scaled_float(kind, threshold)
        each = self._finer(tensor, row, kind, rule)
        if each is not None:
            return each if isinstance(each, str) else ranges.stored_as(each, kind)
        whole = self._find_activation(row, kind.bits, rule)
        return whole if isinstance(whole, str) else ranges.stored_as(whole, kind)

    def _element(self, tensor: str) -> int:
        """The ONNX element type; float32 where nothing tells."""
        found = self.graph.type_of(tensor)
        return TensorProto.FLOAT if found is None else found.element

    def _finer(
        self, tensor: str, row: str, kind: IntegerType, rule: RangeRule
    ) -> Quantizer | str | None:
        """The activation with a scale per token or channel; None where it has one scale."""
        grain, range_bits = rule.granularity, rule.range_bits
        if grain == "tensor" or rule.is_fixed:
            return None
        values = self._body(row)
        if isinstance(values, str):
            return values
        if grain == "token":
            return ranges.per_token(kind, range_bits, self.graph.type_of(tensor), values)
        axis = channel_axes(self.graph, self.taps).get(tensor)
        # A view of what was measured has its channels along other axes, if any.
        channels = self._record.channels(row) if tensor == row else None
        symmetric = self.settings.symmetric
        levels = activation_levels(kind.bits, symmetric=symmetric, range_bits=range_bits)
        parsed = parse_granularity(grain)
        n_groups = parsed.size if parsed is not None and parsed.kind == "group" else None
        return ranges.per_channel(kind.bits, levels, channels, axis, n_groups)

    def _find_activation(self, row: str, bits: int, rule: RangeRule) -> Quantizer | str:
        threshold = self._threshold(row, bits, rule)
        if isinstance(threshold, str):
            return threshold
        return activation_quantizer(threshold, self._levels(bits, rule), bits)

    def _levels(self, bits: int, rule: RangeRule) -> Levels:
        range_bits = None if (rule.range_bits or bits) >= bits else rule.range_bits
        return activation_levels(bits, symmetric=self.settings.symmetric, range_bits=range_bits)

    def _body(self, row: str) -> Density | str:
        """The values of a tensor that are magnitudes, or why it stays float. Raises QD406."""
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
        return "never held a value in calibration" if split.body.is_empty else split.body

    def _threshold(self, row: str, bits: int, rule: RangeRule) -> Threshold | str:
        levels = self._levels(bits, rule)
        if row not in self._record and rule.bounds is not None:
            return rule.without_statistics(levels)
        body = self._body(row)
        if isinstance(body, str):
            return body
        parameters = applicable(rule.method, self.settings.saturation_parameters)
        if rule.is_fixed:
            threshold = rule.fixed(body, levels)
        elif self._blocks:
            histograms = [block.histogram(row) for block in self._blocks]
            threshold = mean_threshold(histograms, levels, rule.method, parameters).threshold
        else:
            readers = self._readers(row) if resolve(rule.method)[0] == "auto" else ()
            threshold = find_threshold(body, levels, rule.method, parameters, readers)
        threshold = rule.scaled(threshold, body, levels)
        histogram = self._record.histogram(row)
        n_masked = int(split_sentinels(histogram.finite).n_sentinels) + histogram.n_infinite
        return keep_masked(threshold, body, levels) if n_masked else threshold

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
            along = summed_axis(layer.op_type, axis, len(self.graph.weights.shape(entry.tensor)))
        method = choice.weight_method
        key = (entry.tensor, kind.name, axis, along, grain, choice.weight_range_bits, method)
        if key not in self._weights:
            self._weights[key] = self._find_weight(entry.tensor, kind, axis, along, choice)
        found = self._weights[key]
        settings = self._settings.get(entry.tensor)
        if settings is None or isinstance(found, str) or found.is_float or found.blocks is not None:
            return found
        return fixed_weight(found, settings, where=f"weight {entry.tensor}")

    def _find_weight(
        self, tensor: str, kind: DType, axis: int | None, along: int | None, choice: LayerChoice
    ) -> Quantizer | str:
        element = self._element(tensor)
        if element not in _ELEMENTS:
            return "not a float32 tensor"
        values = self.graph.weights.read(tensor)
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
            return float_quantizer(values, kind, axis)
        bits, method, grain = kind.bits, choice.weight_method, choice.weight_grain
        # Constants of pointwise layers may be wider than the layer's weights.
        levels = weight_levels(bits, choice.weight_range_bits)
        if along is not None:
            return block_quantizer(values, levels, bits, along, grain.size, method)
        if grain.kind == "group" and axis is not None:
            return group_quantizer(values, levels, bits, axis, grain.size, method)
        return weight_quantizer(values, levels, bits, axis, method)


_ELEMENTS = HALF | {TensorProto.FLOAT}
"""Element types of the tensors that are quantized."""
_PER_TENSOR: dict[str, Any] = {"activation_granularity": "tensor"}
_NARROW_FLOAT = {"percentile": "percentile"}
"""Threshold methods that say something of a floating-point type; the others compare even steps."""


def _rounds_anyway(reason: str | None, name: str | None) -> bool:
    """Whether a layer without an integer form can have the precision of this name."""
    rounds = name is not None and precision(name).rounds is not None
    return reason is not None and rounds and reason.endswith(NO_INTEGER_FORM)


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
        (resolve(layer.choice.saturation)[0], entry.quantizer.method, entry.quantizer.bits)
        for layer in layers
        for entry in layer.activations
        if not entry.quantizer.is_float and entry.quantizer.axis is None
    }
    floats = {
        (resolve(layer.choice.saturation)[0], entry.quantizer.method, layer.choice.precision)
        for layer in layers
        for entry in layer.activations
        if entry.quantizer.is_float and layer.choice.bits.rounds is None
    }
    single = [
        layer.name
        for layer in layers
        if layer.choice.activation_granularity != "tensor" and layer.choice.bits.rounds is None
        for entry in layer.activations
        if entry.quantizer.axis is None and not entry.quantizer.is_dynamic
    ]
    return [
        *_single_notes(single),
        *(
            f"{asked} needs more bins than levels: {used} is used for {bits}-bit layers"
            for asked, used, bits in sorted(pairs)
            if asked not in (used, "auto") and used not in (FIXED, "dynamic")
        ),
        *(
            f"{asked} is for evenly spaced levels: {used} is used for {name} layers"
            for asked, used, name in sorted(floats)
            if asked != used and used != FIXED
        ),
    ]


def _single_notes(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(list(dict.fromkeys(names))[:3])
    return [
        f"{len(names)} activations have one scale all the same, since channels were not measured "
        f"along their axes, or rows are not what is summed over: {shown}"
        + (", ..." if len(set(names)) > 3 else "")
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
