"""What a plan costs: the bytes of its weights, its bit operations, or microseconds by a table.

A cost is a sum over layers, and over edges between layers: where two layers that follow each other
store activations in different number types, something has to convert them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from qdist.plan.choice import LayerChoice

UNITS = ("bytes", "bit_operations", "latency")
FLOAT_BITS = 32
"""Of what has no number type of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Values that go from layer ``source`` to layer ``reader``. ``n_elements``: how many, for one
    sample; 0 where shapes do not tell. ``conversion``: (number type that the one stores, number
    type that the other reads) -> what converting costs; pairs that are absent cost nothing."""

    source: str
    reader: str
    n_elements: int = 0
    conversion: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """``unit``: one of `UNITS`. ``layers``: layer -> choice -> its cost, not negative. ``edges``:
    those whose conversion may cost something. ``fixed``: of all that cannot change."""

    unit: str = "bytes"
    layers: Mapping[str, Mapping[LayerChoice, float]] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    fixed: float = 0.0

    def of_layer(self, name: str, choice: LayerChoice) -> float:
        """The cost of one layer alone; 0 for a layer that the costs do not know. A choice that is
        no option of the layer costs what the one does that differs in its threshold method alone,
        else what the first one of its precision does, and where there is none, what the dearest
        does."""
        known = self.layers.get(name, {})
        if choice in known or not known:
            return known.get(choice, 0.0)
        alike = [(c, cost) for c, cost in known.items() if c.precision == choice.precision]
        if not alike:
            return max(known.values())
        bare = _but_for_threshold(choice)
        return next((cost for c, cost in alike if _but_for_threshold(c) == bare), alike[0][1])

    def total(self, choices: Mapping[str, LayerChoice]) -> float:
        """The cost of a whole plan."""
        layers = sum(self.of_layer(name, choices[name]) for name in self.layers)
        return self.fixed + layers + sum(self._conversions(choices))

    def _conversions(self, choices: Mapping[str, LayerChoice]) -> Iterable[float]:
        for edge in self.edges:
            pair = stored_type(choices[edge.source]), stored_type(choices[edge.reader])
            if pair[0] != pair[1]:
                yield edge.conversion.get(pair, 0.0)


@cache
def _but_for_threshold(choice: LayerChoice) -> LayerChoice:
    """What is alike in choices that differ in their threshold method alone."""
    return replace(choice, saturation=LayerChoice().saturation)


def stored_type(choice: LayerChoice) -> str:
    """The number type in which a layer reads and stores activations."""
    return choice.bits.activation or "float32"


def weight_bytes(choice: LayerChoice, n_weights: int, n_scales: int = 0) -> float:
    """Bytes of a layer's weights and, where they have any, of their float32 scales."""
    bits = choice.bits.weight_bits
    if bits is None:
        return n_weights * FLOAT_BITS / 8
    return n_weights * bits / 8 + 4 * n_scales


def bit_operations(choice: LayerChoice, n_multiplies: int) -> float:
    """Multiply-accumulates times the bits of both factors, for one sample (HAWQ-V3's BOPS)."""
    bits = choice.bits
    return float(n_multiplies * (bits.weight_bits or FLOAT_BITS) * (bits.activation_bits or 32))
