"""What verified trials leave open between them, along the axis of cost.

A plan tells the more, the farther its cost is from those of its verified neighbours, and the more
these differ in their loss: between two plans that are as good as each other there is little to be
found. Both are taken as ratios (of costs in nepers, of losses in decibels), so that no unit counts.
The boxes between the points of a front, of which the largest is looked into next, are those of
Hamacher, Pedersen and Ruzika (2007).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

_LEAST_DB = 1.0
"""What neighbours count that do not differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """``marks``: (cost, loss in dB or None where it is not known) by rising cost; of one cost the
    least loss."""

    marks: tuple[tuple[float, float | None], ...] = ()

    @classmethod
    def of(cls, trials: Iterable[tuple[float, float | None]]) -> Self:
        """Of the (cost, loss) of trials; a loss that is not positive and finite is not known."""
        found: dict[float, float | None] = {}
        for cost, loss in trials:
            is_known = loss is not None and 0 < loss < math.inf
            level = 10 * math.log10(loss) if loss is not None and is_known else None
            known = found.get(cost)
            if known is None or (level is not None and level < known):
                found[cost] = level
        return cls(marks=tuple(sorted(found.items(), key=lambda mark: mark[0])))

    def with_plan(self, cost: float) -> Self:
        """With a plan that is about to be verified: its loss is taken to lie on the line between
        its neighbours'."""
        costs = [mark[0] for mark in self.marks]
        if cost in costs:
            return self
        i = bisect_left(costs, cost)
        level = None
        if 0 < i < len(costs):
            (low, before), (high, after) = self.marks[i - 1], self.marks[i]
            if before is not None and after is not None and low > 0:
                share = math.log(cost / low) / math.log(high / low)
                level = before + share * (after - before)
        return type(self)(marks=(*self.marks[:i], (cost, level), *self.marks[i:]))

    def worth(self, cost: float) -> float:
        """How much a plan of this cost tells; 0 where one of its cost is known, infinite where none
        is. Beyond the ends, and where a loss is not known, neighbours count as not different."""
        if not self.marks:
            return math.inf
        costs = [mark[0] for mark in self.marks]
        i, j = bisect_right(costs, cost) - 1, bisect_left(costs, cost)
        reach = min(_nepers(cost, costs[k]) for k in (i, j) if 0 <= k < len(costs))
        if i < 0 or j == len(costs):
            return reach * _LEAST_DB
        below, above = self.marks[i][1], self.marks[j][1]
        if below is None or above is None:
            return reach * _LEAST_DB
        return reach * (_LEAST_DB + abs(below - above))


def _nepers(one: float, other: float) -> float:
    if one == other:
        return 0.0
    if min(one, other) <= 0:
        return math.inf
    return abs(math.log(one / other))
