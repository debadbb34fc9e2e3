"""Probe, solve, verify, correct: the default strategy.

1. *Probe*: the sensitivity of every layer to every choice, measured beforehand.
2. *Solve*: least harm for a sweep of budgets, a multiple-choice knapsack (`qdist.search.knapsack`):
   the predicted front.
3. *Verify*: the plain plan, the best that there is, both with another clipping
   (`qdist.search.clipping`: what a whole plan makes of it, layers by themselves do not tell), the
   best that costs no more than the plain, and the cheapest; then, round by round, the plans of the
   predicted front that lie in the widest gaps between verified ones (`qdist.search.gaps`), those
   first that cost less than the cheapest one that was as good as the float model. What clipping
   serves best, all plans have from there on.
4. *Correct*: verified trials tell which groups harm more or less than predicted
   (`qdist.search.correction`); the next round solves again.

It is over when the front of verified trials stands still, or the trials are used up. With a target
the rounds close in on the cheapest plan that reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from qdist.search.ahead import if_rest_fails
from qdist.search.candidates import CandidateTable
from qdist.search.clipping import PLAIN_WIDTH, RAISED, Clipping, Width
from qdist.search.correction import group_weights, losses
from qdist.search.front import Front
from qdist.search.gaps import Gaps
from qdist.search.greedy import Greedy, greedy_for
from qdist.search.knapsack import Knapsack, Solution
from qdist.search.problem import SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.trial import Candidate, Choices, Trial, choices_key

_N_FIRST = 5
"""Trials of the first round."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A plan to propose. ``harm``: what is predicted; ``before``: the plan without its clipping,
    where it has one."""

    label: str
    plan: Choices
    harm: float | None = None
    before: Choices | None = None


class Pareto:
    """The strategy. Deterministic: equal problems, settings and trials give equal proposals."""

    def __init__(self, problem: SearchProblem, settings: SearchSettings) -> None:
        self._problem = problem
        self._settings = settings
        self._table = CandidateTable(problem)
        self._clipping = Clipping(problem, settings.clipping)
        self._weights = [1.0] * len(problem.groups)
        self._trials: dict[str, Trial] = {}
        self._unclipped: dict[str, Choices] = {}
        self._numbers: dict[str, int] = {}
        self._n_own = 0
        self._round = 0
        self._idle = 0
        self._front = Front(unit=problem.costs.unit, higher_is_better=problem.higher_is_better)
        self._predicted: tuple[Solution, ...] = ()
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
        """The front that the last round solved for."""
        return self._predicted

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
        self._clipping.tell(self._trials)
        self._weights = self._refitted()
        self._tell_greedy()

    def speculate(self, finished: Sequence[Trial], running: Sequence[Candidate]) -> list[Candidate]:
        """The next round, if what still runs brings nothing."""
        shared = (self._problem, self._settings, *self._trials.values())
        return if_rest_fails(self, finished, running, shared)

    def _refitted(self) -> list[float]:
        """The weights of the groups, by all trials. What clipping harms is no group's own: a
        clipped plan counts as it was before, and one whose clipping did not help not at all."""
        told = {k: t for k, t in self._trials.items() if not self._clipping.is_lost(k)}
        plans = (self._unclipped.get(k, t.candidate.choices) for k, t in told.items())
        return group_weights(
            [self._table.harms_of(plan) for plan in plans],
            losses(list(told.values()), self._problem.float_score),
            len(self._problem.groups),
        )

    def _is_over(self) -> bool:
        return self._n_own >= self._settings.max_trials or self._idle >= self._settings.patience

    def _own(self) -> list[Candidate]:
        knapsack = self._table.knapsack(self._weights)
        limit = math.inf if self._settings.budget is None else self._settings.budget
        self._predicted = knapsack.front(self._settings.n_budgets, limit)
        found: list[Candidate] = []
        if self._round == 0:
            plain = self._problem.plain
            self._add(found, _Wanted("plain", plain, self._table.harm_of(plain)))
            for wanted in self._first(knapsack, limit):
                self._add(found, wanted)
                if len(found) >= _N_FIRST:
                    break
            self._fill(found, knapsack, _N_FIRST)
        else:
            size = self._settings.trials_per_round
            self._fill(found, knapsack, min(1, size - 1))
            for width in (PLAIN_WIDTH, RAISED):
                if len(found) < size:
                    for wanted in self._clipped(width):
                        self._add(found, wanted)
            self._fill(found, knapsack, size)
        return found

    def _fill(self, found: list[Candidate], knapsack: Knapsack, n: int) -> None:
        """Add plans of the predicted front until there are ``n``."""
        while len(found) < n:
            wanted = self._next(knapsack, found)
            if wanted is None or not self._add(found, wanted):
                break

    def _first(self, knapsack: Knapsack, limit: float) -> Iterator[_Wanted]:
        """What is verified first beside the plain plan: the best that the options have, the best
        that costs no more than the plain plan, the plain and the best one with another clipping,
        and the other end of the front."""
        problem, table = self._problem, self._table
        plain_cost = problem.cost(problem.plain)
        if self._predicted:
            best = self._predicted[-1]
            plan = table.choices(best.picks)
            for width in (PLAIN_WIDTH, RAISED):
                self._clipping.refer(width, "least harm", plan)
            yield _Wanted("least harm", plan, best.harm)
        if plain_cost <= limit:
            other = table.other_method()
            methods = () if other is None else (other,)
            self._clipping.refer(PLAIN_WIDTH, "", problem.plain, methods)
        yield from self._clipped(PLAIN_WIDTH)
        free = knapsack.solve(min(limit, plain_cost))
        if free is not None:
            yield _Wanted("least harm at no more cost", table.choices(free.picks), free.harm)
        yield from self._clipped(RAISED)
        if self._predicted:
            last = self._predicted[0]
            yield _Wanted("cheapest", table.choices(last.picks), last.harm)

    def _clipped(self, width: Width) -> Iterator[_Wanted]:
        """The plan that stands for a width with another clipping, where there is one to try."""
        found = self._clipping.next(width)
        if found is not None:
            label, plan, before = found
            yield _Wanted(label, plan, self._table.harm_of(before), before)

    def _next(self, knapsack: Knapsack, found: list[Candidate]) -> _Wanted | None:
        """The unseen plan of the predicted front that tells most."""
        open_ = [s for s in self._predicted if not self._is_seen(self._wanted(s).plan)]
        if not open_ or self._n_own >= self._settings.max_trials:
            return None
        gaps, plain_cost = self._gaps(found), self._problem.cost(self._problem.plain)

        def worth(cost: float) -> float:
            # Beyond the plain plan, what costs twice as much is wanted half as much.
            return gaps.worth(cost) * (plain_cost / cost if 0 < plain_cost < cost else 1.0)

        best = max(open_, key=lambda s: (self._is_wanted(s), worth(s.cost), -s.cost))
        exact = knapsack.solve(best.cost)
        if exact is not None and not self._is_seen(self._wanted(exact).plan):
            best = exact
        return self._wanted(best)

    def _gaps(self, found: list[Candidate]) -> Gaps:
        """Between all trials, and what is proposed with them. With a target, costs alone count: on
        its two sides the search closes in."""
        told = list(self._trials.values())
        costs = (self._problem.cost(trial.candidate.choices) for trial in told)
        lost = losses(told, self._problem.float_score)
        predicted = ((solution.cost, solution.harm) for solution in self._predicted)
        if self._settings.target is None:
            gaps = Gaps.of(zip(costs, lost, strict=True), predicted)
        else:
            gaps = Gaps.of((cost, None) for cost in costs)
        for candidate in found:
            gaps = gaps.with_plan(self._problem.cost(candidate.choices))
        return gaps

    def _is_wanted(self, solution: Solution) -> bool:
        """Whether a plan lies where there is something to be found. Beyond a plan that is as good
        as the float model, or as the target, there is nothing; nor, with a target, below one that
        misses it."""
        target, low = self._settings.target, 0.0
        gain = self._front.gain
        if target is not None:
            failed = [p.cost for p in self._front.points if gain(p.score) < gain(target)]
            low = max(failed, default=0.0)
        enough = self._problem.float_score if target is None else target
        if enough is None:
            return True
        met = [p.cost for p in self._front.points if gain(p.score) >= gain(enough)]
        return low < solution.cost < min(met, default=math.inf)

    def _wanted(self, solution: Solution) -> _Wanted:
        """A plan of the front, clipped as serves best."""
        plan = self._table.choices(solution.picks)
        label = cost_text(self._problem.costs.unit, solution.cost)
        return _Wanted(label, self._clipping.of(plan), solution.harm, plan)

    def _is_seen(self, choices: Choices) -> bool:
        return choices_key(choices) in self._numbers

    def _add(self, found: list[Candidate], wanted: _Wanted) -> bool:
        """Propose a plan of our own, if it is new and there is a trial left for it."""
        if self._n_own >= self._settings.max_trials or self._is_seen(wanted.plan):
            return False
        candidate = self._candidate(wanted.label, wanted.plan, wanted.harm)
        if wanted.before is not None:
            self._unclipped[candidate.key] = wanted.before
        found.append(candidate)
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
