"""The Pareto front of verified trials, score against cost: the state of a search at any time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from qdist.search.problem import SearchProblem
from qdist.search.trial import Trial, best_of


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """A trial with a score, and what its plan costs in the unit of the problem."""

    trial: Trial
    score: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """``points``: verified trials, by rising cost, each with a better score than all cheaper ones.

    Adding trials in any order gives the same front; of equal ones the earlier number stays.
    """

    points: tuple[FrontPoint, ...] = ()
    unit: str = "bytes"
    higher_is_better: bool = True

    @classmethod
    def of(cls, trials: Iterable[Trial], problem: SearchProblem) -> Front:
        """Of all trials that have a score."""
        front = cls(unit=problem.costs.unit, higher_is_better=problem.higher_is_better)
        for trial in trials:
            front = front.with_trial(trial, problem.cost(trial.candidate.choices))
        return front

    def with_trial(self, trial: Trial, cost: float) -> Front:
        """The front with one more trial; the same one where that is dominated, was not scored to
        its end, or has no score."""
        report = trial.report
        if report is None or report.stopped_early or math.isnan(report.score):
            return self
        new = FrontPoint(trial=trial, score=report.score, cost=cost)
        kept: list[FrontPoint] = []
        for point in sorted((*self.points, new), key=self._order):
            if not kept or self.gain(point.score) > self.gain(kept[-1].score):
                kept.append(point)
        return Front(points=tuple(kept), unit=self.unit, higher_is_better=self.higher_is_better)

    def gain(self, score: float) -> float:
        """The score, such that larger is better."""
        return score if self.higher_is_better else -score

    def best(self, *, target: float | None = None, budget: float | None = None) -> Trial | None:
        """The trial of the best score, or with ``target`` the cheapest whose score is as good;
        among those that cost at most ``budget``, where any does. None without points. Where none
        reaches the target, the best score. Of equal scores the front has the cheapest alone."""
        within = [p for p in self.points if budget is None or p.cost <= budget]
        points = within or list(self.points)
        if not points:
            return None
        if target is not None:
            for point in points:
                if self.gain(point.score) >= self.gain(target):
                    return point.trial
        return points[-1].trial

    def rows(self) -> list[dict[str, Any]]:
        """As a table: number, label, score, cost."""
        return [
            {
                "trial": point.trial.candidate.number,
                "label": point.trial.candidate.label,
                "score": point.score,
                "cost": point.cost,
            }
            for point in self.points
        ]

    @property
    def key(self) -> tuple[tuple[float, float], ...]:
        """Equal keys mean that the front did not move."""
        return tuple((point.cost, point.score) for point in self.points)

    def _order(self, point: FrontPoint) -> tuple[float, float, int]:
        return point.cost, -self.gain(point.score), point.trial.candidate.number


def front_of(trials: Iterable[Trial], cost: Callable[[Trial], float] | None = None) -> list[Trial]:
    """Trials that no other beats in score without costing more, the cheapest first.

    ``cost``: of a trial; None: the bytes of its artifact. Among equals the earlier one is kept;
    trials without a score are never on the front.
    """
    price = cost or (lambda trial: float(trial.n_bytes))
    front = Front()
    for trial in trials:
        if trial.report is not None:
            front = replace(front, higher_is_better=trial.report.higher_is_better)
            front = front.with_trial(trial, price(trial))
    return [point.trial for point in front.points]


def answer_of(
    trials: Iterable[Trial],
    problem: SearchProblem,
    *,
    target: float | None = None,
    budget: float | None = None,
) -> Trial | None:
    """What a search ends with: the best trial (`best_of`), with a budget of those that cost no more
    (where any has a score), or with a target what the front has for it (`Front.best`). None where
    no trial succeeded."""
    found = list(trials)
    if target is not None:
        return Front.of(found, problem).best(target=target, budget=budget)
    within = [t for t in found if budget is None or problem.cost(t.candidate.choices) <= budget]
    return best_of(within) or best_of(found)
