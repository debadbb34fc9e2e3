"""The retry policy, which knows no Ray."""

from __future__ import annotations

from typing import Any

import pytest

from actors.retry import GiveUp, Incident, Requeue, RetryElsewhere, RetryPolicy


def test_policy_counts_deaths_exceptions_and_timeouts() -> None:
    policy = RetryPolicy(max_attempts=3)
    for incident in (Incident.WORKER_DIED, Incident.TASK_RAISED, Incident.TASK_TIMED_OUT):
        decisions = [policy.decide(incident, attempt=attempt) for attempt in (1, 2, 3)]
        assert decisions == [
            RetryElsewhere(attempt=2),
            RetryElsewhere(attempt=3),
            GiveUp(n_attempts=3),
        ]


def test_policy_does_not_count_an_unreachable_worker_but_rests_it() -> None:
    policy = RetryPolicy(max_attempts=1, max_requeues=4, backoff_s=2, max_backoff_s=10)
    rests = [
        policy.decide(Incident.WORKER_UNAVAILABLE, attempt=1, n_requeues=n, n_unavailable=n + 1)
        for n in range(4)
    ]
    assert rests == [Requeue(quarantine_s=s) for s in (2.0, 4.0, 8.0, 10.0)]
    last = policy.decide(Incident.WORKER_UNAVAILABLE, attempt=1, n_requeues=4, n_unavailable=5)
    assert last == GiveUp(n_attempts=1), "a task that takes down every node ends as well"
    assert policy.rest_s(10_000) == 10.0


@pytest.mark.parametrize(
    "limits",
    [{"max_attempts": 0}, {"max_requeues": -1}, {"backoff_s": 0.0}, {"backoff_s": 60.0}],
)
def test_policy_refuses_limits_out_of_range(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        RetryPolicy(**limits)


def test_policy_refuses_attempt_zero() -> None:
    with pytest.raises(ValueError, match="attempt"):
        RetryPolicy().decide(Incident.WORKER_DIED, attempt=0)
