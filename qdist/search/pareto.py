"""Probe, solve, verify, correct: the default strategy.

1. *Probe*: the sensitivity of every layer to every choice, measured beforehand.
2. *Solve*: least harm for a sweep of budgets, a multiple-choice knapsack (`qdist.search.knapsack`):
   the predicted front.
3. *Verify*: the plain plan, the best that there is, the best that costs no more than the plain,
   the plain one with the threshold method that comes next (what a whole plan makes of a method,
   layers by themselves do not tell), and the cheapest; then, round by round, the plans of the
   predicted front that lie in the widest gaps between verified ones (`qdist.search.gaps`), those
   first that cost less than the cheapest one that was as good as the float model.
4. *Correct*: verified trials tell which groups harm more or less than predicted
   (`qdist.search.correction`); the next round solves again.

It is over when the front of verified trials stands still, or the trials are used up. With a target
the rounds close in on the cheapest plan that reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from qdist.search.ahead import if_rest_fails
from qdist.search.candidates import CandidateTable
from qdist.search.correction import group_weights, losses
from qdist.search.front import Front
from qdist.search.gaps import Gaps
from qdist.search.greedy import Greedy, greedy_for
from qdist.search.knapsack import Knapsack, Solution
from qdist.search.problem import SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.sweep import PredictedFront
from qdist.search.trial import Candidate, Choices, Trial, choices_key


class Pareto:
    """The strategy. Deterministic: equal problems, settings and trials give equal proposals."""

    def __init__(self, problem: SearchProblem, settings: SearchSettings) -> None:
        self._problem = problem
        self._settings = settings
        self._table = CandidateTable(problem)
        self._weights = [1.0] * len(problem.groups)
        self._trials: dict[str, Trial] = {}
        self._numbers: dict[str, int] = {}
        self._n_own = 0
        self._round = 0
        self._idle = 0
        self._front = Front(unit=problem.costs.unit, higher_is_better=problem.higher_is_better)
        self._predicted: PredictedFront | None = None
        self._greedy: Greedy | None = None
        self._greedy_asked: list[Candidate] = []
        if settings.include_greedy:
            self._greedy = greedy_for(problem, settings.greedy)

    @property
    def front(self) -> Front:
        """Of all trials so far."""
        return self._front

    @property
    def predicted(self) -> tuple[Solution, ...]:
        """What the last round solved of its front."""
        return () if self._predicted is None else self._predicted.solutions

    def ask(self) -> list[Candidate]:
        """The next round; empty when the search is over."""
        own = [] if self._is_over() else self._own()
        beside = self._from_greedy()
        self._round += 1
        return [*own, *beside]

    def tell(self, trials: Iterable[Trial]) -> None:
        """All trials of the last round, in any order."""
        before = self._front.key
        for trial in sorted(trials, key=lambda trial: trial.candidate.number):
            self._trials[trial.candidate.key] = trial
            cost = self._problem.cost(trial.candidate.choices)
            self._front = self._front.with_trial(trial, cost)
        self._idle = 0 if self._front.key != before else self._idle + 1
        told = list(self._trials.values())
        self._weights = group_weights(
            [self._table.harms_of(trial.candidate.choices) for trial in told],
            losses(told, self._problem.float_score),
            len(self._problem.groups),
        )
        self._tell_greedy()

    def speculate(self, finished: Sequence[Trial], running: Sequence[Candidate]) -> list[Candidate]:
        """The next round, if what still runs brings nothing."""
        shared = (self._problem, self._settings, *self._trials.values())
        return if_rest_fails(self, finished, running, shared)

    def answer(self) -> Trial | None:
        """The best trial so far, by the target and the budget of the settings."""
        return self._front.best(target=self._settings.target, budget=self._settings.budget)

    def _is_over(self) -> bool:
        return self._n_own >= self._settings.max_trials or self._idle >= self._settings.patience

    def _own(self) -> list[Candidate]:
        knapsack = self._table.knapsack(self._weights)
        limit = math.inf if self._settings.budget is None else self._settings.budget
        self._predicted = PredictedFront(knapsack, self._settings.n_budgets, limit)
        found: list[Candidate] = []
        if self._round == 0:
            self._add(found, "plain", self._problem.plain, None)
            for label, choices, harm in self._first(knapsack, limit):
                self._add(found, label, choices, harm)
        while len(found) < self._settings.trials_per_round:
            picked = self._next(self._predicted, found)
            if picked is None or not self._add(found, *picked):
                break
        return found

    def _first(self, knapsack: Knapsack, limit: float) -> Iterator[tuple[str, Choices, float]]:
        """What is verified first beside the plain plan: the best that the options have, the best
        that costs no more than the plain plan, the plain plan with another threshold method, and
        the other end of the front."""
        plain_cost = self._problem.cost(self._problem.plain)
        ends = self.predicted
        if ends:
            yield "least harm", self._choices(ends[-1]), ends[-1].harm
        free = knapsack.solve(min(limit, plain_cost))
        if free is not None:
            yield "least harm at no more cost", self._choices(free), free.harm
        other = self._table.other_method() if plain_cost <= limit else None
        if other is not None:
            yield f"{other[0]} everywhere", other[1], sum(self._table.harms_of(other[1]))
        if ends:
            yield "cheapest", self._choices(ends[0]), ends[0].harm

    def _next(
        self, predicted: PredictedFront, found: list[Candidate]
    ) -> tuple[str, Choices, float] | None:
        """The unseen plan of the predicted front that tells most."""
        if self._n_own >= self._settings.max_trials:
            return None
        gaps, low, high = self._gaps(found), *self._wanted_costs()
        best = predicted.best(
            lambda solution: not self._is_seen(self._choices(solution)),
            lambda cost: (low < cost < high, gaps.worth(cost), -cost),
        )
        if best is None:
            return None
        label = cost_text(self._problem.costs.unit, best.cost)
        return label, self._choices(best), best.harm

    def _gaps(self, found: list[Candidate]) -> Gaps:
        """Between all trials, and what is proposed with them."""
        told = list(self._trials.values())
        costs = (self._problem.cost(trial.candidate.choices) for trial in told)
        lost = losses(told, self._problem.float_score)
        gaps = Gaps.of(zip(costs, lost, strict=True))
        for candidate in found:
            gaps = gaps.with_plan(self._problem.cost(candidate.choices))
        return gaps

    def _wanted_costs(self) -> tuple[float, float]:
        """Between which costs there is something to be found. Beyond a plan that is as good as the
        float model, or as the target, there is nothing; nor, with a target, below one that misses
        it."""
        target, low = self._settings.target, 0.0
        gain = self._front.gain
        if target is not None:
            failed = [p.cost for p in self._front.points if gain(p.score) < gain(target)]
            low = max(failed, default=0.0)
        enough = self._problem.float_score if target is None else target
        if enough is None:
            return -math.inf, math.inf
        met = [p.cost for p in self._front.points if gain(p.score) >= gain(enough)]
        return low, min(met, default=math.inf)

    def _choices(self, solution: Solution) -> Choices:
        return self._table.choices(solution.picks)

    def _is_seen(self, choices: Choices) -> bool:
        return choices_key(choices) in self._numbers

    def _add(
        self, found: list[Candidate], label: str, choices: Choices, predicted: float | None
    ) -> bool:
        """Propose a plan of our own, if it is new and there is a trial left for it."""
        if self._n_own >= self._settings.max_trials or self._is_seen(choices):
            return False
        found.append(self._candidate(label, choices, predicted))
        self._n_own += 1
        return True

    def _candidate(self, label: str, choices: Choices, predicted: float | None) -> Candidate:
        plain = self._problem.plain
        names = (layer.name for layer in self._problem.layers)
        candidate = Candidate(
            number=len(self._numbers),
            label=label,
            choices=choices,
            changed=tuple(name for name in names if choices[name] != plain[name]),
            round=self._round,
            predicted=predicted,
        )
        self._numbers[candidate.key] = candidate.number
        return candidate

    def _from_greedy(self) -> list[Candidate]:
        """What the greedy search asks for and nobody has tried."""
        while self._greedy is not None:
            self._greedy_asked = self._greedy.ask()
            if not self._greedy_asked:
                self._greedy = None
                break
            new = [
                # Its numbers of trials are its own.
                self._candidate(f"greedy: {asked.label.split(' + ')[-1]}", asked.choices, None)
                for asked in self._greedy_asked
                if asked.key not in self._numbers
            ]
            if new or any(asked.key not in self._trials for asked in self._greedy_asked):
                return new
            self._tell_greedy()
        return []

    def _tell_greedy(self) -> None:
        if self._greedy is None or not self._greedy_asked:
            return
        self._greedy.tell(
            replace(self._trials[asked.key], candidate=asked) for asked in self._greedy_asked
        )
        self._greedy_asked = []


def cost_text(unit: str, cost: float) -> str:
    """A cost in words, for a unit of `qdist.search.costs.Costs`.

    >>> cost_text("bytes", 98690), cost_text("bit_operations", 2.5e9), cost_text("latency", 12)
    ('98.69 kB of weights', '2.5 G bit operations', '12 us')
    """
    if unit == "latency":
        return f"{cost:.4g} us"
    steps = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, prefix = next(((s, p) for s, p in steps if cost >= s), (1.0, ""))
    what = f"{prefix}B of weights" if unit == "bytes" else f"{prefix} bit operations".lstrip()
    return f"{cost / size:.4g} {what}"
