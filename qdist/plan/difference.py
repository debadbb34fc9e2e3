"""What differs between two plans: choices, methods, and thresholds with how far they moved."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qdist.plan.plan import LayerPlan, QuantizationPlan, QuantizedInput
from qdist.plan.quantizer import Quantizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that a layer has otherwise. ``what``: a field of its choice, ``layer``, ``why``,
    ``threshold``, ``method``, ``type``, ``rule``, ``statistics`` or ``stays float``. ``tensor``:
    the tensor that it is about, or empty. ``before`` and ``after`` as text. ``moved``: of a
    threshold, its relative change (0.1: 10 % larger); None where it was or is zero, or there is
    none."""

    layer: str
    what: str
    before: str
    after: str
    tensor: str = ""
    moved: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "layer": self.layer,
            "what": self.what,
            "tensor": self.tensor,
            "before": self.before,
            "after": self.after,
            "moved": self.moved,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDifference:
    """All changes in the order of the layers, and what holds for the plans as wholes."""

    changes: tuple[Change, ...]
    n_layers: int
    same_model: bool
    same_statistics: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that differ, once each."""
        return tuple(dict.fromkeys(change.layer for change in self.changes))

    @property
    def moved(self) -> tuple[Change, ...]:
        """The thresholds that moved, each tensor once, the farthest first."""
        found = {c.tensor: c for c in self.changes if c.what == "threshold" and c.moved is not None}
        return tuple(sorted(found.values(), key=lambda c: -abs(c.moved or 0.0)))

    def summary(self) -> str:
        """How many thresholds moved, and how far, in one line; empty if none did."""
        moved = self.moved
        if not moved:
            return ""
        median = statistics.median(abs(change.moved or 0.0) for change in moved)
        noun = "threshold" if len(moved) == 1 else "thresholds"
        return (
            f"{len(moved)} {noun} moved, by {moved_text(median)[1:]} in the median and "
            f"{moved_text(moved[0].moved or 0.0)} at most ({moved[0].tensor})"
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "same_model": self.same_model,
            "same_statistics": self.same_statistics,
            "n_layers": self.n_layers,
            "changes": [change.to_json() for change in self.changes],
        }


def compare_plans(a: QuantizationPlan, b: QuantizationPlan) -> PlanDifference:
    """What the second plan has otherwise than the first, layer by layer."""
    left = {layer.name: layer for layer in a.layers}
    right = {layer.name: layer for layer in b.layers}
    names = list(dict.fromkeys([*left, *right]))
    changes = [c for name in names for c in _layer(name, left.get(name), right.get(name))]
    return PlanDifference(
        changes=tuple(changes),
        n_layers=len(names),
        same_model=a.model_digest == b.model_digest,
        same_statistics=a.statistics_digest == b.statistics_digest,
    )


def threshold(quantizer: Quantizer) -> float:
    """The largest magnitude of a range, in the tensor's units."""
    return max(-quantizer.bounds[0], quantizer.bounds[1])


def _layer(name: str, a: LayerPlan | None, b: LayerPlan | None) -> Iterator[Change]:
    if a is None or b is None:
        before, after = ("absent", "there") if a is None else ("there", "absent")
        yield Change(layer=name, what="layer", before=before, after=after)
        return
    first, second = a.choice.to_json(), b.choice.to_json()
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key):
            yield Change(
                layer=name, what=key, before=_text(first.get(key)), after=_text(second.get(key))
            )
    if a.why != b.why and a.choice != b.choice:
        yield Change(layer=name, what="why", before=a.why, after=b.why)
    yield from _entries(name, a.activations, b.activations)
    yield from _entries(name, a.weights, b.weights)
    yield from _entries(name, *(x.bias_add.entries if x.bias_add else () for x in (a, b)))
    if a.is_quantized and b.is_quantized and a.left_float != b.left_float:
        before, after = (", ".join(layer.left_float) or "none" for layer in (a, b))
        yield Change(layer=name, what="stays float", before=before, after=after)


def _entries(
    layer: str, a: Sequence[QuantizedInput], b: Sequence[QuantizedInput]
) -> Iterator[Change]:
    left = {entry.index: entry for entry in a}
    right = {entry.index: entry for entry in b}
    for index in sorted({*left, *right}):
        first, second = left.get(index), right.get(index)
        if first is None or second is None:
            entry = first or second
            texts = (type_text(e.quantizer) if e else "float" for e in (first, second))
            before, after = texts
            tensor = entry.tensor if entry is not None else ""
            yield Change(layer=layer, what="type", tensor=tensor, before=before, after=after)
        else:
            yield from _entry(layer, first, second)


def _entry(layer: str, a: QuantizedInput, b: QuantizedInput) -> Iterator[Change]:
    p, q = a.quantizer, b.quantizer
    if type_text(p) != type_text(q):
        yield Change(
            layer=layer, what="type", tensor=b.tensor, before=type_text(p), after=type_text(q)
        )
    if p.method != q.method:
        yield Change(layer=layer, what="method", tensor=b.tensor, before=p.method, after=q.method)
    if p.bounds != q.bounds or (p.key != q.key and type_text(p) == type_text(q)):
        yield Change(
            layer=layer,
            what="threshold",
            tensor=b.tensor,
            before=range_text(p),
            after=range_text(q),
            moved=_moved(p, q),
        )
    for what, before, after in (
        ("rule", a.provenance.rule, b.provenance.rule),
        ("statistics", a.provenance.statistics, b.provenance.statistics),
    ):
        # What plans of schema 1 do not say is not known to differ.
        if before != after and (what == "rule" or (before and after)):
            yield Change(
                layer=layer,
                what=what,
                tensor=b.tensor,
                before=_text(before)[:80] or "none",
                after=_text(after)[:80] or "none",
            )


def _moved(p: Quantizer, q: Quantizer) -> float | None:
    """The relative change of the side that moved farther, or of the scale where neither did."""
    pairs = [(x, y) for x, y in zip(p.bounds, q.bounds, strict=True) if x != y]
    if not pairs:
        pairs = [(x, y) for x, y in zip(p.scales, q.scales, strict=False) if x != y]
    changes = [y / x - 1.0 for x, y in pairs if x != 0.0 and math.isfinite(y / x)]
    return max(changes, key=abs, default=None)


def moved_text(change: float) -> str:
    """A relative change with its sign, in three significant digits."""
    return f"{100 * change:+.3g} %"


def type_text(quantizer: Quantizer) -> str:
    """Storage type and number of scales."""
    n = len(quantizer.scales)
    return quantizer.dtype + ("" if quantizer.axis is None else f" x {n}")


def range_text(quantizer: Quantizer) -> str:
    """The range of the widest channel."""
    return f"{quantizer.bounds[0]:.6g} .. {quantizer.bounds[1]:.6g}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
