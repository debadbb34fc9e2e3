"""Icraft's measures of a layer, and how its searches find the layers to change.

Section 3.5 of the vendor's guide to quantization. It compares every feature map twice: after a
whole quantized run (ours: *in place*), and layer by layer (ours: *alone*, from the float model's
inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qdist.evaluate.compare import Deviation
from qdist.search.problem import SearchLayer

FIRST_BAD = (0.8, 0.85, 0.9, 0.95)
"""Cosines below which ``tradeoff`` and ``performance`` call a layer bad, one after the other."""
LAYERS_BACK = 3
"""How far before the first bad layer others are changed with it."""

MOVES = frozenset(
    {
        *("Cast", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather"),
        *("GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Shape", "Slice"),
        *("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Operators that only move values: the ones that condition A leaves out, by our reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A layer is bad with a cosine below ``cosine``, or a relative L2 distance (``_dis``), mean
    squared error or mean absolute error above ``distance``."""

    cosine: float
    distance: float

    def is_bad(self, found: Deviation) -> bool:
        """Whether any one of the four is out of bounds. NaN is."""
        within = (
            found.cosine >= self.cosine
            and found.relative_l2 <= self.distance
            and found.mse <= self.distance
            and found.mae <= self.distance
        )
        return not within


LEVELS: dict[int, Bounds] = {
    1: Bounds(cosine=0.97, distance=0.05),
    2: Bounds(cosine=0.98, distance=0.03),
    3: Bounds(cosine=0.99, distance=0.01),
}
"""``threshold_level`` -> where ``accuracy`` ends."""
CONDITION_B = Bounds(cosine=0.97, distance=0.03)
"""Condition B of ``tradeoff`` and ``performance``."""


def widened(level: int, share: float) -> Bounds:
    """The bounds of ``accuracy`` after ``share`` (0 < share <= 1) of its rounds. The guide says
    that they widen with every round and where they end; by our reading the distance from a perfect
    match that counts as bad shrinks as 1 / share."""
    end = LEVELS[level]
    return Bounds(cosine=max(-1.0, 1 - (1 - end.cosine) / share), distance=end.distance / share)


def worst_share(
    found: Mapping[str, Deviation], bounds: Bounds, share: float, order: Sequence[str]
) -> tuple[str, ...]:
    """The worst ``share`` of the bad layers, rounded up: lowest cosine, then largest distance, then
    ``order``."""
    bad = [name for name in order if name in found and bounds.is_bad(found[name])]
    ranked = sorted(bad, key=lambda name: _badness(found[name]))
    # A little less, so that 0.1 * 30 is 3.
    return tuple(ranked[: math.ceil(share * len(bad) - 1e-9)])


def to_change(
    layers: Sequence[SearchLayer],
    in_place: Mapping[str, Deviation],
    is_bad_alone: Callable[[str], bool],
    can_change: Callable[[str], bool],
) -> tuple[str, ...]:
    """The layers that ``tradeoff`` and ``performance`` change next, from front to back.

    For each cosine of `FIRST_BAD`: the first layer in topological order that is below it in place.
    If that is an operator that computes (A) and bad alone (B), then it and every layer up to three
    before it that is bad alone. If not, the nearest layers before it that are both. Our readings: a
    layer with nothing left to change is passed over; where nothing before the first bad layer
    serves, the next one is looked at, and after all of them the next cosine.
    """
    by_name = {layer.name: layer for layer in layers}
    ordered = sorted(layers, key=lambda layer: layer.position)

    def fits(name: str) -> bool:
        return by_name[name].op_type not in MOVES and is_bad_alone(name) and can_change(name)

    for threshold in FIRST_BAD:
        for layer in ordered:
            found = in_place.get(layer.name)
            # Written so that NaN is bad.
            if found is None or found.cosine >= threshold:
                continue
            before = _before(layer.name, by_name)
            if fits(layer.name):
                near = [name for step in before[:LAYERS_BACK] for name in step]
                also = [name for name in near if is_bad_alone(name) and can_change(name)]
                return _from_front((layer.name, *also), by_name)
            for step in before:
                if fitting := [name for name in step if fits(name)]:
                    return _from_front(fitting, by_name)
    return ()


def _before(name: str, by_name: Mapping[str, SearchLayer]) -> list[list[str]]:
    """The layers before one, by how many steps: those one step before, two, and so on."""
    seen = {name}
    steps: list[list[str]] = []
    current = [name]
    while current:
        found = {s for each in current for s in by_name[each].sources if s in by_name} - seen
        seen |= found
        current = sorted(found)
        if current:
            steps.append(current)
    return steps


def _from_front(names: Sequence[str], by_name: Mapping[str, SearchLayer]) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=lambda name: by_name[name].position))


def _badness(found: Deviation) -> tuple[float, float]:
    cosine = found.cosine if math.isfinite(found.cosine) else -1.0
    return (cosine, -found.relative_l2 if math.isfinite(found.relative_l2) else -math.inf)
