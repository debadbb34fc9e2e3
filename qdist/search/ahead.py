"""What a strategy is likely to ask for next, before a round has ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Protocol, runtime_checkable

from qdist.search.trial import Candidate, Strategy, Trial


@runtime_checkable
class Foresighted(Protocol):
    """A strategy that can say what it may ask for next. Optional: without it, workers that are idle
    at the end of a round wait."""

    def speculate(self, finished: Sequence[Trial], running: Sequence[Candidate]) -> list[Candidate]:
        """Candidates of the next round, the likeliest first, where of the current one some are
        finished and others still run. Must not change the strategy. What is run ahead is scored
        and kept, and counts as a trial only once it is asked for."""
        ...


def if_rest_fails(
    strategy: Strategy,
    finished: Sequence[Trial],
    running: Sequence[Candidate],
    shared: Iterable[object] = (),
) -> list[Candidate]:
    """What a copy of ``strategy`` asks for next if the trials that still run bring nothing. For
    strategies that hold nothing outside of themselves. ``shared``: what the copy need not have of
    its own, since nobody changes it."""
    lost = [
        Trial(candidate=candidate, report=None, n_bytes=0, reason="still running")
        for candidate in running
    ]
    copy = deepcopy(strategy, {id(entry): entry for entry in shared})
    copy.tell([*finished, *lost])
    return copy.ask()
