"""Ranges of activations, from their statistics and what rules say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qdist.digest import digest_arrays
from qdist.errors import StoreError
from qdist.model.graph import Graph
from qdist.model.layers import Layer
from qdist.model.taps import TapTable
from qdist.numbers.dtype import FloatType
from qdist.plan.consumers import consumers_of
from qdist.plan.destinations import Destinations
from qdist.plan.plan_settings import PlanSettings
from qdist.plan.precision import activation_levels
from qdist.plan.range_rule import FIXED, RangeRule
from qdist.stats import grid
from qdist.stats.histogram import Density
from qdist.stats.record import CalibrationRecord
from qdist.threshold.auto import Reader
from qdist.threshold.blocks import mean_threshold
from qdist.threshold.clip import Levels, Threshold
from qdist.threshold.error import measured
from qdist.threshold.float_error import FLOAT_METHODS, float_threshold, measured_float
from qdist.threshold.pinning import Pinning, pinning
from qdist.threshold.registry import applicable, find_threshold, resolve
from qdist.threshold.sentinel import keep_masked, split_sentinels


class ActivationRanges:
    """Finds the range of each row of a record: of each tensor that was measured.

    What layers that read a row make of errors, and digests of statistics, are computed once.
    """

    def __init__(
        self,
        graph: Graph,
        record: CalibrationRecord,
        taps: TapTable,
        layers: Sequence[Layer],
        settings: PlanSettings,
        blocks: Sequence[CalibrationRecord] = (),
    ) -> None:
        """``blocks``: records of equal blocks of the samples; ranges are then means over them."""
        self.record = record
        self.blocks = tuple(blocks)
        self._graph = graph
        self._taps = taps
        self._layers = tuple(layers)
        self._settings = settings
        self._consumers: dict[str, tuple[Reader, ...]] = {}
        self._digests: dict[str, str] = {}
        self._destinations = Destinations(graph, taps)
        self._pinnings: dict[tuple[str, str], Pinning] = {}

    @property
    def asked(self) -> Mapping[str, tuple[Reader, ...]]:
        """Row -> the layers that the method ``auto`` judged its range by, of rows whose range it
        chose so far."""
        return self._consumers

    @property
    def pinnings(self) -> Mapping[tuple[str, str], Pinning]:
        """Row and divergence -> how far the stored bins pin its range down, of those that were
        found so far."""
        return self._pinnings

    def levels(self, bits: int, rule: RangeRule) -> Levels:
        """The levels of a signed activation of ``bits`` bits that are in use."""
        return activation_levels(
            bits, symmetric=self._settings.symmetric, range_bits=rule.range_bits
        )

    def body(self, row: str) -> Density | str:
        """The values of a tensor that are magnitudes, or why it stays float. Raises QD406."""
        if row not in self.record:
            raise StoreError(
                "QD406",
                where=f"tensor {row}",
                got="no histogram",
                expected="every tensor that the plan quantizes to be measured",
                mend="run qdist calibrate with calibration.taps=all, "
                "or set quantization.scope=compute",
            )
        body, n_masked = self._split(row)
        if n_masked and not self._may_quantize_masks(row):
            return f"holds {n_masked} values that mean masked, not magnitudes"
        return "never held a value in calibration" if body.is_empty else body

    def threshold(self, row: str, bits: int, rule: RangeRule) -> Threshold | str:
        """The range that the rule comes to in ``bits`` bits, or why the tensor stays float.
        Raises QD406."""
        levels = self.levels(bits, rule)
        if row not in self.record and rule.bounds is not None:
            return rule.without_statistics(levels)
        body = self.body(row)
        if isinstance(body, str):
            return body
        found = rule.fixed(body, levels) if rule.is_fixed else self._found(row, body, levels, rule)
        found = rule.scaled(found, body, levels)
        _, n_masked = self._split(row)
        return keep_masked(found, body, levels) if n_masked else found

    def float_threshold(self, row: str, kind: FloatType, rule: RangeRule) -> Threshold | str:
        """As `threshold`, symmetric, for a floating-point type that has a scale. Methods that
        compare evenly spaced levels are ``max`` there. Raises QD406."""
        levels = activation_levels(kind.bits, symmetric=True)
        if row not in self.record and rule.bounds is not None:
            return rule.without_statistics(levels)
        body = self.body(row)
        if isinstance(body, str):
            return body
        if rule.is_fixed:
            given = rule.fixed(body, levels)
            return measured_float(body, given.low, given.high, kind, FIXED)
        found = self._float_found(row, body, kind, rule)
        low, high = found.low * rule.th_scale, found.high * rule.th_scale
        if self._split(row)[1]:
            low = keep_masked(replace(found, low=low, high=high), body, levels).low
        return measured_float(body, low, high, kind, found.method)

    def _float_found(self, row: str, body: Density, kind: FloatType, rule: RangeRule) -> Threshold:
        parameters = applicable(rule.method, self._settings.saturation_parameters)
        name, given = resolve(rule.method, parameters)
        name = name if name in FLOAT_METHODS else "max"
        if not self.blocks:
            return float_threshold(body, kind, name, given)
        parts = [split_sentinels(block.histogram(row).finite).body for block in self.blocks]
        found = [
            float_threshold(part, kind, name, given)
            for part in parts
            if part.minimum < 0.0 or part.maximum > 0.0
        ]
        if not found:
            return float_threshold(body, kind, name, given)
        low, high = (float(np.mean([getattr(f, end) for f in found])) for end in ("low", "high"))
        return replace(found[0], low=low, high=high)

    def digest(self, row: str) -> str | None:
        """The digest of the histogram that ranges come from; None for what was not measured."""
        if row not in self.record:
            return None
        if row not in self._digests:
            histogram = self.record.histogram(row)
            self._digests[row] = digest_arrays(
                [("bins", histogram.bins), ("counts", histogram.counts)]
            )
        return self._digests[row]

    def _found(self, row: str, body: Density, levels: Levels, rule: RangeRule) -> Threshold:
        parameters = applicable(rule.method, self._settings.saturation_parameters)
        if self.blocks:
            histograms = [block.histogram(row) for block in self.blocks]
            return mean_threshold(histograms, levels, rule.method, parameters).threshold
        name, _ = resolve(rule.method)
        pinned = pinning(body, levels, rule.method, parameters)
        if pinned is not None:
            self._pinnings[row, name] = pinned
        if name != "auto" or "threshold" in parameters:
            return find_threshold(body, levels, rule.method, parameters)
        return self._for_readers(row, body, levels, parameters)

    def _for_readers(
        self, row: str, body: Density, levels: Levels, parameters: Mapping[str, Any]
    ) -> Threshold:
        """The range that serves the layers best which read the row, or what it is handed on to."""
        deciding = self._destinations.row(row)
        values: Density | str = body
        if deciding != row and deciding in self.record:
            values = self.body(deciding)
        if isinstance(values, str):
            deciding, values = row, body
        found = find_threshold(values, levels, "auto", parameters, self._readers(deciding))
        low, high, note = found.low, found.high, found.note
        if deciding != row:
            note = f"the range of {deciding}, which holds these values: {note}"
        is_free = "th_scale" not in parameters
        if is_free and self._destinations.holds_scores(row) and values.maximum > high:
            high, note = values.maximum, f"{note}; scores of a Softmax keep their top"
        if deciding == row and high == found.high:
            return found
        return measured(body, low, high, levels, method=found.method, note=note)

    def _readers(self, row: str) -> tuple[Reader, ...]:
        """The layers that read a row, in scope or not: what they compute suffers all the same."""
        if row not in self._consumers:
            found: tuple[Reader, ...] = consumers_of(
                row, self._graph, self._layers, self._taps, self.record
            )
            root = self._destinations.root(row)
            self._consumers[row] = found if root is None else (root,)
        return self._consumers[row]

    def _split(self, row: str) -> tuple[Density, int]:
        """The values that are magnitudes, and how many others there are."""
        histogram = self.record.histogram(row)
        split = split_sentinels(histogram.finite)
        return split.body, int(split.n_sentinels) + histogram.n_infinite

    def _may_quantize_masks(self, row: str) -> bool:
        """Whether a row with masked values may be quantized: if asked to, and if nothing but a
        Softmax reads it. An infinity above is no mask."""
        if self._settings.masked != "quantize":
            return False
        readers = [
            layer.op_type
            for layer in self._layers
            if any(self._taps.row_of(entry.tensor) == row for entry in layer.activations)
        ]
        histogram = self.record.histogram(row)
        n_above = int(histogram.counts[histogram.bins == grid.POSITIVE_INFINITY].sum())
        return bool(readers) and set(readers) <= {"Softmax", "LogSoftmax"} and not n_above
