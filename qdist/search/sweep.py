"""The predicted front of a search, solved where it is looked at.

A front of thirty budgets is thirty mixed-integer programs, of which a round verifies a handful. So
each budget is solved when it is the one that tells most, as far as is known: until then what it
costs is taken to be the budget itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from qdist.search.knapsack import Knapsack, Solution, undominated

Key: TypeAlias = tuple[float, ...]


class PredictedFront:
    """Solutions of least harm for ``n_budgets`` budgets from the cheapest choice to the least
    harmful, of those that cost at most ``limit``. Owned by one strategy; deterministic."""

    def __init__(self, knapsack: Knapsack, n_budgets: int, limit: float) -> None:
        self._knapsack = knapsack
        self._budgets: list[float] = []
        if knapsack.is_small:
            ends = knapsack.ends(limit)
            if ends:
                between = np.linspace(ends[0].cost, ends[-1].cost, n_budgets)[1:-1]
                self._budgets = [float(budget) for budget in between]
            # The solver's own sums may be off in the last digits.
            self._found = tuple(s for s in ends if s.cost <= limit)
        else:
            self._found = knapsack.front(n_budgets, limit)

    @property
    def solutions(self) -> tuple[Solution, ...]:
        """Those solved so far, both ends included: by cost, none dominated by another."""
        return self._found

    def best(
        self, is_open: Callable[[Solution], bool], key: Callable[[float], Key]
    ) -> Solution | None:
        """The solution of the largest ``key(cost)`` among those that are open; None without any."""
        while True:
            solved = [(key(s.cost), s) for s in self._found if is_open(s)]
            best = max(solved, key=lambda entry: entry[0], default=None)
            ahead = [(key(b), b) for b in self._budgets]
            guess = max(ahead, key=lambda entry: entry[0], default=None)
            if guess is None or (best is not None and best[0] >= guess[0]):
                break
            self._solve(guess[1])
        if best is None or self._knapsack.is_small:
            return None if best is None else best[1]
        exact = self._knapsack.solve(best[1].cost)
        return exact if exact is not None and is_open(exact) else best[1]

    def _solve(self, budget: float) -> None:
        self._budgets.remove(budget)
        found = self._knapsack.solve(budget)
        if found is not None:
            self._found = undominated((*self._found, found))
