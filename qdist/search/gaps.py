"""What verified trials leave open between them, along the axis of cost.

A plan tells the more, the farther it is from the verified plans that are a little cheaper and a
little dearer: in cost (in nepers), and in loss (in decibels), so that no unit counts. Its own loss
is not known yet. It is taken to lie between its neighbours' as the predicted front does: where that
falls steeply, a plan of little more cost is far from the cheaper one, and where it is flat, nothing
is to be found. The boxes between the points of a front, of which the largest is looked into next,
are those of Hamacher, Pedersen and Ruzika (2007).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

_LEAST_DB = 1.0
"""What neighbours count that do not differ."""
_BELOW = 0.1
"""A predicted harm of nothing counts as such a part of the least other one."""

Marks = tuple[tuple[float, float | None], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """``marks``: (cost, loss in dB or None where it is not known) by rising cost; of one cost the
    least loss. ``shape``: (cost, harm in dB) of the predicted front, by rising cost; may be
    empty."""

    marks: Marks = ()
    shape: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(
        cls,
        trials: Iterable[tuple[float, float | None]],
        predicted: Iterable[tuple[float, float]] = (),
    ) -> Self:
        """Of the (cost, loss) of trials, and the (cost, harm) of a predicted front; a loss that is
        not positive and finite is not known."""
        found: dict[float, float | None] = {}
        for cost, loss in trials:
            is_known = loss is not None and 0 < loss < math.inf
            level = 10 * math.log10(loss) if loss is not None and is_known else None
            known = found.get(cost)
            if known is None or (level is not None and level < known):
                found[cost] = level
        front = sorted(predicted)
        least = min((harm for _, harm in front if harm > 0), default=1.0) * _BELOW
        return cls(
            marks=tuple(sorted(found.items(), key=lambda mark: mark[0])),
            shape=tuple((cost, 10 * math.log10(max(harm, least))) for cost, harm in front),
        )

    def with_plan(self, cost: float) -> Self:
        """With a plan that is about to be verified, with the loss that it is taken to have."""
        costs = [mark[0] for mark in self.marks]
        if cost in costs:
            return self
        i = bisect_left(costs, cost)
        level = self._level(i, cost) if 0 < i < len(costs) else None
        return replace(self, marks=(*self.marks[:i], (cost, level), *self.marks[i:]))

    def worth(self, cost: float) -> float:
        """How much a plan of this cost tells; 0 where one of its cost is known, infinite where none
        is. Beyond the ends, and where nothing tells losses apart, neighbours count as not
        different."""
        if not self.marks:
            return math.inf
        costs = [mark[0] for mark in self.marks]
        i, j = bisect_right(costs, cost) - 1, bisect_left(costs, cost)
        if i < 0 or j == len(costs):
            return _LEAST_DB * _nepers(cost, costs[max(i, 0)])
        level = self._level(j, cost)
        return min(
            _nepers(cost, costs[k]) * (_LEAST_DB + self._apart(cost, level, k)) for k in (i, j)
        )

    def _level(self, j: int, cost: float) -> float | None:
        """The loss of a plan between the marks j - 1 and j; None where theirs are not known."""
        (low, before), (high, after) = self.marks[j - 1], self.marks[j]
        if before is None or after is None:
            return None
        first, last = self._predicted(low), self._predicted(high)
        if first is not None and last is not None and first > last:
            share = (first - (self._predicted(cost) or 0.0)) / (first - last)
        elif low > 0:
            share = math.log(cost / low) / math.log(high / low)
        else:
            return None
        return before + min(1.0, max(0.0, share)) * (after - before)

    def _apart(self, cost: float, level: float | None, k: int) -> float:
        """How far a plan's loss is from that of a mark, in dB; by the predicted front alone where
        it is not known."""
        other = self.marks[k][1]
        if level is not None and other is not None:
            return abs(level - other)
        here, there = self._predicted(cost), self._predicted(self.marks[k][0])
        return 0.0 if here is None or there is None else abs(here - there)

    def _predicted(self, cost: float) -> float | None:
        """Of the front at a cost: that of its dearest plan that costs no more."""
        i = bisect_right(self.shape, (cost * (1 + 1e-9), math.inf))
        return self.shape[max(0, i - 1)][1] if self.shape else None


def _nepers(one: float, other: float) -> float:
    if one == other:
        return 0.0
    if min(one, other) <= 0:
        return math.inf
    return abs(math.log(one / other))
