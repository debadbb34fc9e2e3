"""When a task is late, when a store is tried again, and what nodes have done: no Ray in here."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.nodes import NodeFigures, NodeLedger
from actors.outage import Outage
from actors.stragglers import StragglerPolicy

SECONDS = st.floats(min_value=0.0, max_value=1e6, allow_nan=False)


@given(st.lists(SECONDS, min_size=3), st.floats(min_value=1.1, max_value=10.0))
def test_a_task_that_takes_the_usual_time_is_never_late(
    completed_s: list[float], factor: float
) -> None:
    limit_s = StragglerPolicy(factor=factor, min_s=1.0).limit_s(completed_s)
    assert limit_s is not None
    assert limit_s >= 1.0
    assert limit_s >= factor * statistics.median(completed_s)
    assert sum(seconds > limit_s for seconds in completed_s) <= len(completed_s) // 2


@given(st.lists(SECONDS, min_size=3), st.randoms(use_true_random=False))
def test_the_limit_does_not_depend_on_the_order(completed_s: list[float], random: Any) -> None:
    shuffled = list(completed_s)
    random.shuffle(shuffled)
    policy = StragglerPolicy()
    assert policy.limit_s(shuffled) == policy.limit_s(completed_s)


@given(st.lists(st.floats(min_value=1.0, max_value=2.0), min_size=3), SECONDS)
def test_one_task_that_hung_moves_the_limit_no_further_than_the_others(
    usual_s: list[float], hung_s: float
) -> None:
    limit_s = StragglerPolicy(factor=2.0, min_s=0.0).limit_s([*usual_s, hung_s])
    assert limit_s is not None
    assert 2.0 * min(usual_s) <= limit_s + 1e-9 or hung_s < min(usual_s)
    assert limit_s <= 2.0 * max(usual_s)


def test_nothing_is_late_before_enough_tasks_have_completed() -> None:
    policy = StragglerPolicy(min_completed=3)
    assert policy.limit_s([]) is None
    assert policy.limit_s([1.0, 1.0]) is None
    assert policy.limit_s([1.0, 1.0, 1.0]) == policy.min_s


@pytest.mark.parametrize(
    "limits",
    [
        {"factor": 1.0},
        {"factor": math.nan},
        {"factor": math.inf},
        {"min_s": -1.0},
        {"min_s": math.nan},
        {"min_completed": 0},
    ],
)
def test_policy_refuses_limits_out_of_range(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        StragglerPolicy(**limits)


def test_an_outage_lets_one_task_try_after_each_pause() -> None:
    outage = Outage()
    assert not outage.is_on
    assert outage.lasted_s(99.0) == 0.0
    outage.failed(100.0, 2.0)
    outage.failed(100.1, 2.0)  # was under way with the first
    assert (outage.is_on, outage.n_in_a_row, outage.retry_at) == (True, 1, 102.0)
    assert not outage.may_try(101.9)
    assert outage.may_try(102.0)
    outage.tries(102.0)
    assert not outage.may_try(103.9)
    assert outage.may_try(104.0), "the one that tries may hang"
    outage.failed(102.5, 4.0)
    assert (outage.n_in_a_row, outage.retry_at) == (2, 106.5)
    assert outage.lasted_s(106.0) == 6.0
    outage.ended()
    assert not outage.is_on
    outage.failed(200.0, 2.0)
    assert (outage.n_in_a_row, outage.lasted_s(201.0)) == (1, 1.0)


def test_what_nodes_have_done() -> None:
    ledger = NodeLedger()
    assert ledger.figures([]) == []
    for node_id, node_ip in (("b", "10.0.0.2"), ("a", "10.0.0.1"), ("b", "10.0.0.2")):
        ledger.joined({"node_id": node_id, "node_ip": node_ip, "pid": 1})
    ledger.answered("b", 2.0, counts=True)
    ledger.answered("b", 1.5, counts=False)
    assert ledger.figures(["b", "b"]) == [
        NodeFigures(node_id="b", node_ip="10.0.0.2", n_workers=2, n_completed=1, busy_s=3.5),
        NodeFigures(node_id="a", node_ip="10.0.0.1", n_workers=0, n_completed=0, busy_s=0.0),
    ]
