"""The strategies by name, and the user's own.

A strategy of the user's is a class in a file of theirs, ``search.strategy=FILE.py:Class``::

    class Mine:
        def __init__(self, problem, settings): ...   # SearchProblem, SearchSettings
        def ask(self): ...                           # -> list[Candidate]; [] when it is over
        def tell(self, trials): ...                  # all trials of the last round

It proposes rounds; candidate 0 should be the plain plan, numbers count up, and what it proposes
should depend on told trials alone (`qdist.search.trial.Strategy`).
"""

from __future__ import annotations

from collections.abc import Callable

from qdist.errors import ConfigError
from qdist.search.greedy import greedy_for
from qdist.search.pareto import Pareto
from qdist.search.problem import SearchProblem
from qdist.search.settings import SearchSettings
from qdist.search.trial import Strategy
from qdist.search.vendors import icraft, smart_search
from qdist.targets import load_target

StrategyMaker = Callable[[SearchProblem, SearchSettings], Strategy]


def _greedy(problem: SearchProblem, settings: SearchSettings) -> Strategy:
    return greedy_for(problem, settings.greedy)


STRATEGIES: dict[str, StrategyMaker] = {
    "pareto": Pareto,
    "greedy": _greedy,
    "icraft": icraft,
    "smart_search": smart_search,
}
"""Name -> what makes the strategy of a problem and settings."""


def check_strategy(name: str) -> StrategyMaker:
    """What makes the strategy of that name, or the user's class of ``FILE.py:Class`` or
    ``module:Class``. Raises QD104 for an unknown name, QD108 for a class that cannot be loaded."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        raise ConfigError(
            "QD104",
            where="search.strategy",
            got=repr(name),
            expected=f"{', '.join(STRATEGIES)}, or FILE.py:Class",
            mend="choose one of these, or name a class of your own",
        )
    made: StrategyMaker = load_target(name)
    for method in ("ask", "tell"):
        if not callable(getattr(made, method, None)):
            raise ConfigError(
                "QD108",
                where=f"search.strategy={name}",
                got=f"no method {method}",
                expected="a class with ask() and tell(trials)",
                mend="write both; docs/search.md shows them",
            )
    return made


def make_strategy(name: str, problem: SearchProblem, settings: SearchSettings) -> Strategy:
    """A strategy for a problem. Raises as `check_strategy`."""
    return check_strategy(name)(problem, settings)
