"""The multiple-choice knapsack: one candidate for every group, least harm within a budget.

Minimize the sum of harms, where costs add up to at most the budget, with a cost for every edge
between groups whose candidates store different number types, harms of pairs, and rows that a target
asks for. Solved by SciPy's HiGHS (Huangfu and Hall 2018) as a mixed-integer program.

An edge is a transport problem: ``y[a, b]`` is 1 where the source has type a and the reader b, rows
sum to what the source has and columns to what the reader has. So the relaxation is tight, and the y
need not be integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from qdist.search.lagrange import spread, swept
from qdist.search.solver_output import without_stray_lines

GAP = 1e-4
"""Relative distance to the optimum at which the solver may stop."""
_ROUGH_GAP = 1e-2
"""The same for what fills the holes of a swept front."""
_HOLE = 1.5
"""So many times the usual step in the logarithm of cost is a hole."""
_MOST_HOLES = 4
"""Of the widest, since each takes an exact solution."""
EXACT_ITEMS = 400
"""Candidates in all up to which a front is solved budget by budget."""
_INFINITE = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A candidate of a group. ``harm`` and ``cost`` are finite, ``cost`` not negative; ``kind``:
    the number type that it stores; ``is_raised``: whether it has more activation bits than the
    plain plan."""

    harm: float
    cost: float
    kind: str = ""
    is_raised: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEdge:
    """Values from one group to another, by index. ``conversion``: (kind, other kind) -> cost."""

    source: int
    reader: int
    conversion: Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What candidates of two groups harm beyond what each does: ``first`` and ``second`` are
    (group, candidate)."""

    first: tuple[int, int]
    second: tuple[int, int]
    harm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """``picks``: for each group the index of its candidate."""

    picks: tuple[int, ...]
    harm: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Knapsack:
    """``groups``: their candidates. ``implied``: (group, other): where the one is raised, so is the
    other. ``fixed``: cost of all else."""

    groups: tuple[tuple[Item, ...], ...]
    edges: tuple[GroupEdge, ...] = ()
    pairs: tuple[Pair, ...] = ()
    implied: tuple[tuple[int, int], ...] = ()
    fixed: float = 0.0
    _program: list[_Program] = field(default_factory=list, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not all(self.groups):
            raise ValueError("every group needs a candidate")
        if not all(np.isfinite((i.harm, i.cost)).all() for group in self.groups for i in group):
            raise ValueError("harms and costs are finite")

    @property
    def n_items(self) -> int:
        """Candidates of all groups."""
        return sum(map(len, self.groups))

    def harm(self, picks: Sequence[int]) -> float:
        """The harm of a whole choice."""
        alone = sum(group[k].harm for group, k in zip(self.groups, picks, strict=True))
        return alone + sum(
            pair.harm
            for pair in self.pairs
            if all(picks[g] == k for g, k in (pair.first, pair.second))
        )

    def cost(self, picks: Sequence[int]) -> float:
        """The cost of a whole choice."""
        kinds = [group[k].kind for group, k in zip(self.groups, picks, strict=True)]
        alone = sum(group[k].cost for group, k in zip(self.groups, picks, strict=True))
        return (
            self.fixed
            + alone
            + sum(e.conversion.get((kinds[e.source], kinds[e.reader]), 0.0) for e in self.edges)
        )

    def is_allowed(self, picks: Sequence[int]) -> bool:
        """Whether the rows of the target hold."""
        raised = [group[k].is_raised for group, k in zip(self.groups, picks, strict=True)]
        return all(raised[b] or not raised[a] for a, b in self.implied)

    def solve(
        self, budget: float = _INFINITE, *, cheapest: bool = False, gap: float = GAP
    ) -> Solution | None:
        """The least harm whose cost is at most ``budget``, to within ``gap`` of it; None where
        nothing fits. ``cheapest``: the least cost instead. Of equal ones, always the same."""
        if not self.groups:
            return Solution(picks=(), harm=0.0, cost=self.fixed) if self.fixed <= budget else None
        if not self._program:
            self._program.append(_Program(self))
        picks = self._program[0].solve(budget, cheapest=cheapest, gap=gap)
        if picks is None:
            return None
        return Solution(picks=picks, harm=self.harm(picks), cost=self.cost(picks))

    def front(self, n_budgets: int, budget: float = _INFINITE) -> tuple[Solution, ...]:
        """Solutions of least harm from the cheapest choice to the least harmful, for some
        ``n_budgets`` budgets between them, each the same factor from the next, at most ``budget``;
        by cost, none dominated by another.

        Exact for small knapsacks; large ones are swept by `qdist.search.lagrange` in between, and
        the widest holes that this leaves are filled.
        """
        low = self.solve(budget, cheapest=True)
        high = self.solve(budget)
        if low is None or high is None:
            return ()
        # Of all choices of the least cost, the one of least harm.
        low = self.solve(low.cost) or low
        found = [low, high]
        if self.n_items <= EXACT_ITEMS or self.implied:
            budgets = spread(low.cost, high.cost, n_budgets - 2)
            found += [s for s in (self.solve(float(step)) for step in budgets) if s is not None]
        else:
            for picks in swept(self, n_budgets):
                found.append(Solution(picks=picks, harm=self.harm(picks), cost=self.cost(picks)))
            found += self._in_holes(undominated(found), n_budgets)
        return undominated(s for s in found if s.cost <= budget)

    def _in_holes(self, front: Sequence[Solution], n_budgets: int) -> Iterable[Solution]:
        """Solutions in the middle of the widest holes: where conversions tie groups together, a
        price turns many at once, and no price finds what lies between."""
        if len(front) < 2 or front[0].cost <= 0:
            return
        usual = math.log(front[-1].cost / front[0].cost) / max(1, n_budgets - 1)
        holes = [(math.log(b.cost / a.cost), a.cost) for a, b in pairwise(front)]
        for width, start in sorted(holes, reverse=True)[:_MOST_HOLES]:
            if width > _HOLE * usual:
                found = self.solve(start * math.exp(width / 2), gap=_ROUGH_GAP)
                if found is not None:
                    yield found


def undominated(solutions: Iterable[Solution]) -> tuple[Solution, ...]:
    """By cost, those that harm less than every cheaper one."""
    kept: list[Solution] = []
    for solution in sorted(solutions, key=lambda s: (s.cost, s.harm, s.picks)):
        if not kept or solution.harm < kept[-1].harm:
            kept.append(solution)
    return tuple(kept)


class _Program:
    """The mixed-integer program of a knapsack; only the budget differs from solve to solve."""

    def __init__(self, knapsack: Knapsack) -> None:
        self._knapsack = knapsack
        self._kept = _kept(knapsack)
        self._column: dict[tuple[int, int], int] = {}
        for g, kept in enumerate(self._kept):
            for k in kept:
                self._column[g, k] = len(self._column)
        self._n = len(self._column)
        groups = knapsack.groups
        self._harms = [groups[g][k].harm for g, k in self._column]
        self._costs = [groups[g][k].cost for g, k in self._column]
        self._rows: list[tuple[dict[int, float], float, float]] = []
        for g, kept in enumerate(self._kept):
            self._rows.append(({self._column[g, k]: 1.0 for k in kept}, 1.0, 1.0))
        self._add_edges()
        self._add_pairs()
        self._add_implied()
        self._matrix = self._built()

    def solve(self, budget: float, *, cheapest: bool, gap: float) -> tuple[int, ...] | None:
        harms = np.array(self._harms)
        costs = np.array(self._costs)
        scale = float(np.abs(costs).max()) or 1.0
        constraints = [self._matrix]
        room = budget - self._knapsack.fixed
        if room != _INFINITE:
            # What is summed in another order must not miss its own budget.
            room += 1e-9 * max(abs(budget), scale)
            constraints.append(LinearConstraint(csr_matrix(costs / scale), -np.inf, room / scale))
        target = costs if cheapest else harms
        top = float(np.abs(target).max()) or 1.0
        integrality = np.zeros(len(harms))
        integrality[: self._n] = 1
        with without_stray_lines():
            result = milp(
                target / top,
                integrality=integrality,
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": gap},
            )
        if result.x is None:
            return None
        x: NDArray[np.float64] = result.x
        return tuple(
            max(kept, key=lambda k, g=g: (x[self._column[g, k]], -k))  # type: ignore[misc]
            for g, kept in enumerate(self._kept)
        )

    def _new(self, harm: float = 0.0, cost: float = 0.0) -> int:
        self._harms.append(harm)
        self._costs.append(cost)
        return len(self._harms) - 1

    def _by_kind(self, g: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for k in self._kept[g]:
            found.setdefault(self._knapsack.groups[g][k].kind, []).append(self._column[g, k])
        return found

    def _add_edges(self) -> None:
        for edge in self._knapsack.edges:
            sources, readers = self._by_kind(edge.source), self._by_kind(edge.reader)
            costs = {(a, b): edge.conversion.get((a, b), 0.0) for a in sources for b in readers}
            if not any(costs.values()):
                continue
            if len({*sources, *readers}) == 2 and not any(costs.get((a, a)) for a in sources):
                self._add_switch(sources, readers, costs)
                continue
            flows = {pair: self._new(cost=cost) for pair, cost in costs.items()}
            for position, ends in enumerate((sources, readers)):
                for kind, columns in ends.items():
                    row = {flows[pair]: 1.0 for pair in flows if pair[position] == kind}
                    self._rows.append((row | dict.fromkeys(columns, -1.0), 0.0, 0.0))

    def _add_switch(
        self,
        sources: Mapping[str, list[int]],
        readers: Mapping[str, list[int]],
        costs: Mapping[tuple[str, str], float],
    ) -> None:
        """Of two types, what is y[a, b] in the transport problem is what the source has of a beyond
        what the reader has: half of the columns and rows, and as tight."""
        for (a, b), cost in costs.items():
            if a != b and cost > 0:
                row = dict.fromkeys(sources[a], 1.0) | dict.fromkeys(readers.get(a, ()), -1.0)
                self._rows.append(({**row, self._new(cost=cost): -1.0}, -np.inf, 0.0))

    def _add_pairs(self) -> None:
        for pair in self._knapsack.pairs:
            x, z = self._column[pair.first], self._column[pair.second]
            both = self._new(harm=pair.harm)
            if pair.harm > 0:
                self._rows.append(({x: 1.0, z: 1.0, both: -1.0}, -np.inf, 1.0))
            else:
                self._rows.append(({both: 1.0, x: -1.0}, -np.inf, 0.0))
                self._rows.append(({both: 1.0, z: -1.0}, -np.inf, 0.0))

    def _add_implied(self) -> None:
        groups = self._knapsack.groups
        for a, b in self._knapsack.implied:
            row = {self._column[a, k]: 1.0 for k in self._kept[a] if groups[a][k].is_raised}
            for k in self._kept[b]:
                if groups[b][k].is_raised:
                    row[self._column[b, k]] = row.get(self._column[b, k], 0.0) - 1.0
            self._rows.append((row, -np.inf, 0.0))

    def _built(self) -> LinearConstraint:
        entries = [(i, j, v) for i, (row, _, _) in enumerate(self._rows) for j, v in row.items()]
        rows, columns, values = zip(*entries, strict=True)
        shape = (len(self._rows), len(self._harms))
        matrix = csr_matrix((values, (rows, columns)), shape=shape)
        return LinearConstraint(matrix, [row[1] for row in self._rows], [r[2] for r in self._rows])


def _kept(knapsack: Knapsack) -> list[list[int]]:
    """For each group the candidates that may be in a best choice: not those that another one of the
    same kind, in no pair itself, undercuts in harm and in cost."""
    paired = {end for pair in knapsack.pairs for end in (pair.first, pair.second)}
    kept: list[list[int]] = []
    for g, group in enumerate(knapsack.groups):
        order = sorted(range(len(group)), key=lambda k: (group[k].cost, group[k].harm, k))
        found: list[int] = []
        least: dict[tuple[str, bool], float] = {}
        for k in order:
            like = (group[k].kind, group[k].is_raised)
            if (g, k) in paired or group[k].harm < least.get(like, _INFINITE):
                found.append(k)
            if (g, k) not in paired:
                least[like] = min(group[k].harm, least.get(like, _INFINITE))
        kept.append(sorted(found))
    return kept
