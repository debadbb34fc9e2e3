"""The retry policy, which knows no Ray."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.retry import (
    Final,
    GiveUp,
    Incident,
    Postpone,
    Requeue,
    RetryElsewhere,
    RetryPolicy,
)
from qdist.errors import CODES


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
    [
        {"max_attempts": 0},
        {"max_requeues": -1},
        {"backoff_s": 0.0},
        {"backoff_s": 60.0},
        {"patience_s": -1.0},
        {"patience_s": float("nan")},
    ],
)
def test_policy_refuses_limits_out_of_range(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        RetryPolicy(**limits)


def test_policy_refuses_attempt_zero() -> None:
    with pytest.raises(ValueError, match="attempt"):
        RetryPolicy().decide(Incident.WORKER_DIED, attempt=0)


def test_errors_are_final_except_that_the_store_is_out_of_reach() -> None:
    policy = RetryPolicy(patience_s=60.0)
    final = {
        code for code in CODES if policy.decide_error(code, waited_s=0.0, n_in_a_row=1) == Final()
    }
    assert set(CODES) - final == {"QD408"}
    nothing = RetryPolicy(transient_codes=frozenset())
    assert nothing.decide_error("QD408", waited_s=0.0, n_in_a_row=1) == Final()


@given(
    patience_s=st.floats(min_value=0.0, max_value=1e4),
    backoff_s=st.floats(min_value=0.01, max_value=30.0),
)
def test_a_store_that_stays_out_of_reach_is_waited_for_exactly_as_long_as_the_patience(
    patience_s: float, backoff_s: float
) -> None:
    policy = RetryPolicy(patience_s=patience_s, backoff_s=backoff_s)
    waited_s = 0.0
    pauses: list[float] = []
    while True:
        decision = policy.decide_error("QD408", waited_s=waited_s, n_in_a_row=len(pauses) + 1)
        if not isinstance(decision, Postpone):
            break
        assert 0 < decision.pause_s <= policy.max_backoff_s
        pauses.append(decision.pause_s)
        waited_s += decision.pause_s
    assert waited_s == pytest.approx(patience_s)
    assert pauses[:-1] == sorted(pauses[:-1]), "ever longer, the last one aside"
