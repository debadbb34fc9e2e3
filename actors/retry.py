"""What to do after something went wrong: a pure policy that knows no Ray.

Ray's own retries are switched off, since they resubmit blindly: they spend every attempt on a
node that is away for a moment, and hang when the survivors are full. Here the policy is given
what happened and answers with a decision; the pool carries it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

TRANSIENT_CODES = frozenset({"QD408"})
"""Codes of errors that may pass without anyone doing anything: the store cannot be reached."""


class Incident(Enum):
    """What happened to a task that was given to a worker."""

    WORKER_DIED = "the worker died"
    WORKER_UNAVAILABLE = "the worker could not be reached for a moment"
    TASK_RAISED = "the task raised an unexpected exception"
    TASK_TIMED_OUT = "the task ran out of time"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryElsewhere:
    """Run the task again as attempt number ``attempt``, on another worker if there is one."""

    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """Run the task again without counting an attempt; leave the worker alone for a while."""

    quarantine_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """The task has failed; ``n_attempts`` were made."""

    n_attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Postpone:
    """Run the task again in ``pause_s`` seconds, on any worker, without counting an attempt."""

    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The error is the answer to the task."""


Decision: TypeAlias = RetryElsewhere | Requeue | GiveUp
ErrorDecision: TypeAlias = Postpone | Final


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a task is tried and how long an unreachable worker is left alone.

    ``max_attempts`` bounds the attempts that count (>= 1). ``max_requeues`` bounds the requeues
    that do not count (>= 0), so that a task that takes its node down ends as well. An unreachable
    worker rests for ``backoff_s``, doubled each time in a row up to ``max_backoff_s``.

    A `QdistError` is final, since bad input stays bad, unless its code is one of
    ``transient_codes``: then the task is postponed, by the same back-off, for ``patience_s``
    seconds in all (>= 0).

    Raises `ValueError` on limits out of range.
    """

    max_attempts: int = 3
    max_requeues: int = 8
    backoff_s: float = 2.0
    max_backoff_s: float = 30.0
    transient_codes: frozenset[str] = TRANSIENT_CODES
    patience_s: float = 120.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: got {self.max_attempts}, expected 1 or more")
        if self.max_requeues < 0:
            raise ValueError(f"max_requeues: got {self.max_requeues}, expected 0 or more")
        if not 0 < self.backoff_s <= self.max_backoff_s:
            raise ValueError(
                f"backoff_s: got {self.backoff_s}, "
                f"expected more than 0 and at most max_backoff_s={self.max_backoff_s}"
            )
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s: got {self.patience_s}, expected 0 or more")

    def decide(
        self, incident: Incident, *, attempt: int, n_requeues: int = 0, n_unavailable: int = 1
    ) -> Decision:
        """Decide about the task of an incident.

        ``attempt`` is the number of the attempt that failed (from 1), ``n_requeues`` how often
        this task was requeued without counting, ``n_unavailable`` how many times in a row the
        worker could not be reached, this one included. Raises `ValueError` if ``attempt`` < 1.
        """
        if attempt < 1:
            raise ValueError(f"attempt: got {attempt}, expected 1 or more")
        if incident is Incident.WORKER_UNAVAILABLE and n_requeues < self.max_requeues:
            return Requeue(quarantine_s=self.rest_s(n_unavailable))
        if attempt < self.max_attempts:
            return RetryElsewhere(attempt=attempt + 1)
        return GiveUp(n_attempts=attempt)

    def decide_error(self, code: str, *, waited_s: float, n_in_a_row: int) -> ErrorDecision:
        """Decide about a task that was answered with the `QdistError` of ``code``.

        ``waited_s``: seconds since this task first met a transient error, 0 if this is the first;
        ``n_in_a_row``: how many times in a row it was met in this pool, this one included.
        """
        left_s = self.patience_s - waited_s
        if code not in self.transient_codes or left_s <= 0:
            return Final()
        # The last try comes when the patience ends, not a whole pause before it.
        return Postpone(pause_s=min(self.rest_s(n_in_a_row), left_s))

    def rest_s(self, n_in_a_row: int) -> float:
        """Seconds of rest after ``n_in_a_row`` failures of one worker in a row (>= 1)."""
        doublings = min(max(n_in_a_row, 1) - 1, 30)  # bounded: 2.0**1024 overflows
        return min(self.backoff_s * 2.0**doublings, self.max_backoff_s)
