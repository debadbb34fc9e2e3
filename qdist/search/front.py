"""The Pareto front of verified trials."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qdist.search.trial import Trial


def front_of(trials: Iterable[Trial], cost: Callable[[Trial], float] | None = None) -> list[Trial]:
    """Trials that no other beats in score without costing more, the cheapest first.

    ``cost``: of a trial; None: the bytes of its artifact. Among equals the earlier one is kept;
    trials without a score are never on the front.
    """
    price = cost or (lambda trial: float(trial.n_bytes))
    scored = [trial for trial in trials if trial.report is not None]
    scored.sort(key=lambda trial: (price(trial), -trial.rank[0], trial.candidate.number))
    front: list[Trial] = []
    for trial in scored:
        if not front or trial.rank[0] > front[-1].rank[0]:
            front.append(trial)
    return front
