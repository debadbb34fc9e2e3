"""The quantizer of each activation that a layer reads or makes."""

from __future__ import annotations

from qdist.model.channels import channel_axes
from qdist.model.graph import FLOAT_TYPES, Graph
from qdist.model.precision import HALF
from qdist.model.taps import TapTable
from qdist.numbers.dtype import DTYPES, DType, FloatType, IntegerType
from qdist.plan import ranges
from qdist.plan.activation_range import ActivationRanges
from qdist.plan.choice import LayerChoice
from qdist.plan.element import ELEMENTS, element_of
from qdist.plan.granularity import parse_granularity
from qdist.plan.quantizer import Quantizer
from qdist.plan.range_rule import RangeRule, activation_quantizer
from qdist.plan.tensor_rules import TensorRules


class ActivationQuantizers:
    """Finds quantizers of activations, each once."""

    def __init__(
        self,
        graph: Graph,
        taps: TapTable,
        activation_ranges: ActivationRanges,
        rules: TensorRules,
    ) -> None:
        self._graph = graph
        self._taps = taps
        self._ranges = activation_ranges
        self._rules = rules
        self._known: dict[tuple[str, str, RangeRule], Quantizer | str] = {}

    def of(self, tensor: str, choice: LayerChoice) -> Quantizer | str:
        """The quantizer of an activation under a layer's choice, or why it stays float.

        Raises QD406 for what was not measured, QD507 for settings that a plan has no place for.
        """
        kind = choice.bits.activation_type
        if kind is None:
            return f"precision {choice.precision}"
        row = self._taps.row_of(tensor)
        settings = self._rules.of(tensor)
        rule = RangeRule.of(choice, settings, where=f"tensor {tensor}", bits=kind.bits)
        if isinstance(kind, IntegerType) and (rule.most_bits or kind.bits) < kind.bits:
            kind = DTYPES[f"{'' if kind.signed else 'u'}int{rule.most_bits}"]
        # Channels and tokens lie along axes, which a view of the tensor may have elsewhere.
        key = (tensor if rule.granularity != "tensor" else row, kind.name, rule)
        if key not in self._known:
            self._known[key] = self._stored(tensor, row, kind, rule)
        return self._known[key]

    def _stored(self, tensor: str, row: str, kind: DType, rule: RangeRule) -> Quantizer | str:
        """The activation in the number type and granularity that were chosen."""
        element = element_of(self._graph, row)
        if element not in ELEMENTS:
            return "not a float32 tensor"
        if isinstance(kind, FloatType) and kind.bits > 8:
            if element in HALF:
                return f"{FLOAT_TYPES[element]} already"
            record = self._ranges.record
            return ranges.rounded(kind, record.histogram(row).finite if row in record else None)
        if isinstance(kind, FloatType):
            threshold = self._ranges.float_threshold(row, kind, rule)
            return threshold if isinstance(threshold, str) else ranges.scaled_float(kind, threshold)
        found = self._finer(tensor, row, kind, rule)
        if found is None:
            found = self._whole(row, kind.bits, rule)
        return found if isinstance(found, str) else ranges.stored_as(found, kind)

    def _finer(
        self, tensor: str, row: str, kind: IntegerType, rule: RangeRule
    ) -> Quantizer | str | None:
        """The activation with a scale per token or channel; None where it has one scale."""
        if rule.granularity == "tensor" or rule.is_fixed:
            return None
        values = self._ranges.body(row)
        if isinstance(values, str):
            return values
        if rule.granularity == "token":
            return ranges.per_token(kind, rule.range_bits, self._graph.type_of(tensor), values)
        axis = channel_axes(self._graph, self._taps).get(tensor)
        # A view of what was measured has its channels along other axes, if any.
        channels = self._ranges.record.channels(row) if tensor == row else None
        levels = self._ranges.levels(kind.bits, rule)
        parsed = parse_granularity(rule.granularity)
        n_groups = parsed.size if parsed is not None and parsed.kind == "group" else None
        return ranges.per_channel(kind.bits, levels, channels, axis, n_groups)

    def _whole(self, row: str, bits: int, rule: RangeRule) -> Quantizer | str:
        """The activation with one scale, as signed integers."""
        threshold = self._ranges.threshold(row, bits, rule)
        if isinstance(threshold, str):
            return threshold
        return activation_quantizer(threshold, self._ranges.levels(bits, rule), bits)
