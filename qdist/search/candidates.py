"""A search problem as a knapsack: what each group may become, what it harms, and what it costs.

The layers of a group have one precision; of the options with that precision each takes the one of
the least harm. A layer's harm is the squared relative error of its output when it alone is
quantized; where the model's own outputs were measured for a group (``problem.divergence``), its
harms are scaled to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from qdist.plan.choice import LayerChoice
from qdist.search.costs import Edge, stored_type
from qdist.search.knapsack import GroupEdge, Item, Knapsack, Pair
from qdist.search.problem import SearchProblem
from qdist.search.trial import Choices


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCandidate:
    """``choices``: of every layer of a group. ``harm``: before any correction."""

    choices: tuple[tuple[str, LayerChoice], ...]
    harm: float
    cost: float


class CandidateTable:
    """The candidates of all groups; which of them a plan has; the knapsack of them."""

    def __init__(self, problem: SearchProblem) -> None:
        self._problem = problem
        self.groups: tuple[tuple[str, ...], ...] = problem.groups
        self._group_of = {name: g for g, names in enumerate(self.groups) for name in names}
        self.candidates = tuple(self._of_group(names) for names in self.groups)
        self._edges, extra = self._split_edges()
        self._extra = extra

    def choices(self, picks: Sequence[int]) -> dict[str, LayerChoice]:
        """The whole plan, with the candidate of each group."""
        found = dict(self._problem.plain)
        for group, k in zip(self.candidates, picks, strict=True):
            found.update(group[k].choices)
        return found

    def harms_of(self, choices: Choices) -> list[float]:
        """What each group harms in a plan, which may hold choices that are no candidates."""
        return [
            self._gain(names) * sum(self._alone(name, choices[name]) for name in names)
            for names in self.groups
        ]

    def harm_of(self, choices: Choices) -> float:
        """What all groups harm together."""
        return sum(self.harms_of(choices))

    def other_method(self) -> str | None:
        """The threshold method that harms least beside the plain plan's own, where all layers that
        take it have it. None where layers have no other method, or none that finds other ranges:
        what harms every group exactly as the plain plan does is that plan."""
        plain, options = self._problem.plain, self._problem.options
        found: dict[str, dict[str, LayerChoice]] = {}
        for name, known in options.items():
            for choice in known:
                method = choice.saturation
                if choice != plain[name] and choice == replace(plain[name], saturation=method):
                    found.setdefault(method, {})[name] = choice
        own = self.harms_of(plain)
        best: str | None = None
        least = math.inf
        for method, changed in found.items():
            harms = self.harms_of({**plain, **changed})
            if harms != own and sum(harms) < least:
                best, least = method, sum(harms)
        return best

    def knapsack(self, weights: Sequence[float]) -> Knapsack:
        """With a weight for the harms of each group."""
        groups = tuple(
            tuple(self._item(g, candidate, weights[g]) for candidate in group)
            for g, group in enumerate(self.candidates)
        )
        names = self._problem.implied
        implied = {
            (self._group_of[a], self._group_of[b])
            for a, b in names
            if a in self._group_of and b in self._group_of
        }
        return Knapsack(
            groups=groups,
            edges=self._edges,
            pairs=tuple(self._pairs(weights)),
            implied=tuple(sorted((a, b) for a, b in implied if a != b)),
            fixed=self._fixed(),
        )

    def _of_group(self, names: tuple[str, ...]) -> tuple[GroupCandidate, ...]:
        options = self._problem.options
        common = [
            precision
            for precision in dict.fromkeys(choice.precision for choice in options[names[0]])
            if all(any(c.precision == precision for c in options[name]) for name in names)
        ]
        found: dict[tuple[LayerChoice, ...], GroupCandidate] = {}
        for precision in common:
            for by_cost in (False, True):
                picked = [self._picked(name, precision, by_cost=by_cost) for name in names]
                if None in picked:
                    continue
                chosen = tuple(choice for choice in picked if choice is not None)
                found.setdefault(chosen, self._candidate(names, chosen))
        if not found:
            plain = tuple(self._problem.plain[name] for name in names)
            found[plain] = self._candidate(names, plain)
        return tuple(found.values())

    def _candidate(self, names: tuple[str, ...], chosen: tuple[LayerChoice, ...]) -> GroupCandidate:
        pairs = tuple(zip(names, chosen, strict=True))
        return GroupCandidate(
            choices=pairs,
            harm=self._gain(names) * sum(self._alone(name, choice) for name, choice in pairs),
            cost=sum(self._problem.costs.of_layer(name, choice) for name, choice in pairs),
        )

    def _picked(self, name: str, precision: str, *, by_cost: bool) -> LayerChoice | None:
        """Of a layer's options with a precision the least harmful, or the cheapest."""
        known = self._problem.sensitivity.get(name, {})
        measured = [
            choice
            for choice in self._problem.options[name]
            if choice.precision == precision and (choice in known or choice.bits.is_float)
        ]
        if not measured:
            return None

        def order(choice: LayerChoice) -> tuple[float, float]:
            harm, cost = self._alone(name, choice), self._problem.costs.of_layer(name, choice)
            return (cost, harm) if by_cost else (harm, cost)

        return min(measured, key=order)

    def _alone(self, name: str, choice: LayerChoice) -> float:
        known = self._problem.sensitivity.get(name, {})
        error = known.get(choice)
        if error is None:
            # No option of the layer: the worst that was measured at its precision.
            alike = [e for c, e in known.items() if c.precision == choice.precision]
            error = max(alike, default=0.0)
        # What is infinitely bad is only very bad: the solver needs numbers.
        return min(error, 1e6) ** 2

    def _gain(self, names: tuple[str, ...]) -> float:
        """Harm to the model's outputs for each unit of the group's own: the largest that was
        measured; 1 where nothing was measured for any group, else the middle one of all."""
        gains = self._gains
        if not gains:
            return 1.0
        ordered = sorted(gains.values())
        return gains.get(names[0], ordered[len(ordered) // 2])

    @cached_property
    def _gains(self) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for names in self._problem.groups:
            for choice, divergence in self._problem.divergence.get(names[0], {}).items():
                own = sum(self._alone(name, self._like(name, choice)) for name in names)
                if own > 0 and divergence >= 0:
                    found[names[0]] = max(found.get(names[0], 0.0), divergence / own)
        return found

    def _like(self, name: str, choice: LayerChoice) -> LayerChoice:
        """The layer's own option of that precision, its first."""
        options = self._problem.options[name]
        if choice in options:
            return choice
        return next((c for c in options if c.precision == choice.precision), options[0])

    def _item(self, g: int, candidate: GroupCandidate, weight: float) -> Item:
        first_name, first = candidate.choices[0]
        return Item(
            harm=weight * candidate.harm,
            cost=candidate.cost + self._extra.get((g, stored_type(first)), 0.0),
            kind=stored_type(first),
            is_raised=self._problem.is_raised(first_name, first),
        )

    def _split_edges(self) -> tuple[tuple[GroupEdge, ...], dict[tuple[int, str], float]]:
        """Edges between groups, those of one pair together; and what edges to layers that cannot
        change cost a group for each type that it may store."""
        joined: dict[tuple[int, int], dict[tuple[str, str], float]] = {}
        extra: dict[tuple[int, str], float] = {}
        for edge in self._problem.costs.edges:
            source, reader = self._group_of.get(edge.source), self._group_of.get(edge.reader)
            if source is not None and reader is not None:
                if source != reader:
                    sums = joined.setdefault((source, reader), {})
                    for pair, cost in edge.conversion.items():
                        sums[pair] = sums.get(pair, 0.0) + cost
            elif source is not None or reader is not None:
                self._add_extra(extra, edge, source, reader)
        edges = tuple(
            GroupEdge(source=a, reader=b, conversion=sums) for (a, b), sums in joined.items()
        )
        return edges, extra

    def _add_extra(
        self,
        extra: dict[tuple[int, str], float],
        edge: Edge,
        source: int | None,
        reader: int | None,
    ) -> None:
        fixed = stored_type(self._problem.plain[edge.reader if reader is None else edge.source])
        for (a, b), cost in edge.conversion.items():
            if source is not None and b == fixed:
                extra[source, a] = extra.get((source, a), 0.0) + cost
            elif reader is not None and a == fixed:
                extra[reader, b] = extra.get((reader, b), 0.0) + cost

    def _pairs(self, weights: Sequence[float]) -> list[Pair]:
        if not self._problem.divergence:
            return []
        found: dict[tuple[tuple[int, int], tuple[int, int]], float] = {}
        for entry in self._problem.interactions:
            ends = [
                self._candidates_of(name, choice)
                for name, choice in zip(entry.layers, entry.choices, strict=True)
            ]
            for first in ends[0]:
                for second in ends[1]:
                    if first[0] != second[0]:
                        scale = (weights[first[0]] * weights[second[0]]) ** 0.5
                        found[first, second] = scale * entry.value
        return [Pair(first=a, second=b, harm=harm) for (a, b), harm in found.items()]

    def _candidates_of(self, name: str, choice: LayerChoice) -> list[tuple[int, int]]:
        """The candidates of the layer's group that have the precision of ``choice``."""
        g = self._group_of.get(name)
        if g is None:
            return []
        return [
            (g, k)
            for k, candidate in enumerate(self.candidates[g])
            if candidate.choices[0][1].precision == choice.precision
        ]

    def _fixed(self) -> float:
        """Cost of what no group can change."""
        costs = self._problem.costs
        plain = self._problem.plain
        layers = sum(
            costs.of_layer(name, plain[name]) for name in costs.layers if name not in self._group_of
        )
        edges = 0.0
        for edge in costs.edges:
            if edge.source not in self._group_of and edge.reader not in self._group_of:
                pair = stored_type(plain[edge.source]), stored_type(plain[edge.reader])
                edges += edge.conversion.get(pair, 0.0) if pair[0] != pair[1] else 0.0
        return costs.fixed + layers + edges
