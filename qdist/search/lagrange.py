"""Many budgets of a large knapsack at once: a price for cost, in place of a budget.

At a price, every group takes the candidate of least harm plus price times cost; what edges and
pairs add is taken in by going over the groups a few times, each given its neighbours (iterated
conditional modes, Besag 1986). Without edges and pairs every choice that this finds is a best one
for its own cost (Everett 1963).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # knapsack builds on this module
    from qdist.search.knapsack import Knapsack

_PASSES = 4
_DEEPEST = 1000.0
Floats = NDArray[np.float64]


def swept(knapsack: Knapsack, n_prices: int) -> Iterator[tuple[int, ...]]:
    """Choices for some ``n_prices`` prices, from the dearest to the cheapest choice."""
    groups = [
        (np.array([i.harm for i in group]), np.array([i.cost for i in group]))
        for group in knapsack.groups
    ]
    links = _links(knapsack)
    picks: list[int] | None = None
    for price in _prices(groups, n_prices, knapsack.fixed):
        values = [harm + price * cost for harm, cost in groups]
        picks = [int(np.argmin(value)) for value in values]
        for _ in range(_PASSES if links else 0):
            before = list(picks)
            for g, near in links.items():
                value = values[g] + sum(link.given(picks[link.other], price) for link in near)
                picks[g] = int(np.argmin(value))
            if picks == before:
                break
        yield tuple(picks)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    """What the candidates of a group add beside those of another: ``harms`` and ``costs`` are
    float64[candidates of the other, candidates of the group]."""

    other: int
    harms: Floats
    costs: Floats

    def given(self, pick: int, price: float) -> Floats:
        """For each candidate of the group, when the other has ``pick``."""
        return np.asarray(self.harms[pick] + price * self.costs[pick])


def _links(knapsack: Knapsack) -> dict[int, list[_Link]]:
    """Group -> what ties it to others, in both directions."""
    found: dict[int, list[_Link]] = {}

    def add(a: int, b: int, harms: Floats, costs: Floats) -> None:
        found.setdefault(b, []).append(_Link(other=a, harms=harms, costs=costs))
        found.setdefault(a, []).append(_Link(other=b, harms=harms.T, costs=costs.T))

    for edge in knapsack.edges:
        ends = knapsack.groups[edge.source], knapsack.groups[edge.reader]
        costs = np.array(
            [[edge.conversion.get((a.kind, b.kind), 0.0) for b in ends[1]] for a in ends[0]]
        )
        if costs.any():
            add(edge.source, edge.reader, np.zeros_like(costs), costs)
    for pair in knapsack.pairs:
        (a, k), (b, m) = pair.first, pair.second
        harms = np.zeros((len(knapsack.groups[a]), len(knapsack.groups[b])))
        harms[k, m] = pair.harm
        add(a, b, harms, np.zeros_like(harms))
    return dict(sorted(found.items()))


def spread(low: float, high: float, n: int) -> Floats:
    """``n`` costs strictly between two, by rising cost, each the same factor from the next; float64
    [n], empty where there is nothing between. Below a thousandth of ``high`` there are none: from a
    cost of 0 no factor leads anywhere."""
    start = max(low, high / _DEEPEST)
    if n < 1 or not start < high:
        return np.empty(0)
    return np.geomspace(start, high, n + 2)[1:-1]


def _prices(groups: list[tuple[Floats, Floats]], n: int, fixed: float) -> list[float]:
    """Prices at which choices change, such that the costs of the whole, ``fixed`` and what groups
    cost, are the same factor from each other; rising."""
    slopes: list[tuple[float, float]] = []
    for harms, costs in groups:
        slopes += _hull(harms, costs)
    if not slopes:
        return []
    prices, steps = np.array(sorted(slopes)).T
    # From the dearest choice down: each price saves its step of cost.
    saved = np.cumsum(steps)
    dearest = fixed + sum(float(costs[np.lexsort((costs, harms))[0]]) for harms, costs in groups)
    wanted = dearest - spread(dearest - float(saved[-1]), dearest, n)
    places = np.unique(np.searchsorted(saved, wanted).clip(max=len(saved) - 1))
    return [float(prices[i]) * (1 + 1e-12) for i in places]


def _hull(harms: Floats, costs: Floats) -> list[tuple[float, float]]:
    """(price, cost that is saved) at which a group goes on to a cheaper candidate."""
    order = np.lexsort((costs, harms))
    at = int(order[0])
    steps: list[tuple[float, float]] = []
    while True:
        cheaper = np.flatnonzero(costs < costs[at])
        if not cheaper.size:
            return steps
        saved = costs[at] - costs[cheaper]
        prices = (harms[cheaper] - harms[at]) / saved
        least = prices.min()
        ties = np.flatnonzero(prices == least)
        best = int(ties[np.argmax(saved[ties])])
        steps.append((float(least), float(saved[best])))
        at = int(cheaper[best])
