"""What all strategies keep count of: numbers, rounds, and which plans were proposed already."""

from __future__ import annotations

from qdist.search.problem import SearchProblem
from qdist.search.trial import Candidate, Choices, Settings, plan_key


class Proposals:
    """Numbers candidates from 0 and lets no plan through twice, nor more than ``max_trials``."""

    def __init__(self, problem: SearchProblem, max_trials: int) -> None:
        if max_trials < 1:
            raise ValueError(f"max_trials {max_trials} < 1")
        self._problem = problem
        self._asked: dict[str, int] = {}
        self._max_trials = max_trials
        self.round = -1

    @property
    def is_full(self) -> bool:
        """Whether no more may be proposed."""
        return len(self._asked) >= self._max_trials

    def next_round(self) -> None:
        """What is made from here on belongs to the next numbered round."""
        self.round += 1

    def number_of(self, choices: Choices, settings: Settings) -> int | None:
        """The number of the candidate that had this plan; None for a new one."""
        return self._asked.get(plan_key(choices, settings))

    def make(
        self,
        label: str,
        choices: Choices,
        *,
        settings: Settings | None = None,
        predicted: float | None = None,
        wants_layers: bool = False,
    ) -> Candidate | None:
        """The candidate of a plan; None where it was proposed before or there are enough."""
        settings = dict(settings or {})
        key = plan_key(choices, settings)
        if key in self._asked or self.is_full:
            return None
        number = self._asked[key] = len(self._asked)
        plain = self._problem.plain
        return Candidate(
            number=number,
            label=label,
            choices=dict(choices),
            changed=tuple(name for name in choices if choices[name] != plain[name]),
            round=self.round,
            predicted=predicted,
            wants_layers=wants_layers,
            settings=settings,
        )
