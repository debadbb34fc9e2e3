"""What the user says about a search, for any strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qdist.search.greedy import GreedySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """``max_trials``: the plain plan included. ``trials_per_round``: of `Pareto`, at most.
    ``n_budgets``: points of its predicted front. ``patience``: rounds in a row in which the front
    of verified trials stands still before the search is over. ``budget``: the largest cost of an
    answer, in the unit of the problem. ``target``: a score that is good enough: the cheapest plan
    that reaches it is the answer. ``clipping``: threshold methods that whole plans are tried with,
    see `qdist.search.clipping`. ``include_greedy``: run the greedy search beside, with
    ``greedy``; its trials come on top of ``max_trials``. ``options``: for other strategies."""

    max_trials: int = 12
    trials_per_round: int = 4
    n_budgets: int = 40
    patience: int = 2
    budget: float | None = None
    target: float | None = None
    clipping: tuple[str, ...] = ()
    include_greedy: bool = False
    greedy: GreedySettings = field(default_factory=GreedySettings)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.max_trials, self.trials_per_round, self.patience) < 1 or self.n_budgets < 2:
            raise ValueError("trials, rounds and patience are at least 1, budgets at least 2")
