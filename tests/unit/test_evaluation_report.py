"""Reports of evaluations, and the choice of their score."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdist.errors import EvaluationError
from qdist.evaluate.metrics import METRICS
from qdist.evaluate.report import EvalReport, choose_score, named_numbers

Arrays = list[NDArray[Any]]
LABEL_FREE = [name for name, metric in METRICS.items() if metric.needs_reference]


def report(**changes: Any) -> EvalReport:
    fields: dict[str, Any] = {
        "score": 0.5,
        "metric": "top1",
        "higher_is_better": True,
        "metrics": {"top1": 0.5, "sqnr_db": math.inf},
        "n_samples": 8,
        "seconds": 1.5,
        "log": "x" * 5000,
    }
    return EvalReport(**{**fields, **changes})


def test_a_report_round_trips_through_json() -> None:
    text = json.dumps(report().to_json(), allow_nan=False)
    again = EvalReport.from_json(json.loads(text))
    assert again == report()
    assert EvalReport.from_json(report(exit_status=0).to_json()) == report(exit_status=0)
    assert again.mode == "artifact-exact"
    assert len(again.log) == 4000


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_report_has_a_finite_score(score: float) -> None:
    with pytest.raises(EvaluationError) as caught:
        report(score=score, metrics={"top1": score})
    assert caught.value.code == "QD704"


def test_a_report_holds_its_score_among_its_metrics() -> None:
    with pytest.raises(ValueError, match="is not the score"):
        report(metrics={"top1": 0.25})


def test_named_numbers_and_the_choice_among_them() -> None:
    assert named_numbers({"a": np.float32(0.5), "b": True, "c": "x", "d": np.array([2])}) == {
        "a": 0.5,
        "d": 2.0,
    }
    assert named_numbers([1.0]) == named_numbers("1.0") == named_numbers(True) == {}
    assert named_numbers(np.ones(2)) == {}
    assert choose_score(named_numbers(3), "map50", "here") == ("map50", {"map50": 3})
    with pytest.raises(EvaluationError, match="inf"):
        choose_score(named_numbers(10**400), None, "here")
